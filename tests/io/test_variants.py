"""Which files of a directory are loaded: whole, in shards, plain or a variant."""

import torch
from safetensors.torch import save_file

from tests.io.test_weights import ROWS, draw, refused, write_shards
from tinydiff.io.weight_sources import weight_files
from tinydiff.io.weights import load_weights


def test_a_stale_index_beside_a_whole_file_does_not_count(tmp_path):
    for stem in ("model", "diffusion_pytorch_model"):
        (tmp_path / stem).mkdir()
        for shard in write_shards(tmp_path / stem, draw(), stem=stem)[1:]:
            shard.unlink()
        save_file(draw(), tmp_path / stem / f"{stem}.safetensors")
        assert weight_files(tmp_path / stem) == [tmp_path / stem / f"{stem}.safetensors"]
        assert len(load_weights(tmp_path / stem, ROWS, torch.float32)) == len(ROWS)


def test_of_whole_file_and_shards_each_library_reads_its_own(tmp_path):
    for stem in ("model", "diffusion_pytorch_model"):
        (tmp_path / stem).mkdir()
        shards = write_shards(tmp_path / stem, draw(), stem=stem)
        save_file(draw(), tmp_path / stem / f"{stem}.safetensors")
        whole = [tmp_path / stem / f"{stem}.safetensors"]
        assert weight_files(tmp_path / stem) == (whole if stem == "model" else shards)


def test_variants(tmp_path, caplog):
    caplog.set_level("INFO", "tinydiff")
    plain, half, brain = (tmp_path / f"model{part}.safetensors" for part in ("", ".fp16", ".bf16"))
    for path in (half, brain):
        path.touch()
    assert weight_files(tmp_path, "bf16") == [brain]
    assert (
        "holds the variants bf16 and fp16, and nothing says which to load; --variant chooses; "
        "did you mean 'fp16'?" in refused(tmp_path, variant="f16")
    )
    brain.unlink()
    assert weight_files(tmp_path) == weight_files(tmp_path, "fp16") == [half] and not caplog.text
    assert weight_files(tmp_path, "bf16") == [half] and "has no variant bf16; fp16 is read" in caplog.text
    plain.touch()
    assert weight_files(tmp_path) == [plain] and weight_files(tmp_path, "fp16") == [half]
    caplog.clear()
    assert (
        weight_files(tmp_path, "int8") == [plain]
        and "has no variant int8; the plain one is read" in caplog.text
    )


def test_shards_without_an_index(tmp_path):
    write_shards(tmp_path, draw())
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert "'diffusion_pytorch_model-00001-of-00003.safetensors' and no index of its shards" in refused(
        tmp_path
    )
