"""The tiny autoencoders in float64, every parameter redrawn: TAESD's shape against diffusers.AutoencoderTiny,
fal's against `Wrapped`.
"""

import functools
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import nn

from tests.parity import Recording, close, doubles, draw, randomised, shapes
from tinydiff.models.autoencoders import flux2_tiny, tiny
from tinydiff.ops.weights import Weights

SHAPE = {"num_encoder_blocks": (1, 2, 1), "num_decoder_blocks": (2, 1, 1)}
WIDTHS = {"encoder_block_out_channels": (6, 6, 6), "decoder_block_out_channels": (5, 5, 5)}


class Wrapped(nn.Module):
    """fal's autoencoder, written here from the description of its layers and the names of its weights: it is
    in no library.

    So what is proved is that the functions are this module; that this module is the released one, only the
    released files can say.
    """

    def __init__(self, c):
        super().__init__()
        inner, outer = c.latent_channels // 4, c.latent_channels
        self.tiny_vae = AutoencoderTiny(act_fn=c.act_fn, latent_channels=inner, **SHAPE, **WIDTHS)
        self.extra_encoder = nn.Conv2d(inner, outer, 4, 2, 1)
        self.extra_decoder = nn.ConvTranspose2d(outer, inner, 4, 2, 1)
        for name, n in (("residual_encoder", outer), ("residual_decoder", inner)):
            first, last = nn.Conv2d(n, n, 3, padding=1), nn.Conv2d(n, n, 3, padding=1)
            self.add_module(name, nn.Sequential(first, nn.GroupNorm(8, n), nn.SiLU(), last))

    def encode(self, x):
        z = self.extra_encoder(self.tiny_vae.encode(x).latents)
        return self.residual_encoder(z) + z

    def decode(self, z):
        z = self.extra_decoder(z)
        return self.tiny_vae.decode(self.residual_decoder(z) + z).sample


CONFIGS = {
    "TAESD": tiny.Config(**SHAPE, **WIDTHS),
    "scaled": tiny.Config(
        **SHAPE, **WIDTHS, latent_channels=7, act_fn="silu", scaling_factor=0.5, shift_factor=0.25
    ),
    "fal": flux2_tiny.Config(**SHAPE, **WIDTHS, latent_channels=64),
}
NAMES = list(CONFIGS)


def _taesd(c):
    return AutoencoderTiny(**{key: value for key, value in vars(c).items() if key != "block_out_channels"})


@functools.cache
def _case(name):
    """Module, config, reference's encode and decode of images [B, C, H, W], weights."""
    c = CONFIGS[name]
    if name == "fal":
        reference = Wrapped(c)
        return flux2_tiny, c, reference.encode, reference.decode, randomised(reference, 1)
    reference = _taesd(c)
    return (
        tiny,
        c,
        lambda x: reference.encode(x).latents,
        lambda z: reference.decode(z).sample,
        randomised(reference, 1),
    )


def _pictures(c, rows, columns, frames=1):
    return draw(2, 3, frames, rows * c.scale_factor_spatial, columns * c.scale_factor_spatial, seed=7).clamp(
        -1, 1
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_spec_names_every_weight_and_all_are_read(name):
    module, c, _, _, flat = _case(name)
    rows = list(module.spec(c))
    assert shapes(rows) == shapes(flat)
    assert rows == [*module.encoder_spec(c), *module.decoder_spec(c)]
    seen = Recording(flat)
    z = module.encode(c, Weights(seen), _pictures(c, 1, 1))
    assert seen.read == {row.name for row in module.encoder_spec(c)}
    seen.read.clear()
    module.decode(c, Weights(seen), z)
    assert seen.read == {row.name for row in module.decoder_spec(c)}


@pytest.mark.parametrize("name", NAMES)
def test_encode_equals_the_reference(name):
    module, c, encode, _, flat = _case(name)
    x = _pictures(c, 3, 5)
    with doubles():
        expected = encode(x[:, :, 0])
    if name == "scaled":
        expected = (expected - 0.25) * 0.5
    ours = module.encode(c, Weights(flat), x)
    assert ours.shape == (2, c.z_dim, 1, 3, 5)
    close(ours[:, :, 0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_decode_equals_the_reference(name):
    module, c, _, decode, flat = _case(name)
    z = draw(2, c.z_dim, 1, 3, 5) * 3  # beyond what is limited, too
    with doubles():
        expected = decode(z[:, :, 0] / 0.5 + 0.25 if name == "scaled" else z[:, :, 0])
    assert (expected.abs() < 1).double().mean() > 0.2, "all is clipped"
    close(module.decode(c, Weights(flat), z)[:, :, 0], expected.clamp(-1, 1))


@pytest.mark.parametrize("name", NAMES)
def test_frames_are_images(name):
    module, c, _, _, flat = _case(name)
    w, x = Weights(flat), _pictures(c, 1, 2, frames=3)
    z = module.encode(c, w, x)
    y = module.decode(c, w, z)
    for chunk in (1, 2):
        close(module.encode(c, w, x, chunk), z, 1e-12)
        close(module.decode(c, w, z, chunk), y, 1e-12)
    close(z[:, :, 1:2], module.encode(c, w, x[:, :, 1:2]), 1e-12)
    close(y[:, :, 1:2], module.decode(c, w, z[:, :, 1:2]), 1e-12)


def test_tiles_differ_from_the_whole_only_where_they_overlap():
    """No parity: the reference's tiles overlap by an eighth and have the channels of TAESD written into them.
    Ours have no seams.

    A pixel depends on fewer latents around it than tiles overlap by, so outside the overlaps each is what it
    is in the whole image; inside, the first column of an overlap still is, and the error fades in from
    there and out again to the last.
    """
    c = replace(CONFIGS["TAESD"], num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1))
    w = Weights(randomised(_taesd(c), 1))
    side, keep, stride = (
        32,
        24,
        c.scale_factor_spatial,
    )  # in latents: tiles start at 0 and 24, and overlap in 24 to 32
    z = draw(1, c.z_dim, 1, 6, 50)
    whole, parts = tiny.decode(c, w, z), tiny.decode(c, w, z, tile=side * stride)
    error = (whole - parts).abs().amax((0, 1, 2, 3))
    assert error.shape == (50 * stride,)
    overlaps = torch.zeros_like(error, dtype=torch.bool)
    for start in (keep, 2 * keep):
        overlaps[start * stride + 1 : (start + side - keep) * stride] = True
    assert error[~overlaps].max() < 1e-12 < 1e-4 < error[overlaps].max(), "outside overlaps, or no tiles"

    x = _pictures(c, 6, 50)
    whole, parts = tiny.encode(c, w, x), tiny.encode(c, w, x, tile=side * stride)
    error = (whole - parts).abs().amax((0, 1, 2, 3))
    overlaps = torch.zeros_like(error, dtype=torch.bool)
    for start in (keep, 2 * keep):
        overlaps[start + 1 : start + side - keep] = True
    assert error[~overlaps].max() < 1e-12 < 1e-4 < error[overlaps].max(), "outside overlaps, or no tiles"


@pytest.mark.parametrize("name", NAMES)
def test_an_image_within_one_tile_is_not_tiled(name):
    module, c, _, _, flat = _case(name)
    z, tile = draw(1, c.z_dim, 1, 3, 2), 3 * c.scale_factor_spatial
    whole = module.decode(c, Weights(flat), z)
    assert torch.equal(module.decode(c, Weights(flat), z, tile=tile), whole)
    smaller = module.decode(c, Weights(flat), z, tile=2 * c.scale_factor_spatial)
    assert smaller.shape == whole.shape and not torch.equal(smaller, whole)


def test_the_references_config_is_accepted():
    c = CONFIGS["scaled"]
    stored = _taesd(c).config
    stored = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in stored.items()
        if key[0] != "_"
    }
    assert tiny.Config(**stored) == replace(c, block_out_channels=c.decoder_block_out_channels)


def test_the_released_shapes():
    assert (tiny.Config().scale_factor_spatial, tiny.Config().z_dim, tiny.Config().scale_factor_temporal) == (
        8,
        4,
        1,
    )
    c = flux2_tiny.Config()
    assert (c.scale_factor_spatial, c.z_dim, c.scale_factor_temporal) == (16, 128, 1)


@pytest.mark.parametrize(
    ("module", "fields", "message"),
    [
        (tiny, {"act_fn": "mish"}, r"'mish'.*relu"),
        (tiny, {"upsample_fn": "bilinear"}, r"'bilinear'.*'nearest'"),
        (tiny, {"upsampling_scaling_factor": 4}, r"upsampling_scaling_factor is 4.*2"),
        (tiny, {"encoder_block_out_channels": (64, 64, 64, 32)}, "encoder_block_out_channels"),
        (tiny, {"num_decoder_blocks": (3, 3)}, "decoder_block_out_channels has 4 stages"),
        (tiny, {"num_decoder_blocks": (3, 3), "decoder_block_out_channels": (64, 64)}, "num_encoder_blocks"),
        (flux2_tiny, {"latent_channels": 48}, "latent_channels is 48"),
        (flux2_tiny, {"act_fn": "mish"}, "'mish'"),
    ],
)
def test_what_is_not_implemented_is_refused(module, fields, message):
    with pytest.raises(ValueError, match=message):
        module.Config(**fields)
