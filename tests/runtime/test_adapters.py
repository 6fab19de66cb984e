"""Adapters merged into weights and beside them: the same images, on every family and layout, in batches, and
compiled once.
"""

from dataclasses import dataclass, replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from tests.parallel.pool import on_ranks
from tests.parallel.test_families import FULLEST, denoised, plan_of
from tests.parity import close
from tests.sampling import fake
from tinydiff.models.recipe import Net
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.plan import Plan, Row
from tinydiff.parity.denoisers import DENOISERS
from tinydiff.runtime import adapters
from tinydiff.sampling import batch, guidance, loop
from tinydiff.sampling.compile import compiled_denoise, graph_breaks, graph_count

LOOKED_UP = "addition_t_embedding.weight"
"""A table whose rows are looked up: no product goes through it."""


@dataclass(frozen=True)
class LowRank:
    """A difference b @ a."""

    a: Tensor
    b: Tensor

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(wide) + strength * (self.b @ self.a).to(wide).view(weight.shape)).to(weight.dtype)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b


@dataclass(frozen=True)
class Whole:
    """A difference that is no low-rank product."""

    delta: Tensor

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        return weight + strength * self.delta

    def low_rank(self) -> None:
        return None


def differences(family, config, seed=0, skip=lambda name: False):
    """Differences of mixed ranks for every weight that enters a product."""
    generator = torch.Generator().manual_seed(seed)
    rows = [row for row in family.spec(config) if row.name.endswith("weight") and len(row.shape) > 1]
    made = {}
    for number, row in enumerate(row for row in rows if not (row.name.endswith(LOOKED_UP) or skip(row.name))):
        rank, width = 1 + number % 5, row.numel // row.shape[0]
        a = torch.randn(rank, width, generator=generator, dtype=torch.float64) * 0.3 / width**0.5
        made[row.name] = LowRank(a, torch.randn(row.shape[0], rank, generator=generator, dtype=torch.float64))
    return made


def two(net):
    """Two adapters: one of all layers, one of every layer but those of queries."""
    return {
        "first": differences(net.family, net.config),
        "second": differences(net.family, net.config, 1, lambda name: "to_q" in name),
    }


def dynamic(net, first=0.5, second=-0.25):
    return adapters.with_strengths(adapters.beside(net, two(net)), {"first": first, "second": second})


def merged(net, first=0.5, second=-0.25):
    for name, strength in (("first", first), ("second", second)):
        net = adapters.merged(net, two(net)[name], strength)
    return net


@cache
def by_merging(name):
    return denoised(name, Plan(), adapt=merged)


@pytest.mark.parametrize("name", DENOISERS)
def test_beside_the_weights_two_adapters_do_what_they_do_merged(name):
    close(denoised(name, Plan(), adapt=dynamic), by_merging(name))


@pytest.mark.parametrize("name", DENOISERS)
def test_at_strength_0_the_image_is_the_bases_to_the_bit(name):
    assert torch.equal(
        denoised(name, Plan(), adapt=partial(dynamic, first=0.0, second=0.0)), denoised(name, Plan())
    )


LAYOUTS = {
    "tp": Layout(tp=2),
    "full sharding": Layout(ulysses=2, fsdp=True),
    "cfg": Layout(cfg=2),
}


def adapted(layout):
    return {name: denoised(name, plan_of(layout), layout.fsdp, adapt=dynamic) for name in FULLEST}


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_gives_what_merging_gives_on_one_rank(case):
    for rank in on_ranks(2, adapted, LAYOUTS[case]):
        for name, tokens in rank.items():
            close(tokens, by_merging(name))


CONFIG, TABLE = fake.Config(3), fake.table(fake.UNIPC, 4)


def spec(config):
    """The fake family's weights as rows."""
    return [Row(name, tuple(x.shape)) for name, x in fake.weights(config).items()]


FAKE = replace(fake.family, spec=spec)


def fake_net(dtype=torch.float64):
    return Net(FAKE, CONFIG, Plan(), fake.weights(CONFIG, 0, dtype), dtype)


def started(net, strengths, seed, denoise, tokens=6):
    """An image of its own prompt, noise and strengths."""
    net, generator = adapters.with_strengths(net, strengths), torch.Generator().manual_seed(seed)
    text = torch.randn(2, 1, fake.TEXT, fake.WIDTH, generator=generator).to(net.dtype)
    inputs = [{"text": each, "tokens": torch.tensor(tokens)} for each in text]
    hoisted = loop.hoist(net.network, net.weights, inputs, TABLE, net.lora_scale)
    x = fake.latents(tokens, seed=seed, dtype=net.dtype)
    return loop.start(denoise, TABLE, x, lambda _: hoisted)


def finished(image):
    while not image.done:
        image = loop.advance(image, 2)
    return image.state.x


def test_images_with_different_adapters_share_a_batch():
    net = fake_net()
    net = adapters.beside(net, two(net))
    denoise = loop.eager_denoise(net.network, guidance.classifier_free)
    asked = [{}, {"first": 1.0}, {"second": -0.5}, {"first": 0.3, "second": 2.0}]
    images = [started(net, strengths, seed, denoise) for seed, strengths in enumerate(asked)]
    assert len({batch.batch_key(FAKE, image) for image in images}) == 1
    together = batch.split(batch.advance(batch.join(FAKE, images), TABLE.steps))
    for seed, (strengths, image) in enumerate(zip(asked, together, strict=True)):
        alone = finished(started(net, strengths, seed, denoise))
        close(image.state.x, alone)
        plain = fake_net()
        for name, strength in strengths.items():
            plain = adapters.merged(plain, two(plain)[name], strength)
        close(alone, finished(started(plain, {}, seed, denoise)))


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_another_adapter_strength_or_batch_compiles_nothing():
    net = fake_net(torch.float32)
    fast = compiled_denoise(net.network, guidance.classifier_free)
    slow = loop.eager_denoise(net.network, guidance.classifier_free)
    one, other = differences(FAKE, CONFIG), differences(FAKE, CONFIG, 3)
    before = graph_count()
    for loaded, strengths in (
        ({"a": one}, {"a": 1.0}),
        ({"a": one}, {"a": -0.5}),
        ({"b": other}, {"b": 0.7}),
        ({"a": one, "b": other}, {"a": 0.2, "b": 0.9}),
        ({"a": one, "b": other}, {}),
    ):
        beside = adapters.beside(net, loaded)
        expected = finished(started(beside, strengths, 1, slow))
        close(finished(started(beside, strengths, 1, fast)), expected, 1e-4)
    assert (graph_count(), graph_breaks()) == (before + 1, 0)


def test_a_difference_that_is_no_low_rank_product_cannot_stay_beside():
    net = fake_net()
    whole = {"enter.weight": Whole(torch.ones_like(net.weights["enter.weight"]))}
    with pytest.raises(ValueError, match=r"'style' changes enter.weight by more than a low-rank product"):
        adapters.beside(net, {"style": whole})
    assert adapters.merged(net, whole, 2.0).weights["enter.weight"].equal(net.weights["enter.weight"] + 2)


def test_taking_all_adapters_away_leaves_the_base():
    net = fake_net()
    bare = adapters.beside(adapters.beside(net, two(net)), {})
    assert bare.adapters == () and bare.weights.keys() == net.weights.keys()
    assert all(bare.weights[name] is x for name, x in net.weights.items())


def test_rounding_loses_what_is_small_beside_the_weight():
    net = fake_net(torch.bfloat16)
    small = {"enter.weight": Whole(net.weights["enter.weight"] * 1e-4)}
    assert adapters.rounded_away(net, small, 1.0) > 0.9
    assert adapters.rounded_away(fake_net(torch.float32), small, 1.0) < 1e-2
    assert adapters.rounded_away(net, {"enter.weight": Whole(net.weights["enter.weight"])}, 1.0) == 0
