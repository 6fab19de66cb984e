"""The only module that calls torch.compile.

It is also the only one that uses private names of torch (present in 2.11 to 2.13) and functions that torch
does not annotate.

The whole loop is one graph: torch's loop operator over steps, with each kind of block as a nested region that
is compiled once. So the cost of compiling grows neither with depth nor with steps. Tokens and table rows are
dynamic dimensions, and everything else that varies is a tensor: no size, number of steps, solver without
fresh noise, guidance scale or chunk compiles again. A new dtype or device does, and so does the first batch
of several images.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor
from torch._C import _len_torch_function_stack
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch._higher_order_ops.invoke_subgraph import NestedCompileRegionOptions
from torch._higher_order_ops.while_loop import while_loop
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InvalidCxxCompiler
from torch.fx.experimental import _config as fx_config
from torch.overrides import _pop_mode, _push_mode
from torch.utils import _device as default_device
from torch.utils._pytree import tree_leaves

from tinydiff.ops.network import Branch, Fetch, Hoisted, Network, Streams, has_images
from tinydiff.parallel.plan import Cond
from tinydiff.parallel.sequence import KEYS, token_dims
from tinydiff.sampling.loop import (
    Denoise,
    Guidance,
    State,
    StepInputs,
    denoise,
    eager_denoise,
    predictor,
)
from tinydiff.sampling.step_cache import Reuse, choose_in_graph

_RECOMPILE_LIMIT = 64
_regions = itertools.count()
_compiled: dict[tuple[Network, Guidance, bool, int | None], Denoise] = {}
_by_block: dict[tuple[Network, Guidance, Fetch, int | None], Denoise] = {}


def has_compiler() -> bool:
    """Whether this machine has the C++ compiler that compiled graphs need.

    The CPU needs it for kernels, a GPU for their launchers.
    """
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def region(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Mark `fn` as compiled once and reused within a graph.

    It takes plain tensors in dicts and tuples, and returns neither an input nor two views of one tensor.
    """
    # Torch looks a region up by its code, and asks whether it fits by comparing lengths: two regions of one
    # code would be compared, and the outcome, two prompts of equal length or not, guarded. So each has a code
    # of its own.
    fn = _own_code(fn)
    # Inside the loop operator a region needs the decompositions spelled out, else Inductor stops with "both a
    # fallback and a decomp".
    _set_dynamo()
    options = NestedCompileRegionOptions(decompositions=select_decomp_table())
    return cast(Callable[..., Any], torch.compiler.nested_compile_region(fn, options=options))


def _own_code(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own. Torch keeps what it compiled by code, and limits how
    much that is.
    """
    source = cast(FunctionType, fn)
    code = source.__code__.replace(co_name=f"{source.__name__}_{next(_regions)}")
    return FunctionType(code, source.__globals__, code.co_name, source.__defaults__, source.__closure__)


def compiled_denoise(
    network: Network, guidance: Guidance, *, exact: bool = False, cached_after: int | None = None
) -> Denoise:
    """`denoise` for this network as one compiled graph, built once for the same arguments.

    The family's `conds` say which dimension of a request's tensor runs over image or text tokens.
    cached_after: as in `eager_denoise`. exact: round to the tensors' dtype where eager code does, instead of
    keeping fused intermediates in float32.
    """
    key = (network, guidance, exact, cached_after)
    if key not in _compiled:
        _compiled[key] = _build(*key)
    return _compiled[key]


def _build(network: Network, guidance: Guidance, exact: bool, cached_after: int | None) -> Denoise:
    cache = None if cached_after is None else Reuse(cached_after, choose_in_graph)
    predict = guidance(predictor(network, region, cache=cache), network.plan)
    conds = network.family.conds

    def whole(hoisted: Hoisted, state: State, inputs: StepInputs, start: Tensor, stop: Tensor) -> State:
        return denoise(while_loop, predict, hoisted, state, inputs, start, stop)

    options: dict[str, str | int | bool | Callable[..., Any]] = {"emulate_precision_casts": exact}
    graph = torch.compile(_own_code(whole), fullgraph=True, dynamic=False, options=options)

    def call(hoisted: Hoisted, state: State, inputs: StepInputs, start: int, stop: int) -> State:
        noise = None if inputs.noise is None else _two_rows(inputs.noise)
        inputs = inputs._replace(coefficients=_two_rows(inputs.coefficients), noise=noise)
        _mark_steps(inputs, hoisted.branches)
        _mark_tokens(state, inputs)
        if state.x.shape[0] > 1:
            _mark_images(conds, hoisted, state, inputs)
        for request, steps in hoisted.branches:
            _mark_named(token_dims(conds), request[""])
            _mark_named({name: dim + 1 for name, dim in token_dims(conds).items()}, steps[""])
            _mark_named({name: 0 for name in request[""] if name.startswith(KEYS)}, request[""])
        bounds = torch.tensor([start, stop], device=state.x.device)
        with _own_settings():
            return graph(hoisted, state, inputs, bounds[0].clone(), bounds[1].clone())

    return call


def compiled_blocks(
    network: Network, guidance: Guidance, fetch: Fetch, cached_after: int | None = None
) -> Denoise:
    """`denoise` for this network with each kind of block compiled alone, and a Python loop around them.

    This is for weights that come while the loop runs, which torch's loop operator cannot do.
    cached_after: as in `eager_denoise`.
    """
    key = (network, guidance, fetch, cached_after)
    if key not in _by_block:
        conds = network.family.conds
        _by_block[key] = eager_denoise(
            network, guidance, fetch, lambda block: _block(conds, block), cached_after
        )
    return _by_block[key]


def _block(conds: Sequence[Cond], block: Callable[..., Streams]) -> Callable[..., Streams]:
    """A block as one compiled graph, whatever its number of tokens and, above one, of images."""
    graph = torch.compile(_own_code(block), fullgraph=True, dynamic=False)

    def call(
        w: Mapping[str, Tensor], x: Streams, request: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> Streams:
        streams = x if isinstance(x, tuple) else (x,)
        even = {name: y.contiguous() for name, y in shared.items()}  # strides of a part would be guarded
        for each in streams:
            torch._dynamo.mark_dynamic(each, 1)
        _mark_named(token_dims(conds), even)
        _mark_named({name: 0 for name in even if name.startswith(KEYS)}, even)
        if (images := streams[0].shape[0]) > 1:
            named = {name: y for name, y in even.items() if has_images(conds, "", name)}
            for each in (*streams, *request.values(), *named.values()):
                if each.ndim and each.shape[0] == images:
                    torch._dynamo.mark_dynamic(each, 0)
        with _own_settings():
            return graph(dict(w), x, dict(request), even)

    return call


def per_size(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` over tensors, in dicts too, as one compiled graph for each of their sizes; all are kept."""

    @cache
    def graph(*_shapes: torch.Size) -> Callable[..., Any]:
        return torch.compile(_own_code(fn), fullgraph=True, dynamic=False)

    def call(*tensors: object) -> Any:
        with _own_settings():
            return graph(*(x.shape for x in tree_leaves(tensors)))(*tensors)

    return call


def _set_dynamo() -> None:
    """Set what our graphs need. Torch keeps Dynamo's settings per thread, and a server runs a graph in other
    threads than the one that built it.
    """
    if dynamo_config.recompile_limit < _RECOMPILE_LIMIT:
        dynamo_config.recompile_limit = _RECOMPILE_LIMIT
    if not dynamo_config.enable_invoke_subgraph_regional_compile:
        dynamo_config.enable_invoke_subgraph_regional_compile = True


@contextmanager
def _own_settings() -> Generator[None]:
    """Run a graph under our settings of Dynamo, and outside the caller's modes.

    A mode that sees every torch function, such as a default device, would have the graph compiled again.
    """
    _set_dynamo()
    modes = [_pop_mode() for _ in range(_len_torch_function_stack())]
    device, default_device.CURRENT_DEVICE = default_device.CURRENT_DEVICE, None
    try:
        # Two lengths that happen to be equal in the first request are still two.
        with cast(Any, fx_config).patch(use_duck_shape=False):
            yield
    finally:
        default_device.CURRENT_DEVICE = device
        for mode in reversed(modes):
            _push_mode(mode)


def _two_rows(table: Tensor) -> Tensor:
    """Rows [S, ...]. Where S is 1 a row is added that is never read, because torch would compile that case
    separately.
    """
    return table if table.shape[0] > 1 else torch.cat([table, table])


def _mark_steps(inputs: StepInputs, branches: tuple[Branch, ...]) -> None:
    tables = [table for branch in branches for below in branch.steps.values() for table in below.values()]
    for table in (inputs.coefficients, *tables, *(() if inputs.noise is None else (inputs.noise,))):
        torch._dynamo.mark_dynamic(table, 0)


def _mark_tokens(state: State, inputs: StepInputs) -> None:
    cached = [each for each in state.memory.values() if each.ndim == 3]
    for tensor in (state.x, state.h1, state.h2, *cached, *(inputs.fixed or ())):
        torch._dynamo.mark_dynamic(tensor, 1)
    if inputs.noise is not None:
        torch._dynamo.mark_dynamic(inputs.noise, 2)


def _mark_images(conds: Sequence[Cond], hoisted: Hoisted, state: State, inputs: StepInputs) -> None:
    """Make the number of images a dynamic dimension. What they share has a dimension of 1 there."""
    requests = [(at, below) for request, _ in hoisted.branches for at, below in request.items()]
    own = [x for at, below in requests for name, x in below.items() if has_images(conds, at, name)]
    tables = [x for _, steps in hoisted.branches for below in steps.values() for x in below.values()]
    carried = [state.x, state.h1, state.h2, *state.memory.values(), *(inputs.fixed or ())]
    for tensors, dim in (
        ([*own, *carried], 0),
        ([*tables, *(() if inputs.noise is None else (inputs.noise,))], 1),
        ([inputs.coefficients], 2),
    ):
        for x in tensors:
            if x.ndim > dim and x.shape[dim] == state.x.shape[0]:
                torch._dynamo.mark_dynamic(x, dim)


def _mark_named(dims: Mapping[str, int], request: Mapping[str, Tensor]) -> None:
    for name in dims.keys() & request.keys():
        torch._dynamo.mark_dynamic(request[name], dims[name])


def graph_count() -> int:
    """Graphs compiled by this process."""
    return counters["stats"]["unique_graphs"]


def graph_breaks() -> int:
    """Graph breaks in this process. The loop must have none."""
    return sum(counters["graph_break"].values())
