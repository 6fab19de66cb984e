"""Images that share the loop, each at its own row of its own table, against the same images alone, in
float64.
"""

import pytest
import torch

from tests.sampling import fake
from tinydiff.ops.network import Network
from tinydiff.sampling import batch, guidance, loop, solvers, step_cache

CONFIG = fake.Config()
TABLES = {
    "unipc": fake.table(fake.UNIPC, 5, [5, 4, 3, 2, 1]),
    "euler": fake.table(fake.EULER, 3, 2.0),
    "long": fake.table(fake.UNIPC, 9, 1.5),
}
WEIGHTS = fake.weights(CONFIG, 0, torch.float64)
DENOISE = {
    "family": loop.eager_denoise(Network(fake.family, CONFIG), guidance.classifier_free),
    "joint": loop.eager_denoise(Network(fake.joint, CONFIG), guidance.classifier_free),
}


def image(table, seed, tokens=6, net="family", lengths=(5, 5), **more):
    """An image of its own prompt and noise; all share the weights."""
    generator = torch.Generator().manual_seed(seed)
    texts = [
        torch.randn(1, length, fake.WIDTH, generator=generator, dtype=torch.float64) for length in lengths
    ]
    inputs = [{"text": text, "tokens": torch.tensor(tokens)} for text in texts]
    network = loop.hoist(Network(getattr(fake, net), CONFIG), WEIGHTS, inputs, table)
    return loop.start(
        DENOISE[net], table, fake.latents(tokens, seed=seed, dtype=torch.float64), lambda _: network, **more
    )


def alone(one):
    while not one.done:
        one = loop.advance(one, 1)
    return one.state.x


@pytest.mark.parametrize("net", ["family", "joint"])
def test_pictures_that_join_and_leave_are_what_they_are_alone(net):
    family, images = (
        getattr(fake, net),
        [image(table, seed, net=net) for seed, table in enumerate(TABLES.values())],
    )
    images[2] = loop.advance(images[2], 2)  # it stands at a row of its own when the others come
    made = {}
    for _ in range(20):
        images.sort(key=lambda each: each.table.steps)
        joined = batch.advance(batch.join(family, images), 2)
        done = [each for each in batch.split(joined) if each.done]
        made |= {each.table.steps: each.state.x for each in done}
        images = [each for each in batch.split(joined) if not each.done]
        if not images:
            break
    expected = {table.steps: alone(image(table, seed, net=net)) for seed, table in enumerate(TABLES.values())}
    assert made.keys() == expected.keys()
    for steps, x in made.items():
        assert torch.allclose(x, expected[steps], rtol=1e-12, atol=1e-12)


def test_a_batch_ends_where_the_first_of_it_ends():
    images = [image(TABLES["long"], 0), image(TABLES["euler"], 1)]
    joined = batch.join(fake.family, images)
    assert batch.steps_left(joined) == 3
    joined = batch.advance(joined, 99)
    assert batch.steps_left(joined) == 0
    assert [(each.step, each.done) for each in batch.split(joined)] == [(3, False), (3, True)]


def test_kept_tokens_and_fresh_noise_stay_a_pictures_own():
    table = solvers.with_guidance(solvers.dmd(), 2.0)

    def renoised(seed):
        mask, clean = (
            torch.ones(1, 6, 1, dtype=torch.float64),
            fake.latents(6, seed=seed + 50, dtype=torch.float64),
        )
        mask[:, seed] = 0
        fresh = torch.stack([fake.latents(6, seed=seed + 10 * k, dtype=torch.float64) for k in range(3)])
        return image(table, seed, noise=fresh, fixed=loop.FixedTokens(mask, clean, clean))

    pair = batch.split(batch.advance(batch.join(fake.family, [renoised(0), renoised(1)]), 3))
    for seed, one in enumerate(pair):
        assert torch.allclose(one.state.x, alone(renoised(seed)), rtol=1e-12, atol=1e-12)


def test_each_picture_goes_on_with_its_next_expert():
    table = solvers.with_experts(fake.table(fake.EULER, 6), 0.8, 2.0)
    networks = [fake.ready(CONFIG, table, 6, seed=seed, dtype=torch.float64) for seed in (0, 1)]

    def start(seed):
        return loop.start(
            DENOISE["family"], table, fake.latents(6, seed=seed, dtype=torch.float64), networks.__getitem__
        )

    images = [start(seed) for seed in (3, 4)]
    while not images[0].done:
        images = batch.split(batch.advance(batch.join(fake.family, images), 99))
    for seed, one in zip((3, 4), images, strict=True):
        assert torch.allclose(one.state.x, alone(start(seed)), rtol=1e-12, atol=1e-12)


def test_an_image_with_a_step_cache_is_alone():
    limits = step_cache.Limits(torch.tensor(0.2), torch.tensor(1), torch.tensor(1))
    one = image(TABLES["long"], 1)
    one = one._replace(inputs=one.inputs._replace(limits=limits))
    assert batch.batch_key(fake.family, one) != batch.batch_key(fake.family, one)


def test_a_batch_key_is_what_images_must_have_in_common():
    one = image(TABLES["unipc"], 0)
    assert batch.batch_key(fake.family, one) == batch.batch_key(fake.family, image(TABLES["long"], 1))
    fixed = loop.FixedTokens(torch.ones(1, 6, 1), one.state.x, one.state.x)
    others = [
        image(TABLES["unipc"], 0, tokens=7),
        image(TABLES["unipc"], 0, lengths=(4, 5)),
        one._replace(denoise=loop.eager_denoise(Network(fake.family, CONFIG), guidance.none)),
        one._replace(network=fake.ready(CONFIG, TABLES["unipc"], 6, dtype=torch.float64)),
        one._replace(inputs=one.inputs._replace(fixed=fixed)),
    ]
    assert all(batch.batch_key(fake.family, other) != batch.batch_key(fake.family, one) for other in others)


def test_tables_without_an_axis_for_images_must_be_the_same():
    one = image(TABLES["unipc"], 0)
    turned = [
        b._replace(request={**b.request, "": {"cos": b.request[""]["cos"] + 1}}) for b in one.network.branches
    ]
    other = one._replace(network=one.network._replace(branches=tuple(turned)))
    assert batch.batch_key(fake.family, one) != batch.batch_key(fake.family, other)
