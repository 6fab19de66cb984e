"""Every released model: the spec rows are the released weights, and one evaluation costs what the reference's
costs.

`models/released` has a file per repository (model_index, scheduler and component configs as released,
parameter counts), `tests/data/released` a file of keys and shapes per kind of component, `{0..39}` and
`{0,2}` standing for numbers. The keys are those of the reference classes built from the released configs;
where released files spell them otherwise, `spellings` says how. FLUX.2-Tiny-AutoEncoder's class is in no
library: its keys are those of the layers that its repository describes. Nor is that of Wan2.2-S2V's network:
its keys are those of its arithmetic written a second time, `wan_s2v_reference.py`.
"""

import functools
import itertools
import json
import re
from contextlib import nullcontext
from dataclasses import asdict, replace
from math import prod
from pathlib import Path

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.parity import shapes
from tinydiff.io.sources import Component
from tinydiff.models import (
    ernie,
    flux,
    flux2,
    hunyuan_video,
    ltx2,
    ovis,
    qwen_image,
    registry,
    sd3,
    wan,
    z_image,
)
from tinydiff.models.classes import RECORDS
from tinydiff.models.encoders import clip_vision, llava_vision, qwen_vision
from tinydiff.models.evaluate import predict
from tinydiff.models.released import REPOSITORIES
from tinydiff.ops.network import Network
from tinydiff.runtime.blueprint import UNREAD
from tinydiff.runtime.component_config import read_config

RELEASED = Path(__file__).parents[1] / "data" / "released"
MODELS = REPOSITORIES
COMPONENTS = [(name, component) for name, model in MODELS.items() for component in model["components"]]
ALONE = "fal/FLUX.2-Tiny-AutoEncoder"
"""An autoencoder without a model around it."""

SCHEDULERS = {"UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"}
WITHOUT_WEIGHTS = {
    "T5TokenizerFast", "T5Tokenizer", "CLIPTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast",
    "LlamaTokenizerFast", "GemmaTokenizerFast", "ByT5Tokenizer", "ClassifierFreeGuidance",
    "TokenizersBackend", "PixtralProcessor", "CLIPImageProcessor", "Qwen2VLProcessor", "SiglipImageProcessor",
    "Wav2Vec2Processor", "GemmaTokenizer", "Gemma4Processor",
}  # fmt: skip

PREFIXES = {
    "CLIPVisionModel": [("", "vision_model.")],
    "SiglipVisionModel": [("", "vision_model.")],
    "CLIPTextModel": [("", "text_model.")],
    "Qwen3Model": [
        ("model.", ""),
        *((name, f"model.{name}") for name in ("embed_tokens.", "layers.", "norm.")),
    ],
    "Qwen2_5_VLForConditionalGeneration": [("model.visual.", "visual."), ("model.language_model.", "model.")],
    "Mistral3ForConditionalGeneration": [
        ("model.language_model.", "language_model.model."), ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."), ("lm_head.", "language_model.lm_head."),
    ],
    "LlavaForConditionalGeneration": [
        ("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ],
    "Mistral3Model": [
        ("language_model.", "language_model.model."),
        ("language_model.", "model.language_model."),
    ],
}  # fmt: skip
"""Class -> (how transformers 5 begins a key, how files written before or beside it do)."""


def _numbers(group):
    for part in group.split(","):
        first, _, last = part.partition("..")
        yield from range(int(first), int(last or first) + 1)


@functools.cache
def released_keys(kind):
    """Key to shape, from the collapsed file: `a.{0..1}.b` is `a.0.b` and `a.1.b`."""
    table = {}
    for name, shape in json.loads((RELEASED / f"keys_{kind}.json").read_text()).items():
        pieces = re.split(r"\{([^}]*)\}", name)
        choices = [[piece] if i % 2 == 0 else map(str, _numbers(piece)) for i, piece in enumerate(pieces)]
        for parts in itertools.product(*choices):
            key = "".join(parts)
            assert key not in table, f"{key} is listed twice"
            table[key] = tuple(shape)
    return table


def class_of(name, component):
    """The class that runs a component: as model_index.json says, or the config of an autoencoder alone."""
    listed = MODELS[name]["model_index"].get(component)
    return listed[1] if listed else MODELS[name]["components"][component]["config"]["_class_name"]


@functools.cache
def config_of(name, component):
    """The family's Config of a released config.json, as the runtime reads it."""
    class_name = class_of(name, component)
    entries = {"config.json": MODELS[name]["components"][component]["config"]}
    return read_config(RECORDS[class_name], Component(component, "", class_name, entries))


def rename(class_name, c, key):
    """The spec's name of a stored key, as the loader finds it."""
    return RECORDS[class_name].keys(c).row(key)


def spellings(class_name, key):
    """Other names of a key in released files."""
    return [new + key.removeprefix(old) for old, new in PREFIXES.get(class_name, ()) if key.startswith(old)]


def counted_apart(key, config):
    """Second names of one weight, buffers, and a mark that nothing reads: counts of parameters leave them
    out.
    """
    tied = key.endswith("lm_head.weight") and config.get("tie_word_embeddings") is not False
    others = ("encoder.embed_tokens.weight", "keyframes_abs_pos_embedding", "pos_embed.pos_embed")
    return tied or key in others or key.startswith("bn.")


def test_all_models_are_here():
    names = {row.name for row in registry.MODELS if row.name != registry.SHIPPED}
    assert len(MODELS) == 48 and sum("transformer_2" in model["components"] for model in MODELS.values()) == 2
    assert set(MODELS) - {ALONE} == names


@pytest.mark.parametrize(("name", "component"), COMPONENTS, ids=lambda value: value.split("/")[-1])
def test_the_spec_is_the_released_weights(name, component):
    """Language models are built whole; keys that nothing reads, other towers and output heads, must be known
    to be such.
    """
    released, class_name = MODELS[name]["components"][component], class_of(name, component)
    c, keys = config_of(name, component), released_keys(released["keys"])
    rows = list(RECORDS[class_name].spec(c))
    named = {key: rename(class_name, c, key) for key in keys}
    assert shapes(rows) == {named[key]: shape for key, shape in keys.items() if named[key] is not None}
    tied = {row.name for row in rows if row.tied}
    assert {name for name in named.values() if name and list(named.values()).count(name) > 1} <= tied
    assert (
        sum(prod(shape) for key, shape in keys.items() if not counted_apart(key, released["config"]))
        == released["parameters"]
    )


@pytest.mark.parametrize(("name", "component"), COMPONENTS, ids=lambda value: value.split("/")[-1])
def test_other_spellings_of_a_key_mean_the_same(name, component):
    class_name = class_of(name, component)
    c, keys = config_of(name, component), released_keys(MODELS[name]["components"][component]["keys"])
    for key in keys:
        for other in spellings(class_name, key):
            assert rename(class_name, c, other) == rename(class_name, c, key), other


def test_what_is_dropped_of_a_checkpoint():
    """Only towers and heads that no recipe reads, the batch norm's counter, a basis to invert spectrograms,
    and a mark of keyframes that no pipeline sets. A tied head is the embeddings.
    """
    dropped = {}
    for name, component in COMPONENTS:
        class_name, c = class_of(name, component), config_of(name, component)
        for key in released_keys(MODELS[name]["components"][component]["keys"]):
            if rename(class_name, c, key) is None:
                part = re.match(
                    r"(model\.)?(visual|vision_tower|multi_modal_projector|lm_head|bn\.num_batches_tracked"
                    r"|mel_stft\.stft_fn\.inverse_basis|wav2vec2\.masked_spec_embed"
                    r"|embed_vision|embed_audio|keyframes_abs_pos_embedding)",
                    key,
                )
                dropped.setdefault(class_name, set()).add(part and part[2])
    assert dropped == {
        "AutoencoderKLFlux2": {"bn.num_batches_tracked"},
        "LTX2VocoderWithBWE": {"mel_stft.stft_fn.inverse_basis"},
        "Gemma3ForConditionalGeneration": {"vision_tower", "multi_modal_projector"},
        "Gemma4UnifiedForConditionalGeneration": {"embed_vision", "embed_audio"},
        "LTX2VideoTransformer3DModel": {"keyframes_abs_pos_embedding"},
        "LlavaForConditionalGeneration": {"vision_tower", "multi_modal_projector", "lm_head"},
        "Mistral3ForConditionalGeneration": {"vision_tower", "multi_modal_projector", "lm_head"},
        "Mistral3Model": {"vision_tower", "multi_modal_projector"},
        "Qwen2_5_VLForConditionalGeneration": {"visual", "lm_head"},
        "Qwen3ForCausalLM": {"lm_head"},
        "Wav2Vec2ForCTC": {"lm_head", "wav2vec2.masked_spec_embed"},
    }


def test_the_vision_tower_is_the_rest_of_the_language_model():
    for model in MODELS.values():
        part = model["components"].get("text_encoder", {})
        if part.get("keys") == "qwen25_vl_7b":
            keys = {
                qwen_vision.key_map(qwen_vision.Config()).row(key): shape
                for key, shape in released_keys(part["keys"]).items()
            }
            assert shapes(qwen_vision.spec(qwen_vision.config_from(part["config"]))) == {
                key: keys[key] for key in keys if key is not None
            }
        if part.get("keys") == "llava_llama3_8b":
            c = llava_vision.config_from(part["config"], "LlavaForConditionalGeneration")
            rename = llava_vision.key_map(c).row
            for spelt in ({}, dict(PREFIXES["LlavaForConditionalGeneration"])):
                keys = {}
                for key, shape in released_keys(part["keys"]).items():
                    old = next((old for old in spelt if key.startswith(old)), "")
                    keys[rename(spelt.get(old, "") + key.removeprefix(old))] = shape
                assert shapes(llava_vision.spec(c)) == {key: keys[key] for key in keys if key is not None}


@pytest.mark.parametrize("name", [name for name in MODELS if name != ALONE])
def test_every_component_with_weights_is_known(name):
    model = MODELS[name]
    listed = {
        key: value[1]
        for key, value in model["model_index"].items()
        if isinstance(value, list) and value[1] is not None
    }
    assert {key for key, kind in listed.items() if kind in RECORDS} == set(model["components"])
    listed = {key: kind for key, kind in listed.items() if key not in UNREAD}
    assert set(listed.values()) - set(RECORDS) <= SCHEDULERS | WITHOUT_WEIGHTS
    assert model["scheduler"]["_class_name"] == listed["scheduler"] and listed["scheduler"] in SCHEDULERS
    if "image_processor" in model:
        read = model["image_processor"]
        assert (tuple(read["image_mean"]), tuple(read["image_std"])) == (clip_vision.MEAN, clip_vision.STD)
        assert (
            read["size"] == {"shortest_edge": 224}
            and read["resample"] == 3
            and read["rescale_factor"] == 1 / 255
        )
    if "processor" in model:
        read, vision = (
            model["processor"],
            qwen_vision.config_from(model["components"]["text_encoder"]["config"]),
        )
        assert (tuple(read["image_mean"]), tuple(read["image_std"])) == (clip_vision.MEAN, clip_vision.STD)
        assert (read["patch_size"], read["temporal_patch_size"]) == (
            vision.patch_size,
            vision.temporal_patch_size,
        )
        assert read["merge_size"] == vision.spatial_merge_size and (
            read["min_pixels"],
            read["max_pixels"],
        ) == (56 * 56, 12845056)


@pytest.mark.parametrize("name", [name for name in MODELS if name != ALONE])
def test_the_registry_tells_the_released_model(name):
    row, model = registry.named(name), MODELS[name]
    networks = {key: value for key, value in model["components"].items() if key.startswith("transformer")}
    config = networks["transformer"]["config"]
    assert row.params == sum(network["parameters"] for network in networks.values())
    assert row.shape and {key: (model["model_index"] | config).get(key) for key in row.shape} == dict(
        row.shape
    )
    assert (row.pipeline, row.experts) == (model["model_index"]["_class_name"], len(networks))
    assert row.boundary_ratio == model["model_index"].get("boundary_ratio")
    assert row.expand_timesteps == model["model_index"].get("expand_timesteps", False)


# --- floating point operations


def _wan(c, name):
    row = registry.named(name)
    time, space = {16: (4, 8), 48: (4, 16)}[c.out_channels]
    size = ((row.num_frames - 1) // time + 1, row.height // space, row.width // space)
    positions, text = wan.positions(c, size), torch.empty(1, row.text_tokens, c.text_dim)
    known = {"hidden_states": torch.empty(1, c.in_channels, *size), "encoder_hidden_states": text}
    inputs = {"text": text, "positions": positions}
    if c.image_dim is not None:
        inputs["image"] = known["encoder_hidden_states_image"] = torch.empty(
            1, clip_vision.Config().tokens, c.image_dim
        )
    return known, torch.empty(1, len(positions), c.in_channels * prod(c.patch_size)), inputs


def _z_image(c, name):
    size = (1, 128, 128)
    inputs = {
        "text": torch.empty(1, 512, c.cap_feat_dim),
        "positions": z_image.positions(c, size),
        "real": z_image.real(c, size),
    }
    known = {
        "x": [torch.empty(c.in_channels, *size)],
        "cap_feats": list(inputs["text"]),
        "return_dict": False,
    }
    return known, torch.empty(1, 4096, c.in_channels * prod(c.patch_size)), inputs


def _qwen(c, name):
    """Edit-2511 with a reference image of the same size, Layered with four layers and its condition image."""
    sizes = [(80, 80)] * 6 if c.use_layer3d_rope else [(128, 128)] * (2 if c.zero_cond_t else 1)
    positions, text = qwen_image.positions(c, sizes), torch.empty(1, 512, c.joint_attention_dim)
    inputs, tokens = {"text": text, "positions": positions}, torch.empty(1, len(positions), c.in_channels)
    known = {
        "hidden_states": tokens,
        "encoder_hidden_states": text,
        "img_shapes": [[(1, h // 2, w // 2) for h, w in sizes]],
    }
    if c.zero_cond_t:
        inputs["frozen"] = torch.empty(1, len(positions), 1, dtype=torch.bool)
    if c.use_additional_t_cond:
        inputs["kind"] = known["additional_t_cond"] = torch.zeros(1, dtype=torch.int64)
    return known, tokens, inputs


def _flux(c, name):
    """Also FLUX.2 and Ovis-Image. Kontext is given an image of the same size."""
    row = {flux.Config: flux, flux2.Config: flux2, ovis.Config: ovis}[type(c)]
    size = (1, 64, 64) if row is flux2 else (1, 128, 128)
    positions = row.positions(size, (size,)) if "Kontext" in name else row.positions(size)
    text, tokens = (
        torch.empty(1, 256 if "schnell" in name else 512, c.joint_attention_dim),
        torch.empty(1, len(positions), c.in_channels),
    )
    inputs = {"text": text, "positions": positions}
    known = {"hidden_states": tokens, "encoder_hidden_states": text, "img_ids": positions.float()}
    known["txt_ids"] = torch.empty(text.shape[1], positions.shape[1])
    if row is flux:
        inputs["pooled"] = known["pooled_projections"] = torch.empty(1, c.pooled_projection_dim)
    if getattr(c, "guidance_embeds", False):
        inputs["guidance"] = known["guidance"] = torch.empty(1)
    return known, tokens, inputs


def _ernie(c, name):
    text = torch.empty(1, 128, c.text_in_dim)
    known = {
        "hidden_states": torch.empty(1, c.in_channels, 64, 64),
        "text_bth": text,
        "text_lens": torch.tensor([128]),
    }
    return (
        known,
        torch.empty(1, 4096, c.in_channels),
        {"text": text, "positions": ernie.positions((1, 64, 64))},
    )


def _sd3(c, name):
    text, pooled = torch.empty(1, 333, c.joint_attention_dim), torch.empty(1, c.pooled_projection_dim)
    known = {
        "hidden_states": torch.empty(1, c.in_channels, 128, 128),
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
    }
    inputs = {"text": text, "pooled": pooled, "positions": sd3.positions(c, (1, 128, 128))}
    return known, torch.empty(1, 4096, c.in_channels * c.patch_size**2), inputs


def _hunyuan(c, name):
    """Five frames at the model's default size."""
    size = (2, 90, 160)
    text, pooled = torch.empty(1, 256, c.text_embed_dim), torch.empty(1, c.pooled_projection_dim)
    positions, guidance = hunyuan_video.positions(c, size), torch.empty(1)
    values = prod(hunyuan_video.patch(c))
    known = {
        "hidden_states": torch.empty(1, c.in_channels, *size),
        "encoder_hidden_states": text,
        "encoder_attention_mask": torch.ones(1, 256),
        "pooled_projections": pooled,
        "guidance": guidance if c.guidance_embeds else None,
    }
    inputs = {"text": text, "pooled": pooled, "positions": positions, "guidance": guidance}
    if c.in_channels > c.out_channels:
        inputs["concat"] = torch.empty(1, len(positions), (c.in_channels - c.out_channels) * values)
    if c.image_condition_type == hunyuan_video.TOKEN_REPLACE:
        inputs["frozen"] = torch.empty(1, len(positions), 1, dtype=torch.bool)
    return known, torch.empty(1, len(positions), c.out_channels * values), inputs


def _ltx2(c, name):
    """The default size: 121 frames of 768x512, and five seconds of sound."""
    size, sound = (16, 16, 24), 126
    video, total = prod(size), prod(size) + sound
    texts = {
        f"{kind.prefix}text": torch.empty(
            1, 1024, c.caption_channels if c.use_prompt_embeddings else kind.text
        )
        for kind in (c.video, c.audio)
    }
    tokens, t = torch.empty(1, total, c.in_channels), torch.empty(1)
    known = {
        "hidden_states": tokens[:, :video],
        "audio_hidden_states": tokens[:, video:],
        "encoder_hidden_states": texts["text"],
        "audio_encoder_hidden_states": texts["audio_text"],
        "audio_timestep": t,
        "sigma": t,
        "use_cross_timestep": c.cross_attn_mod,
        "num_frames": size[0],
        "height": size[1],
        "width": size[2],
        "fps": 24.0,
        "audio_num_frames": sound,
    }
    inputs = texts | {
        "positions": ltx2.positions(c, size, 24.0),
        "audio_positions": ltx2.audio_positions(c, sound),
    }
    return known, tokens, inputs


REQUESTS = {
    hunyuan_video: _hunyuan,
    ltx2: _ltx2,
    wan: _wan,
    z_image: _z_image,
    qwen_image: _qwen,
    flux: _flux,
    flux2: _flux,
    ovis: _flux,
    ernie: _ernie,
    sd3: _sd3,
}
"""Family -> (the reference's keyword arguments but for the timestep, our tokens, our inputs), at the model's
own size.
"""

DEPTHS = ((1, 1), (2, 1), (1, 2))
"""Numbers of blocks of the two kinds."""


def _shallow(c, layers, single):
    """The network with fewer blocks; None for a second number where it has but one kind."""
    known = vars(c)
    if "num_single_layers" in known:
        return replace(c, num_layers=layers, num_single_layers=single)
    if "n_refiner_layers" in known:
        return replace(c, n_layers=layers, n_refiner_layers=single)
    if "dual_attention_layers" in known:  # those come first
        return replace(
            c,
            num_layers=layers + single,
            dual_attention_layers=tuple(range(single)) if c.dual_attention_layers else (),
        )
    return replace(c, num_layers=layers) if single == 1 else None


TEXT_PROJECTED = {z_image: "all_final_layer.2-1.linear", ernie: "final_linear"}
"""Families whose reference takes the text's rows through the last layer too, and drops them there; we drop
them before.
"""

UNTRACED = tuple(name for name in MODELS if "HunyuanVideo-1.5" in name or "S2V" in name)
"""The reference picks tokens by their mask, which the meta device does not know, or is in no library."""

DISTINCT = {
    (model["components"]["transformer"]["keys"], name if "Kontext" in name or "2511" in name else ""): name
    for name, model in MODELS.items() if name not in (ALONE, *UNTRACED)
}  # fmt: skip
"""A model of each shape, and those of the same shape that are asked with references."""


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTINCT.values())
def test_one_evaluation_costs_what_the_reference_costs(name, monkeypatch):
    """Floating point operations at the model's default size, counted on the meta device, nothing hoisted.

    Both counts are linear in the numbers of blocks, so that equality at these depths is equality at all.
    """
    monkeypatch.setattr(
        torch, "autocast", lambda **_: nullcontext()
    )  # ERNIE-Image turns it off, and it knows no meta device
    class_name, whole = class_of(name, "transformer"), config_of(name, "transformer")
    family = next(module for module in REQUESTS if module.FAMILY is RECORDS[class_name])
    for c in filter(None, (_shallow(whole, *depth) for depth in DEPTHS)):
        with torch.device("meta"):
            fields = {
                key: value
                for key, value in asdict(c).items()
                if key != "pooled_projection_dim" or family is not qwen_image
            }
            reference = getattr(diffusers, class_name)(**fields)
            known, tokens, inputs = REQUESTS[family](c, name)
            t = torch.empty(1)
            with FlopCounterMode(display=False) as theirs:
                reference(**known, **{"t" if family is z_image else "timestep": t})
            weights = {weight.name: torch.empty(weight.shape) for weight in family.spec(c)}
            with FlopCounterMode(display=False) as ours:
                predict(Network(family.FAMILY, c), weights, tokens, t, inputs)
        values = (
            0
            if family not in TEXT_PROJECTED
            else inputs["text"].shape[1] * weights[f"{TEXT_PROJECTED[family]}.weight"].numel()
        )
        assert ours.get_total_flops() + 2 * values == theirs.get_total_flops() > 1e11
