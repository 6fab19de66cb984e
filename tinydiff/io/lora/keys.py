"""What a key of a LoRA file says: of which component, which layer, and which part of the layer's change.

Trainers differ in the prefix of a key, in dots or underscores, and in the name of the part.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_NAMED = r"(?:\.(?!weight$|bias$)[^.]+)?"
"""The adapter's name, which PEFT writes into the keys of some files."""

_PARTS = (
    (rf"(?:\.lora_A|\.lora_down|[._]lora(?:_linear_layer)?\.down){_NAMED}(?:\.weight)?", "down"),
    (rf"(?:\.lora_B|\.lora_up|[._]lora(?:_linear_layer)?\.up){_NAMED}(?:\.weight)?", "up"),
    (rf"(?:\.lora_B|\.lora_up){_NAMED}\.bias", "up_bias"),
    (r"\.lora_mid(?:\.weight)?", "mid"),
    (rf"\.lora_magnitude_vector{_NAMED}(?:\.weight)?", "magnitude"),
    (r"\.(alpha|diff|diff_b|diff_m|w_norm|b_norm|set_weight|reshape_weight|dora_scale|rescale)", None),
    (rf"\.((?:hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t[12])){_NAMED}", None),
    (r"\.(oft_blocks|oft_diag)", None),
    (r"\.oft_R\.(scaled_oft)", None),
    (rf"\.(oft_R){_NAMED}(?:\.weight)?", None),
    (r"\.(boft_R|boft_s)(?:\..+)?", None),
    (r"\.([ab][12])\.weight", None),
    (r"(?<=_norm)\.scale", "set_weight"),
)
"""(how a key ends, the part that it is; None takes the name in the key)."""
_ENDS = tuple((re.compile(f"(?P<stem>.+?){pattern}"), part) for pattern, part in _PARTS)

_DENOISER = re.compile(
    r"(base_model\.model\.)?((?:model\.)?diffusion_model\.|transformer(?:_2)?\.|connectors\.|unet\."
    r"|lora_unet__?|lora_transformer_|lycoris_|oft_unet_)?"
)
_TEXT = re.compile(
    r"(?:base_model\.model\.)?(?:text_encoder(?:_(?P<number>\d))?\."
    r"|text_encoders\.(?P<name>\w+)\.transformer\.|lora_te(?P<te>\d?)_)(?:(?:language_)?model[._])*"
)
_NAMED_ENCODERS = {"clip_l": 1, "clip_g": 2}

_TRAINERS = {
    "transformer.": "diffusers", "transformer_2.": "diffusers", "unet.": "diffusers", "lora_unet_": "kohya",
    "lora_unet__": "VideoX-Fun", "lora_transformer_": "OneTrainer", "lycoris_": "LyCORIS",
    "oft_unet_": "kohya", "connectors.": "diffusers",
    "diffusion_model.": "ComfyUI", "model.diffusion_model.": "ComfyUI",
}  # fmt: skip

_XLABS = (
    (re.compile(r"(.*double_blocks\.\d+)\.processor\.(qkv|proj)_lora1\."), r"\1.img_attn.\2.lora_"),
    (re.compile(r"(.*double_blocks\.\d+)\.processor\.(qkv|proj)_lora2\."), r"\1.txt_attn.\2.lora_"),
    (re.compile(r"(.*single_blocks\.\d+)\.processor\.qkv_lora\."), r"\1.linear1_qkv.lora_"),
    (re.compile(r"(.*single_blocks\.\d+)\.processor\.proj_lora\."), r"\1.linear2.lora_"),
)
"""XLabs names the processor of a block, numbered by stream: 1 is the image's, 2 is the text's."""


class Key(NamedTuple):
    """A key, read.

    part: of the layer's change, as "down" or "alpha". stem: the layer, without the prefix. layout: who writes
    such keys, in words. encoder: the number of the text encoder, 0 where it says none; None in a denoiser.
    second: whether it is the second denoiser's.
    """

    part: str
    stem: str
    layout: str
    encoder: int | None = None
    second: bool = False


def parse(key: str) -> Key | None:
    """What a key says; None where it is no part of an adapter."""
    name, xlabs = key, False
    for pattern, replacement in _XLABS:
        name, count = pattern.subn(replacement, name)
        xlabs = xlabs or count > 0
    halves = _halves(name)
    if halves is None:
        return None
    stem, part = halves
    if text := _TEXT.match(stem):
        number = text["number"] or text["te"] or _NAMED_ENCODERS.get(text["name"] or "", 0)
        if "text_encoder." in text[0]:
            number = 1
        layout = "kohya" if text["te"] is not None else "ComfyUI" if text["name"] else "diffusers"
        return Key(part, stem[text.end() :], layout, int(number or 0))
    prefix = _DENOISER.match(stem)
    assert prefix is not None, "every group of the pattern may be empty"
    bare = stem[prefix.end() :]
    layout = (
        "XLabs" if xlabs else _TRAINERS.get(prefix[2] or "") or ("PEFT" if prefix[1] else _bare(key, bare))
    )
    return Key(part, bare, layout, second=prefix[2] == "transformer_2.")


def _halves(name: str) -> tuple[str, str] | None:
    """(the layer with its prefix, the part)."""
    for end, part in _ENDS:
        if match := end.fullmatch(name):
            return match["stem"], part or match[2]
    return None


def _bare(key: str, stem: str) -> str:
    """Who writes a key without a prefix."""
    if re.search(r"\.lora_[AB]\.[^.]+\.weight$", key):
        return "DiffSynth"
    if stem.startswith(("double_blocks.", "single_blocks.", "final_layer.", "img_in", "txt_in")):
        return "BFL"
    return "without a prefix"


_LOOKS = (
    (r"distilled_guidance_layer", "Chroma"),
    (
        r"input_blocks|output_blocks|down_blocks|up_blocks|middle_block|mid_block",
        "Stable Diffusion 1, 2 or XL",
    ),
    (r"individual_token_refiner|img_attn_qkv|img_mod[._]linear", "HunyuanVideo"),
    (r"double_stream_modulation|to_qkv_mlp_proj|ff_context[._]linear", "FLUX.2"),
    (r"joint_blocks", "Stable Diffusion 3, original names"),
    (r"double_blocks|single_blocks", "FLUX, original names"),
    (r"audio_attn|audio_ff|patchify_proj", "LTX-2"),
    (r"single_transformer_blocks", "FLUX, diffusers names"),
    (r"img_mlp[._]net|txt_mlp[._]net", "Qwen-Image"),
    (r"self_attention[._]", "ERNIE-Image"),
    (r"noise_refiner|context_refiner|layers[._]\d+[._]attention", "Z-Image"),
    (r"k_img|v_img|img_emb", "Wan from an image, original names"),
    (r"blocks[._]\d+[._](?:self_attn|cross_attn)", "Wan, original names"),
    (r"(?<!transformer_)blocks[._]\d+[._]attn[12]|condition_embedder", "Wan, diffusers names"),
    (
        r"transformer_blocks[._]\d+[._](?:attn|ff|norm)",
        "FLUX, Qwen-Image or Stable Diffusion 3, diffusers names",
    ),
    (r"SelfAttention|DenseReluDense", "T5"),
    (r"text_model[._]encoder", "CLIP"),
    (r"layers[._]\d+[._](?:self_attn|mlp)", "a language model"),
)


def look(keys: list[str]) -> str | None:
    """What keys that fit nothing look like, in words."""
    counts = {}
    for key in keys:
        words = next((words for pattern, words in _LOOKS if re.search(pattern, key)), None)
        counts[words] = counts.get(words, 0) + 1
    known = {words: count for words, count in counts.items() if words is not None}
    return max(known, key=lambda words: known[words], default=None)
