"""What a denoising step is spared by computing once, before the loop, all that depends only on the request and the timesteps.

    python benchmarks/hoisting.py

Counted, not timed: on the meta device, guided (conditions and negatives as one batch of 2).
FLOPs of one step with nothing kept, and in the loop; gigabytes of weights that a step reads, in bfloat16 where the spec allows, before and
after; and the gigabytes of hoisted tensors that it reads instead. Ratios are before over after; "run" counts all steps and the hoisting
itself. Each model is shown at its default clip and at one frame of that size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import SCHEDULER, Case, made_up, released, weights
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tinydiff.models import wan
from tinydiff.models.evaluate import predict
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


def measure(case: Case) -> str:
    c, flat = case.config, weights(case.config, "meta", torch.bfloat16)
    table = solvers.with_guidance(solvers.from_scheduler_config(SCHEDULER, STEPS), 5.0)
    inputs = {"text": torch.empty(1, case.text_tokens, c.text_dim, device="meta"), "positions": wan.positions(c, case.size, "meta")}
    x = torch.empty(1, case.tokens, c.out_channels * 4, device="meta")
    times = table.timesteps.to("meta")

    whole = Read(flat)
    before, _ = flops(lambda: predict(wan, c, PLAN, Weights(whole), x, times[:1], inputs))
    once, (request, steps) = flops(lambda: wan.hoist(c, PLAN, Weights(flat), inputs, times))
    kept, dealt = loop.deal(wan, c, flat), loop.deal(wan, c, request)
    stepped = {at: Read(dict(entries)) for at, entries in kept.items()}
    known = {at: Read(dict(entries)) for at, entries in dealt.items()}
    rows = loop.deal(wan, c, {name: rows[0] for name, rows in steps.items()})
    after, _ = flops(lambda: loop.predictor(wan, c, PLAN)(stepped, x, loop.Step(x, x, x), (loop.Branch(known, rows),), {}))

    read, left = whole.size, sum(entries.size for entries in stepped.values())
    hoisted = sum(entries.size for entries in known.values()) + sum(rows[0].nbytes for rows in steps.values())
    run = STEPS * before / (once + STEPS * after)
    work = f"{before / 1e12:11.4f} {after / 1e12:11.4f} {before / after:7.4f} {run:7.4f}"
    return f"{case.name:32s} {work} {read / 1e9:9.4f} {left / 1e9:8.4f} {read / left:6.3f} {hoisted / 1e9:8.4f}"


def main() -> None:
    print(f"{'one branch, ' + str(STEPS) + ' steps':32s} {'TFLOP/step':>11s} {'hoisted':>11s} {'ratio':>7s} {'run':>7s}", end=" ")
    print(f"{'GB/step':>9s} {'hoisted':>8s} {'ratio':>6s} {'instead':>8s}")
    for name in ("Wan2.1-T2V-1.3B-Diffusers", "Wan2.1-T2V-14B-Diffusers", "Wan2.2-TI2V-5B-Diffusers"):
        print(measure(released(name)))
        print(measure(released(name, frames=1)))
    print(measure(made_up("6 blocks of width 160, 64 tokens", layers=6, heads=5, size=(1, 16, 16))))


if __name__ == "__main__":
    main()
