"""A model that leaves the device: its weights move to the host's memory, and come back without being read.

Only memory moves. What was compiled stays: a graph takes weights as its arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tinydiff.runtime import offload
from tinydiff.runtime.blueprint import Model

HOST = torch.device("cpu")


def size(model: Model) -> int:
    """Bytes of the weights that are on the device all the time, each once."""
    parts = getattr(model.pipe, "components", {}).values()  # another library's are modules
    foreign = [x for part in parts if hasattr(part, "parameters") for x in part.parameters()]
    own = [x for net in model.nets.values() for x in net.weights.values()]
    weights = [x for x in (*own, *foreign) if not x.is_meta]
    storages = [x.untyped_storage() for x in weights]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def can_wait(model: Model, ranks: int) -> bool:
    """Whether the weights may wait in the host's memory.

    They may where they are on GPUs and the host has room for those of all ranks.

    Without a GPU they are in it already, most of them mapped from files.
    """
    on_gpu = model.pipe is None and model.blueprint.device.type == "cuda"
    return on_gpu and size(model) * ranks <= offload.free_host_bytes()


def release(model: Model) -> None:
    """Give back what the device holds of weights that are in the host's memory already."""
    for net in model.nets.values():
        if net.store is not None:
            net.store.source.release()


def moved(model: Model, device: torch.device, pinned: bool = False) -> Model:
    """The model with its weights on a device. pinned: in pinned memory, on the CPU."""
    flats = moved_weights({name: net.weights for name, net in model.nets.items()}, device, pinned)
    return replace(model, nets={name: replace(net, weights=flats[name]) for name, net in model.nets.items()})


def moved_weights(
    flats: Mapping[str, Mapping[str, Tensor]], device: torch.device, pinned: bool = False
) -> dict[str, dict[str, Tensor]]:
    """Copies of the weights of networks on a device. Weights that share memory share it there too."""
    came: dict[int, Tensor] = {}

    def there(x: Tensor) -> Tensor:
        if x.is_meta:
            return x
        old = x.untyped_storage()
        if old.data_ptr() not in came:
            new = torch.empty(old.nbytes(), dtype=torch.uint8, device=device, pin_memory=pinned)
            came[old.data_ptr()] = new.copy_(torch.empty(0, dtype=torch.uint8, device=x.device).set_(old))
        new = came[old.data_ptr()].untyped_storage()
        return torch.empty(0, dtype=x.dtype, device=device).set_(new, x.storage_offset(), x.shape, x.stride())

    return {name: {key: there(x) for key, x in flat.items()} for name, flat in flats.items()}
