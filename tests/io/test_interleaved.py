"""Heads whose halves are stored in turns, as llama.cpp's files hold the queries and keys of Mistral."""

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from tests.blocks import gguf_file
from tinydiff.io import weights as module
from tinydiff.io.sources import Component
from tinydiff.io.weight_sources import kept_kinds
from tinydiff.io.weights import exported, load_weights, unread
from tinydiff.keymap import KeyMap
from tinydiff.models.encoders import decoder_lm
from tinydiff.models.encoders.decoder_config import Config, Rope, config_from
from tinydiff.models.layouts.recognise import LAYOUTS
from tinydiff.ops import packed
from tinydiff.parallel.plan import Group, Plan, Row, kept_rows
from tinydiff.runtime import components

CONFIG = Config(
    **{"vocab_size": 10, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_parameters": Rope(1e6)},
    **{"layer_types": ("full_attention",) * 2, "layers": 2, "qkv_bias": False},
)
HEADS = {"q": 4, "k": 2}
MISTRAL = next(
    each
    for each in LAYOUTS
    if (each.name, each.class_name) == ("llama.cpp", "Mistral3ForConditionalGeneration")
)
KEYS = KeyMap(MISTRAL.lines(CONFIG))


@pytest.fixture
def stored():
    """A file's tensors, every one drawn."""
    rows = list(decoder_lm.FAMILY.spec(CONFIG))
    generator = torch.Generator().manual_seed(0)
    drawn = {row.name: torch.randn(row.shape, generator=generator) for row in rows}
    return {key: x.contiguous() for key, x in exported(drawn, rows, KEYS).items()}, drawn, rows


@pytest.mark.parametrize("class_name", ["LlamaModel", "Mistral3ForConditionalGeneration"])
def test_the_file_in_place_of_a_component_is_read_so(tmp_path, stored, class_name):
    """Its map is found by its keys and shapes, which are those of other language models too."""
    tensors, drawn, rows = stored
    save_file(tensors, tmp_path / "a.safetensors")
    entries = {
        "model_type": "llama" if class_name == "LlamaModel" else "mistral", "vocab_size": CONFIG.vocab_size,
        "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": None,
    }  # fmt: skip
    listed = Component("text_encoder", "transformers", class_name, {"config.json": entries}, tmp_path)
    part = components._from_file(listed, tmp_path / "a.safetensors", "text_encoder_path")
    config = config_from(entries, class_name)
    made = load_weights(part.files, rows, torch.float32, keys=part.keys(config))
    for row in rows:
        assert torch.equal(made[row.name], drawn[row.name]), row.name


def test_rows_are_those_that_transformers_reads(tmp_path, stored, monkeypatch):
    tensors, drawn, rows = stored
    theirs = LlamaTensorProcessor({"num_attention_heads": 4, "num_key_value_heads": 2})
    save_file(tensors, tmp_path / "a.safetensors")
    for budget in (module.BUDGET, 2**10):
        monkeypatch.setattr(module, "BUDGET", budget)
        for dtype in (torch.float32, torch.bfloat16):
            made = load_weights(tmp_path / "a.safetensors", rows, dtype, keys=KEYS)
            for row in rows:
                assert torch.equal(made[row.name], drawn[row.name].to(made[row.name].dtype))
    for name in HEADS:
        key = f"blk.1.attn_{name}.weight"
        want = theirs.process(tensors[key].numpy(), key).weights
        row = f"layers.1.self_attn.{name}_proj.weight"
        assert np.array_equal(made[row].float().numpy(), torch.from_numpy(want).bfloat16().float().numpy())
        assert not torch.equal(tensors[key], drawn[row])


def test_a_rank_reads_its_heads(tmp_path, stored):
    tensors, drawn, rows = stored
    save_file(tensors, tmp_path / "a.safetensors")
    plans = [Plan(groups=(("tp", Group("", 2, rank)),)) for rank in range(2)]
    reads = [unread(tmp_path / "a.safetensors", rows, torch.float32, KEYS, plan) for plan in plans]
    for name in ("layers.0.self_attn.q_proj.weight", "layers.1.self_attn.k_proj.weight"):
        assert torch.equal(torch.cat([read([name])[name] for read in reads]), drawn[name])


def test_blocks_keep_their_bytes_in_another_order_of_rows(tmp_path):
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    data = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType.Q4_0)
    gguf_file(tmp_path / "a.gguf", {"blk.0.attn_k.weight": ("Q4_0", data)}, "llama")
    row = Row("layers.0.self_attn.k_proj.weight", (16, 64), 0, head=8)
    assert kept_kinds(tmp_path / "a.gguf", [row], KEYS) == {row.name: ("Q4_0", 1)}
    [rows] = load_weights(tmp_path / "a.gguf", kept_rows(row, "Q4_0"), torch.float32, keys=KEYS).values()
    whole = load_weights(tmp_path / "a.gguf", [row], torch.float32, keys=KEYS)[row.name]
    assert rows.dtype == torch.uint8 and torch.equal(packed.decode("Q4_0", rows), whole)
    theirs = LlamaTensorProcessor({"num_attention_heads": 4, "num_key_value_heads": 2})
    decoded = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(whole.numpy(), theirs.process(decoded, "blk.0.attn_k.weight").weights)
