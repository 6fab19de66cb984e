"""The compiled loop over several ranks: equal to eager, one graph on every rank for all that a request may
vary.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from tests.parallel.pool import on_ranks
from tests.parallel.test_families import plan_of
from tests.parity import draw
from tests.runtime.test_compiled_families import FAMILIES, SCHEDULER, inputs, weights
from tinydiff.models import z_image
from tinydiff.ops.network import Network
from tinydiff.parallel import sequence
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.shards import shard_weights
from tinydiff.sampling import guidance, loop, solvers

REQUESTS = [
    ((2, 2), (4, 4), 2, 3.0),
    ((2, 3), (5, 5), 3, 4.5),
    ((4, 3), (7, 2), 2, 2.0),
    ((3, 5), (3, 6), 4, 5.0),
]
"""(tokens high and wide, lengths of both texts, steps, scale): equal lengths, lengths that two ranks cannot
share evenly, and others.
"""


def tokens(name, plan, fsdp, denoise, size, lengths, steps, scale):
    """The last tokens of a guided request, of all ranks of the plan together."""
    family, config, packed, width = FAMILIES[name]
    rows = solvers.with_guidance(solvers.from_scheduler_config(SCHEDULER, steps), scale)
    branches = [
        inputs(name, config, *size, draw(1, length, width, seed=length + i).float())
        for i, length in enumerate(lengths)
    ]
    blocks = {at for _, at in family.blocks(config)} if fsdp else ()
    mine = shard_weights(weights(family, config), family.spec(config), plan, blocks)
    hoisted = loop.hoist(Network(family, config, plan), mine, branches, rows)
    count = size[0] * size[1] + (z_image.pad_tokens(size[0] * size[1]) if name == "z_image" else 0)
    x = sequence.shard(plan, draw(1, count, packed, seed=steps).float(), 1)
    return sequence.gather(plan, list(loop.run(denoise, rows, x, lambda _: hoisted))[-1].x, 1, count)


def errors(layout, names, backend):
    """(graphs compiled, breaks, the largest error against eager) of each family on this rank."""
    from tinydiff.sampling.compile import _compiled, compiled_denoise, graph_breaks, graph_count

    _compiled.clear()  # another test's graphs, of groups with the same names
    compiling, plan = torch.compile, plan_of(layout)
    options = {} if backend == "inductor" else {"options": None}
    with patch.object(
        torch, "compile", lambda fn, **given: compiling(fn, **given | options, backend=backend)
    ):
        found = {}
        for name in names:
            family, config, *_ = FAMILIES[name]
            made = (
                make(Network(family, config, plan), guidance.classifier_free)
                for make in (loop.eager_denoise, compiled_denoise)
            )
            eager, fast = made
            before, broken, worst = graph_count(), graph_breaks(), 0.0
            for request in REQUESTS:
                want, got = (tokens(name, plan, layout.fsdp, denoise, *request) for denoise in (eager, fast))
                worst = max(worst, ((want - got).abs().max() / max(1, want.abs().max())).item())
            found[name] = graph_count() - before, graph_breaks() - broken, worst
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_one_graph_serves_every_request_of_a_family_on_ulysses(name):
    """Counted on the graphs that Dynamo traces and guards."""
    for rank in on_ranks(2, errors, Layout(ulysses=2), [name], "eager"):
        graphs, breaks, worst = rank[name]
        assert (graphs, breaks) == (1, 0)
        assert worst < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [Layout(ring=2), Layout(tp=2), Layout(cfg=2, fsdp=True), Layout(ring=2, ulysses=2)],
    ids=["ring", "tp", "cfg, full sharding", "ring x ulysses"],
)
def test_one_graph_serves_every_request_on_a_layout(layout):
    for rank in on_ranks(layout.size, errors, layout, ["flux"], "eager"):
        graphs, breaks, worst = rank["flux"]
        assert (graphs, breaks) == (1, 0)
        assert worst < 1e-5


@pytest.mark.slow
def test_inductor_gives_the_same():
    for rank in on_ranks(2, errors, Layout(ring=2), ["flux"], "inductor"):
        assert rank["flux"][:2] == (1, 0)
        assert rank["flux"][2] < 1e-5
