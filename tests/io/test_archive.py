"""Torch's own files are read as weights and never run."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tinydiff.io import archive
from tinydiff.io.weights import load_weights
from tinydiff.parallel.plan import Row
from tinydiff.records import UserError


class Harm:
    """What leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def refused(path):
    with pytest.raises(UserError) as caught:
        archive.header(path)
    message = str(caught.value)
    assert caught.value.field == "model_path" and repr(str(path)) in message and "\n" not in message
    return message


@pytest.mark.parametrize("extension", archive.PICKLES)
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, extension):
    mark, path = tmp_path / "mark", tmp_path / f"model{extension}"
    torch.save({"a": torch.ones(2), "b": Harm(mark)}, path)
    assert "asks to run 'posix.mkdir'" in refused(path) and "nothing in a pickle is ever run" in refused(path)
    path.write_bytes(pickle.dumps({"a": Harm(mark)}))
    assert "save it anew with torch.save" in refused(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ([torch.ones(2)], "no named tensors"),
        ({}, "no named tensors"),
        ({"a": torch.ones(2), "step": 3}, "no plain tensor under 'step'"),
        ({"a": torch.ones(2).to_sparse()}, "no plain tensor under 'a'"),
        ({"a": torch.ones(2, device="meta")}, "no plain tensor under 'a'"),
        (torch.nn.Linear(2, 2), "asks to run 'torch.nn.modules.linear.Linear'"),
    ],
)
def test_what_is_no_weights_is_reported(tmp_path, held, words):
    torch.save(held, tmp_path / "x.pth")
    assert words in refused(tmp_path / "x.pth")


def test_a_broken_pickle_is_reported(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(2000)}, path)
    whole = path.read_bytes()
    for data in (b"", b"PK\3\4", whole[:300], whole[:-30], b"\x80\2}q\0."):
        path.write_bytes(data)
        assert "truncated" in refused(path)
    path.write_bytes(whole.replace(b"FloatStorage", b"FloatStor\xffge"))
    assert "truncated or not a file of torch" in refused(path)
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert "a pickle of before torch 1.6" in refused(path)
    path.unlink()
    assert "does not exist" in refused(path)


@pytest.mark.parametrize("extension", [".safetensors", ".gguf", ".pth"])
def test_what_a_download_left_in_the_place_of_a_file_is_said(tmp_path, extension):
    path = tmp_path / f"model{extension}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n")
    assert "is a Git LFS pointer, not the weights; `git lfs pull` fetches them" in refused(path)
    for start in ("<!DOCTYPE html>\n<html>", "\n <html lang='en'>"):
        path.write_text(start)
        assert "is a web page, not the weights; take the link that downloads" in refused(path)


def test_a_broken_gguf_file_is_reported(tmp_path):
    path = tmp_path / "flux-Q4_0.gguf"
    assert "cannot be read (No such file" in refused(path)
    path.write_bytes(b"GGUF" + bytes(40))
    assert "is a GGUF file of version 0; 2 and 3 are known" in refused(path)


def test_header_of_both_kinds(tmp_path):
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors", {"config": "{}"})
    torch.save(tensors, tmp_path / "x.pth")
    shapes = {"a": (2, 3), "b": (4,)}
    assert archive.header(tmp_path / "x.safetensors") == (shapes, {"config": "{}"})
    assert archive.header(tmp_path / "x.pth") == (shapes, {})


def test_weights_of_a_pickle_are_mapped_and_have_no_gradient(tmp_path):
    """Wrapped as training scripts do; a parameter and a transposed view are plain weights here."""
    whole = torch.arange(6.0).reshape(2, 3)
    torch.save(
        {"state_dict": {"a": torch.nn.Parameter(whole), "b": whole.T}, "epoch": 3}, tmp_path / "x.ckpt"
    )
    rows = [Row("a", (2, 3)), Row("b", (3, 2))]
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_weights(tmp_path / "x.ckpt", rows, dtype)
        assert torch.equal(loaded["a"], whole.to(dtype)) and torch.equal(loaded["b"], whole.T.to(dtype))
        assert not any(tensor.requires_grad for tensor in loaded.values())
    load_weights(tmp_path / "x.ckpt", rows, torch.float32)["a"].zero_()
    assert torch.equal(load_weights(tmp_path / "x.ckpt", rows, torch.float32)["a"], whole)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_storage_is_refused(tmp_path, dtype):
    torch.save({"a": torch.ones(2).to(dtype)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="the types read are F64, F32, F16, BF16"):
        load_weights(tmp_path / "x.pth", [Row("a", (2,))], torch.float32)
