"""Writes trained weights as a model directory in diffusers layout, in float16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinydiff.io.weights import save_weights
from tinydiff.models import wan
from tinydiff.models.autoencoders import wan as wan_vae
from tinydiff.models.encoders import t5
from tinydiff.parallel.plan import Row
from training import autoencoder, model, tokenizer

DIFFUSERS, TRANSFORMERS = "0.42.1", "5.0.0"

SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": DIFFUSERS,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 4.0,
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
}

INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": DIFFUSERS,
    "boundary_ratio": None,
    "expand_timesteps": True,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def _json(path: Path, entries: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")


def _component(
    folder: Path, file: str, config: dict[str, Any], rows: Iterable[Row], weights: dict[str, Tensor]
) -> None:
    _json(folder / "config.json", config)
    chosen = {row.name: weights[row.name].detach().reshape(row.shape).half().contiguous() for row in rows}
    save_weights(folder / file, chosen)


def _autoencoder(mean: Tensor, std: Tensor) -> dict[str, Any]:
    entries = asdict(model.AUTOENCODER)
    del entries["clip_output"]  # not a field of the reference
    return entries | {
        name: [round(x, 5) for x in values.tolist()]
        for name, values in (("latents_mean", mean), ("latents_std", std))
    }


def export(run: Path, folder: Path, origin: Path | None = None) -> int:
    """Write the model of `run` into `folder`; returns the bytes of all safetensors together.

    origin: the model directory that was trained on, whose autoencoder and tokenizer are taken as they are.
    """
    trained = torch.load(run / "denoiser.pt", "cpu")
    average = trained["average"]
    text = model.text_encoder(len(average["text.shared.weight"]))

    def part(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): tensor for name, tensor in average.items() if name.startswith(prefix)
        }

    _component(
        folder / "transformer",
        "diffusion_pytorch_model.safetensors",
        {
            "_class_name": "WanTransformer3DModel",
            "_diffusers_version": DIFFUSERS,
            **asdict(model.TRANSFORMER),
        },
        wan.spec(model.TRANSFORMER),
        part("denoiser."),
    )
    _component(
        folder / "text_encoder",
        "model.safetensors",
        {
            "architectures": ["UMT5EncoderModel"],
            "transformers_version": TRANSFORMERS,
            **{
                "pad_token_id": 0,
                "eos_token_id": 1,
                "decoder_start_token_id": 0,
                "feed_forward_proj": "gated-gelu",
                "dropout_rate": 0.0,
            },
            **{"num_decoder_layers": text.num_layers, "is_encoder_decoder": True, "use_cache": False},
            **asdict(text),
        },
        t5.spec(text),
        part("text."),
    )
    if origin is None:
        _own(run, folder, *trained["statistics"])
    elif origin.resolve() != folder.resolve():
        for same in ("vae", "tokenizer"):
            shutil.copytree(origin / same, folder / same, dirs_exist_ok=True)
    _json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _json(folder / "model_index.json", INDEX)
    return sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))


def _own(run: Path, folder: Path, mean: Tensor, std: Tensor) -> None:
    """The autoencoder of `run`, and the tokenizer of these scenes' captions."""
    latest = torch.load(
        [path for stage in autoencoder.STAGES if (path := run / f"{stage}.pt").exists()][-1], "cpu"
    )["average"]
    _component(
        folder / "vae",
        "diffusion_pytorch_model.safetensors",
        {"_class_name": "AutoencoderKLWan", "_diffusers_version": DIFFUSERS, **_autoencoder(mean, std)},
        wan_vae.spec(autoencoder.C),
        autoencoder.with_past(latest, flat=()),
    )
    tokenizer.save(folder / "tokenizer")
