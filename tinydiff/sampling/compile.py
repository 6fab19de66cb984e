"""The only place that says torch.compile, and the only one that uses private names of torch (present in 2.11 to 2.13).

The whole loop is one graph: torch's loop operator over steps, each kind of block a nested region compiled once, so the cost grows neither
with depth nor with steps. Tokens and table rows are dynamic, everything else that varies is a tensor: no size, step count, solver without
fresh noise, guidance scale or chunk compiles again. A new batch size, dtype or device does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch._higher_order_ops.invoke_subgraph import NestedCompileRegionOptions
from torch._higher_order_ops.while_loop import while_loop
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InvalidCxxCompiler

from tinydiff.parallel.plan import Plan
from tinydiff.sampling.loop import Denoise, Hoisted, Predict, State, denoise, predictor

_RECOMPILE_LIMIT = 64
_compiled: dict[tuple, tuple[Any, Denoise]] = {}


def has_compiler() -> bool:
    """Whether this machine has the C++ compiler that compiled graphs need, on the CPU for kernels, on GPUs for their launchers."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def region(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Mark `fn` as compiled once and reused within a graph.

    It takes plain tensors in dicts and tuples, and returns neither an input nor two views of one tensor.
    """
    # Inside the loop operator a region needs the decompositions spelled out, else Inductor stops with "both a fallback and a decomp".
    dynamo_config.enable_invoke_subgraph_regional_compile = True
    options = NestedCompileRegionOptions(decompositions=select_decomp_table())
    return cast(Callable[..., Tensor], torch.compiler.nested_compile_region(fn, options=options))


def compiled_denoise(family: Any, config: Any, plan: Plan, guidance: Callable[[Predict], Predict], *, exact: bool = False) -> Denoise:
    """`denoise` for this network as one compiled graph; built once for each (family, config, plan, guidance, exact).

    `family.TOKEN_DIMS` names the dimension over tokens of hoisted tensors, of a request and of steps alike: name -> dim.
    exact: round to the tensors' dtype where eager code would, instead of keeping fused intermediates in float32.
    """
    key = (id(family), config, plan, guidance, exact)
    if key not in _compiled:
        _compiled[key] = (family, _build(family, config, plan, guidance, exact))  # holding the family keeps its id its own
    return _compiled[key][1]


def _build(family: Any, config: Any, plan: Plan, guidance: Callable[[Predict], Predict], exact: bool) -> Denoise:
    predict = guidance(predictor(family, config, plan, region))
    # All networks share this function's code, and with it one cache of graphs in Dynamo.
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, _RECOMPILE_LIMIT)

    def whole(network: Hoisted, state: State, coefficients: Tensor, noise: Tensor | None, start: Tensor, stop: Tensor) -> State:
        return denoise(while_loop, predict, network, state, coefficients, noise, start, stop)

    graph = torch.compile(whole, fullgraph=True, dynamic=False, options={"emulate_precision_casts": exact})

    def call(network: Hoisted, state: State, coefficients: Tensor, noise: Tensor | None, start: int, stop: int) -> State:
        tokens = state.x.shape[1]
        network = network._replace(steps={name: _rows(rows, tokens) for name, rows in network.steps.items()})
        coefficients, noise = _rows(coefficients, tokens), None if noise is None else _rows(noise, tokens)
        _mark(family.TOKEN_DIMS, network, state, coefficients, noise)
        bounds = torch.tensor([start, stop], device=state.x.device)
        return graph(network, state, coefficients, noise, bounds[0].clone(), bounds[1].clone())

    return call


def _rows(rows: Tensor, tokens: int) -> Tensor:
    """Rows [S, ...], one or two more that are never read where S is 1 (it would be specialised) or `tokens` (taken for that dimension)."""
    count = rows.shape[0]
    while count in (1, tokens):
        count += 1
    return rows if count == rows.shape[0] else torch.cat([rows, *[rows[-1:]] * (count - rows.shape[0])])


def _mark(token_dims: Mapping[str, int], network: Hoisted, state: State, coefficients: Tensor, noise: Tensor | None) -> None:
    for tensor in (state.x, state.h1, state.h2):
        torch._dynamo.mark_dynamic(tensor, 1)
    for rows in (coefficients, *network.steps.values(), *(() if noise is None else (noise,))):
        torch._dynamo.mark_dynamic(rows, 0)
    if noise is not None:
        torch._dynamo.mark_dynamic(noise, 2)
    hoisted = {**network.request[""], **network.steps}
    for name in token_dims.keys() & hoisted.keys():
        torch._dynamo.mark_dynamic(hoisted[name], token_dims[name])


def graph_count() -> int:
    """Graphs compiled by this process so far."""
    return counters["stats"]["unique_graphs"]


def graph_breaks() -> int:
    """Breaks met by this process so far; the loop tolerates none."""
    return sum(counters["graph_break"].values())
