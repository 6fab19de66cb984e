"""The decoder language models against transformers in float64, every parameter redrawn: all states, padding
on either side, text.
"""

from dataclasses import replace

import pytest
import torch
import transformers
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.parity import Recording, close, doubles, randomised, shapes
from tinydiff.io.weights import load_weights, save_weights
from tinydiff.models.encoders import decoder_generate, decoder_lm
from tinydiff.models.encoders.decoder_config import FULL, SLIDING, Config, Rope
from tinydiff.models.encoders.decoder_generate import Sampling, generate
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan
from tinydiff.records import UserError

PLAN = Plan()
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "beta_fast": 2.0, "beta_slow": 0.5}
MINISTRAL = {
    "original_max_position_embeddings": 7,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
GEMMA = {"query_pre_attn_scalar": 5, "sliding_window": 5, "hidden_activation": "gelu_pytorch_tanh"}
GEMMA3_ROPE = {
    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
    SLIDING: {"rope_type": "default", "rope_theta": 1e3},
}
GEMMA4 = {
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 5,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "final_logit_softcapping": 0.5,
    "tie_word_embeddings": True,
}

CASES = {
    "Llama": (
        "Llama", "",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"},
    ),
    "Llama 3.1": ("Llama", "", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}),
    "Llama, linear": (
        "Llama", "", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "Mistral": (
        "Mistral", "",
        {
            "head_dim": 12, "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
        },
    ),
    "Mistral, sliding": ("Mistral", "", {"sliding_window": 5}),
    "Ministral 3": ("Ministral3", "", {"rope_parameters": YARN | MINISTRAL}),
    "Ministral 3, plain yarn": (
        "Ministral3", "",
        {"sliding_window": 6, "rope_parameters": YARN | MINISTRAL | {"mscale": None, "truncate": False}},
    ),
    "Qwen2.5": (
        "Qwen2_5_VL", "Text",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}},
    ),
    "Qwen2.5, sliding": (
        "Qwen2_5_VL", "Text",
        {
            "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
    ),
    "Qwen3": ("Qwen3", "", {"head_dim": 16, "tie_word_embeddings": True}),
    "Qwen3, biased": ("Qwen3", "", {"attention_bias": True}),
    "Gemma2": ("Gemma2", "", GEMMA | {"attn_logit_softcapping": 0.4, "final_logit_softcapping": 0.5}),
    "Gemma3": ("Gemma3", "Text", GEMMA | {"sliding_window_pattern": 3, "rope_parameters": GEMMA3_ROPE}),
    "Gemma4": ("Gemma4Unified", "Text", GEMMA4),
    "Gemma4, values of their own": (
        "Gemma4Unified", "Text", GEMMA4 | {"attention_k_eq_v": False, "global_head_dim": 8},
    ),
}  # fmt: skip
WRITERS = {"Llama", "Llama 3.1", "Ministral 3, plain yarn", "Qwen3", "Gemma2", "Gemma3", "Gemma4"}


def _case(name, head=False):
    """(Config read from the reference's own, reference, its weights by the spec's names)."""
    family, part, changes = CASES[name]
    entries = SMALL | changes
    settings = getattr(transformers, f"{family}{part}Config")(**entries)
    class_name = f"{family}ForCausalLM" if head else f"{family}{part}Model"
    reference = getattr(transformers, class_name)(settings)
    known = class_name if class_name in decoder_lm.CLASSES else f"{family}ForCausalLM"
    c = decoder_lm.config_from(settings.to_dict(), known)
    c = replace(c, lm_head=head)
    flat = randomised(reference, 1)
    return (
        c,
        reference,
        {
            name: tensor
            for key, tensor in flat.items()
            if (name := decoder_lm.key_map(c).row(key)) is not None
        },
    )


def _tokens(side):
    ids = torch.randint(1, SMALL["vocab_size"], (2, 19), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if side == "right":
        mask[1, 6:] = 0
    if side == "left":
        mask[1, :13] = 0
    return ids, mask


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", CASES)
def test_every_state_equals_the_reference(name, side):
    """Padding included, since FLUX.2 reads those states too. Gemma 2 runs the reference's eager attention,
    which leaves noise there.
    """
    c, reference, flat = _case(name)
    ids, mask = _tokens(side)
    with doubles():
        expected = reference(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    ours = decoder_lm.encode(c, PLAN, Weights(flat), ids, mask, take=tuple(range(c.layers + 1)))
    assert len(expected) == len(ours) == 5
    where = mask.bool() if name == "Gemma2" else torch.ones_like(mask).bool()
    for mine, state in zip(ours, expected, strict=True):
        close(mine[where], state[where])


@pytest.mark.parametrize("name", CASES)
def test_the_spec_names_every_weight_and_all_are_read(name):
    c, _, flat = _case(name)
    assert shapes(decoder_lm.spec(c)) == shapes(flat)
    seen = Recording(flat)
    decoder_lm.encode(c, PLAN, Weights(seen), _tokens("none")[0], take=(c.layers,))
    assert seen.read == set(flat)


@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_fewer_layers_give_the_same_states_unnormalised(name):
    c, _, flat = _case(name)
    ids, mask = _tokens("right")
    whole = decoder_lm.encode(c, PLAN, Weights(flat), ids, mask, take=(1, 3))
    part = replace(c, layers=3)
    assert not part.final_norm and "norm.weight" not in shapes(decoder_lm.spec(part))
    kept = {key: flat[key] for key in shapes(decoder_lm.spec(part))}
    for a, b in zip(whole, decoder_lm.encode(part, PLAN, Weights(kept), ids, mask, take=(1, 3)), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"state 4; .* 0 to 3"):
        decoder_lm.encode(part, PLAN, Weights(kept), ids, mask, take=(4,))


def test_no_mask_is_a_mask_of_ones_and_equal_axes_are_one_axis():
    c, _, flat = _case("Qwen2.5")
    ids, mask = _tokens("none")
    (plain,) = decoder_lm.encode(c, PLAN, Weights(flat), ids, mask, take=(4,))
    places = torch.arange(ids.shape[1]).expand(3, 2, -1)
    embeds = decoder_lm.embed(c, PLAN, Weights(flat), ids)
    (axes,) = decoder_lm.encode(
        c, PLAN, Weights(flat), torch.zeros_like(ids), take=(4,), positions=places, embeds=embeds
    )
    assert torch.equal(plain, axes)
    (apart,) = decoder_lm.encode(
        c, PLAN, Weights(flat), ids, take=(4,), positions=places * torch.tensor([1, 2, 3])[:, None, None]
    )
    assert (apart - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match="mrope_section"):
        decoder_lm.encode(
            _case("Llama")[0], PLAN, Weights(_case("Llama")[2]), ids, take=(4,), positions=places
        )


@pytest.mark.parametrize("name", ["Qwen3", "Gemma4", "Gemma3", "Gemma2", "Ministral 3"])
def test_half_types_are_as_near_as_the_reference(name):
    c, reference, flat = _case(name)
    ids, mask = _tokens("right")
    with doubles():
        exact = reference(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    with torch.no_grad():
        theirs = reference.bfloat16()(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    halves = {key: tensor.bfloat16() for key, tensor in flat.items()}
    (ours,) = decoder_lm.encode(c, PLAN, Weights(halves), ids, mask, take=(c.layers,))
    assert ours.dtype == torch.bfloat16
    assert (ours[mask.bool()] - exact).norm() <= 1.2 * (theirs - exact).norm()


# --- writing


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_greedy_text_is_that_of_the_reference(name):
    c, reference, flat = _case(name, head=True)
    assert shapes(decoder_lm.spec(c)) == shapes(flat)
    ids, mask = _tokens("left")
    with doubles(), torch.no_grad():
        written = reference.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)[
            :, ids.shape[1] :
        ].tolist()
    assert len(written[0]) == 9 and len({*written[0], *written[1]}) > 4
    assert generate(c, PLAN, Weights(flat), ids, mask, limit=9, stop=()) == written
    end = written[1][4]
    cut = [row[: row.index(end)] if end in row else row for row in written]
    assert generate(c, PLAN, Weights(flat), ids, mask, limit=9, stop={end}) == cut


def test_the_cache_gives_what_the_whole_text_gives():
    c, _, flat = _case("Gemma3", head=True)
    ids = _tokens("none")[0]
    (row,) = generate(c, PLAN, Weights(flat), ids[:1], limit=8, stop=())
    whole = torch.cat([ids[:1], torch.tensor([row])], 1)
    (state,) = decoder_lm.encode(c, PLAN, Weights(flat), whole, take=(4,))
    logits = state @ flat["embed_tokens.weight"].T
    assert logits[0, ids.shape[1] - 1 : -1].argmax(-1).tolist() == row


def test_sampling_is_that_of_the_reference_and_repeats_with_its_seed():
    scores, ids = (
        torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 3,
        torch.randint(0, 50, (3, 12)),
    )
    for sampling in (
        Sampling(0.6, top_p=0.9),
        Sampling(1.3, top_k=7, repetition_penalty=1.4),
        Sampling(0.8, top_k=20, top_p=0.5, repetition_penalty=0.8),
        Sampling(0.0, repetition_penalty=2.0),
    ):
        steps = [RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
        if sampling.temperature:
            steps += [
                TemperatureLogitsWarper(sampling.temperature),
                TopKLogitsWarper(sampling.top_k or 50),
                TopPLogitsWarper(sampling.top_p),
            ]
        assert torch.equal(
            decoder_generate.warped(scores, ids, sampling), LogitsProcessorList(steps)(ids, scores.clone())
        )
    draws = [
        decoder_generate.choose(scores, ids, Sampling(2.0), torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_what_cannot_be_written_is_refused():
    c, _, flat = _case("Qwen3", head=True)
    ids, mask = _tokens("right")
    with pytest.raises(ValueError, match="padded on the left"):
        generate(c, PLAN, Weights(flat), ids, mask, limit=1, stop=())
    with pytest.raises(ValueError, match="lm_head"):
        generate(replace(c, lm_head=False), PLAN, Weights(flat), ids, limit=1, stop=())
    with pytest.raises(ValueError, match=r"top_p"):
        Sampling(top_p=0.0)


# --- released files

QWEN25 = {
    "model_type": "qwen2_5_vl",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}  # fmt: skip
QWEN3_4B = {
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
MINISTRAL_3B = {
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 9216,
    "max_position_embeddings": 262144,
    "model_type": "ministral3",
    "num_attention_heads": 32,
    "num_hidden_layers": 26,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384, "rope_theta": 1000000.0,
        "rope_type": "yarn", "type": "yarn",
    },
    "sliding_window": None,
    "tie_word_embeddings": True,
    "vocab_size": 131072,
}  # fmt: skip
GEMMA3_12B = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 3840, "intermediate_size": 15360, "model_type": "gemma3_text",
        "num_attention_heads": 16, "num_hidden_layers": 48, "num_key_value_heads": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
}  # fmt: skip

GEMMA4_12B = {
    "model_type": "gemma4_unified",
    "text_config": {
        "attention_k_eq_v": True, "global_head_dim": 512, "head_dim": 256, "hidden_size": 3840,
        "intermediate_size": 15360, "model_type": "gemma4_unified_text", "num_attention_heads": 16,
        "num_global_key_value_heads": 1, "num_hidden_layers": 48, "num_key_value_heads": 8,
        "sliding_window": 1024, "use_bidirectional_attention": "vision",
    },
}  # fmt: skip


def test_gemma_4_has_other_heads_in_layers_that_do_not_slide():
    """Older files name the heads of these layers once, newer ones list them by layer."""
    c = decoder_lm.config_from(GEMMA4_12B, "Gemma4UnifiedForConditionalGeneration")
    assert c.layer_types == ((SLIDING,) * 5 + (FULL,)) * 8 and (c.vocab_size, c.layers) == (262144, 48)
    assert (c.heads(SLIDING), c.heads(FULL)) == ((256, 8, False), (512, 1, True))
    assert c.rope_parameters == Rope(1e6, "proportional", partial_rotary_factor=0.25)
    assert c.local_rope_parameters == Rope(1e4)
    text = {
        key: value
        for key, value in GEMMA4_12B["text_config"].items()
        if key not in ("global_head_dim", "num_global_key_value_heads")
    }
    listed = {str(i): {"head_dim": 512, "num_key_value_heads": 1} for i in range(5, 48, 6)}
    whole = {"text_config": text | {"per_layer_config": listed}}
    assert decoder_lm.config_from(whole, "Gemma4UnifiedForConditionalGeneration") == c
    rows = shapes(decoder_lm.spec(c))
    assert rows["layers.5.self_attn.k_proj.weight"] == (512, 3840)
    assert "layers.5.self_attn.v_proj.weight" not in rows
    own = decoder_lm.config_from(text | {"attention_k_eq_v": False}, "Gemma4UnifiedTextModel")
    assert own.heads(FULL) == (512, 8, False)


def test_released_configs_of_both_layouts():
    c = decoder_lm.config_from(QWEN25, "Qwen2_5_VLForConditionalGeneration")
    assert (
        c
        == Config()
        == decoder_lm.config_from(
            {"text_config": QWEN25 | {"model_type": "qwen2_5_vl_text"}}, "Qwen2_5_VLTextModel"
        )
    )
    c = decoder_lm.config_from(QWEN3_4B, "Qwen3ForCausalLM")
    assert (c.qk_norm, c.qkv_bias, c.tie_word_embeddings, c.head_dim, c.rope_parameters.rope_theta) == (
        True,
        False,
        True,
        128,
        1e6,
    )
    c = decoder_lm.config_from(
        {"model_type": "mistral3", "text_config": MINISTRAL_3B, "tie_word_embeddings": True}, "Mistral3Model"
    )
    rope = c.rope_parameters
    assert (rope.rope_type, rope.factor, rope.llama_4_scaling_beta, set(c.layer_types)) == (
        "yarn",
        16.0,
        0.1,
        {FULL},
    )
    c = decoder_lm.config_from(GEMMA3_12B, "Gemma3ForConditionalGeneration")
    assert (c.vocab_size, c.head_dim, c.sliding_window, c.query_pre_attn_scalar) == (262208, 256, 1024, 256)
    assert c.layer_types == ((SLIDING,) * 5 + (FULL,)) * 8 and c.tie_word_embeddings
    assert c.rope_parameters == Rope(1e6, "linear", 8.0) and c.local_rope_parameters == Rope(1e4)


@pytest.mark.parametrize(
    "entries, class_name, sentence",
    [
        (QWEN3_4B, "T5EncoderModel", r"'T5EncoderModel' is no known language model"),
        (QWEN3_4B, "LlamaModel", r"model_type is 'qwen3'; LlamaModel holds llama"),
        (QWEN3_4B | {"hidden_act": "relu"}, "Qwen3Model", r"hidden_act is 'relu'; known are silu"),
        (
            QWEN3_4B | {"num_key_value_heads": 5},
            "Qwen3Model",
            r"num_attention_heads is 32; .* multiple of num_key_value_heads, 5",
        ),
        (
            QWEN3_4B | {"rope_scaling": {"rope_type": "longrope", "long_factor": []}},
            "Qwen3Model",
            r"rope_type is 'longrope'",
        ),
        (
            QWEN3_4B | {"rope_scaling": {"rope_type": "yarn", "speed": 1}},
            "Qwen3Model",
            r"rope parameter 'speed' is not known",
        ),
        (
            QWEN3_4B | {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "Qwen3Model",
            r"partial_rotary_factor is 0.5",
        ),
        (
            QWEN25 | {"rope_scaling": {"mrope_section": [16, 24, 25]}},
            "Qwen2_5_VLTextModel",
            r"mrope_section is \(16, 24, 25\).* 64",
        ),
        (
            QWEN25 | {"use_sliding_window": True, "layer_types": [FULL]},
            "Qwen2_5_VLTextModel",
            r"layer_types is .* 28 layers",
        ),
        (
            GEMMA3_12B["text_config"] | {"use_bidirectional_attention": True},
            "Gemma3TextModel",
            r"use_bidirectional_attention",
        ),
        (
            GEMMA4_12B["text_config"] | {"use_bidirectional_attention": "all"},
            "Gemma4UnifiedTextModel",
            r"use_bidirectional_attention is set; only causal",
        ),
        (
            GEMMA4_12B["text_config"] | {"num_kv_shared_layers": 20},
            "Gemma4UnifiedTextModel",
            r"num_kv_shared_layers is 20; only layers with keys of their own",
        ),
        (
            GEMMA4_12B["text_config"] | {"per_layer_config": {"5": {"head_dim": 512}}},
            "Gemma4UnifiedTextModel",
            r"per_layer_config is .*; it must give every layer of full_attention the same head_dim and",
        ),
        (
            GEMMA4_12B["text_config"] | {"per_layer_config": {"5": 512}},
            "Gemma4UnifiedTextModel",
            r"per_layer_config\.5 is 512; it must be an object",
        ),
        (
            GEMMA4_12B["text_config"] | {"num_global_key_value_heads": 3},
            "Gemma4UnifiedTextModel",
            r"num_attention_heads is 16; .* multiple of num_global_key_value_heads, 3",
        ),
    ],
)
def test_what_is_not_implemented_is_refused(entries, class_name, sentence):
    with pytest.raises(ValueError, match=sentence):
        decoder_lm.config_from(entries, class_name)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"layers": 0}, "layers is 0; the model has 1 to 28"),
        ({"layers": 26, "lm_head": True}, "lm_head needs all 28 layers; layers is 26"),
        ({"layer_types": (SLIDING,) * 28}, "sliding_window is None"),
        ({"rope_parameters": Rope(1e6, mrope_section=(32, 32))}, "mrope_section"),
    ],
)
def test_impossible_configs_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(Config(), **changes)


PREFIXES = ("", "model.", "language_model.model.", "model.language_model.", "language_model.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_released_names_are_found_and_the_rest_is_dropped(prefix):
    c = Config(layers=26)
    assert decoder_lm.key_map(c).row(f"{prefix}embed_tokens.weight") == "embed_tokens.weight"
    assert (
        decoder_lm.key_map(c).row(f"{prefix}layers.25.self_attn.q_proj.bias")
        == "layers.25.self_attn.q_proj.bias"
    )
    dropped = (
        f"{prefix}layers.26.mlp.up_proj.weight", f"{prefix}layers.27.input_layernorm.weight",
        f"{prefix}norm.weight", "lm_head.weight", "visual.merger.mlp.0.bias",
        "model.visual.blocks.3.norm1.weight", "vision_tower.ln_pre.weight",
        "model.vision_tower.ln_pre.weight",
        "model.embed_vision.embedding_projection.weight", "multi_modal_projector.linear_1.weight",
        f"{prefix}layers.3.self_attn.rotary_emb.inv_freq", "language_model.lm_head.weight",
    )  # fmt: skip
    assert {decoder_lm.key_map(c).row(key) for key in dropped} == {None}
    assert decoder_lm.key_map(c).row(f"{prefix}score.weight") == f"{prefix}score.weight"
    for key in ("layers.28.input_layernorm.weight", "layers.3.adapter.weight"):
        assert decoder_lm.key_map(c).row(f"{prefix}{key}") == key
    whole = Config(lm_head=True)
    assert decoder_lm.key_map(whole).row(f"{prefix}norm.weight") == "norm.weight"
    assert decoder_lm.key_map(whole).row("lm_head.weight") == "lm_head.weight"
    assert (
        decoder_lm.key_map(replace(whole, tie_word_embeddings=True)).row("lm_head.weight")
        == "embed_tokens.weight"
    )


def test_a_released_file_loads_and_a_foreign_key_fails(tmp_path):
    c, _, flat = _case("Mistral")
    c = replace(c, layers=2)
    stored = {f"language_model.model.{key}": tensor for key, tensor in flat.items()}
    stored |= {"language_model.lm_head.weight": torch.ones(2), "vision_tower.ln_pre.weight": torch.ones(2)}
    save_weights(tmp_path / "model.safetensors", stored)

    def load():
        return load_weights(tmp_path, decoder_lm.spec(c), torch.float64, keys=decoder_lm.key_map(c))

    ids, mask = _tokens("left")
    (state,) = decoder_lm.encode(c, PLAN, Weights(load()), ids, mask, take=(2,))
    assert torch.equal(
        state, decoder_lm.encode(replace(c, layers=4), PLAN, Weights(flat), ids, mask, take=(2,))[0]
    )
    save_weights(
        tmp_path / "model.safetensors", stored | {"language_model.model.layers.1.extra.weight": torch.ones(2)}
    )
    with pytest.raises(UserError, match=r"1 unexpected \(language_model\.model\.layers\.1\.extra\.weight\)"):
        load()
