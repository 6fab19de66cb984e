"""Several images in one loop, each at its own row of its own table: step-level continuous batching.

Images share the loop where all that the network sees of them has one form (`form`). What they are told is
stacked: the rows of their tables from where each stands, their hoisted tensors, their latents. So solver,
step count, guidance scale, seed and prompt may differ, and an image joins and leaves between two steps.
Stacking costs a copy when the company changes, not at every step. Shape letters: S steps, B images, L tokens,
P packed channels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinydiff.ops.network import Branch, Family, Tree, has_images
from tinydiff.sampling.loop import Denoise, Denoising, FixedTokens, Hoisted, State, moved


class Batch(NamedTuple):
    """Seats that go on together, as one. Its own `at` and `stop` count from where it was joined."""

    seats: tuple[Denoising, ...]
    whole: Denoising


def form(family: Family, seat: Denoising) -> Hashable:
    """What two seats must have in common to share the loop: the network, and all shapes and types that it is
    shown.

    What has no axis for images, such as rope tables, must be the same to the bit.
    """
    told = [(b.request, b.steps) for b in seat.network.branches]
    requests = tuple(
        (
            prefix,
            name,
            x.shape,
            x.dtype,
            None if has_images(family.conds, prefix, name) else hash(x.cpu().numpy().tobytes()),
        )
        for request, _ in told
        for prefix, below in sorted(request.items())
        for name, x in sorted(below.items())
    )
    steps = tuple(
        (prefix, name, x.shape[1:], x.dtype)
        for _, rows in told
        for prefix, below in rows.items()
        for name, x in sorted(below.items())
    )
    weights = tuple(id(x) for below in seat.network.weights.values() for x in below.values())
    kept = None if seat.kept is None else tuple(x.shape for x in seat.kept)
    x, fresh = seat.state.x, seat.noise is None
    return seat.denoise, weights, len(told), requests, steps, kept, fresh, x.shape, x.dtype


def together(family: Family, seats: Sequence[Denoising]) -> Batch:
    """Seats of one `form`, joined from where each stands to where the first of them ends or changes its
    expert.
    """
    if len(seats) == 1:
        return Batch(tuple(seats), seats[0])
    first, span = seats[0], min(seat.stop - seat.at for seat in seats)

    def ahead(rows: Sequence[Tensor], dim: int) -> Tensor:
        """Rows [S, ...] of each seat's own table from where it stands, side by side along the axis of images."""
        beside = torch.cat([x[seat.at : seat.at + span] for seat, x in zip(seats, rows, strict=True)], dim)
        return (
            beside if span > 1 else torch.cat([beside, beside])
        )  # torch would compile tables of one row on their own

    def joined(trees: Sequence[Tree], join: Callable[[str, str, list[Tensor]], Tensor]) -> Tree:
        return {
            prefix: {name: join(prefix, name, [tree[prefix][name] for tree in trees]) for name in below}
            for prefix, below in trees[0].items()
        }

    def told(prefix: str, name: str, found: list[Tensor]) -> Tensor:
        return torch.cat(found) if has_images(family.conds, prefix, name) else found[0]

    branches = tuple(
        Branch(
            joined([b.request for b in same], told),
            joined([b.steps for b in same], lambda _, __, rows: ahead(rows, 1)),
        )
        for same in zip(*(seat.network.branches for seat in seats), strict=True)
    )
    states = [seat.state for seat in seats]
    x, h1, h2 = (torch.cat(same) for same in zip(*(state[:3] for state in states), strict=True))
    memory = {name: torch.cat([state.memory[name] for state in states]) for name in states[0].memory}
    whole = first._replace(
        rows=ahead([seat.rows for seat in seats], 2),
        noise=None
        if first.noise is None
        else ahead([seat.noise for seat in seats if seat.noise is not None], 1),
        kept=None
        if first.kept is None
        else FixedTokens(
            *map(torch.cat, zip(*(seat.kept for seat in seats if seat.kept is not None), strict=True))
        ),
        network=Hoisted(first.network.weights, branches),
        state=State(x, h1, h2, memory),
        at=0,
        stop=span,
    )
    return Batch(tuple(seats), whole)


@torch.no_grad()
def advance(batch: Batch, steps: int, denoise: Denoise | None = None) -> Batch:
    """The batch after `steps` more steps, or as many as are left to it. denoise: a function that does the
    same as the seats' own.
    """
    on = batch.whole
    stop = min(on.at + steps, on.stop)
    state = (denoise or on.denoise)(on.network, on.state, on.rows, on.noise, on.kept, on.at, stop)
    return batch._replace(whole=on._replace(state=state, at=stop))


def left(batch: Batch) -> int:
    """How many steps the batch can go on before one of its seats is done or changes its expert."""
    return batch.whole.stop - batch.whole.at


def apart(batch: Batch) -> list[Denoising]:
    """The batch's seats, each where it stands now."""
    state, at = batch.whole.state, batch.whole.at
    if len(batch.seats) == 1:
        return [moved(batch.whole, state, at)]

    def own(i: int) -> State:
        x, h1, h2 = (each[i : i + 1] for each in state[:3])
        return State(x, h1, h2, {name: each[i : i + 1] for name, each in state.memory.items()})

    return [moved(seat, own(i), seat.at + at) for i, seat in enumerate(batch.seats)]
