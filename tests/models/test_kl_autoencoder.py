"""The image autoencoders against diffusers.AutoencoderKL and AutoencoderKLFlux2 in float64, every parameter
redrawn.
"""

import functools
import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLFlux2

from tests.parity import Recording, close, doubles, draw, randomised, shapes
from tinydiff.models.autoencoders import kl
from tinydiff.ops.weights import Weights


def _config(widths, **fields):
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }
    return kl.Config(block_out_channels=widths, norm_num_groups=2, sample_size=1024, **blocks, **fields)


PLAIN = {"use_quant_conv": False, "use_post_quant_conv": False}
CONFIGS = {
    "FLUX.1": _config((4, 6, 8), layers_per_block=2, scaling_factor=0.3611, shift_factor=0.1159, **PLAIN),
    "GLM-Image": _config(
        (4, 8, 8),
        layers_per_block=3,
        mid_block_add_attention=False,
        latents_mean=(0.1, 0.2, -0.3, 0.4),
        latents_std=(1.0, 2.0, 0.5, 0.7),
        **PLAIN,
    ),
    "Stable Diffusion": _config((4, 4), latent_channels=3, in_channels=1, out_channels=2),
    "FLUX.2": _config((4, 6, 8), layers_per_block=2, latent_channels=4, patch_size=(2, 2)),
    "FLUX.2 with a small decoder": _config(
        (4, 8), latent_channels=3, patch_size=(2, 2), decoder_block_out_channels=(2, 6)
    ),
}
NAMES = list(CONFIGS)
FLUX2 = [name for name in NAMES if CONFIGS[name].patch_size]


def _build(c):
    kind = AutoencoderKL if c.patch_size is None else AutoencoderKLFlux2
    known = inspect.signature(kind.__init__).parameters
    return kind(**{name: value for name, value in vars(c).items() if name in known})


@functools.cache
def _pair(name):
    """Config, reference and weights. The reference is not told to tile."""
    c = CONFIGS[name]
    reference = _build(c)
    if c.patch_size is not None:
        assert reference.state_dict().keys() - {row.name for row in kl.spec(c)} == {"bn.num_batches_tracked"}
        reference.bn.num_batches_tracked = None  # the counter of training is no weight
    flat = randomised(reference, 1)
    if c.patch_size is not None:
        flat["bn.running_var"] = flat["bn.running_var"].abs() + 0.01  # so that eps tells
        reference.load_state_dict(flat)
    return c, reference, flat


def _pictures(c, rows, columns, frames=1):
    """Pixels in [-1, 1] that make `rows` x `columns` normalised latents."""
    side = c.scale_factor_spatial
    return draw(2, c.in_channels, frames, rows * side, columns * side, seed=7).clamp(-1, 1)


def _normalised(c, reference, z_BZHW):
    """As the pipelines do it: FLUX.2's patchify, then apply the batch norm's statistics."""
    if c.patch_size is not None:
        return reference.bn(F.pixel_unshuffle(z_BZHW, 2))
    # A mean and a deviation per channel are read by no pipeline of the families that run here.
    return (z_BZHW - (c.shift_factor or 0)) * c.scaling_factor


@pytest.mark.parametrize("name", NAMES)
def test_the_references_config_is_accepted(name):
    c, reference, _ = _pair(name)
    stored = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in reference.config.items()
        if key[0] != "_"
    }
    assert kl.Config(**stored) == c


@pytest.mark.parametrize("name", NAMES)
def test_the_spec_names_every_weight_and_all_are_read(name):
    c, _, flat = _pair(name)
    rows = list(kl.spec(c))
    assert shapes(rows) == shapes(flat)
    halves, shared = (list(kl.encoder_spec(c)), list(kl.decoder_spec(c))), list(kl.statistics_spec(c))
    assert rows == [*halves[0], *halves[1], *shared]
    seen = Recording(flat)
    z = kl.encode(c, Weights(seen), _pictures(c, 1, 1))
    assert seen.read == {row.name for row in halves[0] + shared}
    seen.read.clear()
    kl.decode(c, Weights(seen), z)
    assert seen.read == {row.name for row in halves[1] + shared}


@pytest.mark.parametrize("name", NAMES)
def test_encode_equals_the_reference(name):
    c, reference, flat = _pair(name)
    x, w = _pictures(c, 3, 5), Weights(flat)
    with doubles():
        expected = reference.encode(x[:, :, 0]).latent_dist
    moments = kl.moments(c, w, x)[:, :, 0]
    close(moments[:, : c.latent_channels], expected.mode())
    close(moments[:, c.latent_channels :].clamp(-30, 20), expected.logvar)
    latents = kl.encode(c, w, x)
    assert latents.shape == (2, c.z_dim, 1, 3, 5)
    close(latents[:, :, 0], _normalised(c, reference, expected.mode()))


@pytest.mark.parametrize("name", NAMES)
def test_decode_equals_the_reference(name):
    c, reference, flat = _pair(name)
    z, w = draw(2, c.z_dim, 1, 3, 5), Weights(flat)
    raw = kl.raw_latents(c, w, z)
    close(_normalised(c, reference, raw[:, :, 0])[:, :, None], z)
    with doubles():
        expected = reference.decode(raw[:, :, 0]).sample
    close(kl.raw_pixels(c, w, raw)[:, :, 0], expected)
    close(kl.decode(c, w, z)[:, :, 0], expected.clamp(-1, 1))
    close(kl.decode(c, w, kl.normalise(c, w, raw))[:, :, 0], expected.clamp(-1, 1))


@pytest.mark.parametrize("name", NAMES)
def test_frames_are_images(name):
    c, _, flat = _pair(name)
    w, x = Weights(flat), _pictures(c, 1, 2, frames=3)
    z = kl.encode(c, w, x)
    y = kl.decode(c, w, z)
    for i in range(3):
        close(z[:, :, i : i + 1], kl.encode(c, w, x[:, :, i : i + 1]), 1e-12)
        close(y[:, :, i : i + 1], kl.decode(c, w, z[:, :, i : i + 1]), 1e-12)
    for chunk in (1, 2):
        close(kl.encode(c, w, x, chunk), z, 1e-12)
        close(kl.decode(c, w, z, chunk), y, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_tiles_equal_the_tiles_of_the_reference(name):
    """The same squares, strides and blends, where a quarter of a square is an integer of latents."""
    c, _, flat = _pair(name)
    reference = _build(c).double().eval()
    absent = reference.load_state_dict(flat, strict=False)
    assert not absent.unexpected_keys and set(absent.missing_keys) <= {"bn.num_batches_tracked"}
    reference.enable_tiling()
    side = 8 * c.stride
    reference.tile_sample_min_size, reference.tile_latent_min_size = side, 8

    w, z = Weights(flat), draw(1, c.z_dim, 1, 12, 14)
    raw = kl.raw_latents(c, w, z)
    with doubles():
        pixels = reference.decode(raw[:, :, 0]).sample
    ours = kl.raw_pixels(c, w, raw, tile=side)
    close(ours[:, :, 0], pixels)
    assert (ours - kl.raw_pixels(c, w, raw)).abs().max() > 1e-3, "tiles were not used"

    x = draw(1, c.in_channels, 1, 13 * c.scale_factor_spatial, 10 * c.scale_factor_spatial, seed=3).clamp(
        -1, 1
    )
    with doubles():
        mean = reference.encode(x[:, :, 0]).latent_dist.mode()
    close(kl.encode(c, w, x, tile=side)[:, :, 0], _normalised(c, reference, mean))


def test_an_image_within_one_tile_is_not_tiled():
    c, _, flat = _pair("FLUX.2")
    z = draw(1, c.z_dim, 1, 3, 2)
    tile = 3 * c.scale_factor_spatial
    assert torch.equal(kl.decode(c, Weights(flat), z, tile=tile), kl.decode(c, Weights(flat), z))


@pytest.mark.parametrize("name", FLUX2)
def test_the_batch_norms_eps_is_the_configs(name):
    """ERNIE-Image's pipeline reads the same statistics with 1e-5, whatever the config says."""
    c, _, flat = _pair(name)
    ernie, w, z = replace(c, batch_norm_eps=1e-5), Weights(flat), draw(1, c.z_dim, 1, 1, 1)
    std = (flat["bn.running_var"] + 1e-5).sqrt().view(1, -1, 1, 1)
    expected = F.pixel_shuffle(z[:, :, 0] * std + flat["bn.running_mean"].view(1, -1, 1, 1), 2)
    close(kl.raw_latents(ernie, w, z)[:, :, 0], expected)
    assert (kl.raw_latents(c, w, z)[:, :, 0] - expected).abs().max() > 1e-6


def test_what_the_denoiser_sees_of_the_released_shapes():
    widths = (128, 256, 512, 512)
    flux1, flux2 = _config(widths, latent_channels=16), _config(widths, latent_channels=32, patch_size=(2, 2))
    assert [(c.z_dim, c.scale_factor_spatial, c.scale_factor_temporal) for c in (flux1, flux2)] == [
        (16, 8, 1),
        (128, 16, 1),
    ]


def test_the_counter_of_training_is_no_weight():
    assert kl.key_map(kl.Config()).row("bn.num_batches_tracked") is None
    assert kl.key_map(kl.Config()).row("bn.running_var") == "bn.running_var"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"act_fn": "relu"}, r"act_fn is 'relu'.*'silu'"),
        ({"down_block_types": ("DownEncoderBlock2D",) * 2}, "down_block_types"),
        (
            {"up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D")},
            r"AttnUpDecoderBlock2D.*UpDecoderBlock2D",
        ),
        (
            {"decoder_block_out_channels": (4, 8)},
            "decoder_block_out_channels has 2 widths and block_out_channels 3",
        ),
        ({"patch_size": (1, 2)}, r"patch_size is \[1, 2\]"),
    ],
)
def test_what_is_not_implemented_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIGS["FLUX.1"], **fields)


@pytest.mark.parametrize(("tile", "decoded", "encoded"), [(1, 1, 4), (-64, 1, 4), (7 / 2, 4, 4)])
def test_a_tile_that_cuts_latents_is_refused_with_the_nearest_that_does_not(tile, decoded, encoded):
    """In latents: the side of a tile, and the nearest that can be decoded and encoded."""
    c, _, flat = _pair("FLUX.2")
    w, side = Weights(flat), int(tile * c.stride) + (tile == 1)
    for fn, x, latents in (
        (kl.decode, draw(1, c.z_dim, 1, 3, 2), decoded),
        (kl.encode, draw(1, c.in_channels, 1, 32, 32), encoded),
    ):
        words = f"tile: {side} pixels is no multiple of .*; take {latents * c.stride}$"
        with pytest.raises(ValueError, match=words):
            fn(c, w, x, tile=side)
