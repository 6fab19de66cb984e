"""The expected and the measured peak of working memory of the shipped model, at several sizes.

    python benchmarks/peak_error.py [--sizes 64x64 128x128 192x128]

Measured on the CPU, where tensors that a run makes are counted. Weights are mapped, and left out of
both numbers. On a GPU `tinydiff generate` says both peaks itself, weights included.
"""

from __future__ import annotations

import argparse
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


def peaks(width: int, height: int) -> tuple[int, int]:
    """(expected, measured) bytes beside weights for one image of the shipped model."""
    import tinydiff
    from tinydiff import config
    from tinydiff.runtime import admit, fit

    model = tinydiff.load()
    asked: dict[str, Any] = {
        "width": width,
        "height": height,
        "num_frames": 1,
        "num_inference_steps": 1,
        "seed": 0,
    }
    requests = admit.admit(model.blueprint, config.options(asked | {"prompt": "a red circle"}).sampling)
    with Alive() as alive:
        tinydiff.generate(model, "a red circle", **asked)
    plan = fit.expected(model.blueprint, requests)
    return plan.peak - sum(part.weights for part in plan.parts), alive.most


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--sizes", nargs="+", default=["64x64", "128x128", "192x128"])
    for size in options.parse_args().sizes:
        expected, measured = peaks(*map(int, size.split("x")))
        print(f"{size}: expected {expected / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB, "
              f"error {expected / measured - 1:+.0%}")  # fmt: skip


if __name__ == "__main__":
    main()
