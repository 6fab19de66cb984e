"""The T5 encoders against transformers in float64, every parameter redrawn, with padding and keys beyond the
last bucket.
"""

from dataclasses import asdict, replace

import pytest
import torch
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from tests.parity import Recording, close, doubles, randomised, shapes
from tinydiff.models.encoders import t5
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan

TINY = t5.Config(vocab_size=61, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=4)
CASES = {
    "UMT5": TINY,
    "T5": replace(TINY, model_type="t5"),
    "T5 without gates": replace(TINY, model_type="t5", dense_act_fn="relu", is_gated_act=False),
    "UMT5 with few buckets": replace(
        TINY, relative_attention_num_buckets=12, relative_attention_max_distance=40
    ),
}


def _case(name):
    c = CASES[name]
    kind, model = (UMT5Config, UMT5EncoderModel) if c.model_type == "umt5" else (T5Config, T5EncoderModel)
    fields = {
        key: value
        for key, value in asdict(c).items()
        if key not in ("dense_act_fn", "is_gated_act", "model_type")
    }
    reference = model(kind(**fields, feed_forward_proj="gated-gelu" if c.is_gated_act else "relu"))
    assert reference.config.dense_act_fn == c.dense_act_fn and reference.config.is_gated_act == c.is_gated_act
    return c, reference, randomised(reference, 1)


def _tokens(length):
    ids = torch.randint(0, TINY.vocab_size, (2, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, length // 3 :] = 0
    return ids, mask


@pytest.mark.parametrize("length", [5, 150, 512])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_where_tokens_are(name, length):
    c, reference, flat = _case(name)
    ids, mask = _tokens(length)
    with doubles():
        expected = reference(ids, attention_mask=mask).last_hidden_state
    ours = t5.encode(c, Plan(), Weights(flat), ids, mask)
    close(ours[mask.bool()], expected[mask.bool()])


def test_no_mask_attends_to_padding():
    """As FLUX reads T5."""
    c, reference, flat = _case("T5")
    ids, mask = _tokens(20)
    with doubles():
        expected = reference(ids).last_hidden_state
    ours = t5.encode(c, Plan(), Weights(flat), ids)
    close(ours, expected)
    assert (ours - t5.encode(c, Plan(), Weights(flat), ids, mask))[1].abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_the_spec_names_every_weight_and_all_are_read(name):
    c, _, flat = _case(name)
    assert torch.equal(flat["encoder.embed_tokens.weight"], flat["shared.weight"])
    named = {t5.key_map(t5.Config()).row(key): tensor for key, tensor in flat.items()}
    rows = list(t5.spec(c))
    assert shapes(rows) == shapes(named) and len(named) == len(flat) - 1
    assert [row.name for row in rows if row.tied] == ["shared.weight"]
    seen = Recording(named)
    t5.encode(c, Plan(), Weights(seen), *_tokens(5))
    assert seen.read == set(named)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"'selu'.*gelu_new"):
        t5.Config(dense_act_fn="selu")
