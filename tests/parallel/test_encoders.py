"""Every encoder over the ranks of `tp` against one rank, weights and inputs drawn anew; heads that do not
divide are named.
"""

from dataclasses import replace

import pytest
import torch

from tests.parallel.pool import on_ranks
from tinydiff.models.encoders import clip_text, clip_vision, decoder_lm, qwen_vision, t5
from tinydiff.models.encoders.decoder_config import FULL, SLIDING, Rope
from tinydiff.models.encoders.decoder_generate import Sampling, generate
from tinydiff.ops.weights import Weights
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.plan import Plan
from tinydiff.parallel.ranks import make_ranks
from tinydiff.parallel.shards import shard_weights, why_indivisible

T5 = t5.Config(vocab_size=64, d_model=24, d_kv=6, d_ff=40, num_layers=3, num_heads=4)
CLIP = clip_text.Config(
    vocab_size=61, hidden_size=32, intermediate_size=40, projection_dim=12, num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=19, eos_token_id=60,
)  # fmt: skip
TOWER = clip_vision.Config(
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=21,
    patch_size=7,
)
QWEN_TOWER = qwen_vision.Config(
    depth=3, hidden_size=32, intermediate_size=20, num_heads=4, out_hidden_size=24, patch_size=2,
    window_size=12,
    fullatt_block_indexes=(1,),
)  # fmt: skip
LM = decoder_lm.Config(
    vocab_size=64, hidden_size=32, intermediate_size=44, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
    layer_types=(FULL,) * 4, rope_parameters=Rope(1e4), layers=4, qkv_bias=False,
)  # fmt: skip
LMS = {
    "Qwen2.5": replace(LM, qkv_bias=True, rope_parameters=Rope(1e4, mrope_section=(2, 1, 1)), lm_head=True),
    "Qwen3": replace(LM, qk_norm=True, tie_word_embeddings=True, layers=3),
    "Llama": replace(LM, qkv_bias=True, o_bias=True, mlp_bias=True, tie_word_embeddings=True, lm_head=True),
    "Gemma2": replace(
        LM, sandwich_norms=True, norm_plus_one=True, scale_embeddings=True, layer_types=(SLIDING, FULL) * 2,
        sliding_window=7,
        attn_logit_softcapping=5.0, final_logit_softcapping=2.0, query_pre_attn_scalar=12.0, lm_head=True,
        tie_word_embeddings=True,
    ),
    "Gemma4": replace(
        LM, sandwich_norms=True, scale_embeddings=True, layer_types=(SLIDING, FULL) * 2, sliding_window=7,
        global_head_dim=16, num_global_key_value_heads=2, attention_k_eq_v=True, value_norm=True,
        qk_norm=True, layer_scalars=True, query_pre_attn_scalar=12.0, tie_word_embeddings=True,
        rope_parameters=Rope(1e4, "proportional", partial_rotary_factor=0.25),
        local_rope_parameters=Rope(1e3),
    ),
}  # fmt: skip
WRITERS = [name for name, c in LMS.items() if c.lm_head]
GRIDS = [(6, 10), (14, 4)]


def _weights(rows, dtype, centre=1):
    """Matrices by their fan-in, vectors near `centre`: 0 where a norm multiplies by 1 + weight, or every one
    of them would double.
    """
    generator = torch.Generator().manual_seed(1)
    flat = {}
    for row in rows:
        noise = torch.randn(row.shape, generator=generator, dtype=torch.float64)
        flat[row.name] = (noise / row.shape[-1] ** 0.5 if len(row.shape) > 1 else centre + 0.1 * noise).to(
            dtype
        )
    return flat


def _numbers(*shape, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def _tokens(left=False):
    ids = torch.randint(0, 60, (2, 19), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, slice(0, 8) if left else slice(8, None)] = 0
    return ids, mask


def _t5(c):
    return (
        c,
        t5,
        lambda plan, w, dtype: [t5.encode(c, plan, w, *_tokens()), t5.encode(c, plan, w, _tokens()[0])],
    )


def _clip(c):
    ids = _tokens()[0].clone()
    ids[:, 11] = c.eos_token_id

    def encode(plan, w, dtype):
        states, *pooled = clip_text.encode(c, plan, w, ids)
        return [*states, *(x for x in pooled if x is not None)]

    return c, clip_text, encode


def _tower(c):
    return (
        c,
        clip_vision,
        lambda plan, w, dtype: [clip_vision.encode(c, plan, w, _numbers(2, 3, 21, 21, dtype=dtype))],
    )


def _qwen_tower(c):
    patches = sum(tall * wide for tall, wide in GRIDS)
    return (
        c,
        qwen_vision,
        lambda plan, w, dtype: [
            qwen_vision.encode(c, plan, w, _numbers(patches, 3 * 2 * 2 * 2, dtype=dtype), GRIDS)
        ],
    )


def _lm(c):
    return (
        c,
        decoder_lm,
        lambda plan, w, dtype: decoder_lm.encode(c, plan, w, *_tokens(), take=tuple(range(c.layers + 1))),
    )


CASES = {
    "UMT5": _t5(T5),
    "T5": _t5(replace(T5, model_type="t5", is_gated_act=False, dense_act_fn="relu")),
    "CLIP text": _clip(CLIP),
    "CLIP text projected": _clip(
        replace(CLIP, architectures=(clip_text.WITH_PROJECTION,), hidden_act="gelu")
    ),
    "CLIP vision": _tower(TOWER),
    "Qwen2.5-VL vision": _qwen_tower(QWEN_TOWER),
    **{name: _lm(c) for name, c in LMS.items()},
    **{
        f"{name}, 4 heads of keys": _lm(
            replace(
                c,
                num_key_value_heads=4,
                num_global_key_value_heads=4 if c.num_global_key_value_heads else None,
            )
        )
        for name, c in LMS.items()
    },
}


def _divided(layout, module, c, dtype):
    """(weights of one rank, plan of this rank, its weights)."""
    plan = Plan(groups=(("tp", make_ranks(layout, 60).groups["tp"]),))
    whole = _weights(module.spec(c), dtype, 0 if getattr(c, "norm_plus_one", False) else 1)
    mine = shard_weights(whole, module.spec(c), plan)
    assert sum(tensor.numel() for tensor in mine.values()) < 0.75 * sum(
        tensor.numel() for tensor in whole.values()
    )
    return Weights(whole, dtype=dtype), plan, Weights(mine, dtype=dtype)


@torch.no_grad()
def _errors(layout, name, dtype):
    c, module, encode = CASES[name]
    whole, plan, mine = _divided(layout, module, c, dtype)
    pairs = list(zip(encode(Plan(), whole, dtype), encode(plan, mine, dtype), strict=True))
    assert all(
        one.shape == some.shape and one.dtype == some.dtype == dtype and one.std() > 1e-2
        for one, some in pairs
    )
    return max((one - some).abs().max().item() for one, some in pairs)


@pytest.mark.parametrize(
    ("ranks", "name"), [(ranks, name) for name in CASES for ranks in (2, 4) if ranks == 2 or name not in LMS]
)
def test_equals_one_rank(ranks, name):
    assert max(on_ranks(ranks, _errors, Layout(tp=ranks), name, torch.float64)) <= 1e-10
    assert max(on_ranks(ranks, _errors, Layout(tp=ranks), name, torch.float32)) <= 1e-5


def _written(layout, name):
    """What one rank writes and what the ranks write together: the likeliest words, and words drawn with a
    seed.
    """
    c = LMS[name]
    whole, plan, mine = _divided(layout, decoder_lm, c, torch.float64)
    drawn = Sampling(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.1)
    texts = []
    for place, w in ((Plan(), whole), (plan, mine)):
        for sampling in (Sampling(), drawn):
            generator = torch.Generator().manual_seed(5)
            texts.append(
                generate(
                    c, place, w, *_tokens(left=True), limit=9, stop=(), sampling=sampling, generator=generator
                )
            )
    return texts


@pytest.mark.parametrize("name", WRITERS)
def test_text_is_that_of_one_rank(name):
    texts = on_ranks(2, _written, Layout(tp=2), name)
    assert texts[0] == texts[1]
    likeliest, drawn, ours, ours_drawn = texts[0]
    assert (ours, ours_drawn) == (likeliest, drawn) and likeliest != drawn
    assert len(ours[0]) == 9 and len({*ours[0], *ours_drawn[0]}) > 4


@pytest.mark.parametrize(
    ("module", "c", "divisors"),
    [
        (t5, T5, [1, 2, 4]),
        (t5, replace(T5, num_heads=6), [1, 2]),
        (clip_text, CLIP, [1, 2, 4]),
        (clip_vision, TOWER, [1, 2, 4]),
        (qwen_vision, QWEN_TOWER, [1, 2, 4]),
        (qwen_vision, replace(QWEN_TOWER, intermediate_size=22), [1, 2]),
        (decoder_lm, LM, [1, 2]),
        (decoder_lm, replace(LM, num_key_value_heads=4), [1, 2, 4]),
        (decoder_lm, replace(LM, vocab_size=63), [1]),
        (t5, t5.Config(), [1, 2, 4, 8]),
        (qwen_vision, qwen_vision.Config(), [1, 2, 4]),
        (decoder_lm, decoder_lm.Config(), [1, 2, 4]),
        (decoder_lm, LMS["Gemma4"], [1, 2]),
    ],
)
def test_how_many_ranks_an_encoder_divides_over(module, c, divisors):
    assert [ranks for ranks in range(1, 9) if why_indivisible(module.spec(c), ranks) is None] == divisors


def test_heads_that_do_not_divide_are_named():
    assert (
        why_indivisible(decoder_lm.spec(LM), 4)
        == "layers.0.self_attn.k_proj.weight has 2 heads, which 4 ranks cannot share evenly"
    )
    assert (
        why_indivisible(t5.spec(T5), 8)
        == "encoder.block.0.layer.0.SelfAttention.q.weight has 4 heads, which 8 ranks cannot share evenly"
    )
