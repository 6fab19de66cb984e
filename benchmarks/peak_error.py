"""The expected and the measured peak of working memory of the shipped model, of each stage.

    python benchmarks/peak_error.py [--sizes 64x64 128x128] [--counts 1 4] [--precisions fp32 bf16]

Measured on the CPU, where tensors that a run makes are counted. Weights are mapped, and left out of
both numbers. On a GPU `tinydiff generate` says both peaks itself, weights included.
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """The most bytes that tensors made here held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        result = fn(*args, **(kwargs or {}))
        self.made = {key: entry for key, entry in self.made.items() if not entry[0].expired()}
        for storage in (x.untyped_storage() for x in _tensors(result)):
            if storage._cdata not in known:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.made.values()))
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Stages:
    """A progress that notes the peak of each stage."""

    def __init__(self, alive: Alive) -> None:
        self.alive, self.name = alive, ""
        self.peaks: dict[str, int] = {}

    def on_stage(self, name: str) -> None:
        self.end()
        self.name, self.alive.most = name, sum(size for _, size in self.alive.made.values())

    def on_step(self, done: int, total: int) -> None:
        pass

    def end(self) -> None:
        self.peaks[self.name] = max(self.peaks.get(self.name, 0), self.alive.most)


PARTS = {"denoise": "transformer", "decode": "vae"}
"""Stage -> the component that it runs."""


def peaks(width: int, height: int, count: int, precision: str) -> dict[str, tuple[int, int]]:
    """Stage -> (expected, measured) bytes beside weights for `count` images of the shipped model."""
    import tinydiff
    from tinydiff import config
    from tinydiff.runtime import admit, fit, library

    types = {"dit_precision": precision, "vae_precision": precision, "text_encoder_precisions": [precision]}
    model = tinydiff.load(**types)
    asked: dict[str, Any] = {
        "width": width,
        "height": height,
        "num_frames": 1,
        "num_inference_steps": 2,
        "num_outputs_per_prompt": count,
        "seed": 0,
    }
    requests = admit.admit(model.blueprint, config.options(asked | {"prompt": "a red circle"}).sampling)
    with Alive() as alive:
        stages = Stages(alive)
        library.generate(model, "a red circle", asked, stages)
    stages.end()
    working = {part.name: part.working for part in fit.expected(model.blueprint, requests).footprints}
    return {stage: (working[name], stages.peaks[stage]) for stage, name in PARTS.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--sizes", nargs="+", default=["64x64", "128x128", "192x128"])
    options.add_argument("--counts", nargs="+", type=int, default=[1, 4])
    options.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    asked = options.parse_args()
    for precision, size, count in product(asked.precisions, asked.sizes, asked.counts):
        width, height = map(int, size.split("x"))
        for stage, (expected, measured) in peaks(width, height, count, precision).items():
            print(f"{precision} {size}, {count} images, {stage}: expected {expected / 1e6:.2f} MB, "
                  f"measured {measured / 1e6:.2f} MB, error {expected / measured - 1:+.0%}")  # fmt: skip


if __name__ == "__main__":
    main()
