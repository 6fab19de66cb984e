"""The denoising loop, and the code that calls it in chunks.

It is one function that runs eagerly or is compiled whole.

The engine knows a family only as `ops.network.Family`; any record with these functions will do. What depends
only on the request and the table is computed once, before the loop (`hoist`); the loop gathers its rows.
Guidance evaluates the network on several branches, such as the prompt and the negative prompt. They pass
through the blocks side by side, so the weights of a block are fetched once per step for all branches, and
each branch has its own length of text. Over several ranks the same code runs on each rank: on its shard of
the tokens (`parallel.sequence`) or of the weights, or on its own branch.
Shape letters: S steps, B images, L tokens, P packed channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinydiff.ops import store as stores
from tinydiff.ops.network import (
    RESIDENT,
    Branch,
    Calls,
    Fetch,
    Hoisted,
    Hooks,
    Network,
    Streams,
    Tree,
    divide,
    of_step,
    plain,
    walk,
)
from tinydiff.ops.store import Store
from tinydiff.ops.weights import Weights
from tinydiff.parallel import sequence, shards
from tinydiff.parallel.moves import move
from tinydiff.parallel.plan import LORA_SCALE, Group, Plan
from tinydiff.sampling import step_cache
from tinydiff.sampling.solvers import Table, segments
from tinydiff.sampling.step_cache import Limits, Memory, Reuse


class Step(NamedTuple):
    """What a `Predict` reads of step i."""

    i: Tensor
    """int64 []."""
    sigma: Tensor
    """Noise level [1 or B, 1, 1], in the latents' dtype."""
    guidance: Tensor
    """Guidance scale [1 or B, 1, 1], in the latents' dtype."""
    limits: Limits | None = None
    """Those of the step cache, where there is one."""


class State(NamedTuple):
    """What the loop carries: packed latents and the two clean latents before them, each [B, L, P]."""

    x: Tensor
    h1: Tensor
    h2: Tensor
    memory: Memory


class FixedTokens(NamedTuple):
    """Tokens that the loop does not denoise: a given frame, reference images, what an inpainting mask keeps.

    Where `mask` is 0, a token is reset at each step to the point between `clean` and `noise` at the step's
    sigma; where it is 1, the token is denoised. A token that never changes has `noise` = `clean`.
    """

    mask: Tensor
    """[1 or B, L, 1 or P], between 0 and 1."""
    clean: Tensor
    """[1 or B, L, P]."""
    noise: Tensor
    """[1 or B, L, P]."""

    def reset(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x [B, L, P] with the fixed tokens at noise level sigma."""
        return torch.lerp(torch.lerp(self.clean, self.noise, sigma), x, self.mask)


class StepInputs(NamedTuple):
    """What every step reads beside the network and the state."""

    coefficients: Tensor
    """[S, 8, 1 or B, 1, 1]; see `coefficients`."""
    noise: Tensor | None = None
    """Fresh noise [S, B, L, P], for a table that renoises."""
    fixed: FixedTokens | None = None
    limits: Limits | None = None
    """Those of the step cache, where there is one."""


class LoopProgress(NamedTuple):
    """The tokens x [B, L, P] after `done` of `total` steps."""

    done: int
    total: int
    x: Tensor


Predict = Callable[[Tree, Tensor, Step, tuple[Branch, ...], Memory], tuple[tuple[Tensor, ...], Memory]]
"""(weights, x [B, L, P], step, branches at this step, memory) -> (velocity [B, L, P] of each branch, memory).
"""
Guided = Callable[[Tree, Tensor, Step, tuple[Branch, ...], Memory], tuple[Tensor, Memory]]
"""A `Predict` whose velocities of all branches are combined into one."""
Guidance = Callable[[Predict, Plan], Guided]
"""How velocities are combined."""
Wrap = Callable[[Callable[..., Streams]], Callable[..., Streams]]
"""What is applied to the function of each kind of block, such as marking it as a compiled region."""
Denoise = Callable[[Hoisted, State, StepInputs, int, int], State]
"""(network, state, inputs, start, stop) -> state after the steps [start, stop)."""


class Denoising(NamedTuple):
    """An image (or a batch) that is being denoised.

    It is the step that the image has reached, and all that the next steps need.
    """

    denoise: Denoise
    table: Table
    experts: Callable[[int], Hoisted]
    """Index of an expert -> that network, prepared."""
    inputs: StepInputs
    network: Hoisted
    """The expert that runs the steps up to `stop`."""
    state: State
    step: int
    """Steps done."""
    stop: int

    @property
    def done(self) -> bool:
        return self.step == self.table.steps


@torch.no_grad()
def hoist(
    network: Network,
    weights: Mapping[str, Tensor],
    branches: Sequence[dict[str, Tensor]],
    table: Table,
    lora_scale: Tensor | None = None,
    store: Store | None = None,
) -> Hoisted:
    """Prepare a network for one request: compute once what the loop would otherwise repeat at every step.

    weights: this rank's, flat, on their device. branches: the inputs of the family's `hoist`, one for each
    branch of guidance; with cfg parallelism this rank keeps its own branches. Per-step tensors that do not
    depend on the prompt are kept once for all branches.
    lora_scale: the strengths [1, R] of the low-rank leaves, where the weights have any. store: has the
    weights that are not on the device.
    """
    family, plan = network.family, network.plan
    device = next(iter(weights.values())).device if store is None else store.device
    cfg, everywhere = plan.group("cfg"), sequence.without_sequence(plan)
    if cfg.size > 1:
        branches = _own_branches(cfg, branches)
    timesteps = table.timesteps.to(device)
    if len(timesteps) == 1:
        # torch would compile a table of one row on its own, so that one gets a second, which is never run.
        timesteps = torch.cat([timesteps, timesteps.new_zeros(1)])
    unpacked = shards.GatherOnRead(stores.entries(weights, store), _packs(network), plan)
    flat = Weights(unpacked, dtype=network.dtype, lora_scale=lora_scale)
    hoisted = [family.hoist(network.config, everywhere, flat, inputs, timesteps) for inputs in branches]
    if lora_scale is not None:
        hoisted = [(request | {LORA_SCALE: lora_scale}, steps) for request, steps in hoisted]
    if not family.pooled:
        hoisted = [(request, hoisted[0][1]) for request, _ in hoisted]
    return Hoisted(
        stores.tree(divide(network, weights), store),
        tuple(
            Branch(
                divide(network, sequence.shard_request(plan, family.conds, request)),
                divide(network, sequence.shard_steps(plan, family.conds, steps)),
            )
            for request, steps in hoisted
        ),
    )


def _own_branches(cfg: Group, branches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The branches that this rank evaluates, every size-th; the last again where they do not divide."""
    mine, each = list(branches[cfg.rank :: cfg.size]), -(-len(branches) // cfg.size)
    return mine + [branches[-1]] * (each - len(mine))


def unwrapped(fn: Callable[..., Streams]) -> Callable[..., Streams]:
    """A `Wrap` that changes nothing."""
    return fn


def predictor(
    network: Network,
    wrap: Wrap = unwrapped,
    hooks: Hooks = Hooks(),  # noqa: B008
    per_branch: bool = True,
    cache: Reuse | None = None,
) -> Predict:
    """The network as a `Predict`.

    `wrap` is applied once to each kind of block, a function of plain tensors in dicts and tuples.

    hooks: those of every walk. With full sharding, their `fetch` is replaced by one that gathers packs; with
    a step cache, their `stack` by its own. per_branch: whether a wrapped function serves one shape only, so
    that each branch needs its own.
    """
    kinds = dict.fromkeys(block for block, _ in network.family.blocks(network.config))
    # A compiled region serves one shape. Branches with text differ in shape, so each gets regions of its own.
    has_texts = any(cond.stream == "text" for cond in network.family.conds)
    cfg = network.plan.group("cfg")

    def calls_of_two() -> tuple[Calls, Calls]:
        """Those of the first branch, and of the others."""
        first, second = ({block: wrap(plain(network, block)) for block in kinds} for _ in range(2))
        return first, second if has_texts and per_branch else first

    calls = calls_of_two()
    # Dynamo cannot use a region within a branch of torch.cond that it has seen outside.
    skipped = calls if cache is None else calls_of_two()
    if packs := _packs(network):
        hooks = hooks._replace(fetch=_gathered(packs, network.plan))

    def predict(
        w: Tree, x_BLP: Tensor, step: Step, branches: tuple[Branch, ...], memory: Memory
    ) -> tuple[tuple[Tensor, ...], Memory]:
        own, rest = ([each[0], *[each[1]] * (len(branches) - 1)] for each in (calls, skipped))
        stepping = hooks
        if cache is not None and step.limits is not None:
            kept: Memory = {}
            stack = step_cache.stack(network, cache, rest, step.limits, memory, kept)
            stepping, memory = hooks._replace(stack=stack), kept
        velocities = walk(network, own, w, x_BLP, branches, stepping)
        if cfg.size > 1:
            gathered = move(network.plan, "branches", torch.stack(velocities))
            by_rank = torch.unflatten(gathered, 0, (cfg.size, -1))
            return by_rank.transpose(0, 1).flatten(0, 1).unbind(0), memory
        return tuple(velocities), memory

    return predict


def _packs(network: Network) -> dict[str, shards.Pack]:
    """The packs in which full sharding keeps the weights of blocks; none where `shard` has one rank."""
    family, config, plan = network.family, network.config, network.plan
    if plan.group("shard").size == 1:
        return {}
    return shards.packing(family.spec(config), plan, {prefix for _, prefix in family.blocks(config)})


def _gathered(packs: Mapping[str, shards.Pack], plan: Plan) -> Fetch:
    """Fetch the weights of a block by gathering its packs from all ranks."""
    shard = plan.group("shard")

    def take(prefix: str, coming: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole = {name: x for name, x in coming.items() if f"{prefix}.{name}" not in packs}
        parts = (
            shards.finish(x, packs[f"{prefix}.{name}"]) for name, x in coming.items() if name not in whole
        )
        return whole | {name: x for part in parts for name, x in part.items()}

    def begin(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        is_pack = {name: f"{prefix}.{name}" in packs for name in weights}
        return {name: shards.start(x, shard) if is_pack[name] else x for name, x in weights.items()}

    return Fetch(begin, take)


Carry = tuple[Tensor, Tensor, Tensor, Tensor, Memory]
"""What a step hands to the next: its number, `State.x`, `h1`, `h2` and `memory`."""
Loop = Callable[[Callable[..., Tensor], Callable[..., Carry], Carry], Carry]
"""(condition, body, carry) -> the last carry."""


def python_loop(condition: Callable[..., Tensor], body: Callable[..., Carry], carry: Carry) -> Carry:
    """A Python while loop with the signature of torch's loop operator, which replaces it when compiling."""
    while condition(*carry):
        carry = body(*carry)
    return carry


def denoise(
    loop: Loop,
    predict: Guided,
    network: Hoisted,
    state: State,
    inputs: StepInputs,
    start: Tensor,
    stop: Tensor,
) -> State:
    """The state after steps [start, stop), two 0-d int64 tensors.

    Everything that varies is a tensor, so one graph serves every table and every chunk of it.
    """
    coefficients, noise, fixed, limits = inputs

    def running(i: Tensor, *_: object) -> Tensor:
        return i < stop

    def body(i: Tensor, x: Tensor, h1: Tensor, h2: Tensor, memory: Memory) -> Carry:
        row = i.view(1)
        sigma, after, a, c, b1, b2, n, guidance = coefficients.index_select(0, row)[0].unbind(0)
        branches = tuple(of_step(branch, row) for branch in network.branches)
        step = Step(i, sigma, guidance, limits)
        v, memory = predict(network.weights, x, step, branches, memory)
        v = v.to(x.dtype)
        y = a * x + c * v + b1 * h1 + b2 * h2
        if noise is not None:
            y = y + n * noise.index_select(0, row)[0]
        if fixed is not None:
            y = fixed.reset(y, after)
        return i + 1, y, x - sigma * v, h1.clone(), memory  # a loop operator must not return its own input

    return State(*loop(running, body, (start.clone(), state.x, state.h1, state.h2, state.memory))[1:])


def eager_denoise(
    network: Network,
    guidance: Guidance,
    fetch: Fetch = RESIDENT,
    wrap: Wrap = unwrapped,
    cached_after: int | None = None,
) -> Denoise:
    """`denoise` for this network, run operation by operation.

    wrap: as in `predictor`. cached_after: the blocks that run at every step where the step cache may leave
    out the others; None without a step cache.
    """
    cache = None if cached_after is None else Reuse(cached_after, step_cache.choose_now)
    predict = guidance(predictor(network, wrap, Hooks(fetch), False, cache), network.plan)

    def call(hoisted: Hoisted, state: State, inputs: StepInputs, start: int, stop: int) -> State:
        bounds = torch.tensor([start, stop], device=state.x.device)
        return denoise(python_loop, predict, hoisted, state, inputs, bounds[0], bounds[1])

    return call


def coefficients(table: Table, x: Tensor) -> Tensor:
    """The table's columns as one tensor [S, 8, 1, 1, 1], in x's dtype and on its device.

    They are sigma, next sigma, a, c, b1, b2, n and guidance.
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
    fixed: FixedTokens | None = None,
    limits: Limits | None = None,
    memory: Callable[[Hoisted, Tensor], Memory] | None = None,
) -> Denoising:
    """x_BLP before the first step of the table.

    experts: index -> the prepared network. It is called once per segment, so that one expert may leave the
    device before the next arrives.
    noise: fresh noise [S, B, L, P], for a table that renoises. limits: those of the step cache.
    memory: (network, tokens) -> the step cache before the first step; None without a step cache.
    """
    if table.renoises != (noise is not None):
        raise ValueError("fresh noise must be given for a table that renoises, and only for such a table")
    inputs = StepInputs(coefficients(table, x_BLP), noise, fixed, limits)
    x = (
        x_BLP.clone(memory_format=torch.contiguous_format)
        if fixed is None
        else fixed.reset(x_BLP, inputs.coefficients[0, 0])
    )
    (expert, _, stop), *_ = segments(table)
    network = experts(expert)
    state = State(x, torch.zeros_like(x), torch.zeros_like(x), memory(network, x) if memory else {})
    return Denoising(denoise, table, experts, inputs, network, state, 0, stop)


def at_step(denoising: Denoising, state: State, step: int) -> Denoising:
    """`denoising` with `step` steps done, and with the expert that runs the next step."""
    denoising = denoising._replace(state=state, step=step)
    if step < denoising.stop or denoising.done:
        return denoising
    expert, stop = next((expert, stop) for expert, first, stop in segments(denoising.table) if first == step)
    state = state._replace(memory=step_cache.restarted(state.memory))
    return denoising._replace(network=denoising.experts(expert), state=state, stop=stop)


@torch.no_grad()
def advance(denoising: Denoising, steps: int) -> Denoising:
    """`denoising` after `steps` more steps, or after as many as its expert has left."""
    stop = min(denoising.step + steps, denoising.stop)
    state = denoising.denoise(denoising.network, denoising.state, denoising.inputs, denoising.step, stop)
    return at_step(denoising, state, stop)


@torch.no_grad()
def run(
    denoise: Denoise,
    table: Table,
    x_BLP: Tensor,
    experts: Callable[[int], Hoisted],
    noise: Tensor | None = None,
    fixed: FixedTokens | None = None,
    chunk: int | None = None,
    limits: Limits | None = None,
    memory: Callable[[Hoisted, Tensor], Memory] | None = None,
) -> Iterator[LoopProgress]:
    """Denoise x_BLP over the whole table (see `start`) and yield after every `chunk` steps.

    Where `chunk` is None, it yields after every segment.

    Stop iterating to cancel. The result does not depend on `chunk`.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    denoising = start(denoise, table, x_BLP, experts, noise, fixed, limits, memory)
    while not denoising.done:
        denoising = advance(denoising, chunk or table.steps)
        yield LoopProgress(denoising.step, table.steps, denoising.state.x)
