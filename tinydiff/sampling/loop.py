"""The denoising loop: one function that runs eagerly or is compiled whole, and the driver that calls it in
chunks.

The engine knows a family only as `ops.network.Family`; any record with these functions will do. Everything
that depends only on the request and the table is hoisted out; the loop gathers its rows.
Guidance evaluates the network on several branches (the prompt, the negative prompt). They walk through the
blocks side by side, so a block's weights are fetched once a step however many branches there are, and each
branch has its own length of text. Over several ranks the same code runs on each, on its share of the tokens
(`parallel.sequence`), of the weights, or on its own branch. Shape letters: S steps, B images, L tokens, P
packed channels, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinydiff.ops.network import Branch, Fetch, Hooks, Network, Streams, Tree, divide, plain, walk
from tinydiff.ops.weights import Weights
from tinydiff.parallel import sequence, shards
from tinydiff.parallel.moves import move
from tinydiff.parallel.plan import LORA_SCALE, Plan
from tinydiff.sampling.solvers import Table, segments

Memory = dict[str, Tensor]
"""What a predict carries from step to step; each tensor keeps its shape, dtype and strides."""


class Step(NamedTuple):
    """What a predict sees of step i."""

    i: Tensor
    """int64 []."""
    sigma: Tensor
    """Noise level [1 or B, 1, 1], in the latents' dtype."""
    guidance: Tensor
    """Guidance scale [1 or B, 1, 1], in the latents' dtype."""


class State(NamedTuple):
    """What the loop carries: packed latents and the two clean latents before them, each [B, L, P]."""

    x: Tensor
    h1: Tensor
    h2: Tensor
    memory: Memory


class Hoisted(NamedTuple):
    """A network made ready for one request."""

    weights: Tree
    branches: tuple[Branch, ...]


class FixedTokens(NamedTuple):
    """Tokens that the loop does not make: where `mask` is 0 they follow the straight path from `noise` to
    `clean`, where it is 1 they are the network's. A token that stays as it is given has its own value as its
    noise.
    """

    mask: Tensor
    """[1 or B, L, 1 or P], between 0 and 1."""
    clean: Tensor
    """[1 or B, L, P]."""
    noise: Tensor
    """[1 or B, L, P]."""

    def at(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x [B, L, P] with the kept tokens as they are at noise level sigma."""
        return torch.lerp(torch.lerp(self.clean, self.noise, sigma), x, self.mask)


class Progress(NamedTuple):
    """`done` of `total` steps are behind x [B, L, P]."""

    done: int
    total: int
    x: Tensor


Predict = Callable[[Tree, Tensor, Step, tuple[Branch, ...], Memory], tuple[tuple[Tensor, ...], Memory]]
"""(weights, x [B, L, P], step, branches at this step, memory) -> (a velocity [B, L, P] of each branch,
memory).
"""
Guided = Callable[[Tree, Tensor, Step, tuple[Branch, ...], Memory], tuple[Tensor, Memory]]
"""The same, the branches' velocities made into one."""
Guidance = Callable[[Predict, Plan], Guided]
Wrap = Callable[[Callable[..., Streams]], Callable[..., Streams]]
Denoise = Callable[[Hoisted, State, Tensor, Tensor | None, FixedTokens | None, int, int], State]
"""(network, state, coefficients [S, 8, 1 or B, 1, 1], fresh noise [S, B, L, P], kept tokens, start, stop) ->
state after [start, stop).
"""


class Denoising(NamedTuple):
    """One batch of images on its way: where it is in its table, and all that the loop needs to go on."""

    denoise: Denoise
    table: Table
    experts: Callable[[int], Hoisted]
    rows: Tensor
    """Coefficients [S, 8, 1, 1, 1]."""
    noise: Tensor | None
    """Fresh noise [S, B, L, P]."""
    kept: FixedTokens | None
    network: Hoisted
    """The expert that makes the steps up to `stop`."""
    state: State
    at: int
    """How many steps are made."""
    stop: int

    @property
    def done(self) -> bool:
        return self.at == self.table.steps


@torch.no_grad()
def hoist(
    network: Network,
    weights: Mapping[str, Tensor],
    branches: Sequence[dict[str, Tensor]],
    table: Table,
    lora_scale: Tensor | None = None,
) -> Hoisted:
    """Make a network ready for one request: what the loop need not repeat is computed here, once.

    weights: flat, on their device, as this rank holds them. branches: the inputs of the family's `hoist` for
    each branch of guidance, of which this rank keeps its own where `cfg` divides them. Tensors of the steps
    that no prompt enters are kept once for all branches.
    lora_scale: the strengths [1, R] of the low-rank leaves among the weights, where there are any.
    """
    family, plan = network.family, network.plan
    device = next(iter(weights.values())).device
    cfg, everywhere = plan.group("cfg"), sequence.whole(plan)
    if cfg.size > 1:
        branches = [branches[cfg.rank]]
    timesteps = table.timesteps.to(device)
    if len(timesteps) == 1:
        timesteps = timesteps.expand(
            2
        )  # the second row is never read; torch would compile tables of one row on their own
    unpacked = shards.Unpacked(weights, _packs(network), plan)
    flat = Weights(unpacked, dtype=network.dtype, lora_scale=lora_scale)
    hoisted = [family.hoist(network.config, everywhere, flat, inputs, timesteps) for inputs in branches]
    if lora_scale is not None:
        hoisted = [(request | {LORA_SCALE: lora_scale}, steps) for request, steps in hoisted]
    if not family.pooled:
        hoisted = [(request, hoisted[0][1]) for request, _ in hoisted]
    return Hoisted(
        divide(network, weights),
        tuple(
            Branch(divide(network, sequence.dealt(plan, family.conds, request)), divide(network, steps))
            for request, steps in hoisted
        ),
    )


def as_is(fn: Callable[..., Streams]) -> Callable[..., Streams]:
    return fn


def predictor(network: Network, wrap: Wrap = as_is, hooks: Hooks = Hooks()) -> Predict:  # noqa: B008
    """The network as a predict. `wrap` is applied once to each kind of block, a function of plain tensors in
    dicts and tuples.

    hooks: take part in every walk; over ranks that divide the weights of blocks their `fetch` is replaced.
    """
    kinds = dict.fromkeys(block for block, _ in network.family.blocks(network.config))
    # Texts of their own length make branches of their own shape, and a region serves one shape: each branch
    # gets its own.
    first, second = ({block: wrap(plain(network, block)) for block in kinds} for _ in range(2))
    has_texts = any(cond.stream == "text" for cond in network.family.conds)
    calls, cfg = (first, second if has_texts else first), network.plan.group("cfg")
    if packs := _packs(network):
        hooks = hooks._replace(fetch=_gathered(packs, network.plan))

    def predict(
        w: Tree, x_BLP: Tensor, step: Step, branches: tuple[Branch, ...], memory: Memory
    ) -> tuple[tuple[Tensor, ...], Memory]:
        velocities = walk(network, calls[: len(branches)], w, x_BLP, branches, hooks)
        if cfg.size > 1:
            return move(network.plan, "branches", velocities[0][None]).unbind(0), memory
        return tuple(velocities), memory

    return predict


def _packs(network: Network) -> dict[str, shards.Pack]:
    """How blocks' weights lie divided over the axis `shard`; none where it has one rank."""
    family, config, plan = network.family, network.config, network.plan
    if plan.group("shard").size == 1:
        return {}
    return shards.packing(family.spec(config), plan, {prefix for _, prefix in family.blocks(config)})


def _gathered(packs: Mapping[str, shards.Pack], plan: Plan) -> Fetch:
    """The weights of blocks that are divided over ranks: gathered when they are needed."""
    shard = plan.group("shard")

    def take(prefix: str, coming: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole = {name: x for name, x in coming.items() if f"{prefix}.{name}" not in packs}
        parts = (
            shards.finish(x, packs[f"{prefix}.{name}"]) for name, x in coming.items() if name not in whole
        )
        return whole | {name: x for part in parts for name, x in part.items()}

    def begin(prefix: str, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        is_pack = {name: f"{prefix}.{name}" in packs for name in held}
        return {name: shards.start(x, shard) if is_pack[name] else x for name, x in held.items()}

    return Fetch(begin, take)


def python_loop(condition: Callable[..., Tensor], body: Callable[..., tuple], carry: tuple) -> tuple:
    """A while loop as it stands; compiled, torch's loop operator takes its place."""
    while condition(*carry):
        carry = body(*carry)
    return carry


def denoise(
    loop: Callable[..., tuple],
    predict: Guided,
    network: Hoisted,
    state: State,
    coefficients: Tensor,
    noise: Tensor | None,
    kept: FixedTokens | None,
    start: Tensor,
    stop: Tensor,
) -> State:
    """Steps [start, stop), 0-d int64 tensors: what varies is a tensor, so that one graph serves every table
    and every chunk of it.
    """

    def running(i: Tensor, *_: Any) -> Tensor:
        return i < stop

    def body(
        i: Tensor, x: Tensor, h1: Tensor, h2: Tensor, memory: Memory
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Memory]:
        row = i.view(1)
        sigma, after, a, c, b1, b2, n, guidance = coefficients.index_select(0, row)[0].unbind(0)
        branches = tuple(Branch(request, _rows(steps, row)) for request, steps in network.branches)
        v, memory = predict(network.weights, x, Step(i, sigma, guidance), branches, memory)
        v = v.to(x.dtype)
        y = a * x + c * v + b1 * h1 + b2 * h2
        if noise is not None:
            y = y + n * noise.index_select(0, row)[0]
        if kept is not None:
            y = kept.at(y, after)
        return i + 1, y, x - sigma * v, h1.clone(), memory  # a loop operator must not return its own input

    return State(*loop(running, body, (start.clone(), *state))[1:])


def _rows(steps: Tree, row: Tensor) -> Tree:
    return {
        prefix: {name: rows.index_select(0, row)[0] for name, rows in below.items()}
        for prefix, below in steps.items()
    }


def eager_denoise(network: Network, guidance: Guidance) -> Denoise:
    """`denoise` for this network, run operation by operation."""
    predict = guidance(predictor(network), network.plan)

    def call(
        hoisted: Hoisted,
        state: State,
        coefficients: Tensor,
        noise: Tensor | None,
        kept: FixedTokens | None,
        start: int,
        stop: int,
    ) -> State:
        bounds = torch.tensor([start, stop], device=state.x.device)
        return denoise(python_loop, predict, hoisted, state, coefficients, noise, kept, bounds[0], bounds[1])

    return call


def coefficients(table: Table, x: Tensor) -> Tensor:
    """The columns sigma, sigma after the step, a, c, b1, b2, n, guidance as [S, 8, 1, 1, 1] in x's dtype and
    on its device.
    """
    after = torch.cat([table.sigmas[1:], table.sigmas.new_zeros(1)])
    columns = (table.sigmas, after, table.a, table.c, table.b1, table.b2, table.n, table.guidance)
    return torch.stack(columns, 1).to(x.device, x.dtype)[..., None, None, None]


def start(
    denoise: Denoise,
    table: Table,
    x_BLP: Tensor,
    experts: Callable[[int], Hoisted],
    noise: Tensor | None = None,
    kept: FixedTokens | None = None,
) -> Denoising:
    """x_BLP at the first row of the table.

    experts: index -> the network made ready, asked for once per segment, so that one expert may leave the
    device before the next arrives.
    noise: fresh noise [S, B, L, P], exactly where the table renoises.
    """
    if table.renoises != (noise is not None):
        raise ValueError("a table that renoises needs fresh noise, and only such a table")
    rows = coefficients(table, x_BLP)
    x = x_BLP.clone(memory_format=torch.contiguous_format) if kept is None else kept.at(x_BLP, rows[0, 0])
    (expert, _, stop), *_ = segments(table)
    return Denoising(
        denoise,
        table,
        experts,
        rows,
        noise,
        kept,
        experts(expert),
        State(x, torch.zeros_like(x), torch.zeros_like(x), {}),
        0,
        stop,
    )


def moved(seat: Denoising, state: State, at: int) -> Denoising:
    """The seat with `at` steps made, and the expert for those to come."""
    seat = seat._replace(state=state, at=at)
    if at < seat.stop or seat.done:
        return seat
    expert, stop = next((expert, stop) for expert, first, stop in segments(seat.table) if first == at)
    return seat._replace(network=seat.experts(expert), stop=stop)


@torch.no_grad()
def advance(seat: Denoising, steps: int) -> Denoising:
    """The seat after `steps` more steps, or as many as its expert makes."""
    stop = min(seat.at + steps, seat.stop)
    state = seat.denoise(seat.network, seat.state, seat.rows, seat.noise, seat.kept, seat.at, stop)
    return moved(seat, state, stop)


@torch.no_grad()
def run(
    denoise: Denoise,
    table: Table,
    x_BLP: Tensor,
    experts: Callable[[int], Hoisted],
    noise: Tensor | None = None,
    kept: FixedTokens | None = None,
    chunk: int | None = None,
) -> Iterator[Progress]:
    """Denoise x_BLP over the whole table (see `start`), yielding after every `chunk` steps (None: as rarely
    as possible).

    Stop iterating to cancel. The result does not depend on `chunk`.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    seat = start(denoise, table, x_BLP, experts, noise, kept)
    while not seat.done:
        seat = advance(seat, chunk or table.steps)
        yield Progress(seat.at, table.steps, seat.state.x)
