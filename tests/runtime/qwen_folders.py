"""Tiny random models of Qwen-Image's pipelines in diffusers layout, and the reference's pipelines that saved
them.

Two things of the reference are put right. Its tables come from torch.polar, which rounds float32 cosines
otherwise than torch.cos does. And with transformers 5 it does not tell the language model which tokens are
images, so that rows and columns of their places are lost (huggingface/diffusers issue 14194); here it does,
as with transformers 4.
"""

from __future__ import annotations

import json
import shutil
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import diffusers
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.parity import randomised
from tests.sources import ROOT

Z = 6
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TRANSFORMER = {
    "patch_size": 2, "in_channels": 4 * Z, "out_channels": Z, "num_layers": 2, "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 4),
}  # fmt: skip
LAYERED = {"use_additional_t_cond": True, "use_layer3d_rope": True}
SCHEDULER = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "use_dynamic_shifting": True,
}


def _tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Qwen's bytes and its first 400 merges."""
    folder.mkdir()
    merges = (
        shutil.copy(ROOT / "tests/data/tokenizers/qwen.merges.txt", folder / "merges.txt")
        .read_text()
        .splitlines()[1:]
    )
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    pieces = [
        *map(chr, shown),
        *(chr(256 + i) for i in range(256 - len(shown))),
        *(merge.replace(" ", "") for merge in merges),
    ]
    added = {str(len(pieces) + i): {"content": name, "special": True} for i, name in enumerate(SPECIAL)}
    named = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "tokenizer_config.json").write_text(json.dumps(named | {"added_tokens_decoder": added}))
    return Qwen2Tokenizer.from_pretrained(folder)


def _language(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "in_channels": 3,
        "out_hidden_size": 32, "patch_size": 4,
        "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 24, "fullatt_block_indexes": [1],
    }  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )
    )
    settings = model.generation_config
    settings.repetition_penalty, settings.eos_token_id = 1.05, [ids["<|im_end|>"], ids["<|endoftext|>"]]
    settings.pad_token_id = ids["<|endoftext|>"]
    return model


def build(kind: type, folder: Path, **transformer):
    """The reference's pipeline in float64, saved in float32 to `directory`. Every parameter is redrawn, at
    values that float32 holds.
    """
    tokenizer = _tokenizer(folder.parent / "tokenizer")
    layered = "use_layer3d_rope" in transformer
    with patch(
        "torch.polar", lambda length, angle: torch.complex(length * angle.cos(), length * angle.sin())
    ):
        net = QwenImageTransformer2DModel(**TRANSFORMER, **transformer)
    statistics = {
        "latents_mean": [0.1, 0.2, -0.3, 0.4, 0.0, -0.1],
        "latents_std": [1.0, 2.0, 0.5, 0.7, 1.5, 0.9],
    }
    networks = {
        "transformer": net,
        "vae": AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=Z,
            dim_mult=[1, 2, 2, 2],
            num_res_blocks=1,
            input_channels=4 if layered else 3,
            **statistics,
        ),
        "text_encoder": _language(tokenizer),
    }
    for seed, network in enumerate(networks.values()):
        randomised(network, seed)
        network.float()
    form = {"time_shift_type": "linear", "shift_terminal": None} if layered else {"shift_terminal": 0.02}
    files = {"tokenizer": tokenizer, "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULER, **form)}
    if kind is not diffusers.QwenImagePipeline:
        images = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056, patch_size=4)
        with patch.object(
            Qwen2VLProcessor, "check_argument_for_proper_class"
        ):  # of videos, which need torchvision
            files["processor"] = Qwen2VLProcessor(images, tokenizer)
    pipe = kind(**networks, **files)
    pipe.set_progress_bar_config(disable=True)
    with patch.object(
        Qwen2VLProcessor,
        "save_pretrained",
        lambda self, folder, **_: self.image_processor.save_pretrained(folder),
    ):
        pipe.save_pretrained(folder)
    for network in networks.values():
        network.double()
    _told_of_pictures(pipe.text_encoder)
    return pipe


def _told_of_pictures(encoder: Qwen2_5_VLForConditionalGeneration) -> None:
    """Let it be told which tokens are images wherever it is shown any."""
    forward = encoder.forward

    @wraps(forward)
    def told(*args, **kwargs):
        if kwargs.get("pixel_values") is not None and kwargs.get("mm_token_type_ids") is None:
            kwargs["mm_token_type_ids"] = (kwargs["input_ids"] == encoder.config.image_token_id).int()
        return forward(*args, **kwargs)

    encoder.forward = told
