"""Speech to video: which states of the sound each frame hears, and the inputs of a segment."""

from types import SimpleNamespace

import pytest
import torch

from tests.models.test_wan_s2v import TINY
from tests.models.test_wav2vec2 import LARGE
from tests.models.wan_s2v_reference import Reference
from tests.parity import close, draw, randomised
from tinydiff.models import wan_s2v, wan_s2v_recipe
from tinydiff.models.encoders import wav2vec2
from tinydiff.models.evaluate import predict
from tinydiff.models.recipe import Net
from tinydiff.ops.network import Network
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan
from tinydiff.records import Output, UserError

SCALES = SimpleNamespace(z_dim=3, scale_factor_spatial=8, scale_factor_temporal=4)


def encoder():
    names = [(row.name, row.shape) for row in wav2vec2.spec(LARGE)]
    flat = {name: 0.3 * draw(*shape, seed=i) for i, (name, shape) in enumerate(names)}
    return Net(wav2vec2.FAMILY, LARGE, Plan(), flat, torch.float64)


def test_all_states_at_thirty_per_second():
    net, sound = encoder(), draw(500)
    heard = wav2vec2.encode(
        LARGE, Plan(), Weights(net.weights, dtype=torch.float64), wav2vec2.samples(LARGE, sound)
    )
    last = LARGE.vectors(500) - 1
    count = int((last + 1) / 50 * 30)
    expected = []
    for j in range(count):  # evenly from the first vector to the last
        place = j * last / (count - 1)
        low = min(int(place), last - 1)
        share = place - low
        expected.append(torch.stack([x[0, low] * (1 - share) + x[0, low + 1] * share for x in heard]))
    close(wan_s2v_recipe.states(net, sound), torch.stack(expected, 2), 1e-12)


def test_silence_gives_finite_states():
    assert wan_s2v_recipe.states(encoder(), torch.zeros(500)).isfinite().all()


@pytest.mark.parametrize("samples", [0, 5, 20])
def test_a_sound_that_is_too_short(samples):
    message = rf"^audio_path: the sound has {samples / 16000:.3f} seconds; give at least 0.1$"
    with pytest.raises(UserError, match=message):
        wan_s2v_recipe.states(encoder(), torch.zeros(samples))


def test_a_tenth_of_a_second_suffices_for_the_released_encoder():
    assert int(wav2vec2.Config().vectors(1600) / 50 * 30) >= 1


@pytest.mark.parametrize(("heard", "count"), [(1, 1), (149, 1), (150, 2), (299, 2), (300, 3)])
def test_segments(heard, count):
    """Eighty frames at sixteen per second are five seconds, 150 states."""
    assert wan_s2v_recipe.segments(heard, 80, 16) == count
    found = wan_s2v_recipe.of_frames(torch.ones(2, 3, heard), 80, 16)
    assert len(found) == count and {tuple(each.shape) for each in found} == {(1, 2, 3, 80)}


@pytest.mark.parametrize(("frames", "fps", "heard"), [(80, 16, 200), (8, 16, 37), (12, 32, 31), (4, 30, 9)])
def test_a_frame_hears_the_nearest_state_and_nothing_after_the_end(frames, fps, heard):
    numbers = torch.arange(1.0, heard + 1).expand(2, 1, heard)
    got = torch.cat(wan_s2v_recipe.of_frames(numbers, frames, fps), 3)[0, :, 0]
    for k in range(got.shape[1]):
        state = round(k / fps * 30)  # half to even, as numpy's
        assert got[:, k].tolist() == [float(state + 1) if state < heard else 0.0] * 2, k


def test_the_first_state_stands_for_the_past():
    heard = draw(1, 4, 6, 5)
    whole = wan_s2v_recipe.with_past(TINY, heard)
    assert whole.shape[3] == TINY.motion_frames + 5
    assert torch.equal(whole[..., TINY.motion_frames :], heard)
    assert (whole[..., : TINY.motion_frames] == heard[..., :1]).all()


@pytest.mark.parametrize("later", [False, True])
def test_the_inputs_of_a_segment(later):
    """Both branches equal the network's second writing: the negative one hears zeros."""
    reference = Reference(TINY)
    flat = {wan_s2v.key_map(TINY).row(key): x for key, x in randomised(reference, 1).items()}
    size, output = (3, 18, 22), Output(144, 176, 12)
    x, image = draw(3, *size, seed=2), draw(3, 1, 18, 22, seed=3)
    past = draw(3, TINY.past, 18, 22, seed=4) if later else None
    pose = draw(5, *size, seed=5) if later else torch.zeros(5, *size).double()
    texts, heard = [draw(1, 7, 20, seed=6), draw(1, 5, 20, seed=7)], draw(1, 4, 6, 12, seed=8)
    made = wan_s2v_recipe.segment(
        TINY, SCALES, output, texts, heard, image[None],
        None if past is None else past[None], pose[None] if later else None,
    )  # fmt: skip
    (latents,), given = made.latents, made.given_tokens
    assert latents.size == (3, *size)
    x_BLP = latents.pack(x[None])
    behind = given.tokens[:, x_BLP.shape[1] :]
    assert given.denoised[0, :, 0].tolist() == [True] * x_BLP.shape[1] + [False] * behind.shape[1]
    time, network = torch.tensor([500.0]), Network(wan_s2v.FAMILY, TINY, dtype=torch.float64)
    for branch, text, sound in zip(made.branches, texts, (heard, 0 * heard), strict=True):
        y = predict(network, flat, torch.cat([x_BLP, behind], 1), time, branch)
        with torch.no_grad():
            expected = reference(
                x, time, text[0], image, past, pose, sound[0], (TINY.motion_frames, TINY.past)
            )
        close(latents.unpack(y[:, : x_BLP.shape[1]])[0], expected)


def test_what_is_decoded_and_what_becomes_past():
    image, latents, past = (torch.full((1, 1, n, 2, 2), float(n)) for n in (1, 20, 19))
    assert wan_s2v_recipe.shown(image, latents, None)[0, 0, :, 0, 0].tolist() == [1.0] + [20.0] * 20
    assert wan_s2v_recipe.shown(image, latents, past)[0, 0, :2, 0, 0].tolist() == [19.0] * 2
    frames = torch.arange(10.0).view(1, 1, 10, 1, 1)
    kept = wan_s2v_recipe.moved_on(frames[:, :, :4], frames[:, :, 4:7])
    assert kept.flatten().tolist() == [3, 4, 5, 6]
    assert wan_s2v_recipe.moved_on(frames[:, :, :2], frames[:, :, 2:]).flatten().tolist() == [8, 9]
