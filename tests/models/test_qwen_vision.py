"""Qwen2.5-VL with images against transformers in float64, every parameter redrawn: the tower, the places of
images among words, writing.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.parity import Recording, close, doubles, draw, randomised, shapes
from tinydiff.models.encoders import decoder_lm, qwen_vision
from tinydiff.models.encoders.decoder_generate import generate
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan

PLAN = Plan()
IMAGE, START, END = 57, 55, 56
TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}  # fmt: skip
VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_heads": 2,
    "in_channels": 3,
    "out_hidden_size": 32,
    "patch_size": 2,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 12,
    "fullatt_block_indexes": [1],
}  # fmt: skip
GRIDS = [(6, 10), (14, 4), (6, 6)]
"""Windows hold 3 x 3 tokens of 2 x 2 patches: the first image leaves a column of its windows empty, the
second rows too, the third none.
"""


def _reference():
    settings = Qwen2_5_VLConfig(
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=IMAGE,
        video_token_id=58,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    reference = Qwen2_5_VLForConditionalGeneration(settings)
    entries = settings.to_dict()
    c = replace(decoder_lm.config_from(entries, "Qwen2_5_VLForConditionalGeneration"), lm_head=True)
    v = qwen_vision.config_from(entries)
    return c, v, reference, randomised(reference, 1)


def _named(flat, rename):
    return {name: tensor for key, tensor in flat.items() if (name := rename(key)) is not None}


def _patches(grids):
    return draw(sum(tall * wide for tall, wide in grids), 3 * 2 * 2 * 2, seed=3)


def _prompts(v, side):
    """Two prompts, the first with two images, the second with one and padding."""
    rows = [[3, START, IMAGE, END, 4, 5, START, IMAGE, END, 6], [7, 8, START, IMAGE, END, 9]]
    counts = qwen_vision.token_counts(v, GRIDS)
    assert counts == [15, 14, 9]
    rows = [qwen_vision.expand(rows[0], IMAGE, counts[:2]), qwen_vision.expand(rows[1], IMAGE, counts[2:])]
    length = max(map(len, rows))
    padded = [
        [0] * (length - len(row)) + row if side == "left" else row + [0] * (length - len(row)) for row in rows
    ]
    masks = [
        [0] * (length - len(row)) + [1] * len(row)
        if side == "left"
        else [1] * len(row) + [0] * (length - len(row))
        for row in rows
    ]
    return torch.tensor(padded), torch.tensor(masks)


def _inputs(ids, mask, patches):
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([(1, *grid) for grid in GRIDS]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def test_the_tower_equals_the_reference_and_reads_every_weight():
    _, v, reference, flat = _reference()
    ours = _named(flat, qwen_vision.key_map(qwen_vision.Config()).row)
    assert shapes(qwen_vision.spec(v)) == shapes(ours) == shapes(reference.model.visual.state_dict())
    patches = _patches(GRIDS)
    with doubles():
        expected = reference.model.visual(patches, torch.tensor([(1, *grid) for grid in GRIDS])).pooler_output
    seen = Recording(ours)
    close(qwen_vision.encode(v, PLAN, Weights(seen, dtype=torch.float64), patches, GRIDS), expected)
    assert seen.read == set(ours)


def test_windows_hold_each_patch_once_and_full_ones_need_no_mask():
    _, v, _, _ = _reference()
    for tall, wide in (*GRIDS, (2, 2), (12, 18)):
        index = qwen_vision.windows(v, (tall, wide))
        assert sorted(index[index >= 0].tolist()) == list(range(tall * wide))
        assert bool((index >= 0).all()) == (tall % 6 == 0 and wide % 6 == 0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_states_of_words_and_images_equal_the_reference(side):
    c, v, reference, flat = _reference()
    ids, mask = _prompts(v, side)
    inputs = _inputs(ids, mask, _patches(GRIDS))
    with doubles():
        expected = reference(**inputs, output_hidden_states=True).hidden_states
    w = Weights(_named(flat, lambda key: decoder_lm.key_map(c).row(key)))
    at = qwen_vision.positions(v, ids, mask, IMAGE, GRIDS)
    places, _ = reference.model.get_rope_index(
        ids, inputs["mm_token_type_ids"], inputs["image_grid_thw"], attention_mask=mask
    )
    assert torch.equal(at, places) and at.max() > 0

    tokens = qwen_vision.encode(
        v,
        PLAN,
        Weights(_named(flat, qwen_vision.key_map(qwen_vision.Config()).row), dtype=torch.float64),
        inputs["pixel_values"],
        GRIDS,
    )
    embeds = qwen_vision.place(decoder_lm.embed(c, PLAN, w, ids), ids, IMAGE, tokens)
    ours = decoder_lm.encode(c, PLAN, w, ids, mask, take=(0, 1, 2, 3), positions=at, embeds=embeds)
    for mine, state in zip(ours, expected, strict=True):
        close(mine[mask.bool()], state[mask.bool()])


def test_text_about_images_is_that_of_the_reference():
    c, v, reference, flat = _reference()
    ids, mask = _prompts(v, "left")
    inputs = _inputs(ids, mask, _patches(GRIDS))
    with doubles(), torch.no_grad():
        written = reference.generate(**inputs, max_new_tokens=8, do_sample=False)[:, ids.shape[1] :].tolist()
    assert len({*written[0], *written[1]}) > 4
    w = Weights(_named(flat, lambda key: decoder_lm.key_map(c).row(key)))
    tokens = qwen_vision.encode(
        v,
        PLAN,
        Weights(_named(flat, qwen_vision.key_map(qwen_vision.Config()).row), dtype=torch.float64),
        inputs["pixel_values"],
        GRIDS,
    )
    embeds = qwen_vision.place(decoder_lm.embed(c, PLAN, w, ids), ids, IMAGE, tokens)
    at = qwen_vision.positions(v, ids, mask, IMAGE, GRIDS)
    assert generate(c, PLAN, w, ids, mask, limit=8, stop=(), positions=at, embeds=embeds) == written


@pytest.mark.parametrize(
    "size, bounds",
    [
        ((56, 84), (3136, 12845056)),
        ((101, 57), (3136, 12845056)),
        ((20, 31), (3136, 12845056)),
        ((300, 211), (3136, 28 * 28 * 12)),
        ((40, 600), (28 * 28 * 4, 28 * 28 * 12)),
        ((29, 2000), (28 * 28 * 4, 28 * 28 * 6)),
    ],
)
def test_pixels_are_those_of_the_reference(size, bounds):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    read = Qwen2VLImageProcessorPil(min_pixels=bounds[0], max_pixels=bounds[1])(image, return_tensors="pt")
    patches, grid = qwen_vision.pixels(
        replace(qwen_vision.Config(), min_pixels=bounds[0], max_pixels=bounds[1]), image
    )
    assert read["image_grid_thw"].tolist() == [[1, *grid]]
    assert patches.dtype == torch.float32
    assert torch.equal(patches, read["pixel_values"])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="too narrow"):
        qwen_vision.pixels(qwen_vision.Config(), np.zeros((4, 1000, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="2 image tokens and there are 1 images"):
        qwen_vision.expand([IMAGE, 1, IMAGE], IMAGE, [4])
    with pytest.raises(ValueError, match=r"hidden_act is 'relu'"):
        qwen_vision.Config(hidden_act="relu")
    with pytest.raises(ValueError, match=r"window_size is 100; .* 28 pixels"):
        qwen_vision.Config(window_size=100)


def test_released_config_and_names():
    entries = {
        "vision_config": {
            "depth": 32, "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu", "hidden_size": 1280,
            "in_chans": 3, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584,
            "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
            "tokens_per_second": 2, "window_size": 112,
        }
    }  # fmt: skip
    assert qwen_vision.config_from(entries) == qwen_vision.Config()
    names = (
        "visual.merger.ln_q.weight",
        "model.visual.merger.ln_q.weight",
        "model.layers.0.mlp.up_proj.weight",
        "lm_head.weight",
        "odd",
    )
    assert [qwen_vision.key_map(qwen_vision.Config()).row(key) for key in names] == [
        "merger.ln_q.weight",
        "merger.ln_q.weight",
        None,
        None,
        "odd",
    ]
