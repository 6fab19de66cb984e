"""Blocks decode to the values of the libraries that define them, to the bit."""

import bitsandbytes.functional as bnb
import gguf
import numpy as np
import pytest
import torch

from tests.blocks import blocks
from tinydiff.io.gguf import GGML
from tinydiff.ops import packed
from tinydiff.ops.linear import linear
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import PACKED, SCALED, Row, decoded_row, kept_rows, packed_leaf
from tinydiff.parallel.shards import why_indivisible

OF_GGUF = [name for name in PACKED if name not in (*packed.BITSANDBYTES, "NVFP4")]


@pytest.mark.parametrize("name", OF_GGUF)
def test_values_are_those_of_the_gguf_package(name):
    (values, size), kind = PACKED[name], gguf.GGMLQuantizationType[name]
    assert (values, size) == gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 256, (5, 3 * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = torch.from_numpy(gguf.quants.dequantize(data, kind))
    ours = packed.decode(name, torch.from_numpy(data))
    assert ours.shape == (5, 3 * values) and ours.dtype == torch.float32
    finite = theirs.isfinite()
    assert finite.float().mean() > 0.5 and torch.equal(ours[finite], theirs[finite])
    assert torch.equal(ours.isfinite(), finite)


def test_block_sizes_are_those_of_the_header():
    sizes = {name: (values, size) for name, values, size in GGML.values()}
    assert {name: PACKED[name] for name in OF_GGUF}.items() <= sizes.items()


@pytest.mark.parametrize("name", packed.BITSANDBYTES)
def test_tables_are_those_of_bitsandbytes(name):
    want = bnb.get_4bit_type(name.lower(), device="cpu")
    assert torch.equal(torch.tensor(packed.BITSANDBYTES[name]), want)


def test_scales_of_8_bits_are_those_of_torch():
    codes = torch.arange(256, dtype=torch.uint8)
    want = codes.view(torch.float8_e4m3fn).float()
    finite = want.isfinite()
    assert torch.equal(packed._e4m3(codes[:, None])[finite, 0], want[finite]) and finite.sum() == 254


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PACKED)
def test_a_layer_computes_with_what_its_blocks_decode_to(name, dtype):
    rows, scale = blocks(name, 6, 512, 1)
    beside = {} if scale is None else {"weight_scale": scale}
    whole = packed.decode(name, rows, scale).to(dtype)
    assert whole.shape == (6, 512) and whole.isfinite().all() and whole.float().std() > 1e-3
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(2)).to(dtype)
    made = linear(x, Weights({packed_leaf(name): rows, **beside}, dtype=dtype))
    assert torch.equal(made, linear(x, Weights({"weight": whole}, dtype=dtype)))


def test_a_layer_without_weights_names_the_one_that_is_missing():
    with pytest.raises(KeyError, match=r"a\.weight"):
        linear(torch.ones(1, 2), Weights({}, dtype=torch.float32) / "a")


@pytest.mark.parametrize("name", PACKED)
def test_rows_count_bytes_and_give_back_the_weight(name):
    values, size = PACKED[name]
    whole = Row("a.weight", (5, 8 * values), 1, (2 * values, 6 * values), head=values, input="image")
    row, *beside = kept_rows(whole, name)
    assert row.shape == (5, 8 * size) and row.parts == (2 * size, 6 * size) and row.head == size
    assert (row.name, row.stored_type) == (f"a.weight_{name.lower()}", "uint8")
    assert [each.name for each in beside] == (["a.weight_scale"] if name in SCALED else [])
    assert decoded_row(row) == whole


def test_ranks_share_whole_blocks_alone():
    row, *_ = kept_rows(Row("a.weight", (4, 768), 1, head=128), "Q4_K")
    assert why_indivisible([row], 3) is None
    assert why_indivisible([row], 2) == (
        "a.weight_q4_k has 3 groups of 256 values in Q4_K (--quantization none decodes them), "
        "which 2 ranks cannot share evenly"
    )
