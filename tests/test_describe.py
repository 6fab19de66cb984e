"""What `tinydiff inspect` says of files and directories. Large files are headers with a hole behind them."""

import json
import os
import random
import re
import shutil
import struct
from dataclasses import fields

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from tests.runtime import folders
from tests.sources import PACKAGE, ROOT
from tinydiff import cli
from tinydiff.describe import as_json, lines
from tinydiff.keymap import KeyMap, stored_rows
from tinydiff.models.classes import RECORDS
from tinydiff.models.layouts.recognise import LAYOUTS, config_from
from tinydiff.models.released import COMPONENTS
from tinydiff.records import UserError
from tinydiff.runtime.blueprint import SHIPPED
from tinydiff.runtime.contents import Contents, contents

BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "I8": 1}


def header_only(path, shapes, dtype="BF16", metadata=None):
    """A safetensors file of full length whose values take no space on disk."""
    entries, at = {} if metadata is None else {"__metadata__": metadata}, 0
    for name, shape in shapes.items():
        size = BYTES[dtype] * torch.Size(shape).numel()
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + at)
    return path


def stored(model, component, layout="diffusers", prefix=""):
    """Keys and shapes of a released component in a layout."""
    class_name, entries = COMPONENTS[model][component]
    config = config_from(class_name, entries)
    (found,) = [each for each in LAYOUTS if (each.class_name, each.name) == (class_name, layout)]
    return stored_rows(KeyMap(found.lines(config), prefix), RECORDS[class_name].spec(config))


@pytest.fixture
def model(tmp_path):
    """A copy of the model in the package."""
    return shutil.copytree(SHIPPED, tmp_path / "model")


# --- directories


def test_a_whole_model():
    found = contents("tinydiff/shapes")
    assert (found.kind, found.layout, found.family, found.model_class) == (
        "model directory", "diffusers", "wan", "WanPipeline",
    )  # fmt: skip
    assert found.models == ("tinydiff/shapes",) and found.format == "safetensors"
    assert found.missing == found.problems == ()
    assert found.command == 'tinydiff generate --model-path tinydiff/shapes --prompt "..."'
    parts = {part.path: part for part in found.parts}
    assert {name: part.model_class for name, part in parts.items()} == {
        "scheduler": "UniPCMultistepScheduler",
        "text_encoder": "UMT5EncoderModel",
        "tokenizer": "T5TokenizerFast",
        "transformer": "WanTransformer3DModel",
        "vae": "AutoencoderKLWan",
    }
    assert parts["transformer"].role == "dit" and parts["transformer"].bytes == 2 * 2_457_184
    assert dict(found.precision) == {"F16": found.bytes} and found.bytes == sum(p.bytes for p in found.parts)
    shown = list(lines(found))
    assert shown[0] == "tinydiff/shapes: model directory" and "  precision   F16" in shown
    assert any(line.split()[:4] == ["transformer", "WanTransformer3DModel", "4.9", "MB"] for line in shown)


def test_what_is_missing_is_said_and_no_command_given(model):
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (model / "text_encoder" / "config.json").unlink()
    (file,) = (model / "transformer").glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 1000)
    found = contents(str(model))
    assert found.missing == (
        "text_encoder: config.json",
        f"transformer: {file.name}: the file's last 1000 bytes: it is truncated",
        "vae: weights: it has no *.safetensors file",
    )
    assert "does not exist" in found.problems[0] and found.command is None
    shutil.rmtree(model / "vae")
    assert "vae: its directory; --vae-path takes another" in contents(str(model)).missing


def test_a_shard_that_is_not_there(model):
    (file,) = (model / "transformer").glob("*.safetensors")
    file.unlink()
    index = {"weight_map": {"a": "x-00001-of-00002.safetensors", "b": "x-00002-of-00002.safetensors"}}
    (model / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert contents(str(model)).missing == (
        "transformer: x-00001-of-00002.safetensors",
        "transformer: x-00002-of-00002.safetensors",
    )


def test_weights_that_do_not_fit_the_config(model):
    folders.edit(model / "transformer" / "config.json", num_layers=7)
    found = contents(str(model))
    assert found.missing == () and found.command is None
    assert len(found.problems) == 1 and "transformer: the weights in" in found.problems[0]
    assert "missing (blocks.6." in found.problems[0]


def test_a_class_that_is_not_known(model):
    folders.edit(model / "model_index.json", _class_name="CogVideoXPipeline")
    found = contents(str(model))
    assert "is a CogVideoXPipeline; supported classes are" in found.problems[0] and found.command is None


def test_a_model_that_needs_an_image_is_run_with_one(tmp_path):
    folders.build(folders.VARIANTS["I2V with two experts"], tmp_path / "my model")
    found = contents(str(tmp_path / "my model"))
    assert found.models == ("Wan-AI/Wan2.2-I2V-A14B-Diffusers",) and found.problems == ()
    path = tmp_path / "my model"
    assert found.command == f"tinydiff generate --model-path '{path}' --image-path IMAGE --prompt \"...\""


def test_a_component_by_itself(model):
    found = contents(str(model / "vae"))
    assert (found.kind, found.model_class, found.role) == ("component directory", "AutoencoderKLWan", "vae")
    assert found.files == 1 and dict(found.precision) == {"F16": found.bytes}


def test_a_directory_of_files(tmp_path):
    (tmp_path / "loras").mkdir()
    header_only(tmp_path / "loras" / "style.safetensors", LORA)
    header_only(
        tmp_path / "flux.safetensors", stored("black-forest-labs/FLUX.1-dev", "transformer", "original")
    )
    (tmp_path / "broken.safetensors").write_bytes(b"")
    found = contents(str(tmp_path))
    assert [(part.path, part.kind, part.model_class) for part in found.parts] == [
        ("broken.safetensors", "file", None),
        ("flux.safetensors", "safetensors file", "FluxTransformer2DModel"),
        ("loras/style.safetensors", "LoRA", None),
    ]
    assert found.parts[0].problems == ("is empty",) and found.files == 3


def test_a_hub_id_in_the_cache(tmp_path, monkeypatch):
    repo = tmp_path / "models--some--model"
    shutil.copytree(SHIPPED, repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = contents("some/model")
    assert found.kind == "model directory" and found.bytes == contents("tinydiff/shapes").bytes
    assert found.command == 'tinydiff generate --model-path some/model --prompt "..."'
    with pytest.raises(
        UserError,
        match=r"neither a local path nor downloaded, and this command downloads nothing$",
    ):
        contents("some/other")
    with pytest.raises(UserError, match=r"it is Qwen/Qwen-Image, which `tinydiff generate` downloads"):
        contents("Qwen/Qwen-Image")


# --- files

LORA = {
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight": (16, 1536),
    "diffusion_model.blocks.0.self_attn.q.lora_B.weight": (1536, 16),
}


FLUX, WAN = "black-forest-labs/FLUX.1-dev", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
FLUXES = (FLUX, "black-forest-labs/FLUX.1-schnell", "black-forest-labs/FLUX.1-Kontext-dev")
WANS = (WAN, "FastVideo/FastWan2.1-T2V-1.3B-Diffusers")
ADAPTERS = {
    "diffusers": (
        FLUX, "diffusers", "transformer.{}.lora_A.weight transformer.{}.lora_B.weight", ("LoRA", FLUXES),
    ),
    "peft": (
        FLUX, "diffusers", "base_model.model.{}.lora_A.default.weight " "base_model.model.{}"
        ".lora_B.default.weight",
        ("LoRA", FLUXES),
    ),
    "kohya": (
        FLUX, "original", "lora_unet_{_}.lora_down.weight lora_unet_{_}.lora_up.weight lora_unet_{_}.alpha",
        ("LoRA", FLUXES),
    ),
    "ComfyUI": (
        WAN, "original", "diffusion_model.{}.lora_A.weight diffusion_model.{}.lora_B.weight", ("LoRA", WANS),
    ),
    "DoRA": (
        WAN, "original", "diffusion_model.{}.lora_down.weight diffusion_model.{}.lora_up.weight "
        "diffusion_model.{}.dora_scale",
        ("LoRA and DoRA", WANS),
    ),
}  # fmt: skip
"""Trainer -> (model, layout whose names it writes, keys of a layer, what is said)."""


def adapter(model, layout, keys, rank=8):
    """Keys and shapes of an adapter on every matrix of the blocks."""
    shapes = {}
    for name, shape in stored(model, "transformer", layout).items():
        if name.endswith(".weight") and "blocks." in name and len(shape) == 2:
            module = name.removesuffix(".weight")
            for key in keys.split():
                size = (
                    (rank, shape[1])
                    if key.endswith(("lora_A.weight", "down.weight", "A.default.weight"))
                    else (shape[0], rank)
                )
                size = () if key.endswith("alpha") else (shape[0],) if key.endswith("scale") else size
                shapes[key.replace("{_}", module.replace(".", "_")).replace("{}", module)] = size
    return shapes


@pytest.mark.parametrize("trainer", ADAPTERS)
def test_an_adapter_is_recognised(trainer, tmp_path):
    model, layout, keys, (kind, models) = ADAPTERS[trainer]
    shapes = adapter(model, layout, keys)
    if trainer == "kohya":  # text encoders may be trained too
        shapes["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = (4, 768)
    found = contents(str(header_only(tmp_path / "a.safetensors", shapes)))
    assert (found.kind, found.layout, found.models) == (kind, layout, models) and found.problems == ()
    assert found.layers == len(shapes) // len(keys.split()) + (trainer == "kohya")
    assert found.ranks == ((4, 8) if trainer == "kohya" else (8,))
    lora = f"--lora-path {tmp_path / 'a.safetensors'}"
    assert found.command == f'tinydiff generate --model-path {model} {lora} --prompt "..."'
    assert found.family == ("flux" if model == FLUX else "wan")


def test_layers_that_no_model_has_are_said(tmp_path):
    shapes = adapter(*ADAPTERS["ComfyUI"][:3])
    odd = {
        "diffusion_model.mid.attn.lora_A.weight": (8, 10),
        "diffusion_model.mid.attn.lora_B.weight": (10, 8),
    }
    found = contents(str(header_only(tmp_path / "a.safetensors", shapes | odd)))
    assert found.models == WANS and found.problems == (
        f"1 of its {found.layers} layers are not those of the released models that it looks like: "
        "mid.attn",
    )  # fmt: skip
    found = contents(str(header_only(tmp_path / "b.safetensors", odd)))
    assert (
        found.models == () and found.command is None and "not those of a released model" in found.problems[0]
    )


def test_other_kinds_of_adapters(tmp_path):
    at = "lycoris_blocks_0_attn1_to_q"
    lokr = {
        f"{at}.lokr_w1": (8, 8),
        f"{at}.lokr_w2_a": (192, 4),
        f"{at}.lokr_w2_b": (4, 192),
        f"{at}.alpha": (),
    }
    found = contents(str(header_only(tmp_path / "a.safetensors", lokr)))
    assert (found.kind, found.layers, found.ranks) == ("LoKr", 1, (4,)) and WAN in found.models
    loha = {
        f"{at}.hada_w{i}_{half}": (1536, 6) if half == "a" else (6, 1536) for i in (1, 2) for half in "ab"
    }
    found = contents(str(header_only(tmp_path / "a.safetensors", loha)))
    assert (found.kind, found.layers, found.ranks) == ("LoHa", 1, (6,)) and WAN in found.models
    oft = {"base_model.model.blocks.0.attn1.to_q.oft_R.weight": (48, 496)}
    found = contents(str(header_only(tmp_path / "a.safetensors", oft)))
    assert (found.kind, found.layers, found.ranks) == ("OFT", 1, ()) and WAN in found.models


def test_the_adapters_of_the_package_are_its_models():
    for name in ("purple", "yellow"):
        found = contents(str(PACKAGE / "shapes" / "loras" / f"{name}.safetensors"))
        assert (found.kind, found.models, found.problems) == ("LoRA", ("tinydiff/shapes",), ())


@pytest.mark.parametrize(("layout", "prefix"), [("diffusers", ""), ("original", "model.diffusion_model.")])
@pytest.mark.parametrize(
    ("model", "family", "also"),
    [
        ("black-forest-labs/FLUX.1-dev", "flux", ["black-forest-labs/FLUX.1-Kontext-dev"]),
        ("black-forest-labs/FLUX.1-schnell", "flux", []),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan", ["FastVideo/FastWan2.1-T2V-1.3B-Diffusers"]),
    ],
)
def test_a_released_file_is_recognised(model, family, also, layout, prefix, tmp_path):
    shapes = stored(model, "transformer", layout, prefix)
    path = header_only(tmp_path / "a.safetensors", shapes, metadata={"format": "pt", "note": "x" * 500})
    found = contents(str(path))
    assert (found.kind, found.layout, found.family, found.role) == ("safetensors file", layout, family, "dit")
    assert list(found.models) == [model, *also] and found.prefix == prefix
    assert found.tensors == len(shapes) and dict(found.precision) == {"BF16": found.bytes}
    assert found.bytes == 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    assert found.metadata["format"] == "pt" and len(found.metadata["note"]) == 200
    assert found.problems == () and f": taken from {model}, or from --" in found.missing[0]


def test_types_that_are_not_read_are_said(tmp_path):
    shapes = stored("black-forest-labs/FLUX.1-dev", "transformer", "original")
    found = contents(str(header_only(tmp_path / "a.safetensors", shapes, "I8")))
    assert found.models[0] == "black-forest-labs/FLUX.1-dev"
    assert found.problems == ("its weights are I8; the types read are F64, F32, F16, BF16",)


def test_a_file_that_is_cut_short_says_by_how_much(tmp_path):
    path = header_only(tmp_path / "a.safetensors", stored("black-forest-labs/FLUX.1-dev", "transformer"))
    os.truncate(path, path.stat().st_size - 5_000_000)
    assert contents(str(path)).missing == ("the file's last 5000000 bytes: it is truncated",)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["a.pth", "a.bin", "a.ckpt"])
def test_a_pickle_is_never_executed(name, tmp_path):
    torch.save({"w": torch.zeros(2), "x": Malicious(tmp_path / "run")}, tmp_path / name)
    found = contents(str(tmp_path / name))
    assert found.kind == "torch pickle" and not (tmp_path / "run").exists()
    assert len(found.problems) == 1 and found.problems[0].startswith("asks to run 'posix.mkdir', and")


def test_a_pickle_of_weights(tmp_path):
    torch.save(
        {"a.weight": torch.zeros(3, 4), "a.bias": torch.zeros(3, dtype=torch.float16)}, tmp_path / "a.pth"
    )
    found = contents(str(tmp_path / "a.pth"))
    assert (found.kind, found.tensors, found.bytes) == ("torch pickle", 2, 54)
    assert dict(found.precision) == {"F32": 48, "F16": 6}


def gguf(path, shapes, quantised=None):
    """A file as GGUF's own library writes it. quantised: its bytes in a block of 32 values, and the type."""
    writer = GGUFWriter(path, "flux")
    writer.add_string("general.name", "a\nname")
    writer.add_array("tokens", [f"t{i}" for i in range(20)])
    writer.add_array("numbers", list(range(20)))
    for name, shape in shapes.items():
        values = torch.zeros(shape, dtype=torch.float16)
        if quantised and len(shape) == 2:
            size, kind = quantised
            rows = torch.zeros(shape[0], shape[1] // 32 * size, dtype=torch.uint8)
            writer.add_tensor(name, rows.numpy(), raw_dtype=kind)
        else:
            writer.add_tensor(name, values.numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return path


@pytest.mark.parametrize(("size", "kind"), [(18, GGMLQuantizationType.Q4_0), (34, GGMLQuantizationType.Q8_0)])
def test_gguf(size, kind, tmp_path):
    path = gguf(tmp_path / "a.gguf", {"img_in.weight": (6, 64), "img_in.bias": (6,)}, (size, kind))
    found = contents(str(path))
    assert (found.kind, found.format) == ("GGUF file", "GGUF")
    assert found.metadata["general.architecture"] == "flux" and found.metadata["general.name"] == "a name"
    assert found.metadata["tokens"] == "['t0', 't1', 't2', 't3', 't4', 't5', 't6', 't7', '...']"
    theirs = {each.tensor_type.name: int(each.n_bytes) for each in GGUFReader(path).tensors}
    assert dict(found.precision) == theirs == {kind.name: 12 * size, "F16": 12}
    assert found.missing == ()
    os.truncate(path, path.stat().st_size - 40)
    assert "truncated" in contents(str(path)).missing[0]


# --- mistakes


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.safetensors", b"", "is empty"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("a.safetensors", b"<!DOCTYPE html><html>", "is a web page, not the weights"),
        ("a.safetensors", b"\x00" * 40, "is truncated or not a safetensors file"),
        ("a.safetensors", struct.pack("<Q", 2**60) + b"{}", "is truncated or not a safetensors file"),
        ("a.safetensors", struct.pack("<Q", 9) + b'{"a": 1} ', "has a header that is not that of"),
        ("a.gguf", b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "is a GGUF file of version 9; 2 and 3 are known"),
        ("a.gguf", b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0), "ends inside its header"),
        ("a.png", b"\x89PNG\r\n\x1a\n0000", "is no file of weights"),
    ],
)
def test_a_file_that_is_none(name, data, sentence, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=sentence) as caught:
        contents(str(tmp_path / name))
    assert caught.value.field == "path" and str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_any_broken_header_is_one_sentence(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    if kind == "gguf":
        gguf(path, {"img_in.weight": (6, 64), "img_in.bias": (6,)})
    else:
        header_only(path, LORA, metadata={"a": "b"})
    whole, draw = path.read_bytes(), random.Random(0)
    told_of = refused = 0
    for _ in range(400):
        data = bytearray(whole[: draw.choice([len(whole), draw.randrange(len(whole))])])
        for _ in range(draw.randrange(1, 4)):
            if data:
                data[draw.randrange(min(len(data), 400))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            assert contents(str(path)).files == 1
            told_of += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            refused += 1
    assert told_of > 20 and refused > 20


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "path: is missing; give a file, a directory or a hub id"),
        (["a", "b"], "path: takes one value and was given 'a' 'b'"),
        (["a", "--jsn"], "--jsn: no such flag; did you mean '--json'?"),
        (["./nowhere.safetensors"], "is not a file, a directory or a hub id"),
    ],
)
def test_mistakes_on_the_command_line(argv, sentence, capsys):
    assert cli.main(["inspect", *argv]) == 2
    assert sentence in capsys.readouterr().err


def test_the_command(capsys, model):
    assert cli.main(["inspect", "--help"]) == 0
    assert "usage: tinydiff inspect [-h] PATH [--json [true|false]]" in capsys.readouterr().out
    assert cli.main(["inspect", str(model), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(as_json(contents(str(model)))))
    assert (
        printed["kind"] == "model directory"
        and printed["parts"][0]["model_class"] == "UniPCMultistepScheduler"
    )
    assert cli.main(["inspect", str(model)]) == 0
    assert capsys.readouterr().out.splitlines() == list(lines(contents(str(model))))


def test_what_the_page_shows_is_printed():
    page = (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")
    shown = page.split("$ tinydiff inspect tinydiff/shapes\n")[1].split("\n```")[0]
    assert shown.splitlines() == list(lines(contents("tinydiff/shapes")))
    assert set(re.findall(r"`(\w+)`", page.split("`--json`")[1])) <= {each.name for each in fields(Contents)}


RUNS = [
    ("FLUX.1-dev", "transformer", "original", "--model-path {}"),
    ("FLUX.1-dev", "vae", "diffusers", "--model-path black-forest-labs/FLUX.1-dev --vae-path {}"),
    ("FLUX.1-dev", "text_encoder", "transformers", "--text-encoder-path {}"),
    ("FLUX.1-dev", "text_encoder_2", "transformers", "--text-encoder-2-path {}"),
]


@pytest.mark.parametrize(("model", "component", "layout", "words"), RUNS)
def test_the_command_of_a_file(model, component, layout, words, tmp_path):
    name = f"black-forest-labs/{model}"
    path = header_only(tmp_path / f"{model}.safetensors", stored(name, component, layout))
    found = contents(str(path))
    assert words.format(path) in found.command and found.command.endswith('--prompt "..."')
    others = "text_encoder, text_encoder_2, tokenizer, tokenizer_2, vae"
    flags = "--text-encoder-path, --text-encoder-2-path, --tokenizer-path, --tokenizer-2-path, --vae-path"
    said = (f"{others}: taken from {name}, or from {flags}",) if component == "transformer" else ()
    assert found.missing == said


def test_no_command_for_a_file_that_is_not_read(tmp_path):
    shapes = stored("black-forest-labs/FLUX.1-dev", "transformer", "original")
    path = header_only(tmp_path / "a.safetensors", shapes, "I8")
    assert contents(str(path)).command is None


def test_a_float8_file_has_a_command(tmp_path):
    shapes = stored("black-forest-labs/FLUX.1-dev", "transformer", "original")
    found = contents(str(header_only(tmp_path / "a.safetensors", shapes, "F8_E4M3")))
    assert found.problems == () and "--model-path" in found.command
    assert list(found.precision) == ["F8_E4M3"]
    assert found.quantised == "fp8" and "  in memory   linear layers stay in fp8" in lines(found)
    plain = contents(str(header_only(tmp_path / "b.safetensors", shapes, "BF16")))
    assert plain.quantised is None and not any("in memory" in line for line in lines(plain))
