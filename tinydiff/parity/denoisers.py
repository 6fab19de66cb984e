"""The tiny denoisers of all families, and what each is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tinydiff.entries import EntryDict
from tinydiff.models import (
    ernie,
    flux,
    flux2,
    hunyuan_video,
    hunyuan_video15,
    ltx2,
    ovis,
    qwen_image,
    sd3,
    wan,
    z_image,
)
from tinydiff.ops.network import Config
from tinydiff.ops.patch import patchify
from tinydiff.parity import hunyuan
from tinydiff.parity.asked import TIME, WORDS, Asked
from tinydiff.parity.denoiser_case import Denoiser, as_float32
from tinydiff.parity.reference import Foreign, draw


def _wan(frozen: bool = False, length: int = WORDS) -> Callable[[wan.Config], Asked]:
    """frozen: the first frame is given, and sits at timestep 0.

    length: where CLIP's tokens come too, the reference expects 512 words.
    """

    def ask(c: wan.Config) -> Asked:
        size, channels = (3, 6, 10), c.out_channels
        x, text = draw(2, c.in_channels, *size, seed=2), draw(2, length, c.text_dim, seed=3)
        inputs = {"text": text, "positions": wan.positions(c, size)}
        theirs = {"hidden_states": x, "timestep": TIME.long().expand(2), "encoder_hidden_states": text}
        if c.in_channels > channels:
            inputs["concat"] = patchify(x[:, channels:], c.patch_size)
        if c.image_dim is not None:
            images = 2 if c.pos_embed_seq_len is None else 4  # a first frame each, or a last one too
            inputs["image"] = theirs["encoder_hidden_states_image"] = draw(images, 9, c.image_dim, seed=4)
        if frozen:
            inputs["frozen"] = (inputs["positions"][:, 0] == 0)[None, :, None]
            theirs["timestep"] = torch.where(inputs["frozen"][..., 0], 0, TIME.long()).expand(2, -1)
        return Asked(
            patchify(x[:, :channels], c.patch_size),
            inputs,
            theirs,
            lambda output: patchify(output.sample, c.patch_size),
        )

    return ask


def _z_image(c: z_image.Config) -> Asked:
    """Caption and image both short of a multiple of 32 tokens."""
    size = (1, 14, 10)
    x, text = draw(2, c.in_channels, *size, seed=2), draw(2, WORDS, c.cap_feat_dim, seed=3)
    tokens = patchify(x, c.patch_size)
    inputs = {"text": text, "positions": z_image.positions(c, size), "real": z_image.real(c, size)}
    theirs = {"x": list(x), "t": (1000 - TIME.expand(2)) / 1000, "cap_feats": list(text)}
    padded = torch.cat([tokens, draw(2, z_image.pad_tokens(tokens.shape[1]), tokens.shape[2], seed=4)], 1)
    return Asked(
        padded,
        inputs,
        theirs,
        lambda output: -patchify(torch.stack(output.sample), c.patch_size),
        tokens.shape[1],
    )


def qwen(*sizes: tuple[int, int], denoised: int = 1) -> Callable[[qwen_image.Config], Asked]:
    """Images of latents of these sizes, the first `denoised` of which are denoised.

    Two texts, of different lengths.
    """

    def ask(c: qwen_image.Config) -> Asked:
        images = [
            patchify(draw(2, c.out_channels, 1, *size, seed=i), (1, 2, 2)) for i, size in enumerate(sizes)
        ]
        tokens, text = torch.cat(images, 1), draw(2, WORDS, c.joint_attention_dim, seed=11)
        mask = torch.tensor([[1] * (WORDS - 3) + [0] * 3, [1] * WORDS])
        inputs = {"text": text, "positions": qwen_image.positions(c, sizes), "mask": mask}
        theirs = {"hidden_states": tokens, "encoder_hidden_states": text, "encoder_hidden_states_mask": mask}
        theirs |= {
            "timestep": TIME.double().expand(2) / 1000,
            "img_shapes": [[(1, h // 2, w // 2) for h, w in sizes]] * 2,
        }
        if len(sizes) > denoised:
            inputs["frozen"] = torch.cat(
                [torch.full(x.shape[1:2], i >= denoised) for i, x in enumerate(images)]
            )[None, :, None]
        if c.use_additional_t_cond:
            inputs["kind"] = theirs["additional_t_cond"] = torch.tensor([1, 0])
        return Asked(tokens, inputs, theirs)

    return ask


def _flux(module: ModuleType, *sizes: tuple[int, int, int]) -> Callable[[Config], Asked]:
    """FLUX.1, FLUX.2 and Ovis-Image; sizes of the image's latents and of references."""

    def ask(c: Config) -> Asked:
        ids = module.positions(sizes[0], sizes[1:]) if sizes[1:] else module.positions(sizes[0])
        tokens, text = draw(2, len(ids), c.in_channels, seed=2), draw(2, WORDS, c.joint_attention_dim, seed=3)
        inputs = {"text": text, "positions": ids}
        places = {flux: (0, 0, 0), ovis: (0, 1, 1), flux2: (0, 0, 0, 1)}[module]
        theirs = {
            "hidden_states": tokens,
            "encoder_hidden_states": text,
            "timestep": TIME.double().expand(2) / 1000,
        }
        theirs |= {
            "img_ids": ids.double(),
            "txt_ids": torch.arange(WORDS)[:, None].double() * torch.tensor(places),
        }
        if module is flux:
            inputs["pooled"] = theirs["pooled_projections"] = draw(2, c.pooled_projection_dim, seed=4)
        if getattr(c, "guidance_embeds", False):
            inputs["guidance"] = theirs["guidance"] = torch.tensor([2.0, 4.0])
        return Asked(tokens, inputs, theirs)

    return ask


def _ernie(c: ernie.Config) -> Asked:
    """Two texts of different lengths."""
    size, ends = (1, 3, 5), torch.tensor([3, WORDS])
    x, text = draw(2, c.in_channels, *size, seed=2), draw(2, WORDS, c.text_in_dim, seed=3)
    inputs = {"text": text, "positions": ernie.positions(size), "mask": torch.arange(WORDS) < ends[:, None]}
    theirs = {"hidden_states": x[:, :, 0], "timestep": TIME.expand(2), "text_bth": text, "text_lens": ends}
    return Asked(
        patchify(x, (1, 1, 1)), inputs, theirs, lambda output: patchify(output.sample[:, :, None], (1, 1, 1))
    )


def _sd3(c: sd3.Config) -> Asked:
    size, patch_size = (1, 6, 10), (1, c.patch_size, c.patch_size)
    x, text, pooled = (
        draw(2, 3, *size, seed=2),
        draw(2, WORDS, c.joint_attention_dim, seed=3),
        draw(2, c.pooled_projection_dim, seed=4),
    )
    inputs = {"text": text, "pooled": pooled, "positions": sd3.positions(c, size)}
    theirs = {
        "hidden_states": x[:, :, 0],
        "timestep": TIME.expand(2),
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
    }
    return Asked(
        patchify(x, patch_size),
        inputs,
        theirs,
        lambda output: patchify(output.sample[:, :, None], patch_size),
    )


def _ltx2(frozen: bool = False) -> Callable[[ltx2.Config], Asked]:
    """frozen: the first frame is given, and its tokens stand at timestep 0."""

    def ask(c: ltx2.Config) -> Asked:
        tokens = draw(2, _LTX2_VIDEO + _LTX2_SOUND, c.in_channels, seed=2)
        texts = {}
        for kind, seed in ((c.video, 3), (c.audio, 4)):
            width = c.caption_channels if c.use_prompt_embeddings else kind.text
            texts[f"{kind.prefix}text"] = draw(2, WORDS, width, seed=seed)
        inputs = {
            "positions": ltx2.positions(c, _LTX2_SIZE, 25.0),
            "audio_positions": ltx2.audio_positions(c, _LTX2_SOUND),
        }
        time = TIME.expand(2)
        theirs = {
            "hidden_states": tokens[:, :_LTX2_VIDEO],
            "audio_hidden_states": tokens[:, _LTX2_VIDEO:],
            "encoder_hidden_states": texts["text"],
            "audio_encoder_hidden_states": texts["audio_text"],
            "timestep": time,
            "audio_timestep": time,
            "sigma": time,
            "use_cross_timestep": c.cross_attn_mod,
        } | dict(zip(("num_frames", "height", "width"), _LTX2_SIZE, strict=True))
        theirs |= {"fps": 25.0, "audio_num_frames": _LTX2_SOUND}
        if frozen:
            first_frame = torch.arange(_LTX2_VIDEO) < _LTX2_VIDEO // _LTX2_SIZE[0]
            inputs["frozen"] = first_frame[None, :, None]
            theirs["timestep"] = torch.where(first_frame, 0, TIME).expand(2, -1)
        kinds = (_LTX2_VIDEO, _LTX2_SOUND)
        return Asked(tokens, texts | inputs, theirs, _both_kinds, kinds=kinds)

    return ask


def _both_kinds(output: Foreign) -> Tensor:
    """The velocities of video and sound as one sequence."""
    return torch.cat([output.sample, output.audio_sample], 1)


def _ltx2_tables(module: Foreign) -> None:
    """LTX-2 makes its rope tables in float32, and was trained with them; they are made here once."""
    video = module.rope.prepare_video_coords(2, *_LTX2_SIZE, "cpu", fps=25.0)
    sound = module.audio_rope.prepare_audio_coords(2, _LTX2_SOUND, "cpu")
    for rope, coords in (
        (module.rope, video),
        (module.audio_rope, sound),
        (module.cross_attn_rope, video[:, :1]),
        (module.cross_attn_audio_rope, sound[:, :1]),
    ):
        tables = rope(coords)
        rope.register_forward_hook(lambda _module, _args, _output, tables=tables: tables)


# --- the denoisers ---

_NARROW: EntryDict = {
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 20,
}
_WAN = wan.Config(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_dim=20,
    freq_dim=8,
    ffn_dim=40,
    num_layers=2,
)
_Z = z_image.Config(
    in_channels=4,
    dim=32,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    norm_eps=1e-4,
    cap_feat_dim=20,
    axes_dims=(4, 6, 6),
)
_QWEN = qwen_image.Config(in_channels=16, out_channels=4, axes_dims_rope=(4, 6, 6), **_NARROW)
_FLUX = flux.Config(
    in_channels=8, num_single_layers=2, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8), **_NARROW
)
_FLUX2 = flux2.Config(
    in_channels=6,
    num_single_layers=2,
    timestep_guidance_channels=8,
    axes_dims_rope=(2, 4, 4, 6),
    guidance_embeds=False,
    **_NARROW,
)
_OVIS = ovis.Config(in_channels=8, out_channels=8, num_single_layers=2, axes_dims_rope=(4, 4, 8), **_NARROW)
_ERNIE = ernie.Config(32, 2, 2, 40, in_channels=6, out_channels=6, text_in_dim=20, rope_axes_dim=(4, 6, 6))
_SD3 = sd3.Config(
    sample_size=8,
    in_channels=3,
    out_channels=5,
    caption_projection_dim=32,
    pooled_projection_dim=12,
    pos_embed_max_size=9,
    **_NARROW,
)

_LTX2_SIZE, _LTX2_VIDEO, _LTX2_SOUND = (3, 2, 5), 30, 11
"""Of the video's latents, and how many tokens each kind has."""
_LTX2 = ltx2.Config(
    in_channels=6,
    out_channels=6,
    audio_in_channels=6,
    audio_out_channels=6,
    num_attention_heads=2,
    attention_head_dim=20,
    cross_attention_dim=40,
    audio_num_attention_heads=2,
    audio_attention_head_dim=14,
    audio_cross_attention_dim=28,
    caption_channels=24,
    num_layers=2,
    rope_type="split",
)
_LTX23 = replace(
    _LTX2,
    gated_attn=True,
    audio_gated_attn=True,
    cross_attn_mod=True,
    audio_cross_attn_mod=True,
    use_prompt_embeddings=False,
    perturbed_attn=True,
)
_LTX25 = replace(_LTX23, ff_bias=False, use_keyframes_abs_pos_embedding=True)

_FIRST = "transformer_blocks.0"
_PICTURE, _GIVEN, _SMALL = (6, 10), (4, 14), (8, 2)
"""Latents of an image and of two others, none square."""


def _of_wan(config: wan.Config, **more: Any) -> Denoiser:
    time, text = ("condition_embedder.time_proj", "modulation"), ("blocks.0.attn2.to_v", "blocks.0.attn2.v")
    return Denoiser(wan.FAMILY, "WanTransformer3DModel", config, _wan(**more), time, text, "patch_embedding")


def _of_qwen(config: qwen_image.Config, ask: Callable[[Config], Asked]) -> Denoiser:
    time = (f"{_FIRST}.img_mod.1", f"{_FIRST}.img_mod")
    return Denoiser(
        qwen_image.FAMILY, "QwenImageTransformer2DModel", config, ask, time, ("txt_in", "text"), "img_in"
    )


def _of_flux(
    module: ModuleType,
    reference: str,
    config: Config,
    time: tuple[str, str],
    sinusoid: str,
    *references: tuple[int, int],
) -> Denoiser:
    ask = _flux(module, *((1, *size) for size in (_PICTURE, *references)))
    return Denoiser(
        module.FAMILY, reference, config, ask, time, ("context_embedder", "text"), "x_embedder", sinusoid
    )


def _of_flux1(config: flux.Config, *references: tuple[int, int]) -> Denoiser:
    time = (f"{_FIRST}.norm1.linear", f"{_FIRST}.norm1")
    return _of_flux(flux, "FluxTransformer2DModel", config, time, "time_text_embed.time_proj", *references)


def _of_flux2(config: flux2.Config) -> Denoiser:
    time = ("double_stream_modulation_img.linear", "image_modulation")
    return _of_flux(
        flux2, "Flux2Transformer2DModel", config, time, "time_guidance_embed.time_proj", _GIVEN, _SMALL
    )


def _of_sd3(**changes: Any) -> Denoiser:
    time = (f"{_FIRST}.norm1.linear", f"{_FIRST}.norm1")
    config = replace(_SD3, num_layers=3, **changes)
    return Denoiser(
        sd3.FAMILY, "SD3Transformer2DModel", config, _sd3, time, ("context_embedder", "text"), "pos_embed"
    )


def _of_ltx2(config: ltx2.Config, frozen: bool = False) -> Denoiser:
    text = (f"{_FIRST}.attn2.to_v", f"{_FIRST}.attn2.v")
    return Denoiser(
        ltx2.FAMILY,
        "LTX2VideoTransformer3DModel",
        config,
        _ltx2(frozen),
        ("audio_time_embed.linear", "audio_modulation"),
        None if config.text_by_step else text,
        "audio_proj_in",
        prepare=_ltx2_tables,
    )


def _of_hunyuan(**changes: Any) -> Denoiser:
    return Denoiser(
        hunyuan_video.FAMILY,
        "HunyuanVideoTransformer3DModel",
        replace(hunyuan.CONFIG, **changes),
        hunyuan.asked,
        (f"{_FIRST}.norm1_context.linear", f"{_FIRST}.norm1_context"),
        ("context_embedder", "text"),
        "x_embedder",
        image_first=True,
    )


def _of_hunyuan15(parts: Sequence[str] = (), **changes: Any) -> Denoiser:
    return Denoiser(
        hunyuan_video15.FAMILY,
        "HunyuanVideo15Transformer3DModel",
        replace(hunyuan.CONFIG_15, **changes),
        partial(hunyuan.asked_15, parts=parts),
        (f"{_FIRST}.norm1.linear", f"{_FIRST}.norm1"),
        None,  # the reference puts its parts together outside of its layers
        "x_embedder",
        image_first=True,
        prepare=_sinusoids_15,
    )


def _sinusoids_15(module: Foreign) -> None:
    projections = [module.time_embed.time_proj, module.context_embedder.time_text_embed.time_proj]
    if module.time_embed.use_meanflow:
        projections.append(module.time_embed.time_proj_r)
    for projection in projections:
        projection.register_forward_pre_hook(as_float32)


DENOISERS = {
    "Wan, text": _of_wan(_WAN),
    "Wan, a frame beside the noise": _of_wan(replace(_WAN, in_channels=12)),
    "Wan, a frame beside the noise and CLIP": _of_wan(replace(_WAN, in_channels=12, image_dim=24,
    added_kv_proj_dim=32), length=512),
    "Wan, a given first frame": _of_wan(_WAN, frozen=True),
    "Z-Image": Denoiser(
        z_image.FAMILY, "ZImageTransformer2DModel", _Z, _z_image, ("all_final_layer.2-1.adaLN_modulation.1",
        "scale"),
        ("context_refiner.1", "text"), None, image_alone="noise_refiner.", image_first=True,
    ),
    "Qwen-Image": _of_qwen(_QWEN, qwen(_PICTURE)),
    "Qwen-Image, references": _of_qwen(_QWEN, qwen(_PICTURE, _GIVEN, _SMALL)),
    "Qwen-Image, references at timestep 0": _of_qwen(replace(_QWEN, zero_cond_t=True), qwen(_PICTURE, _GIVEN,
    _SMALL)),
    "Qwen-Image, layers": _of_qwen(
        replace(_QWEN, use_additional_t_cond=True, use_layer3d_rope=True), qwen(_PICTURE, _PICTURE, _PICTURE,
        _GIVEN, denoised=3)
    ),
    "FLUX.1": _of_flux1(_FLUX),
    "FLUX.1, guidance": _of_flux1(replace(_FLUX, guidance_embeds=True)),
    "FLUX.1, guidance and a reference": _of_flux1(replace(_FLUX, guidance_embeds=True), _GIVEN),
    "FLUX.2, references": _of_flux2(_FLUX2),
    "FLUX.2, guidance and references": _of_flux2(replace(_FLUX2, guidance_embeds=True)),
    "Ovis-Image": _of_flux(ovis, "OvisImageTransformer2DModel", _OVIS, (f"{_FIRST}.norm1.linear",
    f"{_FIRST}.norm1"), "time_proj"),
    "ERNIE-Image": Denoiser(
        ernie.FAMILY, "ErnieImageTransformer2DModel", _ERNIE, _ernie, ("adaLN_modulation.1", "modulation"),
        ("text_proj", "text"),
        "x_embedder",
        image_first=True, sequence_first=True,
    ),
    "SD3": _of_sd3(),
    "SD3, norms": _of_sd3(qk_norm="rms_norm"),
    "SD3, norms and dual attention": _of_sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "LTX-2": _of_ltx2(_LTX2),
    "LTX-2, a given first frame": _of_ltx2(replace(_LTX2, rope_type="interleaved"), frozen=True),
    "LTX-2.3": _of_ltx2(_LTX23),
    "LTX-2.3, a given first frame": _of_ltx2(_LTX23, frozen=True),
    "LTX-2.5, a given first frame": _of_ltx2(_LTX25, frozen=True),
    "LTX-2.5, keys of the prompt for all steps": _of_ltx2(
        replace(_LTX25, use_prompt_adaln_single=False, audio_ff_bias=False)
    ),
    "HunyuanVideo": _of_hunyuan(),
    "HunyuanVideo, no guidance": _of_hunyuan(guidance_embeds=False),
    "HunyuanVideo, a frame beside the noise": _of_hunyuan(
        in_channels=9, guidance_embeds=False, image_condition_type="latent_concat"
    ),
    "HunyuanVideo, a given first frame": _of_hunyuan(image_condition_type="token_replace"),
    "HunyuanVideo-1.5": _of_hunyuan15(),
    "HunyuanVideo-1.5, glyphs": _of_hunyuan15(("glyphs",)),
    "HunyuanVideo-1.5, glyphs and an image": _of_hunyuan15(("image", "glyphs"), task_type="i2v"),
    "HunyuanVideo-1.5, the end of a step": _of_hunyuan15(
        ("image", "glyphs", "ends"), task_type="i2v", use_meanflow=True
    ),
}  # fmt: skip
"""What is compared -> how."""
