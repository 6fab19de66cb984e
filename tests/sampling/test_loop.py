"""The eager loop on a tiny family, in float64 against the table written out by hand."""

import pytest
import torch

from tests.sampling import fake
from tinydiff.ops.weights import Weights
from tinydiff.sampling import guidance, loop, solvers

CONFIG = fake.Config()
EAGER = loop.eager_denoise(fake.family, CONFIG, fake.PLAN, guidance.classifier_free)
PLAIN = loop.eager_denoise(fake.family, CONFIG, fake.PLAN, guidance.none)


def velocity(network, x, i):
    """The stack without the engine: flat weights seen through prefixes, row i of the steps."""
    flat = {f"{prefix}.{name}".lstrip("."): t for prefix, entries in network.weights.items() for name, t in entries.items()}
    request = {f"{prefix}.{name}".lstrip("."): t for prefix, entries in network.request.items() for name, t in entries.items()}
    row = {name: rows[i : i + 1] for name, rows in network.steps.items()}
    y = fake.family.pre(CONFIG, fake.PLAN, Weights(flat), x, Weights(request), row)
    for fn, at in fake.family.blocks(CONFIG):
        y = fn(CONFIG, fake.PLAN, Weights(flat) / at, y, Weights(request) / at, row | {"cos": request["cos"]})
    return fake.family.post(CONFIG, fake.PLAN, Weights(flat), y, Weights(request), row)


def by_hand(table, network, x, fresh=None):
    h1 = h2 = torch.zeros_like(x)
    for i in range(table.steps):
        condition, negative = velocity(network, torch.cat([x, x]), i).chunk(2)
        v = negative + table.guidance[i] * (condition - negative)
        clean = x - table.sigmas[i] * v
        x, h1, h2 = table.a[i] * x + table.c[i] * v + table.b1[i] * h1 + table.b2[i] * h2, clean, h1
        if fresh is not None:
            x = x + table.n[i] * fresh[i]
    return x


@pytest.mark.parametrize("scheduler", [fake.UNIPC, fake.EULER], ids=["unipc", "euler"])
def test_loop_is_the_table(scheduler):
    table = fake.table(scheduler, 5, [5, 4, 3, 2, 1])
    network, x = fake.ready(CONFIG, table, 6, dtype=torch.float64), fake.latents(6, dtype=torch.float64)
    got = fake.last(EAGER, table, x, lambda _: network)
    assert torch.allclose(got, by_hand(table, network, x), rtol=1e-12, atol=1e-12)


def test_renoising_adds_the_steps_own_noise():
    table = solvers.with_guidance(solvers.dmd(), 2.0)
    network, x = fake.ready(CONFIG, table, 6, dtype=torch.float64), fake.latents(6, dtype=torch.float64)
    fresh = torch.stack([fake.latents(6, seed=seed, dtype=torch.float64) for seed in (7, 8, 9)])
    got = fake.last(EAGER, table, x, lambda _: network, noise=fresh)
    assert torch.allclose(got, by_hand(table, network, x, fresh), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(got, fake.last(EAGER, table, x, lambda _: network, noise=fresh.flip(0)))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 99])
def test_chunks_are_bit_equal_and_report_progress(chunk):
    table = fake.table(fake.UNIPC, 7)
    network, x = fake.ready(CONFIG, table, 6), fake.latents(6)
    before = x.clone()
    reports = list(loop.run(EAGER, table, x, lambda _: network, chunk=chunk))
    assert torch.equal(reports[-1].x, fake.last(EAGER, table, x, lambda _: network))
    assert [(p.done, p.total) for p in reports] == [(min(done, 7), 7) for done in range(chunk, 7 + chunk, chunk)]
    assert torch.equal(x, before)


def test_stopping_early_runs_no_further_step():
    calls = []

    def counted(*args):
        calls.append(args[-2:])
        return EAGER(*args)

    table = fake.table(fake.UNIPC, 6)
    network = fake.ready(CONFIG, table, 6)
    for progress in loop.run(counted, table, fake.latents(6), lambda _: network, chunk=2):
        if progress.done == 4:
            break
    assert calls == [(0, 2), (2, 4)]


def test_two_experts_run_their_own_steps_and_are_asked_for_once():
    table = solvers.with_experts(fake.table(fake.EULER, 6), 0.8, 2.0)
    networks = [fake.ready(CONFIG, table, 6, seed=seed) for seed in (0, 1)]
    asked = []

    def experts(index):
        asked.append(index)
        return networks[index]

    x = fake.latents(6)
    got = fake.last(EAGER, table, x, experts, chunk=1)
    assert asked == [0, 1]
    (_, _, switch), _ = solvers.segments(table)
    state = loop.State(x, torch.zeros_like(x), torch.zeros_like(x), {})
    rows = loop.coefficients(table, x)
    with torch.no_grad():
        state = EAGER(networks[0], state, rows, None, 0, switch)
        state = EAGER(networks[1], state, rows, None, switch, 6)
    assert torch.equal(got, state.x)
    assert not torch.equal(got, fake.last(EAGER, table, x, lambda _: networks[0]))


def test_guidance_of_one_is_the_condition_alone():
    table = fake.table(fake.UNIPC, 4, 1.0)
    network, x = fake.ready(CONFIG, table, 6), fake.latents(6)
    alone = network._replace(request={at: {n: t[:1] if at else t for n, t in entries.items()} for at, entries in network.request.items()})
    got, want = fake.last(EAGER, table, x, lambda _: network), fake.last(PLAIN, table, x, lambda _: alone)
    assert torch.allclose(got, want, atol=1e-5)


def test_images_of_a_batch_do_not_mix():
    table = fake.table(fake.UNIPC, 4)
    network, x = fake.ready(CONFIG, table, 6, batch=3), fake.latents(6, batch=3)
    together = fake.last(PLAIN, table, x, lambda _: network)
    for k in range(3):
        request = {at: {n: t[k : k + 1] if at else t for n, t in entries.items()} for at, entries in network.request.items()}
        alone = fake.last(PLAIN, table, x[k : k + 1], lambda _, r=request: network._replace(request=r))
        assert torch.allclose(together[k], alone[0], atol=1e-5)


def test_memory_is_carried_from_step_to_step_across_chunks():
    def counting(predict):
        def counted(w, x, step, request, memory):
            v, _ = predict(w, x, step, request, {})
            return v, {"sum": memory["sum"] + step.i}

        return counted

    denoise = loop.eager_denoise(fake.family, CONFIG, fake.PLAN, counting)
    table = fake.table(fake.EULER, 5)
    network, x = fake.ready(CONFIG, table, 6), fake.latents(6)
    state = loop.State(x, x * 0, x * 0, {"sum": torch.tensor(0)})
    for start, stop in ((0, 2), (2, 5)):
        state = denoise(network, state, loop.coefficients(table, x), None, start, stop)
    assert state.memory["sum"].item() == 10


def test_deal_gives_each_block_its_own_entries():
    many = fake.Config(12)
    flat = fake.weights(many)
    tree = loop.deal(fake.family, many, flat)
    assert set(tree) == {"", *(f"blocks.{i}" for i in range(12))} and set(tree[""]) == {"enter.weight", "enter.bias", "leave.weight"}
    assert tree["blocks.11"]["qkv.weight"] is flat["blocks.11.qkv.weight"] and "1.qkv.weight" not in tree["blocks.1"]
    assert sum(map(len, tree.values())) == len(flat)


def test_noise_must_fit_the_table():
    table = fake.table()
    network, x = fake.ready(CONFIG, table, 6), fake.latents(6)
    with pytest.raises(ValueError, match="renoises"):
        next(loop.run(EAGER, table, x, lambda _: network, noise=x[None]))
    with pytest.raises(ValueError, match="renoises"):
        next(loop.run(EAGER, solvers.dmd(), x, lambda _: network))
    with pytest.raises(ValueError, match="at least 1"):
        next(loop.run(EAGER, table, x, lambda _: network, chunk=0))
