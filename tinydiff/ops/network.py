"""A denoiser as the loop sees it, and the one walk through it.

A network is a family's functions, a config and a parallel plan; its weights are data that travels beside it.
Everything that evaluates a network (the loop, the parity check, FLOP counts, training, tests) goes through
`walk`. Shape letters: S steps, B images, L tokens, P latent values of a token, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tinydiff.ops.weights import Weights
from tinydiff.parallel import sequence
from tinydiff.parallel.plan import LORA_SCALE, SINGLE, Cond, Plan, Row

Config = Any
"""A family's own frozen dataclass. Its fields are the names in the checkpoint's config.json."""
Tensors = dict[str, Tensor]
Tree = Mapping[str, Mapping[str, Tensor]]
"""Block prefix -> the block's entries of a flat dict, without the prefix; "" -> what belongs to no block."""
Streams = Tensor | tuple[Tensor, ...]
"""What the blocks carry, for example [B, L, D] or (text [B, T, D], image [B, L, D])."""


class Block(Protocol):
    """One block: streams in, streams out.

    Arguments: config, plan, the block's weights, streams, the request's and step's tensors of this block,
    and those that every block reads. The result is new memory: no input, and no two views of one tensor.
    """

    def __call__(
        self, c: Config, plan: Plan, w: Weights, x: Any, request: Weights, shared: Tensors, /
    ) -> Streams: ...


Stack = list[tuple[Block, str]]
"""The blocks in order: (function, prefix of its weights)."""


class Family(Protocol):
    """What the loop asks of a family. `models.family.Denoiser` is this and more."""

    @property
    def spec(self) -> Callable[[Config], Iterable[Row]]:
        """Config -> every weight."""
        ...

    @property
    def conds(self) -> tuple[Cond, ...]:
        """The tensors of a request that belong to no block."""
        ...

    @property
    def pooled(self) -> bool:
        """Whether the prompt enters the tensors of a step."""
        ...

    @property
    def denoised_streams(self) -> int:
        """How many of the streams, counted from the last, are tokens that are denoised.

        `post` reads these alone.
        """
        ...

    @property
    def hoist(self) -> Callable[[Config, Plan, Weights, Tensors, Tensor], tuple[Tensors, Tensors]]:
        """(config, plan, weights, inputs, timesteps [S]) -> (request's tensors, steps' [S, 1 or B, ...])."""
        ...

    @property
    def pre(self) -> Callable[[Config, Plan, Weights, Tensor, Weights, Tensors], Streams]:
        """(config, plan, weights, tokens [B, L, P], request, step) -> what enters the first block."""
        ...

    @property
    def blocks(self) -> Callable[[Config], Sequence[tuple[Block, str]]]:
        """Config -> the blocks in order, each as (function, prefix of its weights)."""
        ...

    @property
    def post(self) -> Callable[[Config, Plan, Weights, Any, Weights, Tensors], Tensor]:
        """(config, plan, weights, what leaves the last block, request, step) -> velocity [B, L, P]."""
        ...


@dataclass(frozen=True)
class Network:
    """A denoiser without its weights. Two networks that are equal share compiled graphs.

    dtype: the type of its computations. Weights may be stored in another type.
    """

    family: Family
    config: Config
    plan: Plan = SINGLE
    dtype: torch.dtype = torch.float32


class Branch(NamedTuple):
    """The tensors of one branch of guidance, divided by block."""

    request: Tree
    steps: Tree
    """Tensors of the steps [S, 1 or B, ...]; for a walk, those of one step [1 or B, ...]."""


def of_step(branch: Branch, number: Tensor) -> Branch:
    """A branch of all steps -> that of one step, for a walk. number: of the step, int64 [1]."""
    steps = {
        prefix: {name: rows.index_select(0, number)[0] for name, rows in below.items()}
        for prefix, below in branch.steps.items()
    }
    return Branch(branch.request, steps)


class Hoisted(NamedTuple):
    """A network prepared for one request: its weights, and what `hoist` computed once."""

    weights: Tree
    branches: tuple[Branch, ...]


class Fetch(NamedTuple):
    """How a block's weights are fetched: started while the block before computes, taken before its own."""

    start: Callable[[str, Mapping[str, Tensor]], Mapping[str, Tensor]]
    """(prefix, this rank's part of the block's weights) -> the pending fetch."""
    take: Callable[[str, Mapping[str, Tensor]], Mapping[str, Tensor]]
    """(prefix, the pending fetch) -> the block's weights."""
    ahead: int = 1
    """How many blocks are prefetched while one computes."""


def _as_it_is(prefix: str, local: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return local


RESIDENT = Fetch(_as_it_is, _as_it_is)
"""The weights are on the device already."""

Calls = Mapping[Block, Callable[..., Streams]]
"""Block function -> the function of plain tensors that runs it (see `plain`)."""


class Walk(Protocol):
    """Runs the blocks [start, stop) of the stack, all by default, on the streams of each branch.

    calls: those of each branch, in place of the walk's.
    """

    def __call__(
        self,
        streams: list[Streams],
        start: int = 0,
        stop: int | None = None,
        calls: Sequence[Calls] | None = None,
        /,
    ) -> list[Streams]: ...


class Hooks(NamedTuple):
    """Functions that take part in a walk.

    fetch: fetches the weights of each block. stack: called as stack(run, streams) in place of run(streams),
    which walks all blocks; a step cache leaves some of them out. after: called with (prefix, streams of each
    branch) after every block.
    """

    fetch: Fetch = RESIDENT
    stack: Callable[[Walk, list[Streams]], list[Streams]] | None = None
    after: Callable[[str, list[Streams]], None] | None = None


def plain(network: Network, block: Block) -> Callable[..., Streams]:
    """The block as a function of plain tensors, which may cross the boundary of a compiled region."""
    config, plan, dtype = network.config, network.plan, network.dtype

    def call(w: Mapping[str, Tensor], x: Streams, request: Mapping[str, Tensor], shared: Tensors) -> Streams:
        weights = Weights(w, dtype=dtype, lora_scale=shared.get(LORA_SCALE))
        return block(config, plan, weights, x, Weights(request, dtype=dtype), shared)

    return call


def walk(
    network: Network,
    calls: Sequence[Calls],
    w: Tree,
    x_BLP: Tensor,
    branches: Sequence[Branch],
    hooks: Hooks = Hooks(),  # noqa: B008
) -> list[Tensor]:
    """One evaluation for each branch -> velocities [B, L, P].

    The branches go through each block together, so that a block's weights are fetched once. calls: one
    mapping per branch.
    """
    family, config, plan, dtype = network.family, network.config, network.plan, network.dtype
    stack = family.blocks(config)
    tops = [Weights(w[""], dtype=dtype, lora_scale=request[""].get(LORA_SCALE)) for request, _ in branches]
    ends = [(Weights(request[""], dtype=dtype), dict(step[""])) for request, step in branches]
    shared = [
        step | {name: x for name, x in request.flat.items() if is_shared(family.conds, name)}
        for request, step in ends
    ]

    def run(
        streams: list[Streams],
        start: int = 0,
        stop: int | None = None,
        others: Sequence[Calls] | None = None,
        /,
    ) -> list[Streams]:
        fetch, part = hooks.fetch, stack[start:stop]
        prefixes = [prefix for _, prefix in part]
        pending: list[Mapping[str, Tensor]] = []
        for index, (block, prefix) in enumerate(part):
            if not pending:
                pending.append(fetch.start(prefix, w[prefix]))
            weights = fetch.take(prefix, pending.pop(0))
            for following in prefixes[index + 1 + len(pending) : index + 1 + fetch.ahead]:
                pending.append(fetch.start(following, w[following]))
            own = [{**request[prefix], **step[prefix]} for request, step in branches]
            streams = [
                call[block](weights, *each)
                for call, *each in zip(others or calls, streams, own, shared, strict=True)
            ]
            weights = {}  # before the next is fetched, which may need its memory; Dynamo cannot trace del
            if hooks.after is not None:
                hooks.after(prefix, streams)
        return streams

    # No variable may keep the streams that enter the stack alive: they are as large as those in it.
    if hooks.stack is None:
        last = run([family.pre(config, plan, top, x_BLP, *end) for top, end in zip(tops, ends, strict=True)])
    else:
        last = hooks.stack(
            run, [family.pre(config, plan, top, x_BLP, *end) for top, end in zip(tops, ends, strict=True)]
        )
    return [family.post(config, plan, top, x, *end) for top, x, end in zip(tops, last, ends, strict=True)]


def divide(network: Network, flat: Mapping[str, Tensor]) -> Tree:
    """A flat dict of tensors (weights, a request) divided by the blocks' prefixes."""
    prefixes = {prefix for _, prefix in network.family.blocks(network.config)}
    tree: dict[str, dict[str, Tensor]] = {"": {}} | {prefix: {} for prefix in prefixes}
    for name, tensor in flat.items():
        cuts = (i for i, letter in enumerate(name) if letter == ".")
        prefix = next((name[:cut] for cut in cuts if name[:cut] in prefixes), "")
        tree[prefix][name[len(prefix) + 1 :] if prefix else name] = tensor
    return tree


def is_shared(conds: Iterable[Cond], name: str) -> bool:
    """Whether every block reads the request's tensor of this name."""
    everywhere = name == LORA_SCALE or name.startswith(sequence.KEYS)
    return everywhere or any(cond.shared and cond.name == name for cond in conds)


def has_images(conds: Iterable[Cond], prefix: str, name: str) -> bool:
    """Whether the first dimension of a request's tensor runs over images.

    It does not where the first dimension runs over tokens, nor for the index tensors of keys.
    """
    if prefix:
        return True
    return not name.startswith(sequence.KEYS) and sequence.token_dims(conds).get(name) != 0
