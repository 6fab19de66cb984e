"""A tiny random model of Wan2.2 speech to video in diffusers layout, and the reference's networks in it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel, Wav2Vec2Config, Wav2Vec2ForCTC

from tests.models.wan_s2v_reference import Reference
from tests.parity import randomised
from tests.runtime.folders import VAE, Z
from tests.sources import PACKAGE
from tinydiff.io import overlay
from tinydiff.models import wan_s2v

REPOSITORY = "Wan-AI/Wan2.2-S2V-14B"
CONFIG = wan_s2v.Config(
    dim=32,
    ffn_dim=40,
    freq_dim=8,
    text_dim=16,
    in_dim=Z,
    out_dim=Z,
    cond_dim=Z,
    num_heads=2,
    num_layers=3,
    audio_dim=24,
    num_audio_token=2,
    enable_adain=True,
    audio_inject_layers=(0, 2),
    motion_frames=9,
    audio_states=3,
)
SPEECH = {
    **{"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3},
    **{"conv_dim": (8,) * 7, "conv_bias": True, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
    **{"num_conv_pos_embeddings": 6, "num_conv_pos_embedding_groups": 4, "layerdrop": 0.0, "vocab_size": 7},
}


@dataclass(frozen=True)
class Networks:
    """The reference's, in float64."""

    transformer: Reference
    vae: AutoencoderKLWan
    text_encoder: UMT5EncoderModel
    audio_encoder: Wav2Vec2ForCTC


def build(folder: Path) -> Networks:
    """The model at `folder`, every parameter redrawn, and its networks."""
    shutil.copytree(overlay.BUILT_IN[REPOSITORY], folder, ignore=shutil.ignore_patterns("_overlay"))
    text = UMT5Config(
        vocab_size=142, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    made = Networks(
        Reference(CONFIG),
        AutoencoderKLWan(**VAE),
        UMT5EncoderModel(text),
        Wav2Vec2ForCTC(Wav2Vec2Config(**SPEECH, attn_implementation="eager")),
    )
    for seed, (name, network) in enumerate(vars(made).items()):
        randomised(network, seed)
        network.float()
        if name != "transformer":
            network.save_pretrained(folder / name)
    place = folder / "transformer"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(asdict(CONFIG)))
    save_file(made.transformer.state_dict(), place / "diffusion_pytorch_model.safetensors")
    for network in vars(made).values():
        network.double()
    T5TokenizerFast.from_pretrained(PACKAGE / "shapes/tokenizer").save_pretrained(folder / "tokenizer")
    (folder / "audio_processor").mkdir()
    settings = {"do_normalize": True, "sampling_rate": 16000}
    (folder / "audio_processor/preprocessor_config.json").write_text(json.dumps(settings))
    return made
