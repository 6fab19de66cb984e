"""Every autoencoder on 2 and 4 ranks against itself on one, at heights that do not divide, in chunks and
tiles; and the bytes moved.
"""

from collections import Counter
from itertools import count
from math import prod

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parallel.pool import on_ranks
from tests.parallel.test_strips import RANKS, over_all
from tests.parity import close, draw
from tinydiff.models.autoencoders import flux2_tiny, kl, tiny, wan
from tinydiff.ops.weights import Weights

pytestmark = pytest.mark.slow

BLOCKS = {"num_encoder_blocks": (1, 2, 1), "num_decoder_blocks": (2, 1, 1)}
WIDTHS = {"encoder_block_out_channels": (6, 6, 6), "decoder_block_out_channels": (5, 5, 5)}
STATISTICS = {"latents_mean": (0.1, 0.2, -0.3, 0.4), "latents_std": (1.0, 2.0, 0.5, 0.7)}


def _kl(*widths, **fields):
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }
    return kl.Config(block_out_channels=widths, norm_num_groups=2, **blocks, **fields)


CASES = {
    "Wan2.1": (wan, wan.Config(base_dim=4, z_dim=4, num_res_blocks=1, **STATISTICS)),
    "Wan2.2": (
        wan,
        wan.Config(
            base_dim=4,
            decoder_base_dim=6,
            z_dim=4,
            num_res_blocks=1,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            **STATISTICS,
        ),
    ),
    "FLUX.1": (
        kl,
        _kl(4, 6, 8, shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False),
    ),
    "without attention": (kl, _kl(4, 8, latent_channels=3, mid_block_add_attention=False)),
    "FLUX.2": (kl, _kl(4, 6, 8, latent_channels=4, patch_size=(2, 2), decoder_block_out_channels=(2, 6, 4))),
    "TAESD": (tiny, tiny.Config(**BLOCKS, **WIDTHS)),
    "fal": (flux2_tiny, flux2_tiny.Config(**BLOCKS, **WIDTHS, latent_channels=64)),
}
CLIPS = ["Wan2.1", "Wan2.2"]


def _weights(rows):
    """Numbers that neither vanish nor explode, all drawn."""
    flat = {}
    for seed, row in zip(count(), rows):
        x = draw(*row.shape, seed=seed)
        long = row.shape[0] if row.name.endswith("gamma") else row.numel
        one = long == row.shape[0] and row.name.endswith(("gamma", "weight", "running_var"))
        flat[row.name] = (
            (1 + 0.3 * x).abs() if one else x * (0.3 if len(row.shape) == 1 else prod(row.shape[1:]) ** -0.5)
        )
    return flat


def _inputs(name, rows, columns, frames, dtype=torch.float64):
    """Module, config, weights, pixels and latents of the case."""
    module, c = CASES[name]
    flat = {key: tensor.to(dtype) for key, tensor in _weights(module.spec(c)).items()}
    side, channels = c.scale_factor_spatial, 3
    x = (
        draw(2, channels, (frames - 1) * c.scale_factor_temporal + 1, rows * side, columns * side, seed=7)
        .clamp(-1, 1)
        .to(dtype)
    )
    return module, c, Weights(flat), x, draw(2, c.z_dim, frames, rows, columns, seed=8).to(dtype)


def _agree(name, rows, columns, frames, dtype, tolerance, **options):
    """Encoding and decoding over all ranks are those of one, and so on every rank."""
    module, c, w, x, z = _inputs(name, rows, columns, frames, dtype)
    close(module.encode(c, w, x, **options, plan=over_all()), module.encode(c, w, x, **options), tolerance)
    close(module.decode(c, w, z, **options, plan=over_all()), module.decode(c, w, z, **options), tolerance)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", CASES)
def test_ranks_share_the_rows(name, ranks):
    on_ranks(ranks, _agree, name, 5, 3, 2, torch.float64, 1e-10)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", CASES)
def test_in_float32(name, ranks):
    on_ranks(ranks, _agree, name, 7, 1, 1, torch.float32, 1e-5)


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", [*CLIPS, "FLUX.1"])
def test_videos_in_chunks(name, ranks, chunk):
    on_ranks(ranks, _chunked, name, chunk)


def _chunked(name, chunk):
    """As in one pass on one rank: what is remembered between chunks is right at the edges too."""
    module, c, w, x, z = _inputs(name, 5, 1, 3)
    close(module.encode(c, w, x, chunk, plan=over_all()), module.encode(c, w, x), 1e-10)
    close(module.decode(c, w, z, chunk, plan=over_all()), module.decode(c, w, z), 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_fewer_rows_than_ranks(name):
    on_ranks(4, _agree, name, 3, 2, 1, torch.float64, 1e-12)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", ["Wan2.1", "Wan2.2", "FLUX.1", "fal"])
def test_ranks_share_the_tiles(name, ranks):
    _, c = CASES[name]
    on_ranks(ranks, _in_tiles, name, 4 * c.scale_factor_spatial)


def _in_tiles(name, tile):
    module, c, w, x, z = _inputs(name, 5, 4, 2)
    with Moved() as moved:
        latents, pixels = (
            fn(c, w, given, 1, tile, over_all()) for fn, given in ((module.encode, x), (module.decode, z))
        )
    assert set(moved.bytes) == {"all_gather_into_tensor"}, "tiles have no edges to exchange"
    expected = module.encode(c, w, x, 1, tile), module.decode(c, w, z, 1, tile)
    close(latents, expected[0], 1e-12)
    close(pixels, expected[1], 1e-12)
    assert (pixels - module.decode(c, w, z)).abs().max() > 1e-3, "tiles were not used"


# --- bytes ---


class Moved(TorchDispatchMode):
    """A context that counts the bytes this rank gives to each collective."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func.name().partition("::")
        if "c10d" in space and "wait" not in name:
            self.bytes[name.partition(".")[0]] += args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


def _moved(name, way, rows, columns, frames, chunk):
    module, c, w, x, z = _inputs(name, rows, columns, frames)
    with Moved() as moved:
        getattr(module, way)(c, w, x if way == "encode" else z, chunk, plan=over_all())
    return dict(moved.bytes)


def _wan_decoder(c, frames, columns):
    """(rows that reach over an edge, channels, frames, columns) of every convolution's input; (channels,
    pixels a row) of the middle.
    """
    first = (c.decoder_base_dim or c.base_dim) * c.dim_mult[-1]
    convs, last = [(2, c.z_dim, frames, columns), *[(2, first, frames, columns)] * 4], 0
    for blocks, resample, _ in wan.up_stages(c):
        for _, inner, outer in blocks:
            convs += [(2, inner, frames, columns), (2, outer, frames, columns)]
            last = outer
        if resample is not None:
            frames, columns = 2 * frames - 1 if resample.time else frames, 2 * columns
            convs.append((2, resample.width_in, frames, columns))
    return [*convs, (2, last, frames, columns)], first


def _kl_decoder(c, frames, columns):
    first = c.decoder_widths[-1]
    convs, last = [(2, c.latent_channels, frames, columns), *[(2, first, frames, columns)] * 4], 0
    for blocks, resample in kl.up_stages(c):
        for _, inner, outer in blocks:
            convs += [(2, inner, frames, columns), (2, outer, frames, columns)]
            last = outer
        if resample is not None:
            columns *= 2
            convs.append((2, last, frames, columns))
    return [*convs, (2, last, frames, columns)], first


def _kl_encoder(c, frames, columns):
    """A halving convolution reads a row of the strip below, none of the one above."""
    columns *= c.stride
    convs, last = [(2, c.in_channels, frames, columns)], 0
    for blocks, resample in kl.down_stages(c):
        for _, inner, outer in blocks:
            convs += [(2, inner, frames, columns), (2, outer, frames, columns)]
            last = outer
        if resample is not None:
            convs.append((1, last, frames, columns))
            columns //= 2
    return [*convs, *[(2, last, frames, columns)] * 5], last


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    ("name", "way", "layers", "frames", "chunk"),
    [
        ("Wan2.1", "decode", _wan_decoder, 3, None),
        ("Wan2.1", "decode", _wan_decoder, 3, 1),
        ("Wan2.2", "decode", _wan_decoder, 3, 2),
        ("FLUX.1", "decode", _kl_decoder, 1, None),
        ("FLUX.1", "encode", _kl_encoder, 2, None),
    ],
)
def test_nothing_moves_but_edges_and_what_all_must_see(name, way, layers, frames, chunk, ranks):
    """Over each edge between two strips, once: the rows that a convolution reads of the other's input, in
    chunks of a video no more.

    Bytes, of all ranks: edges * batch * sum over convolutions of (rows * channels * frames * columns) * bytes
    of a number. Gathered besides, each rank giving as much as the highest strip has: keys and values, the
    result, two moments per group of a norm.
    """
    batch, rows, columns, size = 2, 5, 3, 8
    _, c = CASES[name]
    convs, width = layers(c, frames, columns)
    answers = on_ranks(ranks, _moved, name, way, rows, columns, frames, chunk)
    edges = sum(answer.pop("all_to_all_single") for answer in answers)
    assert edges == (ranks - 1) * batch * sum(map(prod, convs)) * size

    highest = -(-rows // ranks)
    middle = 2 * frames * highest * columns * width
    if way == "encode":
        result = 2 * c.latent_channels * frames * highest * columns
    else:
        result = (
            3 * ((frames - 1) * c.scale_factor_temporal + 1) * highest * columns * c.scale_factor_spatial**2
        )
    norms = 0
    if name == "FLUX.1":
        pairs = {"decode": kl.up_stages, "encode": kl.down_stages}[way]
        norms = 2 + 2 * (2 + sum(len(stage.blocks) for stage in pairs(c)))
    statistics = norms * 2 * c.norm_num_groups * frames if norms else 0
    assert answers == [{"all_gather_into_tensor": batch * (middle + result + statistics) * size}] * ranks
