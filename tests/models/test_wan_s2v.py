"""Wan2.2 speech to video against its arithmetic written a second time (`wan_s2v_reference`), in float64,
every parameter redrawn; the released keys.
"""

import re
from dataclasses import asdict, replace

import pytest
import torch

from tests.models.wan_s2v_reference import Reference
from tests.parity import close, draw, randomised, shapes, tracked, unread
from tinydiff.models import wan_s2v, wan_s2v_recipe
from tinydiff.models.evaluate import predict
from tinydiff.ops.network import Branch, Network, divide, plain, walk
from tinydiff.ops.patch import patchify, unpatchify
from tinydiff.ops.weights import Weights

TINY = wan_s2v.Config(
    dim=32,
    ffn_dim=40,
    freq_dim=8,
    text_dim=20,
    in_dim=3,
    out_dim=3,
    cond_dim=5,
    num_heads=2,
    num_layers=4,
    eps=1e-3,
    audio_dim=6,
    num_audio_token=3,
    enable_adain=True,
    audio_inject_layers=(3, 0, 2),
    motion_frames=9,
    audio_states=4,
)
SIZE = (3, 18, 22)  # latents: a patch grid of 3 x 9 x 11, no multiple of the older frames' patches
CASES = {
    "first segment": (TINY, None, False),
    "past frames": (TINY, 5, False),
    "more past frames than are read": (TINY, 21, True),
    "pose": (TINY, None, True),
    "no AdaIN": (replace(TINY, enable_adain=False), 5, False),
    "no cross-attention norm": (replace(TINY, cross_attn_norm=False), 5, False),
}


def case(name):
    """Config, weights by row, the reference and its arguments, our inputs."""
    c, past, posed = CASES[name]
    reference = Reference(c)
    state = randomised(reference, 1)
    flat = {wan_s2v.key_map(c).row(key): tensor for key, tensor in state.items()}
    given = {
        "x": draw(c.in_dim, *SIZE, seed=2),
        "text": draw(7, c.text_dim, seed=3),
        "reference": draw(c.in_dim, 1, *SIZE[1:], seed=4),
        "motion": None if past is None else draw(c.in_dim, past, *SIZE[1:], seed=5),
        "pose": draw(c.cond_dim, *SIZE, seed=6) if posed else torch.zeros(c.cond_dim, *SIZE).double(),
        "audio": draw(c.audio_states, c.audio_dim, 4 * SIZE[0], seed=7),
    }
    audio = given["audio"]
    inputs = wan_s2v_recipe.layout(c, SIZE, past is not None) | {
        "text": given["text"][None],
        "reference": patchify(given["reference"][None], c.patch_size),
        "audio": torch.cat([audio[..., :1].expand(-1, -1, c.motion_frames), audio], -1)[None],
    }
    if past is not None:
        inputs["motion"] = given["motion"][None]
    if posed:
        inputs["pose"] = patchify(given["pose"][None], c.patch_size)
    return c, flat, reference, given, inputs


def evaluated(c, flat, given, inputs, time, junk=0.0):
    """Our velocity [C, F, H, W]. junk: in place of latents where there are none."""
    x = patchify(given["x"][None], c.patch_size)
    behind = torch.full((1, len(inputs["positions"]) - x.shape[1], x.shape[2]), junk).double()
    network = Network(wan_s2v.FAMILY, c, dtype=torch.float64)
    y = predict(network, flat, torch.cat([x, behind], 1), time, inputs)
    return unpatchify(y[:, : x.shape[1]], c.patch_size, SIZE)[0]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_second_writing_and_reads_every_weight(name):
    c, flat, reference, given, inputs = case(name)
    assert shapes(wan_s2v.spec(c)) == shapes(flat)
    time = torch.tensor([637.0])
    with torch.no_grad():
        expected = reference(**given, t=time, past_frames=(c.motion_frames, c.past))
    weights = tracked(flat)
    with torch.enable_grad():
        y = evaluated(c, weights, given, inputs, time)
    close(y.detach(), expected)
    idle = {f"{name}.{part}" for _, _, layer in wan_s2v.BUCKETS for name in [f"frame_packer.{layer}"]
            for part in ("weight", "bias")} if "motion" not in inputs else set()  # fmt: skip
    idle |= {"cond_encoder.weight"} if "pose" not in inputs else set()
    assert set(unread(y, weights)) == idle


def test_what_stands_behind_the_video_in_the_latents_is_not_read():
    c, flat, _, given, inputs = case("past frames")
    time = torch.tensor([637.0])
    a, b = (evaluated(c, flat, given, inputs, time, junk) for junk in (0.0, 3.0))
    assert torch.equal(a, b)


def test_no_pose_is_a_pose_of_zeros():
    c, flat, _, given, inputs = case("first segment")
    time = torch.tensor([637.0])
    zeros = inputs | {"pose": patchify(given["pose"][None], c.patch_size)}
    torch.testing.assert_close(
        evaluated(c, flat, given, inputs, time), evaluated(c, flat, given, zeros, time), rtol=0, atol=1e-12
    )


def test_each_latent_frame_hears_its_own_sound():
    """Four frames of sound reach the latent frame that they belong to and, by the past that each
    convolution sees, later ones; never an earlier one.
    """
    c, flat, _, _, inputs = case("first segment")
    encoded = [
        wan_s2v.encode_audio(c, Weights(flat, dtype=torch.float64), audio)[0][0, c.past :]
        for audio in (
            inputs["audio"],
            torch.cat([inputs["audio"][..., :-3], inputs["audio"][..., -3:] + 1], -1),
        )
    ]
    changed = (encoded[0] - encoded[1]).abs().amax((1, 2)) > 0
    assert changed.tolist() == [False, False, True]


def released_keys():
    """Key -> shape of the released checkpoint, from the published modules at the released sizes."""
    c = wan_s2v.Config(**RELEASED)
    with torch.device("meta"):
        return c, {name: tuple(x.shape) for name, x in Reference(c).state_dict().items()}


RELEASED = {
    "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "audio_dim": 1024, "enable_adain": True,
    "audio_inject_layers": (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39),
    "zero_timestep": True, "zero_init": True, "cond_dim": 16,
}  # fmt: skip


def test_the_released_layout_is_consumed_whole():
    c, keys = released_keys()
    row = wan_s2v.key_map(c).row
    assert {row(key): shape for key, shape in keys.items()} == shapes(wan_s2v.spec(c))
    assert "casual_audio_encoder.encoder.conv1_global.conv.bias" in keys
    assert sum(torch.Size(shape).numel() for shape in keys.values()) / 1e9 == pytest.approx(16.3, abs=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_motioner": True}, "enable_motioner is True; only False is supported"),
        ({"enable_framepack": False}, "enable_framepack is False; only True is supported"),
        ({"zero_timestep": False}, "zero_timestep is False; only True is supported"),
        ({"adain_mode": "output"}, "adain_mode is 'output'; only 'attn_norm' is supported"),
        ({"num_heads": 3}, "dim is 32; it must be a multiple of 4 and of twice num_heads, 6"),
        (
            {"audio_inject_layers": (0, 4)},
            "audio_inject_layers is [0, 4]; each must be a layer from 0 to 3, once",
        ),
    ],
)
def test_a_config_that_does_not_run_is_one_sentence(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        wan_s2v.Config(**asdict(TINY) | changes)


def test_bfloat16_is_near_float64():
    """Weights and latents in bfloat16, float32 where the spec says so."""
    c, flat, _, given, inputs = case("past frames")
    types = {row.name: torch.float32 if row.float32 else torch.bfloat16 for row in wan_s2v.spec(c)}
    time, x = torch.tensor([637.0]), patchify(given["x"][None], c.patch_size)
    behind = torch.zeros(1, len(inputs["positions"]) - x.shape[1], x.shape[2])
    tokens = torch.cat([x, behind], 1)
    exact, rounded = (
        predict(Network(wan_s2v.FAMILY, c, dtype=dtype), weights, tokens.to(dtype), time, inputs)
        for dtype, weights in (
            (torch.float64, flat),
            (torch.bfloat16, {name: x.to(types[name]) for name, x in flat.items()}),
        )
    )
    assert rounded.dtype == torch.bfloat16
    error = (rounded.double() - exact)[:, : x.shape[1]].square().mean().sqrt()
    assert error < 0.05 * exact[:, : x.shape[1]].std()


def test_hoisted_rows_equal_single_evaluations():
    """What the loop does: hoist once for all timesteps, then each step with its row."""
    c, flat, _, given, inputs = case("past frames")
    network = Network(wan_s2v.FAMILY, c, dtype=torch.float64)
    times = torch.tensor([999.0, 1.0])
    request, steps = wan_s2v.hoist(c, network.plan, Weights(flat, dtype=torch.float64), inputs, times)
    x = patchify(given["x"][None], c.patch_size)
    tokens = torch.cat([x, x.new_zeros(1, len(inputs["positions"]) - x.shape[1], x.shape[2])], 1)
    calls = {block: plain(network, block) for block, _ in wan_s2v.blocks(c)}
    for i, t in enumerate(times):
        step = divide(network, {key: rows[i] for key, rows in steps.items()})
        branch = Branch(divide(network, request), step)
        (y,) = walk(network, [calls], divide(network, flat), tokens, [branch])
        close(y, predict(network, flat, tokens, t[None], inputs), 1e-12)
