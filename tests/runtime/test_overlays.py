"""A model from the authors' own files, through an overlay: the same latents to the bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import tinydiff
from tests.runtime.folders import VARIANTS, build, edit
from tinydiff.config import ModelOptions
from tinydiff.io import overlay, repositories
from tinydiff.io.weights import exported
from tinydiff.keymap import KeyMap
from tinydiff.models.layouts.recognise import LAYOUTS
from tinydiff.records import UserError
from tinydiff.runtime import components

SMALL = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "seed": 3}
S2V = "Wan-AI/Wan2.2-S2V-14B"
FILES = {"vae": "Wan2.1_VAE.pth", "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth"}
AUDIO = ("config.json", "model.safetensors", "preprocessor_config.json", "vocab.json")


def original(net, class_name):
    layout = next(each for each in LAYOUTS if each.class_name == class_name and "original" in each.name)
    weights = exported(net.weights, net.family.spec(net.config), KeyMap(layout.lines(net.config)))
    return {key: x.contiguous() for key, x in weights.items()}


@pytest.fixture(scope="module")
def authors(tmp_path_factory):
    """(a tiny Wan in diffusers layout, its files as the authors of S2V name and store theirs)."""
    folder = tmp_path_factory.mktemp("wan")
    build(VARIANTS["T2V"], folder / "model")
    model, source = tinydiff.load(str(folder / "model")), folder / "Wan2.2-S2V-14B"
    source.mkdir()
    for name, file in FILES.items():
        torch.save(original(model.nets[name], model.blueprint.nets[name].component.class_name), source / file)
    weights, index = original(model.denoiser, "WanTransformer3DModel"), {}
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
    (source / "wav2vec2-large-xlsr-53-english").mkdir()
    for name in AUDIO:
        (source / "wav2vec2-large-xlsr-53-english" / name).write_text("{}")
    return folder / "model", source


@pytest.fixture
def tiny(authors, tmp_path, monkeypatch):
    """The built-in overlay of S2V with the sizes and the network of the tiny model."""
    monkeypatch.setenv("TINYDIFF_CACHE_ROOT", str(tmp_path / "cache"))
    model, place = authors[0], tmp_path / "overlay"
    shutil.copytree(overlay.BUILT_IN[S2V], place)
    for name in FILES:
        shutil.copy(model / name / "config.json", place / name)
    shutil.copy(model / "scheduler/scheduler_config.json", place / "scheduler")
    shutil.copy(model / "model_index.json", place)
    return place


def latents(path):
    return tinydiff.generate(tinydiff.load(str(path)), "a fox", **SMALL).latents[0]


def test_a_models_original_files_run_through_its_overlay(authors, tiny, monkeypatch):
    model, source = authors
    monkeypatch.setenv("TINYDIFF_MODEL_OVERLAY_REGISTRY", json.dumps({S2V: str(tiny)}))
    base = latents(model)
    assert torch.equal(latents(source), base)  # a directory named like the source
    edit(tiny / overlay.MANIFEST, source_model_id=str(source))
    assert torch.equal(latents(tiny), base)  # the overlay itself as the model
    edit(tiny / overlay.MANIFEST, source_model_id=S2V)

    def answer(hub_id, wanted, *others):
        assert hub_id == S2V and set(FILES.values()) < set(wanted)
        return source

    monkeypatch.setattr(repositories, "fetched", answer)
    assert torch.equal(latents(S2V), base)


def test_s2v_lacks_its_network_alone_and_nothing_is_fetched_for_it(monkeypatch):
    monkeypatch.setattr(repositories, "fetched", lambda *_: pytest.fail("fetched"))
    with pytest.raises(UserError, match="has a WanS2VTransformer3DModel that is not supported; known are"):
        components.chosen(ModelOptions(model_path=S2V))


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
