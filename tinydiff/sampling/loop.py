"""The denoising loop: one function that runs eagerly or is compiled whole, and the driver that calls it in chunks.

The engine knows a family only by `pre`, `blocks`, `post`, `SHARED` (and `hoist`, `TOKEN_DIMS`); a module or any object with these will do.
Everything that depends only on the request and the table is hoisted out of the loop; the loop gathers its rows.
Shape letters: S steps, B images, L tokens, P packed channels, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan
from tinydiff.sampling.solvers import Table, segments

Tree = Mapping[str, Mapping[str, Tensor]]
"""A flat dict of tensors dealt to blocks: block prefix -> its entries without the prefix; "" -> what belongs to no block."""
Memory = dict[str, Tensor]
"""What a predict carries from step to step; each tensor keeps its shape, dtype and strides."""


class Step(NamedTuple):
    """What a predict sees of step i."""

    i: Tensor
    """int64 []."""
    sigma: Tensor
    """Noise level [1], in the latents' dtype."""
    guidance: Tensor
    """Guidance scale [1], in the latents' dtype."""
    hoisted: dict[str, Tensor]
    """The family's rows of this step, [1, ...]."""


class State(NamedTuple):
    """What the loop carries: packed latents and the two clean latents before them, each [B, L, P]."""

    x: Tensor
    h1: Tensor
    h2: Tensor
    memory: Memory


class Hoisted(NamedTuple):
    """A network made ready for one request."""

    weights: Tree
    request: Tree
    steps: dict[str, Tensor]
    """Tensors [S, ...] of which step i sees row i."""


class Progress(NamedTuple):
    """`done` of `total` steps are behind x [B, L, P]."""

    done: int
    total: int
    x: Tensor


Predict = Callable[[Tree, Tensor, Step, Tree, Memory], tuple[Tensor, Memory]]
"""(weights, x [B, L, P], step, request, memory) -> (velocity [B, L, P], memory)."""
Wrap = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
Denoise = Callable[[Hoisted, State, Tensor, Tensor | None, int, int], State]
"""(network, state, coefficients [S, 7], fresh noise [S, B, L, P] or None, start, stop) -> state after steps [start, stop)."""


def deal(family: Any, config: Any, flat: Mapping[str, Tensor]) -> Tree:
    """A flat dict (weights, or a request) dealt to the blocks of the family by prefix."""
    prefixes = {prefix for _, prefix in family.blocks(config)}
    tree: dict[str, dict[str, Tensor]] = {"": {}} | {prefix: {} for prefix in prefixes}
    for name, tensor in flat.items():
        cuts = (i for i, letter in enumerate(name) if letter == ".")
        prefix = next((name[:cut] for cut in cuts if name[:cut] in prefixes), "")
        tree[prefix][name[len(prefix) + 1 :] if prefix else name] = tensor
    return tree


@torch.no_grad()
def hoist(family: Any, config: Any, plan: Plan, weights: Mapping[str, Tensor], inputs: dict[str, Tensor], table: Table) -> Hoisted:
    """Make a network ready for one request: what the loop need not repeat is computed here, once. weights: flat, on their device."""
    device = next(iter(weights.values())).device
    request, steps = family.hoist(config, plan, Weights(weights), inputs, table.timesteps.to(device))
    return Hoisted(deal(family, config, weights), deal(family, config, request), steps)


def as_is(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return fn


def predictor(family: Any, config: Any, plan: Plan, wrap: Wrap = as_is) -> Predict:
    """The family's stack as a predict. `wrap` is applied once to each kind of block, a function of plain tensors in dicts."""

    def plain(block: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # Views are built inside: only plain tensors may cross the boundary of a compiled region.
        def call(w: Mapping[str, Tensor], x_BLD: Tensor, request: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
            return block(config, plan, Weights(w), x_BLD, Weights(request), shared)

        return wrap(call)

    stack = list(family.blocks(config))
    calls = {block: plain(block) for block in dict.fromkeys(block for block, _ in stack)}

    def predict(w: Tree, x_BLP: Tensor, step: Step, request: Tree, memory: Memory) -> tuple[Tensor, Memory]:
        top, cond = Weights(w[""]), Weights(request[""])
        shared = step.hoisted | {name: cond[name] for name in family.SHARED if name in cond}
        x_BLD = family.pre(config, plan, top, x_BLP, cond, step.hoisted)
        for block, prefix in stack:
            x_BLD = calls[block](w[prefix], x_BLD, request[prefix], shared)
        return family.post(config, plan, top, x_BLD, cond, step.hoisted), memory

    return predict


def python_loop(condition: Callable[..., Tensor], body: Callable[..., tuple], carry: tuple) -> tuple:
    """A while loop as it stands; compiled, torch's loop operator takes its place."""
    while condition(*carry):
        carry = body(*carry)
    return carry


def denoise(
    loop: Callable[..., tuple],
    predict: Predict,
    network: Hoisted,
    state: State,
    coefficients: Tensor,
    noise: Tensor | None,
    start: Tensor,
    stop: Tensor,
) -> State:
    """Steps [start, stop), 0-d int64 tensors: what varies is a tensor, so that one graph serves every table and every chunk of it."""

    def running(i: Tensor, *_: Any) -> Tensor:
        return i < stop

    def body(i: Tensor, x: Tensor, h1: Tensor, h2: Tensor, memory: Memory) -> tuple[Tensor, Tensor, Tensor, Tensor, Memory]:
        row = i.view(1)
        sigma, a, c, b1, b2, n, guidance = coefficients.index_select(0, row).unbind(1)
        hoisted = {name: rows.index_select(0, row) for name, rows in network.steps.items()}
        v, memory = predict(network.weights, x, Step(i, sigma, guidance, hoisted), network.request, memory)
        v = v.to(x.dtype)
        y = a * x + c * v + b1 * h1 + b2 * h2
        if noise is not None:
            y = y + n * noise.index_select(0, row)[0]
        return i + 1, y, x - sigma * v, h1.clone(), memory  # a loop operator must not return its own input

    return State(*loop(running, body, (start.clone(), *state))[1:])


def eager_denoise(family: Any, config: Any, plan: Plan, guidance: Callable[[Predict], Predict]) -> Denoise:
    """`denoise` for this network, run operation by operation."""
    predict = guidance(predictor(family, config, plan))

    def call(network: Hoisted, state: State, coefficients: Tensor, noise: Tensor | None, start: int, stop: int) -> State:
        bounds = torch.tensor([start, stop], device=state.x.device)
        return denoise(python_loop, predict, network, state, coefficients, noise, bounds[0], bounds[1])

    return call


def coefficients(table: Table, x: Tensor) -> Tensor:
    """The columns sigma, a, c, b1, b2, n, guidance as [S, 7] in x's dtype and on its device."""
    columns = (table.sigmas, table.a, table.c, table.b1, table.b2, table.n, table.guidance)
    return torch.stack(columns, 1).to(x.device, x.dtype)


@torch.no_grad()
def run(
    denoise: Denoise, table: Table, x_BLP: Tensor, experts: Callable[[int], Hoisted], noise: Tensor | None = None, chunk: int | None = None
) -> Iterator[Progress]:
    """Denoise x_BLP over the whole table, yielding after every `chunk` steps (None: as rarely as possible). Stop iterating to cancel.

    experts: index -> the network made ready, asked for once per segment, so that one expert may leave the device before the next arrives.
    noise: fresh noise [S, B, L, P], exactly where the table renoises. The result does not depend on `chunk`.
    """
    if table.renoises != (noise is not None):
        raise ValueError("a table that renoises needs fresh noise, and only such a table")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    state = State(x_BLP.clone(memory_format=torch.contiguous_format), torch.zeros_like(x_BLP), torch.zeros_like(x_BLP), {})
    rows = coefficients(table, x_BLP)
    for expert, first, last in segments(table):
        network = experts(expert)
        for start in range(first, last, chunk or last - first):
            stop = min(start + (chunk or last), last)
            state = denoise(network, state, rows, noise, start, stop)
            yield Progress(stop, table.steps, state.x)
