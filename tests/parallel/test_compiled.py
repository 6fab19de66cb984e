"""The compiled loop over several ranks: equal to eager, one graph for all that a request may vary.

Tracing is what takes time here, and ranks trace the same code. So where `all_ranks` is not asked for, the
first rank compiles, and the others meet its collectives eagerly.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch.distributed as dist

from tests.compiling import traced_by_dynamo
from tests.parallel.pool import on_ranks
from tests.parallel.test_families import plan_of
from tests.parity import draw
from tests.runtime.test_compiled_families import FAMILIES, SCHEDULER, inputs, weights
from tinydiff.models import z_image
from tinydiff.ops.network import Network
from tinydiff.parallel import sequence
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.shards import shard_weights
from tinydiff.sampling import guidance, loop, solvers, step_cache
from tinydiff.sampling.compile import compiled_denoise, graph_breaks, graph_count

REQUESTS = [
    ((2, 2), (4, 4), 2, 3.0),
    ((2, 3), (5, 5), 3, 4.5),
    ((4, 3), (7, 2), 2, 2.0),
    ((3, 5), (3, 6), 4, 5.0),
]
"""(tokens high and wide, lengths of both texts, steps, scale): equal lengths, lengths that two ranks cannot
share evenly, and others.
"""


def tokens(name, plan, fsdp, denoise, size, lengths, steps, scale, guided, limits=None):
    """The last tokens of a request, of all ranks of the plan together. limits: those of a step cache."""
    family, config, packed, width = FAMILIES[name]
    rows = solvers.with_guidance(solvers.from_scheduler_config(SCHEDULER, steps), scale)
    branches = [
        inputs(name, config, *size, draw(1, length, width, seed=length + i).float())
        for i, length in enumerate(lengths[: 1 + guided])
    ]
    blocks = {at for _, at in family.blocks(config)} if fsdp else ()
    mine = shard_weights(weights(family, config), family.spec(config), plan, blocks)
    hoisted = loop.hoist(Network(family, config, plan), mine, branches, rows)
    count = size[0] * size[1] + (z_image.pad_tokens(size[0] * size[1]) if name == "z_image" else 0)
    x = sequence.shard(plan, draw(1, count, packed, seed=steps).float(), 1)
    network = Network(family, config, plan)
    memory = limits and partial(step_cache.memory, network)
    *_, last = loop.run(denoise, rows, x, lambda _: hoisted, limits=limits, memory=memory)
    return sequence.gather(plan, last.x, 1, count)


def errors(layout, name, backend, guided, all_ranks, limits=None):
    """(graphs compiled, breaks, the largest error against eager) on this rank."""
    plan = plan_of(layout)
    family, config, *_ = FAMILIES[name]
    kind = guidance.classifier_free if guided else guidance.none
    with traced_by_dynamo(backend):
        network, compiles = Network(family, config, plan), all_ranks or dist.get_rank() == 0
        eager = loop.eager_denoise(network, kind, cached_after=limits and 1)
        fast = compiled_denoise(network, kind, cached_after=limits and 1) if compiles else eager
        before, broken, worst = graph_count(), graph_breaks(), 0.0
        for request in REQUESTS:
            want, got = (
                tokens(name, plan, layout.fsdp, denoise, *request, guided, limits)
                for denoise in (eager, fast)
            )
            worst = max(worst, ((want - got).abs().max() / max(1, want.abs().max())).item())
    return graph_count() - before, graph_breaks() - broken, worst


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_one_graph_serves_every_request_of_a_family_on_ulysses(name):
    """Counted on the graphs that Dynamo traces and guards. Two branches are twice the tracing: below FLUX.1
    has both, and on one rank most families have.
    """
    check(Layout(ulysses=2), name, guided=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "guided", "all_ranks"),
    [(Layout(ring=2), True, False), (Layout(tp=2), False, True), (Layout(cfg=2, fsdp=True), True, True),
     (Layout(ring=2, ulysses=2), False, False)],
    ids=["ring", "tp", "cfg, full sharding", "ring x ulysses"],
)  # fmt: skip
def test_one_graph_serves_every_request_on_a_layout(layout, guided, all_ranks):
    check(layout, "flux", guided, all_ranks)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_inductor_gives_the_same():
    """The mechanism is communication in a compiled loop; one kind of block and one branch show it."""
    check(Layout(ring=2), "ernie", guided=False, backend="inductor")


def check(layout, name, guided, all_ranks=False, backend="eager", limits=None):
    made = on_ranks(layout.size, errors, layout, name, backend, guided, all_ranks, limits)
    for rank, (graphs, breaks, worst) in enumerate(made):
        assert (graphs, breaks) == (int(all_ranks or rank == 0), 0)
        assert worst < 1e-5
