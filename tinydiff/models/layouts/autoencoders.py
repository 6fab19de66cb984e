"""Files of autoencoders in the authors' layouts and in diffusers'.

The authors are those of FLUX, SD3, FLUX.2, Wan 2.1 and 2.2, Qwen-Image, HunyuanVideo and HunyuanVideo-1.5.

Source: the names of the reference codes. FLUX's decoder counts its stages from the last, and its attention is
a convolution of one pixel. HunyuanVideo's authors have diffusers' names, and ComfyUI gives its file FLUX's.
HunyuanVideo-1.5 counts its stages in the order in which they run. Wan 2.1 has all layers of a half in one
list, Wan 2.2 a list in a list.
"""

from __future__ import annotations

from collections.abc import Iterable

from tinydiff.entries import Entries
from tinydiff.keymap import Line, moved, under
from tinydiff.models.autoencoders import flux2_tiny, hunyuan, hunyuan15, kl, tiny
from tinydiff.models.autoencoders import wan as wan_vae
from tinydiff.models.layouts.table import Layout, Sizes, by_rows

# --- AutoencoderKL ---


def _projections(ones: int) -> tuple[Line, ...]:
    """Convolutions of one pixel that are linear layers here. ones: their dimensions of length one."""
    return tuple(
        moved(f"{stored}.{leaf}", f"{row}.{leaf}", ones=extra)
        for stored, row in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
        for leaf, extra in (("weight", ones), ("bias", 0))
    )


_BLOCK = moved("nin_shortcut", "conv_shortcut")


def _half(*attention: Line) -> tuple[Line, ...]:
    """A half of an autoencoder but its stages. attention: the lines of what is in the middle."""
    return (
        moved("mid.block_1", "mid_block.resnets.0"),
        moved("mid.block_2", "mid_block.resnets.1"),
        *under("mid.attn_1", "mid_block.attentions.0", *attention),
        moved("mid.attn_1", "mid_block.attentions.0"),
    )


def _kl_half(ones: int) -> tuple[Line, ...]:
    attention = (moved("norm", "group_norm"), *_projections(ones))
    return (*_half(*attention), moved("norm_out", "conv_norm_out"))


def _stages(stages: Iterable[tuple[str, str]]) -> tuple[Line, ...]:
    """Blocks and changes of the resolution of (stored stage, stage)."""
    return tuple(
        line
        for stored, row in stages
        for line in (
            *under(f"{stored}.block.*", f"{row}.resnets.*", _BLOCK),
            moved(f"{stored}.block", f"{row}.resnets"),
            moved(f"{stored}.downsample.conv", f"{row}.downsamplers.0.conv"),
            moved(f"{stored}.upsample.conv", f"{row}.upsamplers.0.conv"),
        )
    )


_DOWN = ("encoder.down.*", "encoder.down_blocks.*")


def _from_last(levels: int, ones: int) -> tuple[Line, ...]:
    """FLUX's names. ones: the dimensions of length one that a convolution of one pixel has."""
    up = ((f"decoder.up.{i}", f"decoder.up_blocks.{levels - 1 - i}") for i in range(levels))
    half = _kl_half(ones)
    return (*_stages((_DOWN, *up)), *under("encoder", "encoder", *half), *under("decoder", "decoder", *half))


def _kl(levels: int) -> tuple[Line, ...]:
    return (
        *_from_last(levels, ones=2),
        moved("encoder.quant_conv", "quant_conv"),
        moved("decoder.post_quant_conv", "post_quant_conv"),
    )


def kl_entries(s: Sizes) -> Entries:
    """The scale and shift of latents are not told: FLUX.1's and SD3's files have the same shapes."""
    levels = s.count("encoder.down_blocks")
    widths = [s(f"encoder.down_blocks.{i}.resnets.0.conv2.weight") for i in range(levels)]
    decoder = [s(f"decoder.up_blocks.{levels - 1 - i}.resnets.0.conv2.weight") for i in range(levels)]
    found: Entries = {
        "in_channels": s("encoder.conv_in.weight", 1),
        "out_channels": s("decoder.conv_out.weight"),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": s.count("encoder.down_blocks.0.resnets"),
        "latent_channels": s("decoder.conv_in.weight", 1),
        "use_quant_conv": s.has("quant_conv"),
        "use_post_quant_conv": s.has("post_quant_conv"),
        "mid_block_add_attention": s.has("encoder.mid_block.attentions"),
    }
    if decoder != widths:
        found["decoder_block_out_channels"] = decoder
    if s.has("bn"):
        found["patch_size"] = [2, 2]
    return found


def _kl_original(s: Sizes) -> Entries:
    return by_rows(_kl(s.count("encoder.down")), kl_entries)(s)


_KL_FILES = ("encoder.down.0.block.0", "decoder.up.0.block.0", "decoder.mid.block_1")
_KL_DIRECTORY = (
    "encoder.down_blocks.0.resnets.0.norm1",
    "decoder.up_blocks.0.resnets.0.norm1",
    "encoder.conv_norm_out",
)
_CAUSAL = "decoder.conv_in.conv"
"""HunyuanVideo's convolutions are in a layer that pads."""


def _of_kl(class_name: str, signs: tuple[str, ...], lacks: tuple[str, ...]) -> tuple[Layout, ...]:
    return (
        Layout(
            "original",
            class_name,
            (*_KL_FILES, *signs),
            lambda c: (*_kl(len(c.block_out_channels)), *kl.FAMILY.keys(c).lines),
            _kl_original,
            (*lacks, _CAUSAL),
        ),
        Layout(
            "diffusers",
            class_name,
            (*_KL_DIRECTORY, *signs),
            lambda c: kl.FAMILY.keys(c).lines,
            kl_entries,
            (*lacks, _CAUSAL),
        ),
    )


# --- Wan's ---

_RESIDUAL = (
    moved("residual.0", "norm1"),
    moved("residual.2", "conv1"),
    moved("residual.3", "norm2"),
    moved("residual.6", "conv2"),
    moved("shortcut", "conv_shortcut"),
)
_ENDS = (
    moved("conv1", "conv_in"),
    *under("middle.0", "mid_block.resnets.0", *_RESIDUAL),
    moved("middle.1", "mid_block.attentions.0"),
    *under("middle.2", "mid_block.resnets.1", *_RESIDUAL),
    moved("head.0", "norm_out"),
    moved("head.2", "conv_out"),
)
_HALVES = (
    *under("encoder", "encoder", *_ENDS),
    *under("decoder", "decoder", *_ENDS),
    moved("conv1", "quant_conv"),
    moved("conv2", "post_quant_conv"),
)


def _wan_flat(c: wan_vae.Config) -> tuple[Line, ...]:
    """Wan 2.1: the decoder's list, stage by stage, is blocks and then what changes the resolution."""
    size, stages = c.num_res_blocks + 2, range(len(c.dim_mult))
    return (
        *_HALVES,
        *under("encoder.downsamples.*", "encoder.down_blocks.*", *_RESIDUAL),
        moved("encoder.downsamples", "encoder.down_blocks"),
        *(
            line
            for i in stages
            for j in range(size - 1)
            for line in under(
                f"decoder.upsamples.{i * size + j}", f"decoder.up_blocks.{i}.resnets.{j}", *_RESIDUAL
            )
        ),
        *(
            moved(f"decoder.upsamples.{(i + 1) * size - 1}", f"decoder.up_blocks.{i}.upsamplers.0")
            for i in stages
        ),
    )


def _wan_nested(c: wan_vae.Config) -> tuple[Line, ...]:
    """Wan 2.2: a stage's list is blocks and then what changes the resolution."""
    down, up = c.num_res_blocks, c.num_res_blocks + 1
    return (
        *_HALVES,
        moved(f"encoder.downsamples.*.downsamples.{down}", "encoder.down_blocks.*.downsampler"),
        *under("encoder.downsamples.*.downsamples.*", "encoder.down_blocks.*.resnets.*", *_RESIDUAL),
        moved(f"decoder.upsamples.*.upsamples.{up}", "decoder.up_blocks.*.upsampler"),
        *under("decoder.upsamples.*.upsamples.*", "decoder.up_blocks.*.resnets.*", *_RESIDUAL),
    )


def wan_entries(s: Sizes) -> Entries:
    """The mean and deviation of latents are not told; those of 16 channels are the same in every model."""
    residual = s.has("decoder.up_blocks.0.upsampler")
    base, decoder = s("encoder.conv_in.weight"), s("decoder.conv_out.weight", 1)
    levels = s.count("decoder.up_blocks")
    blocks = s.count("decoder.up_blocks.0.resnets") - 1
    each = [f"{i}.resnets.0" if residual else f"{i * (blocks + 1)}" for i in range(levels)]
    ends = [f"{i}.downsampler" if residual else f"{i * (blocks + 1) + blocks}" for i in range(levels - 1)]
    found: Entries = {
        "base_dim": base,
        "z_dim": s("decoder.conv_in.weight", 1),
        "dim_mult": [s(f"encoder.down_blocks.{at}.conv2.weight") // base for at in each],
        "num_res_blocks": blocks,
        "temperal_downsample": [s.has(f"encoder.down_blocks.{at}.time_conv") for at in ends],
        "in_channels": s("encoder.conv_in.weight", 1),
        "out_channels": s("decoder.conv_out.weight"),
        "is_residual": residual,
    }
    if decoder != base:
        found["decoder_base_dim"] = decoder
    if residual:  # 2 x 2 pixels of three colours are one
        found |= {"patch_size": 2, "scale_factor_spatial": 2 * 2 ** (levels - 1)}
    return found


_WAN = "AutoencoderKLWan"
_NESTED = wan_vae.Config(is_residual=True)

# --- HunyuanVideo's ---

HUNYUAN15 = (
    *_stages((_DOWN, ("decoder.up.*", "decoder.up_blocks.*"))),
    *(
        line
        for half in ("encoder", "decoder")
        for line in under(half, half, *_half(*(moved(name, f"to_{name}") for name in "qkv")))
    ),
)


def hunyuan_entries(s: Sizes) -> Entries:
    """The scale of latents is not told; it is that of the released models."""
    levels = s.count("encoder.down_blocks")
    return {
        "in_channels": s("encoder.conv_in.conv.weight", 1),
        "out_channels": s("decoder.conv_out.conv.weight"),
        "latent_channels": s("decoder.conv_in.conv.weight", 1),
        "block_out_channels": [
            s(f"encoder.down_blocks.{i}.resnets.0.conv2.conv.weight") for i in range(levels)
        ],
        "layers_per_block": s.count("encoder.down_blocks.0.resnets"),
        "spatial_compression_ratio": 2 ** (levels - 1),
    }


def hunyuan_first_entries(s: Sizes) -> Entries:
    """HunyuanVideo's, which also names its blocks."""
    found = hunyuan_entries(s)
    levels = s.count("encoder.down_blocks")
    return {
        **found,
        "down_block_types": ["HunyuanVideoDownBlock3D"] * levels,
        "up_block_types": ["HunyuanVideoUpBlock3D"] * levels,
        "mid_block_add_attention": s.has("encoder.mid_block.attentions"),
    }


def _hunyuan_comfyui(s: Sizes) -> Entries:
    return by_rows(_from_last(s.count("encoder.down"), ones=3), hunyuan_first_entries)(s)


_HUNYUAN = (
    Layout(
        "comfyui",
        "AutoencoderKLHunyuanVideo",
        (*_KL_FILES, _CAUSAL, "encoder.norm_out.weight"),
        lambda c: _from_last(len(c.block_out_channels), ones=3),
        _hunyuan_comfyui,
    ),
    Layout(
        "diffusers",
        "AutoencoderKLHunyuanVideo",
        (*_KL_DIRECTORY, _CAUSAL),
        lambda c: hunyuan.FAMILY.keys(c).lines,
        hunyuan_first_entries,
    ),
    Layout(
        "original",
        "AutoencoderKLHunyuanVideo15",
        (*_KL_FILES, _CAUSAL, "encoder.norm_out.gamma"),
        lambda c: HUNYUAN15,
        by_rows(HUNYUAN15, hunyuan_entries),
    ),
    Layout(
        "diffusers",
        "AutoencoderKLHunyuanVideo15",
        ("encoder.down_blocks.0.resnets.0.norm1.gamma", "decoder.up_blocks.0.resnets.0", _CAUSAL),
        lambda c: hunyuan15.FAMILY.keys(c).lines,
        hunyuan_entries,
    ),
)

# --- tiny ones ---


def _counts(s: Sizes, half: str) -> list[int]:
    """Blocks of each stage: what lies between the convolutions that change the resolution."""
    counts: list[int] = []
    blocks = 0
    for i in range(s.count(half)):
        if s.has(f"{half}.{i}.conv"):
            blocks += 1
        elif blocks:
            counts.append(blocks)
            blocks = 0
    return counts


def tiny_entries(s: Sizes) -> Entries:
    """The decoder clamps in its first layer, which has no weights."""
    encoder, decoder = _counts(s, "encoder.layers"), _counts(s, "decoder.layers")
    last = s.count("encoder.layers") - 1
    return {
        "in_channels": s("encoder.layers.0.weight", 1),
        "out_channels": s(f"decoder.layers.{s.count('decoder.layers') - 1}.weight"),
        "latent_channels": s(f"encoder.layers.{last}.weight"),
        "encoder_block_out_channels": [s("encoder.layers.0.weight")] * len(encoder),
        "decoder_block_out_channels": [s("decoder.layers.2.conv.0.weight")] * len(decoder),
        "num_encoder_blocks": encoder,
        "num_decoder_blocks": decoder,
    }


LAYOUTS = (
    *_of_kl("AutoencoderKLFlux2", ("bn.running_mean",), ()),
    *_of_kl("AutoencoderKL", (), ("bn",)),
    *_HUNYUAN,
    Layout(
        "original",
        _WAN,
        ("decoder.middle.0.residual.0", "encoder.downsamples.0.residual.0", "decoder.upsamples.0.residual.0"),
        _wan_flat,
        by_rows(_wan_flat(wan_vae.Config()), wan_entries),
    ),
    Layout(
        "original",
        _WAN,
        (
            "decoder.middle.0.residual.0",
            "encoder.downsamples.0.downsamples.0",
            "decoder.upsamples.0.upsamples.0",
        ),
        _wan_nested,
        by_rows(_wan_nested(_NESTED), wan_entries),
    ),
    Layout(
        "diffusers",
        _WAN,
        ("encoder.down_blocks.0", "encoder.norm_out.gamma", "decoder.mid_block.attentions.0.to_qkv"),
        lambda c: wan_vae.FAMILY.keys(c).lines,
        wan_entries,
    ),
    Layout(
        "diffusers",
        "AutoencoderTiny",
        ("encoder.layers.0", "decoder.layers.2.conv.0"),
        lambda c: tiny.FAMILY.keys(c).lines,
        tiny_entries,
    ),
    Layout(
        "its own",
        "Flux2TinyAutoEncoder",
        ("tiny_vae.encoder.layers.0", "tiny_vae.decoder.layers.2.conv.0"),
        lambda c: flux2_tiny.FAMILY.keys(c).lines,
        lambda s: {},
    ),
)
