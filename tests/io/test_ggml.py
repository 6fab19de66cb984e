"""Blocks of GGUF files decode to the values of the gguf package, to the bit."""

import gguf
import numpy as np
import pytest
import torch

from tinydiff.io import ggml
from tinydiff.io.gguf import GGML


@pytest.mark.parametrize("name", ggml.BLOCKS)
def test_values_are_those_of_the_gguf_package(name):
    block, kind = ggml.BLOCKS[name], gguf.GGMLQuantizationType[name]
    assert (block.values, block.bytes) == gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 256, (5, 3 * block.bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = torch.from_numpy(gguf.quants.dequantize(data, kind))
    ours = ggml.decode(name, torch.from_numpy(data))
    assert ours.shape == (5, 3 * block.values) and ours.dtype == torch.float32
    finite = theirs.isfinite()
    assert finite.float().mean() > 0.5 and torch.equal(ours[finite], theirs[finite])
    assert torch.equal(ours.isfinite(), finite)


def test_block_sizes_are_those_of_the_header():
    sizes = {name: (values, size) for name, values, size in GGML.values()}
    assert {name: (block.values, block.bytes) for name, block in ggml.BLOCKS.items()}.items() <= sizes.items()
