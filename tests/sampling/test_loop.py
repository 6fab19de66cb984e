"""The eager loop on a tiny family, in float64 against the table written out by hand."""

import pytest
import torch

from tests.sampling import fake
from tinydiff.ops.network import Network, divide
from tinydiff.ops.weights import Weights
from tinydiff.sampling import guidance, loop, solvers

CONFIG = fake.Config()
EAGER = loop.eager_denoise(Network(fake.family, CONFIG), guidance.classifier_free)
PLAIN = loop.eager_denoise(Network(fake.family, CONFIG), guidance.none)


def flat(tree):
    return {
        f"{prefix}.{name}".lstrip("."): t for prefix, entries in tree.items() for name, t in entries.items()
    }


def velocity(network, branch, x, i):
    """The stack without the engine: flat weights seen through prefixes, row i of the steps."""
    w, request = Weights(flat(network.weights)), flat(branch.request)
    row = {name: rows[i] for name, rows in flat(branch.steps).items()}
    y = fake.family.pre(CONFIG, fake.PLAN, w, x, Weights(request), row)
    for fn, at in fake.family.blocks(CONFIG):
        y = fn(CONFIG, fake.PLAN, w / at, y, Weights(request | row) / at, row | {"cos": request["cos"]})
    return fake.family.post(CONFIG, fake.PLAN, w, y, Weights(request), row)


def by_hand(table, network, x, fresh=None):
    h1 = h2 = torch.zeros_like(x)
    for i in range(table.steps):
        condition, negative = (velocity(network, branch, x, i) for branch in network.branches)
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
    assert [(p.done, p.total) for p in reports] == [
        (min(done, 7), 7) for done in range(chunk, 7 + chunk, chunk)
    ]
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
    inputs = loop.StepInputs(loop.coefficients(table, x))
    with torch.no_grad():
        state = EAGER(networks[0], state, inputs, 0, switch)
        state = EAGER(networks[1], state, inputs, switch, 6)
    assert torch.equal(got, state.x)
    assert not torch.equal(got, fake.last(EAGER, table, x, lambda _: networks[0]))


def test_guidance_of_one_is_the_condition_alone():
    table = fake.table(fake.UNIPC, 4, 1.0)
    network, x = fake.ready(CONFIG, table, 6), fake.latents(6)
    alone = network._replace(branches=network.branches[:1])
    got, want = fake.last(EAGER, table, x, lambda _: network), fake.last(PLAIN, table, x, lambda _: alone)
    assert torch.allclose(got, want, atol=1e-5)


def test_normed_guidance_has_the_length_of_the_condition_in_each_token():
    normed = loop.eager_denoise(Network(fake.family, CONFIG), guidance.token_normed)
    table = fake.table(fake.EULER, 1, 4.0)
    network, x = fake.ready(CONFIG, table, 6, dtype=torch.float64), fake.latents(6, dtype=torch.float64)
    condition, negative = (velocity(network, branch, x, 0) for branch in network.branches)
    plain = negative + 4.0 * (condition - negative)
    v = plain * condition.norm(dim=-1, keepdim=True) / plain.norm(dim=-1, keepdim=True)
    want = table.a[0] * x + table.c[0] * v + table.b1[0] * 0
    assert torch.allclose(fake.last(normed, table, x, lambda _: network), want, rtol=1e-12, atol=1e-12)


def test_steps_that_branches_have_in_common_are_kept_once():
    network = fake.ready(CONFIG, fake.table(), 6)
    first, second = network.branches
    assert first.steps[""]["modulation"] is second.steps[""]["modulation"]
    assert not torch.equal(first.request["blocks.0"]["k"], second.request["blocks.0"]["k"])


def test_kept_tokens_follow_their_path_and_given_ones_stay():
    table = fake.table(fake.EULER, 4)
    network, x = fake.ready(CONFIG, table, 6, dtype=torch.float64), fake.latents(6, dtype=torch.float64)
    clean, noise = fake.latents(6, seed=5, dtype=torch.float64), fake.latents(6, seed=6, dtype=torch.float64)
    noise[:, 0] = clean[:, 0]
    mask = torch.tensor([0, 0, 0.25, 1, 1, 1], dtype=torch.float64)[None, :, None]
    kept = loop.FixedTokens(mask, clean, noise)
    reports = [progress.x for progress in loop.run(EAGER, table, x, lambda _: network, fixed=kept, chunk=1)]
    for y, sigma in zip(reports, [*table.sigmas[1:].tolist(), 0.0], strict=True):
        assert torch.equal(y[:, 0], clean[:, 0])
        assert torch.allclose(
            y[:, 1], (1 - sigma) * clean[:, 1] + sigma * noise[:, 1], rtol=1e-12, atol=1e-12
        )
    start = torch.where(mask > 0.5, x, torch.lerp(clean + (noise - clean) * table.sigmas[0], x, mask))
    first = velocity(network, network.branches[1], start, 0)
    first = first + table.guidance[0] * (velocity(network, network.branches[0], start, 0) - first)
    free = table.a[0] * start + table.c[0] * first
    path = clean + (noise - clean) * table.sigmas[1]
    assert torch.allclose(reports[0], path + mask * (free - path), rtol=1e-12, atol=1e-12)


def test_images_of_a_batch_do_not_mix():
    table = fake.table(fake.UNIPC, 4)
    network, x = fake.ready(CONFIG, table, 6, branches=1, images=3), fake.latents(6, batch=3)
    together = fake.last(PLAIN, table, x, lambda _: network)
    [branch] = network.branches
    for k in range(3):
        request = {
            at: {n: t[k : k + 1] if at else t for n, t in entries.items()}
            for at, entries in branch.request.items()
        }
        one = network._replace(branches=(branch._replace(request=request),))
        alone = fake.last(PLAIN, table, x[k : k + 1], lambda _, n=one: n)
        assert torch.allclose(together[k], alone[0], atol=1e-5)


def test_memory_is_carried_from_step_to_step_across_chunks():
    def counting(predict, plan):
        def counted(w, x, step, branches, memory):
            (v, _), _ = predict(w, x, step, branches, {})
            return v, {"sum": memory["sum"] + step.i}

        return counted

    denoise = loop.eager_denoise(Network(fake.family, CONFIG), counting)
    table = fake.table(fake.EULER, 5)
    network, x = fake.ready(CONFIG, table, 6), fake.latents(6)
    state = loop.State(x, x * 0, x * 0, {"sum": torch.tensor(0)})
    for start, stop in ((0, 2), (2, 5)):
        state = denoise(network, state, loop.StepInputs(loop.coefficients(table, x)), start, stop)
    assert state.memory["sum"].item() == 10


def test_divide_gives_each_block_its_own_entries():
    many = fake.Config(12)
    flat = fake.weights(many)
    tree = divide(Network(fake.family, many), flat)
    assert set(tree) == {"", *(f"blocks.{i}" for i in range(12))}
    assert set(tree[""]) == {"enter_text.weight", "enter.weight", "enter.bias", "leave.weight"}
    assert (
        tree["blocks.11"]["qkv.weight"] is flat["blocks.11.qkv.weight"]
        and "1.qkv.weight" not in tree["blocks.1"]
    )
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
