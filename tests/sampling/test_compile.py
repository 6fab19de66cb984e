"""The compiled loop: equal to eager, one graph for everything a request may vary, cost that does not grow
with depth.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo import config as dynamo_config

from tests.sampling import fake
from tinydiff.ops.network import Network
from tinydiff.sampling import compile, guidance, loop, solvers
from tinydiff.sampling.compile import (
    compiled_denoise,
    graph_breaks,
    graph_count,
    per_size,
    region,
    while_loop,
)

CONFIG = fake.Config(4)


def pair(kind, config=CONFIG, **options):
    return loop.eager_denoise(Network(fake.family, config), kind), compiled_denoise(
        Network(fake.family, config), kind, **options
    )


def assert_equal_to_eager(
    eager, fast, table, tokens, *, branches=2, images=1, seed=1, chunk=None, noise=None
):
    network, x = fake.ready(CONFIG, table, tokens, branches, images), fake.latents(tokens, images, seed)
    want = fake.last(eager, table, x, lambda _: network, noise=noise)
    got = fake.last(fast, table, x, lambda _: network, noise=noise, chunk=chunk)
    assert got.isfinite().all() and (got - want).abs().max() < 1e-5 * max(1, want.abs().max().item())


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_one_graph_serves_sizes_steps_scales_seeds_solvers_and_chunks():
    eager, fast = pair(guidance.classifier_free)
    before = graph_count()
    # The first request has as many tokens as steps: the two lengths must not be taken for one.
    for tokens, steps, scale, seed, solver, chunk in (
        (4, 4, 3.0, 1, fake.UNIPC, None),
        (9, 4, 3.0, 1, fake.UNIPC, 1),
        (24, 7, 1.5, 2, fake.UNIPC, 3),
        (9, 5, 5.0, 2, fake.EULER, None),
        (24, 1, 3.0, 1, fake.EULER, None),
        (6, 1, 3.0, 1, fake.UNIPC, None),
    ):
        assert_equal_to_eager(eager, fast, fake.table(solver, steps, scale), tokens, seed=seed, chunk=chunk)
        assert graph_count() == before + 1
    experts = solvers.with_experts(fake.table(fake.EULER, 6), 0.8, 2.0)
    assert len(solvers.segments(experts)) == 2
    assert_equal_to_eager(eager, fast, experts, 24)
    assert (graph_count(), graph_breaks()) == (before + 1, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_one_graph_serves_every_length_of_two_prompts_in_a_family_of_two_streams():
    eager, fast = (
        make(Network(fake.joint, CONFIG), guidance.classifier_free)
        for make in (loop.eager_denoise, compiled_denoise)
    )
    before = graph_count()
    # Lengths that are equal in the first request, to each other and to those of tokens and steps, are not
    # taken for one.
    for tokens, steps, lengths in ((4, 4, (4, 4)), (9, 4, (4, 7)), (4, 3, (11, 3)), (24, 5, (5, 24))):
        table, x = fake.table(fake.EULER, steps), fake.latents(tokens)
        network = fake.ready(CONFIG, table, tokens, net=fake.joint, lengths=lengths)
        want, got = (fake.last(run, table, x, lambda _, n=network: n) for run in (eager, fast))
        assert got.isfinite().all() and (got - want).abs().max() < 1e-5 * max(1, want.abs().max().item())
        assert (graph_count(), graph_breaks()) == (before + 1, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_fixed_tokens_are_one_more_graph():
    eager, fast = pair(guidance.none)
    before = graph_count()
    for tokens, steps in ((6, 4), (9, 3)):
        table, x = fake.table(fake.EULER, steps), fake.latents(tokens)
        network = fake.ready(CONFIG, table, tokens, branches=1)
        fixed = loop.FixedTokens(
            (torch.arange(tokens) > 2).float()[None, :, None],
            fake.latents(tokens, seed=5),
            fake.latents(tokens, seed=6),
        )
        want, got = (fake.last(run, table, x, lambda _, n=network: n, fixed=fixed) for run in (eager, fast))
        assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max().item())
        assert (graph_count(), graph_breaks()) == (before + 1, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_unguided_renoising_in_two_batch_sizes():
    eager, fast = pair(guidance.none)
    before = graph_count()
    for tokens, timesteps, images, graphs in (
        (6, (1000, 757, 522), 1, 1),
        (9, (1000, 500), 1, 1),
        (6, (1000, 757, 522), 2, 2),
    ):
        noise = torch.stack([fake.latents(tokens, images, seed) for seed in range(len(timesteps))])
        assert_equal_to_eager(
            eager, fast, solvers.dmd(timesteps), tokens, branches=1, images=images, noise=noise, chunk=2
        )
        assert graph_count() == before + graphs
    assert graph_breaks() == 0


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_inductor_renoises_and_keeps_fixed_tokens_as_eager():
    """Fresh noise at every step, two images, and tokens that a mask holds; compiled in a thread, as a server
    does it.
    """
    eager, fast = pair(guidance.none)
    timesteps, tokens = (1000, 757, 522), 6
    network, x = fake.ready(CONFIG, solvers.dmd(timesteps), tokens, 1, 2), fake.latents(tokens, 2)
    fixed = loop.FixedTokens(
        (torch.arange(tokens) > 2).float()[None, :, None],
        fake.latents(tokens, seed=5),
        fake.latents(tokens, seed=6),
    )
    noise = torch.stack([fake.latents(tokens, 2, seed) for seed in range(len(timesteps))])
    last = partial(fake.last, noise=noise, fixed=fixed)
    want = last(eager, solvers.dmd(timesteps), x, lambda _: network)

    def in_a_thread():
        with torch.no_grad():
            return last(fast, solvers.dmd(timesteps), x, lambda _: network)

    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(in_a_thread).result()
    assert (want - x).abs().max() > 0.1
    assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max().item())


@pytest.mark.usefixtures("dynamo")
def test_loops_and_sizes_do_not_count_against_one_limit(monkeypatch):
    """Torch limits the graphs of one code. So a loop has a code of its own, and a size too."""
    monkeypatch.setattr(compile, "_RECOMPILE_LIMIT", 1)
    table, x = fake.table(fake.EULER, 2), fake.latents(4)
    before = graph_count()
    with dynamo_config.patch(recompile_limit=1):
        for config in (CONFIG, fake.Config(1)):
            network = fake.ready(config, table, 4, 1)
            fake.last(pair(guidance.none, config)[1], table, x, lambda _, n=network: n)
        enlarge = per_size(lambda x: torch.cat([x, x]))
        assert [len(enlarge(torch.zeros(n))) for n in (2, 3, 4, 2)] == [4, 6, 8, 4]
    assert graph_count() == before + 2 + 3


@pytest.mark.usefixtures("dynamo")
def test_every_thread_gets_the_settings():
    """Torch keeps Dynamo's settings per thread, and a server builds a loop in another than it runs it in."""
    double = per_size(lambda x: 2 * x)

    def limit():
        double(torch.ones(2))
        return dynamo_config.recompile_limit

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(limit).result() == compile._RECOMPILE_LIMIT == 64


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_exact_rounds_bfloat16_as_eager():
    table = fake.table(fake.UNIPC, 4)
    network, x = fake.ready(CONFIG, table, 12, 1, dtype=torch.bfloat16), fake.latents(12, dtype=torch.float32)
    family = replace(fake.family, pre=lambda c, p, w, x, *rest: fake.family.pre(c, p, w, x.bfloat16(), *rest))
    eager = loop.eager_denoise(Network(family, CONFIG), guidance.none)
    want = fake.last(eager, table, x, lambda _: network)
    exact = fake.last(
        compiled_denoise(Network(family, CONFIG), guidance.none, exact=True),
        table,
        x,
        lambda _: network,
    )
    loose = fake.last(compiled_denoise(Network(family, CONFIG), guidance.none), table, x, lambda _: network)
    assert (exact - want).abs().max() < (loose - want).abs().max() / 4


def counting(predict):
    """A predict that keeps something: the sum of the steps seen."""

    def counted(w, x, step, branches, memory):
        (v,), _ = predict(w, x, step, branches, {})
        return v, {"sum": memory["sum"] + step.i}

    return counted


def test_a_block_is_compiled_once_however_deep_the_stack_and_memory_is_carried():
    """In the graph that Dynamo hands over, every block calls the one region."""
    config = fake.Config(6)
    predict = counting(loop.predictor(Network(fake.family, config), region))
    calls = []

    def capture(graph, inputs):
        calls.extend(
            node.args[1]
            for part in graph.modules()
            for node in part.graph.nodes
            if str(node.target) == "invoke_subgraph"
        )
        return graph

    table = fake.table(fake.UNIPC, 3)
    network, x = fake.ready(config, table, 5, branches=1), fake.latents(5)

    @torch.compile(backend=capture, fullgraph=True)
    def whole(network, state, inputs, stop):
        return loop.denoise(while_loop, predict, network, state, inputs, stop * 0, stop)

    with torch.no_grad():
        state = loop.State(x, x * 0, x * 0, {"sum": torch.tensor(0)})
        got = whole(network, state, loop.StepInputs(loop.coefficients(table, x)), torch.tensor(3))
    assert len(calls) == 6 and len(set(calls)) == 1
    assert got.memory["sum"].item() == 0 + 1 + 2
    want = fake.last(
        loop.eager_denoise(Network(fake.family, config), guidance.none), table, x, lambda _: network
    )
    assert torch.allclose(got.x, want, atol=1e-5)
