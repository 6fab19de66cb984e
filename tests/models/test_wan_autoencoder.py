"""The Wan autoencoders against diffusers' AutoencoderKLWan and AutoencoderKLQwenImage in float64, every
parameter redrawn.
"""

import functools
import inspect

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan

from tests.parity import Recording, close, doubles, draw, randomised, shapes
from tinydiff.models.autoencoders import wan as autoencoder
from tinydiff.ops.weights import Weights

STATISTICS = {"latents_mean": (0.1, 0.2, -0.3, 0.4), "latents_std": (1.0, 2.0, 0.5, 0.7)}
CONFIGS = {
    "Wan2.1": autoencoder.Config(base_dim=6, z_dim=4, dim_mult=(1, 2, 4, 4), num_res_blocks=2, **STATISTICS),
    "Wan2.2": autoencoder.Config(
        base_dim=6,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        **STATISTICS,
    ),
    "time in the first stage": autoencoder.Config(
        base_dim=4,
        z_dim=4,
        dim_mult=(1, 3, 2, 2),
        num_res_blocks=1,
        temperal_downsample=(True, False, True),
        **STATISTICS,
    ),
}
NAMES = list(CONFIGS)


def _fields(c, kind):
    """The config as the class takes it."""
    known = inspect.signature(kind.__init__).parameters
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in vars(c).items()
        if key in known
    }


@functools.cache
def _pair(name):
    """Config, reference and weights. The reference is not told to tile."""
    c = CONFIGS[name]
    reference = AutoencoderKLWan(**_fields(c, AutoencoderKLWan))
    return c, reference, randomised(reference, 1)


def _clip(c, frames, rows, columns, batch=2):
    """Pixels in [-1, 1] that make `rows` x `columns` latents."""
    return draw(
        batch, 3, frames, rows * c.scale_factor_spatial, columns * c.scale_factor_spatial, seed=7
    ).clamp(-1, 1)


def _raw(c, z):
    mean, std = (
        torch.tensor(values, dtype=z.dtype).view(1, -1, 1, 1, 1) for values in (c.latents_mean, c.latents_std)
    )
    return z * std + mean


@pytest.mark.parametrize("name", NAMES)
def test_the_spec_names_every_weight_and_all_are_read(name):
    c, _, flat = _pair(name)
    rows = list(autoencoder.spec(c))
    assert shapes(rows) == shapes(flat)
    assert rows == [*autoencoder.encoder_spec(c), *autoencoder.decoder_spec(c)]
    seen = Recording(flat)
    autoencoder.encode(c, Weights(seen), _clip(c, 9, 1, 1))
    assert seen.read == {row.name for row in autoencoder.encoder_spec(c)}
    seen.read.clear()
    autoencoder.decode(c, Weights(seen), draw(2, 4, 3, 1, 1))
    assert seen.read == {row.name for row in autoencoder.decoder_spec(c)}


@pytest.mark.parametrize("frames", [1, 13])
@pytest.mark.parametrize("name", NAMES)
def test_encode_equals_the_reference_in_one_pass_and_in_chunks(name, frames):
    c, reference, flat = _pair(name)
    x, w = _clip(c, frames, 1, 3), Weights(flat)
    with doubles():
        expected = reference.encode(x).latent_dist
    moments = autoencoder.moments(c, w, x)
    close(moments[:, : c.z_dim], expected.mean)
    close(moments[:, c.z_dim :].clamp(-30, 20), expected.logvar)
    close(_raw(c, autoencoder.encode(c, w, x)), expected.mean)
    for chunk in (1, 2, 3):
        close(autoencoder.moments(c, w, x, chunk), moments, 1e-12)


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_decode_equals_the_reference_in_one_pass_and_in_chunks(name, frames):
    c, reference, flat = _pair(name)
    z, w = draw(2, c.z_dim, frames, 3, 1), Weights(flat)
    with doubles():
        expected = reference.decode(_raw(c, z)).sample
    y = autoencoder.decode(c, w, z)
    assert y.shape[2] == 4 * frames - 3
    close(y, expected)
    for chunk in (1, 2, 3):
        close(autoencoder.decode(c, w, z, chunk), y, 1e-12)


def _tiling_reference(name, side):
    c, _, flat = _pair(name)
    reference = AutoencoderKLWan(**_fields(c, AutoencoderKLWan)).double().eval()
    reference.load_state_dict(flat)
    reference.enable_tiling(side, side, side * 3 // 4, side * 3 // 4)
    return c, reference, Weights(flat)


@pytest.mark.parametrize("name", NAMES[:2])
def test_tiles_equal_the_tiles_of_the_reference(name):
    """The same squares, strides and blends. The reference measures the encoder's squares after folding pixels
    into channels.
    """
    c, reference, w = _tiling_reference(name, 4 * CONFIGS[name].scale_factor_spatial)
    z = draw(1, c.z_dim, 2, 5, 6)
    with doubles():
        pixels = reference.decode(_raw(c, z)).sample
    tiled = autoencoder.decode(c, w, z, tile=4 * c.scale_factor_spatial)
    close(tiled, pixels)
    close(autoencoder.decode(c, w, z, chunk=1, tile=4 * c.scale_factor_spatial), tiled, 1e-12)
    assert (tiled - autoencoder.decode(c, w, z)).abs().max() > 1e-3, "tiles were not used"

    fold = c.patch_size or 1
    x = _clip(c, 1, 5 * fold, 6, batch=1)
    with doubles():
        mean = reference.encode(x).latent_dist.mean
    close(_raw(c, autoencoder.encode(c, w, x, tile=4 * c.scale_factor_spatial * fold)), mean)


def test_an_image_within_one_tile_is_not_tiled():
    c, _, flat = _pair("Wan2.1")
    z = draw(1, c.z_dim, 1, 3, 2)
    assert torch.equal(
        autoencoder.decode(c, Weights(flat), z, tile=3 * 8), autoencoder.decode(c, Weights(flat), z)
    )


def test_attention_in_other_stages_is_refused():
    with pytest.raises(ValueError, match="attn_scales"):
        autoencoder.Config(attn_scales=(0.5,))


# --- Qwen-Image's images

QWEN = {"Qwen-Image": 3, "Qwen-Image-Layered": 4}


@functools.cache
def _qwen(channels):
    c = autoencoder.Config(
        base_dim=6, z_dim=4, dim_mult=(1, 2, 4, 4), num_res_blocks=2, input_channels=channels, **STATISTICS
    )
    reference = AutoencoderKLQwenImage(**_fields(c, AutoencoderKLQwenImage))
    return c, reference, randomised(reference, 1)


@pytest.mark.parametrize("channels", QWEN.values(), ids=QWEN)
def test_an_image_of_qwen_image_equals_its_reference(channels):
    """One frame: the network's weights over time are in the files, and nothing reads them."""
    c, reference, flat = _qwen(channels)
    stored = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in reference.config.items()
        if key[0] != "_"
    }
    assert autoencoder.Config(**stored) == c and (c.in_channels, c.out_channels) == (channels, channels)
    assert shapes(autoencoder.spec(c)) == shapes(flat)

    seen = Recording(flat)
    x, z = draw(2, channels, 1, 24, 40, seed=7).clamp(-1, 1), draw(2, c.z_dim, 1, 5, 3)
    with doubles():
        mean = reference.encode(x).latent_dist.mode()
        pixels = reference.decode(_raw(c, z)).sample
    latents = autoencoder.encode(c, Weights(seen), x)
    assert latents.shape == (2, c.z_dim, 1, 3, 5)
    close(_raw(c, latents), mean)
    close(autoencoder.decode(c, Weights(seen), z), pixels)
    assert set(flat) - seen.read == {name for name in flat if ".time_conv." in name} != set()


def test_tiles_of_qwen_image_equal_those_of_its_reference():
    c, _, flat = _qwen(4)
    reference = AutoencoderKLQwenImage(**_fields(c, AutoencoderKLQwenImage)).double().eval()
    reference.load_state_dict(flat)
    side = 4 * c.scale_factor_spatial
    reference.enable_tiling(side, side, side * 3 // 4, side * 3 // 4)
    z, x = draw(1, c.z_dim, 1, 5, 6), draw(1, 4, 1, 48, 40, seed=7).clamp(-1, 1)
    with doubles():
        pixels, mean = reference.decode(_raw(c, z)).sample, reference.encode(x).latent_dist.mode()
    # the reference videos a whole image and leaves a tiled one to its pipeline
    close(autoencoder.decode(c, Weights(flat), z, tile=side), pixels.clamp(-1, 1))
    close(_raw(c, autoencoder.encode(c, Weights(flat), x, tile=side)), mean)
