"""Bad input at the command line: exit code 2, one sentence on stderr, nothing written. Everything here runs
the real runtime.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.runtime.folders import edit
from tests.sources import PACKAGE, ROOT
from tinydiff import cli
from tinydiff.io.weights import save_weights

SHIPPED = PACKAGE / "shapes"
FAST = ("--num-inference-steps", "2", "--height", "32", "--width", "32")


@pytest.fixture
def refused(tmp_path, capsys) -> Callable[..., str]:
    """Run `generate` with these words into an empty directory; the sentence that it ends with."""

    def run(*words: object, prompt: bool = True) -> str:
        out = tmp_path / "out"
        asked = ["--prompt", "a red circle"] if prompt else []
        assert cli.main(["generate", *asked, "--output-path", str(out), *FAST, *map(str, words)]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.startswith("tinydiff: error: ") and shown.err.count("\n") == 1, (
            shown.err
        )
        assert not out.exists() or not list(out.iterdir())
        return shown.err.removeprefix("tinydiff: error: ").strip()

    return run


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the shipped model, to be broken."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "model"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--num-inference-step", "2"],
        "--num-inference-step: no such flag; did you " "mean '--num-inference-steps'?"),
        (["--height", "100"],
        "height: 100 is not a multiple of 16, which " "tinydiff/shapes needs; the " "nearest: 96 and " "112"),
        (["--width", "8"], "width: 8 is not a multiple of 16, which tinydiff/shapes needs; the nearest: 16"),
        (["--num-frames", "6"],
        "num_frames: 6 is not 4k + 1, which tinydiff/shapes needs; the nearest: 5 and 9"),
        (["--num-frames", "0"], "num_frames: 0 must be at least 1 and at most 100000"),
        (["--num-inference-steps", "0"], "num_inference_steps: 0 must be at least 1 and at most 1000"),
        (["--num-inference-steps", "-5"], "num_inference_steps: -5 must be at least 1 and at most 1000"),
        (["--guidance-scale", "nan"], "guidance_scale: nan is not a finite number"),
        (["--guidance-scale-2", "3"],
        "guidance_scale_2: tinydiff/shapes has only one expert, so there is no boundary to set"),
        (["--image-path", "nowhere.png"], "image_path: 'nowhere.png' is not a file"),
        (["--attention-backend", "flsh"],
        "'flsh' is not one of sdpa, flash, cudnn, efficient, " "math; did you mean 'flash'?"),
        (["--output-file-name", "a.pgn"], "output_file_name: 'a.pgn': '.pgn' is not a known extension"),
        (["--output-file-name", "a.png", "--num-frames", "5"],
        "output_file_name: 'a.png': this " "request makes a video"),
        (["--model-path", "tinydiff/shape"], "model_path:"),
        (["--model-path", "/nowhere/at/all"],
        "model_path: '/nowhere/at/all' is neither a " "file nor a directory here, nor a hub id"),
    ],
)  # fmt: skip
def test_mistakes_in_options(words, sentence, refused, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert sentence in refused(*words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs these")
@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
def test_an_attention_backend_that_this_machine_cannot_run(backend, refused):
    sentence = refused("--attention-backend", backend)
    assert sentence == (
        f"attention_backend: {backend!r} cannot run the transformer in fp32 on this machine "
        "(cpu); the backends that can are sdpa, flash, math"
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"num_frames": 5,', "is neither JSON nor YAML"),
        ("a: [1, 2", "is neither JSON nor YAML (YAML error in line 1)"),
        ("only words", "must hold keys and values"),
        ("guidance_scal: 3", "guidance_scal: no such key; did you mean 'guidance_scale'?"),
        ('{"height": 100}', "height: 100 is not a multiple of 16"),
    ],
)
def test_config_files(text, sentence, refused, tmp_path, capsys):
    (tmp_path / "request.yaml").write_text(text)
    argv = [
        "generate",
        "--prompt",
        "a",
        "--output-path",
        str(tmp_path / "out"),
        "--config",
        str(tmp_path / "request.yaml"),
    ]
    assert cli.main(argv) == 2
    shown = capsys.readouterr().err
    assert sentence in shown and shown.count("\n") == 1
    assert "cannot be read (no such file or directory)" in refused("--config", tmp_path / "nowhere.yaml")


def test_a_first_frame_that_is_no_image(refused, tmp_path):
    for name, data in (
        ("text.png", b"not an image"),
        ("cut.png", (b"\x89PNG\r\n\x1a\n" + b"\0" * 20)),
        ("empty.jpg", b""),
    ):
        (tmp_path / name).write_bytes(data)
        sentence = refused("--image-path", tmp_path / name)
        assert sentence.startswith(f"image_path: '{tmp_path / name}' is not an image that can be read")
    assert "is not a file" in refused("--image-path", tmp_path)


def test_directories_that_are_no_model(refused, model, tmp_path):
    (tmp_path / "empty").mkdir()
    assert refused("--model-path", tmp_path / "empty").endswith(
        "has no model_index.json, so it is not a model in diffusers layout"
    )
    (tmp_path / "file").write_text("x")
    assert "is truncated or not a safetensors file" in refused("--model-path", tmp_path / "file")
    edit(model / "model_index.json", _class_name="StableDiffusionPipeline")
    words = refused("--backend", "tinydiff", "--model-path", model)
    assert "is a StableDiffusionPipeline; supported classes are " in words
    (model / "model_index.json").write_text("{")
    assert "is not readable JSON" in refused("--model-path", model)


def test_broken_weights(refused, model):
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:5], b"", b"\xff" * 64 + whole[64:]):
        file.write_bytes(broken)
        assert refused("--model-path", model).startswith(
            f"model_path: '{file}' is truncated or not a safetensors file ("
        )
    file.unlink()
    assert refused("--model-path", model).endswith("has no *.safetensors file")


def test_weights_that_are_not_the_configs(refused, model):
    from safetensors.torch import load_file

    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    lost = weights.pop("blocks.0.attn1.to_q.weight")
    save_weights(file, weights)
    assert "1 missing (blocks.0.attn1.to_q.weight)" in refused("--model-path", model)
    save_weights(file, weights | {"blocks.0.attn1.to_q.weight": lost[1:].clone(), "blocks.0.extra": lost})
    sentence = refused("--model-path", model)
    assert "1 unexpected (blocks.0.extra)" in sentence
    assert (
        "1 of another shape (blocks.0.attn1.to_q.weight is [159, 160] and should be [160, 160])" in sentence
    )
    edit(model / "transformer" / "config.json", num_layer=6)
    assert "field 'num_layer' is unknown" in refused("--model-path", model)


def test_weights_that_give_no_numbers(refused, model):
    from safetensors.torch import load_file

    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_weights(file, weights | {"proj_out.bias": weights["proj_out.bias"] * float("nan")})
    assert "gave values that are not finite" in refused("--model-path", model)


def test_a_tokenizer_that_is_not_there_or_not_one(refused, model):
    (model / "tokenizer" / "tokenizer.json").write_text("{}")
    assert "tokenizer.json' is not a usable tokenizer" in refused("--model-path", model)
    (model / "tokenizer" / "tokenizer.json").unlink()
    assert refused("--model-path", model).endswith("has neither tokenizer.json nor spiece.model")


def test_directories_that_cannot_be_written(tmp_path, capsys):
    taken = tmp_path / "file"
    taken.write_text("here")
    for folder in (
        taken,
        taken / "deeper",
        *([Path("/proc/nowhere")] if Path("/proc/version").exists() else []),
    ):
        assert cli.main(["generate", "--prompt", "a", "--output-path", str(folder)]) == 2
        shown = capsys.readouterr().err
        assert (
            shown.startswith(f"tinydiff: error: output_path: '{folder}' cannot be") and shown.count("\n") == 1
        )
    assert list(tmp_path.iterdir()) == [taken]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
@pytest.mark.parametrize(
    "words", [[], ["--num-frames", "5"], ["--num-frames", "5", "--output-file-name", "frames/"]]
)
def test_a_full_disk_leaves_nothing_half_written(words, tmp_path):
    """A real refusal of the system at the end of a run: no file of this process may exceed 100 bytes."""
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))"
    code = f"{limit}; from tinydiff import cli; sys.exit(cli.main(sys.argv[1:]))"
    argv = ["generate", "--prompt", "a", "--output-path", str(tmp_path / "out"), *FAST, *words]
    run = subprocess.run(
        [sys.executable, "-B", "-c", code, *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("tinydiff: error: output_path: cannot write '") and run.stderr.endswith(
        "': the disk is full\n"
    )
    assert run.stderr.count("\n") == 1 and run.stdout == "" and list((tmp_path / "out").iterdir()) == []


def test_compiling_without_a_compiler(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("tinydiff.sampling.compile.has_compiler", lambda: False)
    assert (
        cli.main(
            ["generate", "--prompt", "x", "--enable-torch-compile", "--output-path", str(tmp_path / "out")]
        )
        == 2
    )
    assert capsys.readouterr().err.splitlines() == [
        "tinydiff: error: enable_torch_compile: torch.compile needs a C++ compiler, and none is "
        "installed; install g++ or leave the option out"
    ]
    assert not (tmp_path / "out").exists()
