"""HunyuanVideo-1.5's autoencoder against diffusers' AutoencoderKLHunyuanVideo15 in float64, every parameter
redrawn.
"""

import functools
from dataclasses import asdict, replace

import pytest
from diffusers import AutoencoderKLHunyuanVideo15

from tests.parity import Recording, close, doubles, draw, randomised, shapes
from tinydiff.models.autoencoders import hunyuan15
from tinydiff.ops.weights import Weights

CONFIG = hunyuan15.Config(
    latent_channels=2, block_out_channels=(8, 16, 16), layers_per_block=1, spatial_compression_ratio=4
)


@functools.cache
def _pair():
    reference = AutoencoderKLHunyuanVideo15(**asdict(CONFIG))
    return reference, randomised(reference, 1)


def test_the_spec_names_every_weight_and_all_are_read():
    _, flat = _pair()
    assert shapes(hunyuan15.spec(CONFIG)) == shapes(flat)
    seen = Recording(flat)
    hunyuan15.encode(CONFIG, Weights(seen), draw(1, 3, 5, 8, 4))
    assert seen.read == {row.name for row in hunyuan15.encoder_spec(CONFIG)}
    seen.read.clear()
    hunyuan15.decode(CONFIG, Weights(seen), draw(1, 2, 2, 2, 1))
    assert seen.read == {row.name for row in hunyuan15.decoder_spec(CONFIG)}


@pytest.mark.parametrize("frames", [1, 13])
def test_encode_equals_the_reference_in_one_pass_and_in_chunks(frames):
    reference, flat = _pair()
    x, w = draw(1, 3, frames, 8, 12, seed=7), Weights(flat)
    with doubles():
        expected = reference.encode(x).latent_dist
    moments = hunyuan15.moments(CONFIG, w, x)
    close(moments[:, :2], expected.mean)
    close(moments[:, 2:].clamp(-30, 20), expected.logvar)
    close(hunyuan15.encode(CONFIG, w, x), expected.mean * CONFIG.scaling_factor)
    for chunk in (1, 2, 3):
        close(hunyuan15.moments(CONFIG, w, x, chunk), moments, 1e-12)


@pytest.mark.parametrize("frames", [1, 4])
def test_decode_equals_the_reference_in_one_pass_and_in_chunks(frames):
    reference, flat = _pair()
    z, w = draw(1, 2, frames, 3, 2, seed=8), Weights(flat)
    with doubles():
        expected = reference.decode(z).sample
    pixels = hunyuan15.raw_pixels(CONFIG, w, z)
    assert pixels.shape[2] == 4 * frames - 3
    close(pixels, expected)
    close(hunyuan15.decode(CONFIG, w, z * CONFIG.scaling_factor), expected.clamp(-1, 1))
    for chunk in (1, 2, 3):
        close(hunyuan15.raw_pixels(CONFIG, w, z, chunk), pixels, 1e-12)


def test_tiles_equal_the_reference():
    """Squares of 16 pixels that overlap by 4."""
    _, flat = _pair()
    reference = AutoencoderKLHunyuanVideo15(**asdict(CONFIG)).double()
    reference.load_state_dict(flat)
    reference.enable_tiling(16, 16, 4, 4)
    x, z, w = draw(1, 3, 5, 16, 28, seed=7), draw(1, 2, 2, 4, 7, seed=8), Weights(flat)
    with doubles():
        encoded, decoded = reference.encode(x).latent_dist.mean, reference.decode(z).sample
    close(hunyuan15.moments(CONFIG, w, x, tile=16)[:, :2], encoded)
    close(hunyuan15.raw_pixels(CONFIG, w, z, tile=16), decoded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"spatial_compression_ratio": 8},
            "spatial_compression_ratio is 8; 5 widths in block_out_channels make 16",
        ),
        (
            {"temporal_compression_ratio": 8},
            "temporal_compression_ratio is 8; it must be 4, with at least 3 widths in block_out_channels",
        ),
        (
            {"upsample_match_channel": False},
            "upsample_match_channel is false; every released autoencoder of this kind has true",
        ),
    ],
)
def test_a_config_that_is_not_implemented_is_refused(changes, message):
    with pytest.raises(ValueError) as error:
        replace(hunyuan15.Config(), **changes)
    assert str(error.value) == message
