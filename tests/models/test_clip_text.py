"""CLIP's text encoders against transformers in float64, every parameter redrawn."""

from dataclasses import asdict, replace

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.parity import Recording, close, doubles, randomised, shapes
from tinydiff.models.encoders import clip_text
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan

TINY = clip_text.Config(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    projection_dim=10,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=11,
    layer_norm_eps=1e-3,
    eos_token_id=2,
)
CASES = {
    "CLIP-L": TINY,
    "CLIP-L with projection": replace(TINY, architectures=("CLIPTextModelWithProjection",)),
    "CLIP-G": replace(TINY, hidden_act="gelu", architectures=("CLIPTextModelWithProjection",)),
    "end token of its own": replace(TINY, eos_token_id=7),
}
IDS = torch.tensor([[50, 3, 9, 7, 60, 60, 60, 60], [50, 60, 7, 5, 7, 0, 0, 0]])
"""Ends at 60, the highest; where 7 is the end token, at the first 7. The first is padded with its end token,
the second with 0.
"""


def _case(name):
    c = CASES[name]
    fields = asdict(c)
    model = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}[
        fields.pop("architectures")[0]
    ]
    reference = model(CLIPTextConfig(**fields))
    flat = randomised(reference, 1)
    return c, reference, {clip_text.key_map(c).row(key): tensor for key, tensor in flat.items()}


@pytest.mark.parametrize("length", [8, 2])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, length):
    c, reference, flat = _case(name)
    ids = IDS[:, :length]
    with doubles():
        expected = reference(ids, output_hidden_states=True)
    ours = clip_text.encode(c, Plan(), Weights(flat), ids)
    assert len(ours.hidden_states) == len(expected.hidden_states) == c.num_hidden_layers + 1
    for mine, theirs in zip(ours.hidden_states, expected.hidden_states, strict=True):
        close(mine, theirs)
    if c.projects:
        close(ours.projected, expected.text_embeds)
        assert ours.projected.shape == (2, c.projection_dim)
    else:
        assert ours.projected is None
        close(ours.pooled, expected.pooler_output)


def test_the_projection_is_of_what_is_pooled():
    c, reference, flat = _case("CLIP-G")
    ours = clip_text.encode(c, Plan(), Weights(flat), IDS)
    with doubles():
        close(ours.pooled, reference.text_model(IDS).pooler_output)
    close(ours.projected, ours.pooled @ flat["text_projection.weight"].T)


def test_the_end_token_is_the_configs_or_the_highest_of_old():
    assert clip_text.end_token(CASES["CLIP-L"], IDS).tolist() == [4, 1]
    assert clip_text.end_token(CASES["end token of its own"], IDS).tolist() == [3, 2]


@pytest.mark.parametrize("name", CASES)
def test_the_spec_names_every_weight_and_all_are_read(name):
    c, _, flat = _case(name)
    assert shapes(clip_text.spec(c)) == shapes(flat)
    seen = Recording(flat)
    clip_text.encode(c, Plan(), Weights(seen), IDS)
    assert seen.read == set(flat)


def test_projections_in_are_split_by_rows_and_projections_out_by_columns():
    splits = {
        row.name.removeprefix("text_model.encoder.layers.0."): row.split
        for row in clip_text.spec(replace(TINY, num_hidden_layers=1))
    }
    out = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")
    columns = {f"{name}.{part}": 0 for name in out for part in ("weight", "bias")}
    rows = {"self_attn.out_proj.weight": 1, "mlp.fc2.weight": 1}
    assert {name: split for name, split in splits.items() if split is not None} == columns | rows


def test_names_of_both_generations_of_files():
    bare, whole = CASES["CLIP-L"], CASES["CLIP-G"]
    assert clip_text.key_map(bare).row("final_layer_norm.weight") == "text_model.final_layer_norm.weight"
    assert (
        clip_text.key_map(bare).row("text_model.final_layer_norm.weight")
        == "text_model.final_layer_norm.weight"
    )
    assert clip_text.key_map(whole).row("text_projection.weight") == "text_projection.weight"
    assert clip_text.key_map(bare).row("text_projection.weight") is None
    assert clip_text.key_map(bare).row("text_model.embeddings.position_ids") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "selu"}, r"'selu'.*quick_gelu"),
        ({"num_attention_heads": 5}, "num_attention_heads, 5"),
        ({"architectures": ("CLIPModel",)}, r"CLIPModel.*CLIPTextModel"),
    ],
)
def test_what_is_not_implemented_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **fields)
