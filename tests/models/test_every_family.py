"""What holds for every denoiser, tested on the tiny ones of the parity table and on further configs.

Each equals diffusers in float64 with every parameter redrawn, and has the properties that the loop, the
compiler and the plan build on.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.models.tiny import in_bfloat16, tiny
from tests.parallel.test_families import weights
from tests.parity import close, shapes, tracked, unread
from tinydiff.models import hunyuan_video15, qwen_image
from tinydiff.models.evaluate import evaluate, predict
from tinydiff.ops.network import Branch, Network, divide, plain, walk
from tinydiff.ops.weights import Weights
from tinydiff.parity.denoisers import DENOISERS

TIMES = torch.tensor([999.0, 640.0, 1.0])
PROMPT = ("text", "audio_text", "pooled", "glyphs", "mask", "image", "kind")
"""The inputs that a prompt gives."""


def case(name):
    """A tiny denoiser: the network, its weights, tokens, inputs."""
    d = DENOISERS[name]
    asked = d.ask(d.config)
    network = Network(d.family, d.config, dtype=torch.float64)
    return network, weights(d.family, d.config, torch.float64), asked.tokens, asked.inputs


def hoisted(network, flat, inputs):
    return network.family.hoist(
        network.config, network.plan, Weights(flat, dtype=network.dtype), inputs, TIMES
    )


def changed(name, **changes):
    d = DENOISERS[name]
    return replace(d, config=replace(d.config, **changes))


VARIANTS = DENOISERS | {
    "Wan, thick patches": changed("Wan, text", patch_size=(3, 2, 1), in_channels=3, out_channels=5),
    "Wan, no norm before cross-attention": changed("Wan, text", cross_attn_norm=False),
    "Wan, first and last frame with CLIP": changed(
        "Wan, a frame beside the noise and CLIP", pos_embed_seq_len=18
    ),
    "FLUX.1, other values out": changed("FLUX.1", out_channels=12),
    "FLUX.2, another feed-forward": changed("FLUX.2, references", mlp_ratio=2.5, out_channels=5, eps=1e-3),
    "Ovis-Image, other values out": changed("Ovis-Image", out_channels=12),
    "ERNIE-Image, other values out": changed("ERNIE-Image", out_channels=5, eps=1e-3),
    "SD3, dual attention to the end": changed(
        "SD3", dual_attention_layers=(1, 2), patch_size=1, pos_embed_max_size=10
    ),
}
"""Further configs, which only the comparison with the reference needs."""

LAST_TEXT = {
    qwen_image.FAMILY: ("attn.to_add_out.", "txt_mlp."),
    hunyuan_video15.FAMILY: ("attn.to_add_out.", "ff_context."),
}
"""What the last block does to the text, which nothing reads after it."""
PARTS = {"context_embedder_2.": "glyphs", "image_embedder.": "image"}
"""Layers of HunyuanVideo-1.5 for inputs that a request may not have."""


def idle(d, inputs):
    """How the names of weights begin on which no image depends."""
    *_, (_, last) = d.family.blocks(d.config)
    layers = [f"{last}.{layer}" for layer in LAST_TEXT.get(d.family, ())]
    missing = [layer for layer, name in PARTS.items() if name not in inputs]
    return (*layers, *(missing if d.family is hunyuan_video15.FAMILY else ()))


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_reference_and_reads_every_weight(name):
    d = VARIANTS[name]
    both = tiny(d)
    assert shapes(d.family.spec(d.config)) == shapes(both.flat)
    kept = tracked(both.flat)
    with torch.enable_grad():
        y = both.predict(kept)
    close(y.detach(), both.expected())
    left, unused = unread(y, kept), idle(d, both.asked.inputs)
    assert [name for name in left if not name.startswith(unused)] == []
    assert [layer for layer in unused if not any(name.startswith(layer) for name in left)] == []


@pytest.mark.parametrize("name", DENOISERS)
def test_bfloat16_is_as_exact_as_the_reference_in_bfloat16(name):
    """The distance to float64 is at most a fifth above that of the reference."""
    ours, theirs, exact = in_bfloat16(DENOISERS[name])
    assert ours.dtype == torch.bfloat16
    error, allowed = ((y.double() - exact).square().mean().sqrt() for y in (ours, theirs))
    assert error < 1.2 * allowed < 0.12


@pytest.mark.parametrize("name", DENOISERS)
def test_hoisted_rows_equal_single_evaluations(name):
    """What the loop does: hoist once for all timesteps, then each step with its row."""
    network, flat, tokens, inputs = case(name)
    request, steps = hoisted(network, flat, inputs)
    assert {len(rows) for rows in steps.values()} == {len(TIMES)}
    calls = {block: plain(network, block) for block, _ in network.family.blocks(network.config)}
    for i, t in enumerate(TIMES):
        step = divide(network, {key: rows[i] for key, rows in steps.items()})
        (y,) = walk(network, [calls], divide(network, flat), tokens, [Branch(divide(network, request), step)])
        close(y, predict(network, flat, tokens, t[None], inputs), 1e-12)


@pytest.mark.parametrize("name", DENOISERS)
def test_a_block_returns_new_memory(name):
    """No input, no two views of one tensor, and nothing is written into an input: regions of a graph ask for
    it.
    """
    network, flat, tokens, inputs = case(name)
    known = {x.untyped_storage().data_ptr() for x in flat.values()}

    def checked(block):
        call = plain(network, block)

        def run(w, x, request, shared):
            streams = x if isinstance(x, tuple) else (x,)
            given = [*streams, *request.values(), *shared.values()]
            before = [each.clone() for each in given]
            result = call(w, x, request, shared)
            returned = result if isinstance(result, tuple) else (result,)
            storages = {each.untyped_storage().data_ptr() for each in returned}
            assert len(storages) == len(returned)
            assert not storages & (known | {each.untyped_storage().data_ptr() for each in given})
            assert all(map(torch.equal, given, before)), "a block wrote into its input"
            return result

        return run

    request, steps = hoisted(network, flat, inputs)
    calls = {block: checked(block) for block, _ in network.family.blocks(network.config)}
    step = divide(network, {key: rows[0] for key, rows in steps.items()})
    walk(network, [calls], divide(network, flat), tokens, [Branch(divide(network, request), step)])


@pytest.mark.parametrize("name", DENOISERS)
def test_conds_name_every_tensor_of_a_request_and_the_dimension_that_runs_over_tokens(name):
    network, flat, tokens, inputs = case(name)
    request, steps = hoisted(network, flat, inputs)
    own = divide(network, request)[""]
    conds = {cond.name: cond for cond in network.family.conds}
    assert own.keys() <= conds.keys()
    own |= {name: rows[0] for name, rows in divide(network, steps)[""].items() if name in conds}
    lengths = {
        stream: {
            own[cond.name].shape[cond.dim]
            for cond in conds.values()
            if cond.stream == stream and cond.name in own
        }
        for stream in ("image", "text", "audio")
    }
    assert sum(map(sum, (lengths["image"], lengths["audio"]))) == tokens.shape[1]
    if lengths["text"]:
        assert lengths["text"] == {own["text"].shape[1]}


@pytest.mark.parametrize("name", DENOISERS)
def test_one_text_serves_all_images(name):
    """What an input holds once for a batch stands for each of its images."""
    network, flat, tokens, inputs = case(name)
    prompt = {key: x for key, x in inputs.items() if key in PROMPT}
    once = inputs | {key: x[: len(x) // 2] for key, x in prompt.items()}
    twice = inputs | {key: x[: len(x) // 2].repeat(2, *[1] * (x.ndim - 1)) for key, x in prompt.items()}
    close(*(predict(network, flat, tokens, TIMES[:1], each) for each in (once, twice)), 1e-12)


@pytest.mark.parametrize("name", DENOISERS)
def test_an_evaluation_tells_what_each_block_returned(name):
    network, flat, tokens, inputs = case(name)
    made = evaluate(network, flat, tokens, TIMES[:1], inputs)
    assert list(made.blocks) == [prefix for _, prefix in network.family.blocks(network.config)]
    assert made.velocity.shape[:2] == tokens.shape[:2]


@pytest.mark.parametrize("name", DENOISERS)
def test_the_rows_of_blocks_say_what_passes_through(name):
    """`tinydiff plan` counts operations and bytes from rows: a weight without an input would cost nothing."""
    d = DENOISERS[name]
    rows = list(d.family.spec(d.config))
    for _, prefix in d.family.blocks(d.config):
        block = [row for row in rows if row.name.startswith(f"{prefix}.")]
        matrices = [row for row in block if row.name.endswith(".weight") and len(row.shape) > 1]
        assert matrices and [row.name for row in matrices if row.input is None] == []
        attentions = [row.attends for row in block if row.attends is not None]
        assert attentions
        for queries, keys in attentions:
            assert queries in ("image", "audio") or queries == keys
