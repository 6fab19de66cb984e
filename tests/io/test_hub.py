import json
import math
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from tinydiff.io.hub import WANTED, read_index, read_json, resolve
from tinydiff.records import UserError

INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.35.0.dev0",
    "boundary_ratio": 0.875,
    "expand_timesteps": True,
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "tokenizer": ["transformers", "T5TokenizerFast"],
}


def test_index(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    index = read_index(tmp_path)
    assert index.class_name == "WanPipeline"
    assert index.components == {
        "transformer": ("diffusers", "WanTransformer3DModel"),
        "tokenizer": ("transformers", "T5TokenizerFast"),
    }
    assert index.options == {"boundary_ratio": 0.875, "expand_timesteps": True}


def test_index_missing_or_not_one(tmp_path):
    with pytest.raises(UserError, match=r"has no model_index\.json") as caught:
        read_index(tmp_path)
    assert caught.value.field == "model_path" and str(tmp_path) in str(caught.value)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="names no pipeline class"):
        read_index(tmp_path)


def test_json_takes_infinity_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"low": -Infinity, "high": Infinity}')
    assert read_json(path) == {"low": -math.inf, "high": math.inf}


@pytest.mark.parametrize(
    "data, reason",
    [(b'{"a": 1,}', "not readable JSON"), (b"\xff\xfe\x00", "not readable JSON"), (b"[1]", "JSON list")],
)
def test_json_refused(tmp_path, data, reason):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=reason) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_json_missing(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "config.json")


def test_local_directory(tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert resolve("~/models") == tmp_path / "models"
    with pytest.raises(UserError, match="is a local directory") as caught:
        resolve(tmp_path, revision="main")
    assert caught.value.field == "revision"


def test_mistyped_directory_names_the_nearest(tmp_path):
    (tmp_path / "Wan2.2-TI2V").mkdir()
    with pytest.raises(UserError, match=r"did you mean 'Wan2\.2-TI2V'"):
        resolve(tmp_path / "Wan2.2-TI2W")
    with pytest.raises(UserError, match="neither a file nor a directory here, nor a hub id"):
        resolve("no-such-folder")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file") as caught:
        resolve(tmp_path / "file", field="vae_path")
    assert caught.value.field == "vae_path"


def answer(monkeypatch, error: Exception | None, path="/snapshot", files=()) -> dict:
    asked: dict = {}

    def download(hub_id, **options):
        asked.update(options, hub_id=hub_id)
        if error is not None:
            raise error
        return path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr(huggingface_hub, "model_info", lambda hub_id, revision: info)
    return asked


def downloaded(asked, files):
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    return list(huggingface_hub.utils.filter_repo_objects(files, **patterns))


def test_hub_id_downloads_only_what_is_run(monkeypatch, tmp_path):
    files = [
        "model_index.json",
        "vae/m.safetensors",
        "vae/m.fp16.safetensors",
        "big.safetensors",
        "tokenizer/spiece.model",
        "vae/m.bin",
    ]
    asked = answer(monkeypatch, None, str(tmp_path), files)
    assert resolve("org/model", "v1") == tmp_path
    assert (
        asked["hub_id"] == "org/model"
        and asked["revision"] == "v1"
        and asked["allow_patterns"] == list(WANTED)
    )
    assert downloaded(asked, files) == ["model_index.json", "vae/m.safetensors", "tokenizer/spiece.model"]


def test_a_component_by_itself_lies_at_the_root(monkeypatch, tmp_path):
    files = [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "model.bin",
    ]
    asked = answer(monkeypatch, None, str(tmp_path), files)
    resolve("org/autoencoder", field="vae_path")
    assert downloaded(asked, files) == ["config.json", "diffusion_pytorch_model.safetensors"]


SHARDS = ["-00001-of-00002.safetensors", "-00002-of-00002.safetensors"]
PLAIN = ["t/model.safetensors.index.json", *(f"t/model{shard}" for shard in SHARDS)]
HALF = ["t/model.safetensors.index.fp16.json", *(f"t/model.fp16{shard}" for shard in SHARDS)]
OLD = ["t/model.safetensors.index.fp16.json", *(f"t/model{shard.replace('.', '.fp16.')}" for shard in SHARDS)]


@pytest.mark.parametrize(
    ("files", "variant", "kept"),
    [
        (PLAIN + HALF, None, PLAIN),
        (PLAIN + HALF, "fp16", HALF),
        (PLAIN + OLD, "fp16", OLD),
        (PLAIN + OLD, None, PLAIN),
        (HALF, None, HALF),  # alone in its directory
        (PLAIN, "fp16", PLAIN),  # a component that has no variant
        ([*PLAIN, "t/model.safetensors", "t/model.bf16.safetensors"], "bf16", ["t/model.bf16.safetensors"]),
        (["v/wan2.1_vae.safetensors"], "fp16", ["v/wan2.1_vae.safetensors"]),
    ],
)  # fmt: skip
def test_only_the_weights_that_will_be_loaded_are_downloaded(files, variant, kept, monkeypatch, tmp_path):
    asked = answer(monkeypatch, None, str(tmp_path), files)
    resolve("org/model", variant=variant)
    assert downloaded(asked, files) == kept


def test_without_the_hub_the_cache_is_asked(monkeypatch, tmp_path):
    answer(monkeypatch, None, str(tmp_path))

    def silent(hub_id, revision):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "model_info", silent)
    assert resolve("org/model", variant="fp16") == tmp_path


@pytest.mark.parametrize(
    "error, reason",
    [
        (errors.LocalEntryNotFoundError("offline"), "the hub cannot be reached"),
        (ConnectionError("line\nbreak"), "the download failed"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_hub_trouble_is_one_sentence(monkeypatch, error, reason):
    answer(monkeypatch, error)
    with pytest.raises(UserError, match=reason) as caught:
        resolve("org/model")
    assert "'org/model'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind, field, reason",
    [
        (errors.RepositoryNotFoundError, "model_path", "no such model"),
        (errors.GatedRepoError, "model_path", "licence"),
        (errors.RevisionNotFoundError, "revision", "no branch, tag or commit 'v9'"),
    ],
)
def test_what_the_hub_answers(monkeypatch, kind, field, reason):
    answer(monkeypatch, kind.__new__(kind))  # its constructor wants an HTTP response
    with pytest.raises(UserError, match=reason) as caught:
        resolve("org/model", "v9")
    assert caught.value.field == field


def test_real_hub_client_offline(monkeypatch, tmp_path):
    """The library itself, offline with an empty cache, then with a cached snapshot."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda hub_id, **options: real(hub_id, cache_dir=tmp_path, **options),
    )
    with pytest.raises(UserError, match="not in the download cache"):
        resolve("org/model")
    snapshot = tmp_path / "models--org--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text(json.dumps(INDEX))
    (tmp_path / "models--org--model" / "refs").mkdir()
    (tmp_path / "models--org--model" / "refs" / "main").write_text("a" * 40)
    assert read_index(resolve("org/model")).class_name == "WanPipeline"
