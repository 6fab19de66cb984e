"""HunyuanVideo's autoencoder against diffusers' AutoencoderKLHunyuanVideo in float64, every parameter
redrawn.
"""

import functools
from dataclasses import asdict, replace

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo

from tests.parity import Recording, close, doubles, draw, randomised, shapes
from tinydiff.models.autoencoders import hunyuan
from tinydiff.ops.weights import Weights

CONFIG = hunyuan.Config(
    latent_channels=2,
    down_block_types=("HunyuanVideoDownBlock3D",) * 3,
    up_block_types=("HunyuanVideoUpBlock3D",) * 3,
    block_out_channels=(4, 6, 8),
    layers_per_block=1,
    norm_num_groups=2,
    spatial_compression_ratio=4,
)


@functools.cache
def _pair():
    reference = AutoencoderKLHunyuanVideo(**asdict(CONFIG))
    return reference, randomised(reference, 1)


def test_the_spec_names_every_weight_and_all_are_read():
    _, flat = _pair()
    rows = list(hunyuan.spec(CONFIG))
    assert shapes(rows) == shapes(flat)
    seen = Recording(flat)
    hunyuan.encode(CONFIG, Weights(seen), draw(1, 3, 5, 8, 4))
    assert seen.read == {row.name for row in hunyuan.encoder_spec(CONFIG)}
    seen.read.clear()
    hunyuan.decode(CONFIG, Weights(seen), draw(1, 2, 2, 2, 1))
    assert seen.read == {row.name for row in hunyuan.decoder_spec(CONFIG)}


@pytest.mark.parametrize("frames", [1, 13, 17, 29])
def test_encode_equals_the_reference(frames):
    """More than 16 frames are coded in tiles along time, as the reference does unasked."""
    reference, flat = _pair()
    x = draw(1, 3, frames, 8, 12, seed=7)
    with doubles():
        expected = reference.encode(x).latent_dist
    moments = hunyuan.moments(CONFIG, Weights(flat), x)
    close(moments[:, :2], expected.mean)
    close(moments[:, 2:].clamp(-30, 20), expected.logvar)
    close(hunyuan.encode(CONFIG, Weights(flat), x), expected.mean * CONFIG.scaling_factor)


@pytest.mark.parametrize("frames", [1, 4, 5, 8])
def test_decode_equals_the_reference(frames):
    reference, flat = _pair()
    z = draw(1, 2, frames, 3, 2, seed=8)
    with doubles():
        expected = reference.decode(z / CONFIG.scaling_factor).sample
    assert expected.shape[2] == 4 * frames - 3
    close(hunyuan.raw_pixels(CONFIG, Weights(flat), z / CONFIG.scaling_factor), expected)
    close(hunyuan.decode(CONFIG, Weights(flat), z), expected.clamp(-1, 1))


def test_tiles_equal_the_reference():
    """Squares of 16 pixels that overlap by 4, within tiles along time."""
    _, flat = _pair()
    reference = AutoencoderKLHunyuanVideo(**asdict(CONFIG)).double()
    reference.load_state_dict(flat)
    sides = {f"tile_sample_min_{side}": 16 for side in ("height", "width")}
    reference.enable_tiling(**sides, **{f"tile_sample_stride_{side}": 12 for side in ("height", "width")})
    x, z = draw(1, 3, 17, 16, 28, seed=7), draw(1, 2, 5, 4, 7, seed=8)
    with doubles():
        encoded, decoded = reference.encode(x).latent_dist.mean, reference.decode(z).sample
    w = Weights(flat)
    close(hunyuan.moments(CONFIG, w, x, tile=16)[:, :2], encoded)
    close(hunyuan.raw_pixels(CONFIG, w, z, tile=16), decoded)


def test_the_passes_are_part_of_the_result():
    """`chunk` says how much memory may be used; the frames of a tile do not follow it."""
    _, flat = _pair()
    z = draw(1, 2, 7, 2, 2, seed=8)
    whole = hunyuan.decode(CONFIG, Weights(flat), z)
    for chunk in (1, 3):
        assert torch.equal(hunyuan.decode(CONFIG, Weights(flat), z, chunk), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn is 'gelu'; every released autoencoder of this kind uses 'silu'"),
        (
            {"spatial_compression_ratio": 16},
            "spatial_compression_ratio is 16; 4 widths in block_out_channels make 8",
        ),
        (
            {"temporal_compression_ratio": 8},
            "temporal_compression_ratio is 8; it must be 4, with at least 3 widths in block_out_channels",
        ),
        ({"norm_num_groups": 24}, "norm_num_groups is 24, which a width of 128 does not divide by"),
        (
            {"up_block_types": ("UpDecoderBlock2D",) * 4},
            f"up_block_types is {['UpDecoderBlock2D'] * 4}; it must be HunyuanVideoUpBlock3D once per width "
            "of block_out_channels",
        ),
    ],
)
def test_a_config_that_is_not_implemented_is_refused(changes, message):
    with pytest.raises(ValueError) as error:
        replace(hunyuan.Config(), **changes)
    assert str(error.value) == message
