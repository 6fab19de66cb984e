"""The step cache: its decisions against a plain computation of them, and one graph for all limits."""

from functools import partial

import pytest
import torch

from tests.sampling import fake
from tinydiff.ops.network import Hooks, Network, plain, walk
from tinydiff.ops.weights import Weights
from tinydiff.sampling import guidance, loop, step_cache
from tinydiff.sampling.compile import compiled_denoise, graph_breaks, graph_count

CONFIG = fake.Config(4)
TOKENS = 9


def limits(threshold, warmup=0, most=100):
    return step_cache.Limits(torch.tensor(threshold), torch.tensor(warmup), torch.tensor(most))


def denoised(run, asked, *, net=fake.family, steps=8, branches=2, tokens=TOKENS, seed=1, **options):
    """The last state of a run with these limits; None runs without a step cache."""
    table, x = fake.table(fake.EULER, steps), fake.latents(tokens, seed=seed)
    hoisted = fake.ready(CONFIG, table, tokens, branches, net=net)
    memory = partial(step_cache.memory, Network(net, CONFIG))
    more = {"limits": asked, "memory": memory} if asked else {}
    denoising = loop.start(run, table, x, lambda _: hoisted, **more)
    while not denoising.done:
        denoising = loop.advance(denoising, options.get("chunk", steps))
    return denoising.state


def eager(net=fake.family, blocks=1, kind=guidance.classifier_free):
    return loop.eager_denoise(Network(net, CONFIG), kind, cached_after=blocks)


@pytest.mark.parametrize("net", [fake.family, fake.joint], ids=["one stream", "two streams"])
def test_a_threshold_of_zero_changes_nothing(net):
    plain = loop.eager_denoise(Network(net, CONFIG), guidance.classifier_free)
    state = denoised(eager(net), limits(0.0), net=net)
    assert torch.equal(state.x, denoised(plain, None, net=net).x)
    assert state.memory["reused"].item() == 0 and state.memory["done"].item() == 8


@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.parametrize(
    ("warmup", "most", "reused"), [(0, 100, 7), (4, 100, 4), (1, 1, 4), (3, 2, 4), (8, 100, 0)]
)
def test_a_high_threshold_reuses_all_that_the_counts_allow(warmup, most, reused, chunk):
    state = denoised(eager(), limits(1e9, warmup, most), chunk=chunk)
    assert state.memory["reused"].item() == reused


def _by_hand(asked, blocks, net):
    """The same loop written out: every block of every branch runs, and results are replaced afterwards."""
    network = Network(net, CONFIG)
    old, rest, run, reused = None, [], 0, []

    def predict(w, x, step, branches, memory):
        nonlocal old, rest, run
        ins, outs, ends, velocities = [], [], [], []

        def note(run_blocks, streams):
            first = run_blocks(streams, 0, blocks)
            last = run_blocks(first, blocks)
            for values, at in ((ins, streams), (outs, first), (ends, last)):
                values.extend(each[-1] if isinstance(each, tuple) else each for each in at)
            return last

        calls = [{b: plain(network, b) for b, _ in net.blocks(CONFIG)}] * len(branches)
        walk(network, calls, w, x, branches, Hooks(stack=note))
        change = outs[0] - ins[0]
        near = old is not None and (old - change).abs().mean() / old.abs().mean() < asked.threshold
        if near and len(reused) >= asked.warmup and run < asked.most:
            images, run = [o + r for o, r in zip(outs, rest, strict=True)], run + 1
            reused.append(True)
        else:
            old, rest, images, run = change, [e - o for e, o in zip(ends, outs, strict=True)], ends, 0
            reused.append(False)
        for image in images:
            streams = (image, image) if net is fake.joint else image
            velocities.append(net.post(CONFIG, None, Weights(w[""]), streams, {}, {}))
        return tuple(velocities), memory

    def call(hoisted, state, inputs, start, stop):
        bounds = torch.tensor([start, stop])
        guided = guidance.classifier_free(predict, network.plan)
        return loop.denoise(loop.python_loop, guided, hoisted, state, inputs, bounds[0], bounds[1])

    return call, reused


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("net", [fake.family, fake.joint], ids=["one stream", "two streams"])
def test_decisions_and_results_equal_those_written_out(net, blocks):
    counts = set()
    for threshold in (0.2, 0.5, 1.0, 2.0):
        asked = limits(threshold, 2, 2)
        reference, reused = _by_hand(asked, blocks, net)
        want = denoised(reference, None, net=net, steps=12).x
        state = denoised(eager(net, blocks), asked, net=net, steps=12)
        assert state.memory["reused"].item() == sum(reused)
        assert (state.x - want).abs().max() < 1e-6 * want.abs().max()
        counts.add(sum(reused))
    assert len(counts) > 1, "the thresholds should differ in what they reuse"


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("net", [fake.family, fake.joint], ids=["one stream", "two streams"])
def test_one_graph_serves_every_threshold_size_and_number_of_steps(net):
    fast = compiled_denoise(Network(net, CONFIG), guidance.classifier_free, cached_after=1)
    before, reused = graph_count(), set()
    for tokens, steps, asked in (
        (9, 8, limits(0.9, 2, 2)),
        (9, 8, limits(1e9, 1, 3)),
        (24, 5, limits(0.0)),
        (4, 12, limits(0.9, 4, 1)),
    ):
        want = denoised(eager(net), asked, net=net, steps=steps, tokens=tokens)
        got = denoised(fast, asked, net=net, steps=steps, tokens=tokens)
        assert (got.x - want.x).abs().max() < 1e-5 * want.x.abs().max()
        assert got.memory["reused"].item() == want.memory["reused"].item()
        reused.add(got.memory["reused"].item())
        assert (graph_count(), graph_breaks()) == (before + 1, 0)
    assert len(reused) > 1
