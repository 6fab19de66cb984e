"""GGUF files as the gguf package writes them: plain types and blocks, whole and in pieces."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants

from tinydiff.io import archive
from tinydiff.io.weights import load_weights
from tinydiff.parallel.plan import Row
from tinydiff.records import UserError


@pytest.fixture
def weight():
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(0))


def written(path, **tensors):
    """A file of {name: (array, its type)}."""
    writer = GGUFWriter(path, "flux")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q5_1", "Q8_0"])
def test_a_file_of_the_gguf_package_loads(weight, name, tmp_path):
    kind = GGMLQuantizationType[name]
    data = quants.quantize(weight.numpy(), kind)
    whole = torch.from_numpy(quants.dequantize(data, kind))
    bias = np.arange(6, dtype=np.float32)
    path = written(tmp_path / "a.gguf", **{"a.weight": (data, kind), "a.bias": (bias, None)})
    opened = archive.opened(path)
    assert opened.keys() == ["a.weight", "a.bias"]
    assert opened.get_slice("a.weight").get_shape() == [6, 64]
    assert torch.equal(opened.get_tensor("a.weight").float(), whole)
    assert torch.equal(opened.get_slice("a.weight")[2:5, 8:40].float(), whole[2:5, 8:40])
    loaded = load_weights(path, [Row("a.weight", (6, 64)), Row("a.bias", (6,))], torch.bfloat16)
    assert torch.equal(loaded["a.weight"], whole.bfloat16())
    assert torch.equal(loaded["a.bias"], torch.arange(6).bfloat16())


def test_a_type_without_a_decoder_is_refused(tmp_path):
    data = np.zeros((2, 66), dtype=np.uint8)
    path = written(tmp_path / "a.gguf", **{"a.weight": (data, GGMLQuantizationType.IQ2_XXS)})
    with pytest.raises(UserError, match=r"a\.weight is IQ2_XXS; the types read are"):
        load_weights(path, [Row("a.weight", (2, 256))], torch.float32)


def test_a_file_that_is_cut_short_is_reported(weight, tmp_path):
    path = written(tmp_path / "a.gguf", **{"a.weight": (weight.numpy(), None)})
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="is truncated: its last 200 bytes are not there"):
        archive.opened(path)
