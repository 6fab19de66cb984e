"""Complete models of every Wan variant in diffusers layout, tiny and random: the reference's pipeline and the
directory that it saved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPVisionConfig, CLIPVisionModel, T5TokenizerFast, UMT5Config, UMT5EncoderModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.parity import randomised
from tests.sources import PACKAGE
from tinydiff.config import ModelOptions
from tinydiff.models.released import REPOSITORIES
from tinydiff.runtime import blueprint
from tinydiff.runtime.blueprint import Model

Z = 4
CLIP_SIDE = 14
TRANSFORMER = {
    **{"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": Z, "out_channels": Z},
    **{"text_dim": 16, "freq_dim": 8, "ffn_dim": 20, "num_layers": 2},
}
VAE = {
    **{"base_dim": 4, "z_dim": Z, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
    **{"latents_mean": [0.1, 0.2, -0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 0.7]},
}
VAE_16 = {
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}


@dataclass(frozen=True)
class Variant:
    """What sets a variant of Wan apart.

    stored_as: the pipeline class that model_index.json names; run_by: the reference pipeline that makes its
    videos.
    """

    stored_as: str = "WanPipeline"
    run_by: type[DiffusionPipeline] = WanPipeline
    transformer: Mapping[str, Any] = field(default_factory=dict)
    boundary_ratio: float | None = None
    expand_timesteps: bool = False

    @property
    def clip(self) -> bool:
        """Whether CLIP looks at the given images."""
        return "image_dim" in self.transformer


_BESIDE = {"in_channels": 2 * Z + 4}
_CLIP = _BESIDE | {"image_dim": 10, "added_kv_proj_dim": 24}
_IMAGE = Variant("WanImageToVideoPipeline", WanImageToVideoPipeline)

VARIANTS = {
    "T2V": Variant(),
    "T2V with two experts": Variant(boundary_ratio=0.85),
    "I2V with CLIP": replace(_IMAGE, transformer=_CLIP),
    "I2V with two experts": replace(_IMAGE, transformer=_BESIDE, boundary_ratio=0.9),
    "first and last frame with CLIP": replace(_IMAGE, transformer=_CLIP | {"pos_embed_seq_len": 10}),
    "TI2V": Variant(expand_timesteps=True),
    "TI2V from an image": Variant(run_by=WanImageToVideoPipeline, expand_timesteps=True),
    "DMD": Variant("WanDMDPipeline"),
    "DMD TI2V": Variant("WanDMDPipeline", WanImageToVideoPipeline, expand_timesteps=True),
}


def build(variant: Variant, folder: Path, flow_shift: float = 3.0) -> DiffusionPipeline:
    """The reference's pipeline of a variant, and the directory that holds it."""
    text = UMT5Config(
        vocab_size=142, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    networks = {
        "transformer": WanTransformer3DModel(**TRANSFORMER | variant.transformer),
        "vae": AutoencoderKLWan(**VAE | (VAE_16 if variant.expand_timesteps else {})),
        "text_encoder": UMT5EncoderModel(text),
    }
    files: dict[str, Any] = {
        "tokenizer": T5TokenizerFast.from_pretrained(PACKAGE / "shapes" / "tokenizer"),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
        ),
    }
    if variant.boundary_ratio is not None:
        networks["transformer_2"] = WanTransformer3DModel(**TRANSFORMER | variant.transformer)
    if variant.clip:
        sizes = {"hidden_size": 10, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        networks["image_encoder"] = CLIPVisionModel(
            CLIPVisionConfig(**sizes, image_size=CLIP_SIDE, patch_size=7)
        )
        files["image_processor"] = CLIPImageProcessorPil(
            size={"shortest_edge": CLIP_SIDE}, crop_size=CLIP_SIDE
        )
    settings = {"boundary_ratio": variant.boundary_ratio, "expand_timesteps": variant.expand_timesteps}
    pipe = saved(variant.run_by, folder, networks, **files, **settings)
    edit(folder / "model_index.json", _class_name=variant.stored_as)
    return pipe


def saved(
    kind: type[DiffusionPipeline], folder: Path, networks: Mapping[str, Any], **others: Any
) -> DiffusionPipeline:
    """A pipeline of these networks in float64, saved in float32 to `directory`. Every parameter is redrawn,
    at values that float32 holds.
    """
    for seed, network in enumerate(networks.values()):
        randomised(network, seed)
        network.float()
    pipe = kind(**networks, **others)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    for network in networks.values():
        network.double()
    return pipe


def edit(path: Path, **entries: Any) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries, indent=2))


def load(folder: Path, **options: Any) -> Model:
    """tinydiff's model in that directory, its weights brought to float64."""
    model = blueprint.load(blueprint.read(ModelOptions(model_path=str(folder), **options)))
    nets = {
        name: replace(
            net, weights={key: tensor.double() for key, tensor in net.weights.items()}, dtype=torch.float64
        )
        for name, net in model.nets.items()
    }
    return replace(model, nets=nets)


def released(name: str, folder: Path) -> Path:
    """The configs of a released model at `directory / name`, without weights: enough to read and to admit
    requests, not to load.
    """
    stored = REPOSITORIES[name]
    files = {
        "model_index.json": stored["model_index"],
        "scheduler/scheduler_config.json": stored["scheduler"],
    }
    files |= {
        f"{component}/config.json": entry["config"] for component, entry in stored["components"].items()
    }
    for path, entries in files.items():
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / path).write_text(json.dumps(entries))
    return folder / name
