"""What a denoising step is spared by computing once, before the loop, all that depends only on the request
and the timesteps.

    python benchmarks/hoisting.py

Counted, not timed: on the meta device, one branch of guidance.
FLOPs of one step with nothing kept, and in the loop; gigabytes of weights that a step reads, in bfloat16
where the spec allows, before and after; and the gigabytes of hoisted tensors that it reads instead. Ratios
are before over after; "run" counts all steps and the hoisting itself. Videos are shown at the model's default
and at one frame of that size, image models at their default size and a short prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import SCHEDULER, Case, Picture, made_up, picture, released, weights
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tinydiff.models import wan
from tinydiff.models.evaluate import predict
from tinydiff.ops.network import Branch, Network, divide
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan
from tinydiff.sampling import loop, solvers

STEPS = 50
PLAN = Plan()


class Read(dict[str, Tensor]):
    """A dict of tensors that remembers which were read."""

    def __init__(self, flat: dict[str, Tensor]) -> None:
        super().__init__(flat)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names |= {name} & self.keys()
        return super().get(name, default)

    @property
    def size(self) -> int:
        return sum(super(Read, self).__getitem__(name).nbytes for name in self.names)


def flops(fn: Callable[[], Any]) -> tuple[int, Any]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = fn()
    return counter.get_total_flops(), result


def clip(case: Case) -> Picture:
    """One branch of a request to Wan."""
    text = torch.empty(1, case.text_tokens, case.config.text_dim, device="meta")
    inputs = {"text": text, "positions": wan.positions(case.config, case.size, "meta")}
    return Picture(
        case.name,
        wan.FAMILY,
        case.config,
        inputs,
        torch.empty(1, case.tokens, case.config.out_channels * 4, device="meta"),
    )


def measure(asked: Picture) -> str:
    name, family, c, inputs, x = asked
    flat = weights(c, "meta", torch.bfloat16, family=family)
    times = solvers.from_scheduler_config(SCHEDULER, STEPS).timesteps.to("meta")

    whole = Read(flat)
    network = Network(family, c, dtype=torch.bfloat16)
    before, _ = flops(lambda: predict(network, flat, x, times[:1], inputs))
    once, (request, steps) = flops(
        lambda: family.hoist(c, PLAN, Weights(whole, dtype=network.dtype), inputs, times)
    )
    stepped = {at: Read(dict(entries)) for at, entries in divide(network, flat).items()}
    branch = Branch(
        divide(network, request), divide(network, {name: rows[0] for name, rows in steps.items()})
    )
    after, _ = flops(lambda: loop.predictor(network)(stepped, x, loop.Step(x, x, x), (branch,), {}))

    left = sum(entries.size for entries in stepped.values())
    names = whole.names | {
        f"{at}.{name}".lstrip(".") for at, entries in stepped.items() for name in entries.names
    }
    read = sum(flat[name].nbytes for name in names)
    hoisted = sum(t.nbytes for t in request.values()) + sum(rows[0].nbytes for rows in steps.values())
    run = STEPS * before / (once + STEPS * after)
    work = f"{before / 1e12:11.4f} {after / 1e12:11.4f} {before / after:7.4f} {run:7.4f}"
    return f"{name:36s} {work} {read / 1e9:9.4f} {left / 1e9:8.4f} {read / left:6.3f} {hoisted / 1e9:8.4f}"


PICTURES = {
    "FLUX.1-dev": 512, "FLUX.2-dev": 512, "FLUX.2-klein-4B": 512, "Qwen-Image": 50, "Z-Image": 64,
    "stable-diffusion-3.5-large": 333,
    "Ovis-Image-7B": 256, "ERNIE-Image": 64,
}  # fmt: skip
"""Image models and how many tokens of text they are shown."""


def main() -> None:
    print(
        f"{'one branch, ' + str(STEPS) + ' steps':36s} {'TFLOP/step':>11s} {'hoisted':>11s} "
        f"{'ratio':>7s} {'run':>7s}",
        end=" ",
    )
    print(f"{'GB/step':>9s} {'hoisted':>8s} {'ratio':>6s} {'instead':>8s}")
    for name, text_tokens in PICTURES.items():
        print(measure(picture(name, text_tokens)), flush=True)
    for name in ("Wan2.1-T2V-1.3B-Diffusers", "Wan2.1-T2V-14B-Diffusers", "Wan2.2-TI2V-5B-Diffusers"):
        print(measure(clip(released(name))), flush=True)
        print(measure(clip(released(name, frames=1))), flush=True)
    print(measure(clip(made_up("6 blocks of width 160, 64 tokens", layers=6, heads=5, size=(1, 16, 16)))))


if __name__ == "__main__":
    main()
