"""The hub's own client against an endpoint that the test starts: what is downloaded, and what is not."""

import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub import hf_api

from tests.io.hub_server import TOKEN, Hub, commit, running
from tinydiff.io import overlay, repositories
from tinydiff.io.hub import resolve
from tinydiff.records import UserError

SHARDS = [f"transformer/diffusion_pytorch_model-0000{at}-of-00002.safetensors" for at in (1, 2)]
RUN = [
    *("model_index.json", "scheduler/scheduler_config.json", "tokenizer/spiece.model"),
    *("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors.index.json", *SHARDS),
]
PLAIN, HALF = "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"
LEFT = ["README.md", "whole.safetensors", "vae/flax.msgpack", "vae/model.bin", "onnx/model.json"]
MODEL = {name: name.encode() for name in (*RUN, PLAIN, HALF, *LEFT)}
BIG = bytes(range(256)) * 400


@pytest.fixture
def hub(tmp_path, monkeypatch):
    repositories = {
        "org/model": {"main": MODEL, "v1": {"model_index.json": b"index", PLAIN: b"old"}},
        "org/private": {"main": {"model_index.json": b"{}"}},
        "org/gated": {"main": {"model_index.json": b"{}"}},
        "org/big": {"main": {"model_index.json": b"{}", "vae/model.safetensors": BIG}},
        "org/lora": {"main": {"a.safetensors": b"a", "b.safetensors": b"b", "README.md": b""}},
    }
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with running(Hub(repositories, {"org/private"}, {"org/gated"})) as started:
        monkeypatch.setattr(constants, "ENDPOINT", started.url)
        monkeypatch.setattr(hf_api.api, "endpoint", started.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", started.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield started


def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def files(place):
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())


def test_only_what_is_run_is_downloaded_and_only_once(hub):
    place = resolve("org/model")
    assert hub.asked() == files(place) == sorted([*RUN, PLAIN])
    assert resolve("org/model") == place and hub.asked() == []


def test_a_variant(hub):
    place = resolve("org/model", variant="fp16")
    assert hub.asked() == sorted([*RUN, HALF])  # what has no such files comes plain
    assert resolve("org/model") == place and hub.asked() == [PLAIN]


def test_json_files_alone_and_single_components(hub):
    resolve("org/model", weights=False)
    assert hub.asked() == sorted(name for name in MODEL if name.endswith(".json") and "onnx" not in name)
    resolve("org/model", only=["vae"])
    assert hub.asked() == [PLAIN]
    resolve("org/lora", field="lora_path", only=("b.safetensors", "adapter_config.json"))
    assert hub.asked() == ["b.safetensors"]


def test_revisions(hub):
    place = resolve("org/model", "v1")
    assert place.name == commit("v1") and (place / PLAIN).read_bytes() == b"old"
    assert resolve("org/model", commit("v1")) == place
    assert hub.asked() == sorted(["model_index.json", PLAIN])
    with pytest.raises(UserError, match="has no branch, tag or commit 'v9'") as caught:
        resolve("org/model", "v9")
    assert caught.value.field == "revision"


def test_tokens(hub, monkeypatch):
    with pytest.raises(UserError, match="the hub has no such model, or it is private"):
        resolve("org/private")
    with pytest.raises(UserError, match="asks for its licence to be accepted"):
        resolve("org/gated")
    with pytest.raises(UserError, match="the hub has no such model"):
        resolve("org/absent")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert files(resolve("org/private")) == files(resolve("org/gated")) == ["model_index.json"]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_offline_the_cache_has_to_do(hub, monkeypatch, variant, caplog):
    place = resolve("org/model", variant=variant)
    hub.asked()
    offline(monkeypatch)
    assert resolve("org/model", variant=variant) == place and hub.asked() == []
    assert "of org/model the files in the download cache are used" in caplog.text
    with pytest.raises(UserError, match="not in the download cache, and the hub cannot be reached"):
        resolve("org/big")


def test_a_download_that_breaks_off_is_continued(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 2**14)
    hub.cut["vae/model.safetensors"] = 70_000
    place = resolve("org/big")
    assert (place / "vae/model.safetensors").read_bytes() == BIG
    assert [start for name, start in hub.files if name != "model_index.json"] == [0, 4 * 2**14]


ASKS = "import sys\nfrom tinydiff.io.hub import resolve\nprint(resolve(sys.argv[1]))"


def test_the_endpoint_and_the_token_of_the_environment(hub, tmp_path):
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    asked = [sys.executable, "-c", ASKS, "org/private"]
    done = subprocess.run(asked, env=os.environ | environment, capture_output=True, text=True)
    place = tmp_path / "home/hub/models--org--private/snapshots" / commit("main")
    assert done.stdout.strip() == str(place), done.stderr
    assert hub.asked() == ["model_index.json"]


def test_an_overlay_takes_of_its_source_what_it_needs(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYDIFF_CACHE_ROOT", str(tmp_path / "made"))
    mappings = [
        {"type": "file", "src": "whole.safetensors", "dst_dir": "transformer"},
        {"type": "tree", "src": "tokenizer", "dst": "tokenizer"},
    ]
    manifest = {"source_model_id": "org/model", "source_revision": "main", "file_mappings": mappings}
    hub.repositories["org/overlay"] = {
        "main": {"model_index.json": b"{}", overlay.MANIFEST: json.dumps(manifest).encode(), "a.bin": b""}
    }
    found = overlay.of_directory(resolve("org/overlay"), "org/overlay")
    place = overlay.materialised(found)
    wanted = ["model_index.json", "tokenizer/spiece.model", "transformer/whole.safetensors"]
    assert files(place) == sorted([overlay.RECORD, *wanted])
    fetched = ["model_index.json", overlay.MANIFEST, "tokenizer/spiece.model", "whole.safetensors"]
    assert hub.asked() == sorted(fetched)
    offline(monkeypatch)
    assert overlay.materialised(found) == place
    (place / "tokenizer/spiece.model").unlink()  # built again from the cache
    assert files(overlay.materialised(found)) == sorted([overlay.RECORD, *wanted])


@pytest.fixture
def modelscope(monkeypatch, tmp_path):
    """ModelScope's library with its functions' names; what is asked of it."""
    asked = []
    client, api = ModuleType("modelscope"), ModuleType("modelscope.hub.api")

    def snapshot_download(model_id, revision=None, allow_patterns=None, ignore_patterns=None):
        if model_id != "org/model":
            raise ValueError("no such\nmodel")
        asked.append((revision, allow_patterns, ignore_patterns))
        return str(tmp_path)

    class HubApi:
        def get_model_files(self, model_id, revision=None, recursive=True):
            folder = {"Path": "vae", "Type": "tree"}
            return [folder, *({"Path": name, "Type": "blob"} for name in MODEL)]

    client.snapshot_download, api.HubApi = snapshot_download, HubApi
    for name, module in (("modelscope", client), ("modelscope.hub", client), ("modelscope.hub.api", api)):
        monkeypatch.setitem(sys.modules, name, module)
    return asked


@pytest.mark.parametrize("name", ["TINYDIFF_USE_MODELSCOPE", "SGLANG_USE_MODELSCOPE"])
def test_modelscope(modelscope, monkeypatch, name, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the other hub"))
    monkeypatch.setenv(name, "true")
    assert resolve("org/model", "v2", variant="fp16") == tmp_path
    [(revision, wanted, unwanted)] = modelscope
    patterns = {"allow_patterns": wanted, "ignore_patterns": unwanted}
    kept = huggingface_hub.utils.filter_repo_objects(MODEL, **patterns)
    assert revision == "v2" and sorted(kept) == sorted([*RUN, HALF])
    with pytest.raises(UserError, match=r"cannot load .org/other. from ModelScope: no such model$"):
        resolve("org/other")


def test_modelscope_is_not_installed(monkeypatch):
    monkeypatch.setenv("TINYDIFF_USE_MODELSCOPE", "1")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", None)
    with pytest.raises(UserError, match="whose library is not installed; pip install modelscope"):
        resolve("org/model")
    monkeypatch.setenv("TINYDIFF_USE_MODELSCOPE", "0")
    monkeypatch.setenv("SGLANG_USE_MODELSCOPE", "1")  # ours counts first
    monkeypatch.setattr(repositories, "_from_hub", lambda *_: "here")
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: SimpleNamespace(siblings=None))
    assert resolve("org/model") == "here"
    monkeypatch.setenv("TINYDIFF_USE_MODELSCOPE", "maybe")
    with pytest.raises(UserError, match="is 'maybe'; set true or false"):
        resolve("org/model")
