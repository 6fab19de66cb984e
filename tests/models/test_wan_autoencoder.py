"""The Wan autoencoders against diffusers.AutoencoderKLWan in float64, every parameter redrawn."""

import functools

import pytest
import torch
from diffusers import AutoencoderKLWan

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
        base_dim=4, z_dim=4, dim_mult=(1, 3, 2, 2), num_res_blocks=1, temperal_downsample=(True, False, True), **STATISTICS
    ),
}
NAMES = list(CONFIGS)


@functools.cache
def _pair(name):
    """Config, reference and weights. The reference is not told to tile."""
    c = CONFIGS[name]
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(c).items() if key != "clip_output"}
    reference = AutoencoderKLWan(**fields)
    return c, reference, randomised(reference, 1)


def _clip(c, frames, rows, columns, batch=2):
    """Pixels in [-1, 1] that make `rows` x `columns` latents."""
    return draw(batch, 3, frames, rows * c.scale_factor_spatial, columns * c.scale_factor_spatial, seed=7).clamp(-1, 1)


def _raw(c, z):
    mean, std = (torch.tensor(values, dtype=z.dtype).view(1, -1, 1, 1, 1) for values in (c.latents_mean, c.latents_std))
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
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(c).items() if key != "clip_output"}
    reference = AutoencoderKLWan(**fields).double().eval()
    reference.load_state_dict(flat)
    reference.enable_tiling(side, side, side * 3 // 4, side * 3 // 4)
    return c, reference, Weights(flat)


@pytest.mark.parametrize("name", NAMES[:2])
def test_tiles_equal_the_tiles_of_the_reference(name):
    """The same squares, strides and blends. The reference measures the encoder's squares after folding pixels into channels."""
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


def test_a_picture_within_one_tile_is_not_tiled():
    c, _, flat = _pair("Wan2.1")
    z = draw(1, c.z_dim, 1, 3, 2)
    assert torch.equal(autoencoder.decode(c, Weights(flat), z, tile=3 * 8), autoencoder.decode(c, Weights(flat), z))


def test_attention_in_other_stages_is_refused():
    with pytest.raises(ValueError, match="attn_scales"):
        autoencoder.Config(attn_scales=(0.5,))
