"""A model from the authors' own files, through an overlay: the same weights to the bit, the same video."""

import json
import shutil

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tinydiff
from tests.runtime import s2v
from tests.runtime.folders import edit
from tests.sources import ROOT
from tinydiff import cli
from tinydiff.io import overlay, repositories
from tinydiff.io.video import write_wav
from tinydiff.io.weights import exported
from tinydiff.keymap import KeyMap
from tinydiff.models.layouts.recognise import LAYOUTS
from tinydiff.records import Sound, UserError

SMALL = {"height": 32, "width": 48, "num_frames": 8, "num_inference_steps": 2, "seed": 3}
S2V = "Wan-AI/Wan2.2-S2V-14B"
FILES = {"vae": "Wan2.1_VAE.pth", "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth"}


def original(net, class_name):
    layout = next(each for each in LAYOUTS if each.class_name == class_name and "original" in each.name)
    weights = exported(net.weights, net.family.spec(net.config), KeyMap(layout.lines(net.config)))
    return {key: x.contiguous() for key, x in weights.items()}


@pytest.fixture(scope="module")
def authors(tmp_path_factory):
    """(a tiny S2V in diffusers layout, its files as the authors name and store theirs)."""
    folder = tmp_path_factory.mktemp("s2v")
    s2v.build(folder / "model")
    model, source = tinydiff.load(str(folder / "model")), folder / "Wan2.2-S2V-14B"
    source.mkdir()
    for name, file in FILES.items():
        torch.save(original(model.nets[name], model.blueprint.nets[name].component.class_name), source / file)
    index = {}
    weights = load_file(folder / "model/transformer/diffusion_pytorch_model.safetensors")
    for shard in range(4):
        name = f"diffusion_pytorch_model-0000{shard + 1}-of-00004.safetensors"
        part = {key: x for at, (key, x) in enumerate(weights.items()) if at % 4 == shard}
        save_file(part, source / name)
        index |= dict.fromkeys(part, name)
    index_file = source / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": index}))
    shutil.copy(folder / "model/transformer/config.json", source)
    shutil.copytree(folder / "model/tokenizer", source / "google/umt5-xxl")
    (source / "google/umt5-xxl/spiece.model").touch()
    (source / "google/umt5-xxl/special_tokens_map.json").write_text("{}")
    heard = source / "wav2vec2-large-xlsr-53-english"
    shutil.copytree(folder / "model/audio_encoder", heard)
    shutil.copy(folder / "model/audio_processor/preprocessor_config.json", heard)
    (heard / "vocab.json").write_text("{}")
    write_wav(folder / "speech.wav", Sound(np.sin(np.arange(4800)[:, None] / 9).astype(np.float32), 16000))
    Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint32).astype(np.uint8).reshape(48, 48, 3)).save(
        folder / "person.png"
    )
    return folder / "model", source


@pytest.fixture
def tiny(authors, tmp_path, monkeypatch):
    """The built-in overlay of S2V with the sizes of the tiny model."""
    monkeypatch.setenv("TINYDIFF_CACHE_ROOT", str(tmp_path / "cache"))
    model, place = authors[0], tmp_path / "overlay"
    shutil.copytree(overlay.BUILT_IN[S2V], place)
    for name in FILES:
        shutil.copy(model / name / "config.json", place / name)
    return place


def made(path, given):
    """(the loaded model, latents of its video)."""
    asked = SMALL | {"image_path": str(given / "person.png"), "audio_path": str(given / "speech.wav")}
    model = tinydiff.load(str(path))
    return model, tinydiff.generate(model, "a person talks", **asked).latents[0]


def same(got, expected):
    """The same weights to the bit; sums may differ in their last bits by where the weights lie in memory."""
    for name, net in expected[0].nets.items():
        other = got[0].nets[name]
        assert net.config == other.config and net.weights.keys() == other.weights.keys()
        assert all(torch.equal(x, other.weights[key]) for key, x in net.weights.items())
    assert (got[1] - expected[1]).abs().max() < 1e-4 < expected[1].std()


def test_a_models_original_files_run_through_its_overlay(authors, tiny, monkeypatch):
    model, source = authors
    given = model.parent
    monkeypatch.setenv("TINYDIFF_MODEL_OVERLAY_REGISTRY", json.dumps({S2V: str(tiny)}))
    base = made(model, given)
    same(made(source, given), base)  # a directory named like the source
    edit(tiny / overlay.MANIFEST, source_model_id=str(source))
    same(made(tiny, given), base)  # the overlay itself as the model
    edit(tiny / overlay.MANIFEST, source_model_id=S2V)
    monkeypatch.setattr(repositories, "fetched", fetched_from(source))
    same(made(S2V, given), base)


def fetched_from(source):
    def answer(hub_id, wanted, *others):
        assert hub_id == S2V and set(FILES.values()) < set(wanted)
        return source

    return answer


def test_the_example_of_the_command_line_page(authors, tiny, tmp_path, monkeypatch):
    """The registry's variable, the hub id and configs/wan_s2v.yaml with sizes of the tiny model: a video with
    sound."""
    entry = {"overlay_repo_id": str(tiny)}
    monkeypatch.setenv("SGLANG_DIFFUSION_MODEL_OVERLAY_REGISTRY", json.dumps({S2V: entry}))
    monkeypatch.setattr(repositories, "fetched", fetched_from(authors[1]))
    monkeypatch.chdir(authors[0].parent)
    config = ROOT / "configs/wan_s2v.yaml"
    words = ["--num-frames=8", "--size=64x64", "--num-inference-steps=1", f"--output-path={tmp_path}"]
    argv = ["generate", "--model-path", S2V, "--config", str(config), *words]
    assert cli.main([*argv, "--output-file-name", "a.mp4"]) == 0
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
        assert sum(1 for _ in container.decode(video=0)) == 5


def test_the_files_of_s2v(authors, tmp_path, monkeypatch):
    """Of the repository's files those that are run, each where a component of that name looks for it."""
    monkeypatch.setenv("TINYDIFF_CACHE_ROOT", str(tmp_path))
    found = overlay.named(str(authors[1]))
    place = overlay.materialised(found)
    files = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    shards = {f"transformer/diffusion_pytorch_model-0000{at}-of-00004.safetensors" for at in (1, 2, 3, 4)}
    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    names = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    assert files == {
        *("model_index.json", overlay.RECORD, "scheduler/scheduler_config.json", "transformer/config.json"),
        *(shards | {index} | {f"tokenizer/{name}" for name in names}),
        *(f"{name}/{each}" for name, file in FILES.items() for each in ("config.json", file)),
        *("audio_encoder/config.json", "audio_encoder/model.safetensors"),
        *("audio_processor/preprocessor_config.json", "audio_processor/vocab.json"),
    }
    assert set(found.required) == {each.source for each in found.mappings}


def test_a_broken_file_of_the_source(authors, tiny, tmp_path):
    source = tmp_path / "Wan2.2-S2V-14B"
    shutil.copytree(authors[1], source)
    edit(tiny / overlay.MANIFEST, source_model_id=str(source))
    torch.save({"a": torch.zeros(1)}, source / FILES["vae"])
    with pytest.raises(UserError, match="do not fit the model's config"):
        tinydiff.load(str(tiny))
    (source / FILES["vae"]).write_bytes(b"cos\nsystem\n(S'ls'\ntR.")
    with pytest.raises(UserError, match="is truncated, or a pickle of before"):
        tinydiff.load(str(tiny))
