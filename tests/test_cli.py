"""The command line: help, exit codes, one sentence for a mistake, what is printed at the end. The runtime is
a stand-in here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import tinydiff
from tinydiff import cli, config, progress
from tinydiff.models.registry import MODELS
from tinydiff.records import RankError, UserError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list:
    """The options that reach the runtime; it answers with one image per seed."""
    calls: list = []

    def generate(options, shown):
        calls.append(options)
        shown.on_stage("denoise")
        shown.on_step(1, 2)
        paths = (Path("outputs/a_0.png"), Path("outputs/a_1.png")) if options.output.save_output else ()
        stages = {"load": 0.5, "denoise": 0.25}
        said = {"warnings": ("prompt: the last 3 of its tokens were cut",), "parameters": {"height": 128}}
        return [
            SimpleNamespace(paths=paths, seeds=(42, 43), seconds=stages, step_seconds=(0.1, 0.15), **said)
        ]

    stand_in = ModuleType("tinydiff.runtime.generate")
    stand_in.generate = generate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tinydiff.runtime.generate", stand_in)
    return calls


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The sentence on stderr of a refused command."""
    assert cli.main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("tinydiff: error: ") and shown.err.count("\n") == 1
    return shown.err.removeprefix("tinydiff: error: ").strip()


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["models"]])
def test_answers_without_torch(argv: list[str]):
    heavy = "{'torch', 'numpy', 'PIL', 'av', 'asyncio', 'typeguard'}"
    code = f"import sys\nfrom tinydiff.cli import main\nmain({argv!r})\nassert not {heavy} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 0
    assert "tinydiff generate --prompt" in capsys.readouterr().out
    assert cli.main(["generate", "--prompt", "a", "--help"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "--prompt TEXT ...",
        "--attention-backend sdpa|flash|cudnn|efficient|math",
        "(default: 42)",
        "--config FILE",
        "LoRA",
        "--num-gpus N",
    ):
        assert word in shown
    assert "None" not in shown and "--lora-path TEXT ..." in shown


def test_version(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tinydiff {tinydiff.__version__}\n"


def test_models(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(MODELS) + 1
    assert all(line.startswith(row.name) for line, row in zip(lines[1:], MODELS, strict=True))
    assert cli.main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [row.name for row in MODELS]
    assert rows[1]["steps"] == 50 and rows[1]["negative_prompt"].startswith("色调艳丽")


def test_generate_prints_paths_seeds_and_seconds(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "--prompt", "a red circle", "--num-outputs", "2", "--num-gpus", "1"]) == 0
    [options] = asked
    assert options.sampling.prompt == ("a red circle",) and options.sampling.num_outputs_per_prompt == 2
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "outputs/a_0.png  seed 42",
        "outputs/a_1.png  seed 43",
        "warning: prompt: the last 3 of its tokens were cut",
        "load 0.50 s, denoise 0.25 s",
    ]
    assert shown.err == ""
    assert list(tmp_path.iterdir()) == []


def test_server_flags_are_ignored_in_one_line_each(asked, tmp_path, capsys):
    assert cli.main(["generate", "--prompt", "a", "--port", "30010", "--output-path", str(tmp_path)]) == 0
    assert capsys.readouterr().err == "tinydiff: --port is a server option and is ignored here\n"


def test_not_saving_says_so(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "--prompt", "a", "--no-save-output"]) == 0
    assert capsys.readouterr().out.startswith("not saved: seed 42, seed 43\n")


def test_perf_dump(asked, tmp_path):
    path = tmp_path / "new" / "perf.json"
    assert (
        cli.main(["generate", "--prompt", "a", "--output-path", str(tmp_path), "--perf-dump-path", str(path)])
        == 0
    )
    record = json.loads(path.read_text())
    assert record["total_duration_ms"] == 750
    assert record["steps"] == [{"name": "load", "duration_ms": 500}, {"name": "denoise", "duration_ms": 250}]
    assert record["denoise_steps_ms"] == [{"step": 0, "duration_ms": 100}, {"step": 1, "duration_ms": 150}]
    assert record["meta"]["parameters"] == {"height": 128}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["generat"], "generat: no such command; did you mean 'generate'?"),
        (["serve", "--porrt", "1"], "did you mean '--port'?"),
        (["serve", "--port", "x"], "port: 'x' is not an integer"),
        (["serve", "--prompt", "x"], "prompt: is an option of a request, not of the server"),
        (["serve", "--api-key-file", "/nowhere"], "api_key_file: '/nowhere' cannot be read"),
        (["models", "--jsn"], "--jsn: no such flag; did you mean '--json'?"),
        (["generate"], "prompt: is missing"),
        (["generate", "--promt", "a"], "did you mean '--prompt'?"),
        (
            ["generate", "--prompt", "a", "--kv-gather-degree", "2"],
            "not supported yet: HSDP",
        ),
        (
            ["generate", "--prompt", "a", "--num-gpus", "4", "--tp-size", "3"],
            "num_gpus: 4 does not match tp_size 3, which makes 3 ranks",
        ),
        (
            ["generate", "--prompt", "a", "--num-gpus", "4", "--nnodes", "2"],
            "dist_init_addr: 2 machines (nnodes) need",
        ),
        (["generate", "--prompt", "a", "--model-id", "Wan"], "model_id: 'Wan' is not a known model"),
        (
            ["generate", "--prompt", "a", "--num-inference-steps", "0"],
            "num_inference_steps: 0 must be at least 1",
        ),
    ],
)
def test_mistakes(asked, capsys, argv, words):
    assert words in refused(capsys, *argv)
    assert asked == []


def test_the_failure_of_a_rank_is_a_sentence(asked, tmp_path, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise RankError("rank 1: out of memory")

    monkeypatch.setattr("tinydiff.runtime.launch.generate", fail)
    assert cli.main(["generate", "--prompt", "a", "--num-gpus", "2", "--output-path", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == "tinydiff: error: rank 1: out of memory\n"


def test_places_that_cannot_be_written(asked, tmp_path, capsys):
    taken = tmp_path / "file"
    taken.write_text("here")
    assert "output_path:" in refused(
        capsys, "generate", "--prompt", "a", "--output-path", str(taken / "deeper")
    )
    common = ["generate", "--prompt", "a", "--output-path", str(tmp_path), "--perf-dump-path"]
    assert refused(capsys, *common, str(taken / "perf.json")).startswith("perf_dump_path:")
    assert "is a directory" in refused(capsys, *common, str(tmp_path))
    assert "is a device or a pipe" in refused(capsys, *common, "/dev/null")
    assert refused(capsys, *common, "~no-such-user/a").startswith(
        "perf_dump_path: '~no-such-user/a' does not exist: no home directory"
    )
    assert "no home directory is known" in refused(
        capsys, "generate", "--prompt", "a", "--output-path", "~no-such-user"
    )
    assert "file name too long" in refused(
        capsys, "generate", "--prompt", "a", "--output-path", str(tmp_path / ("a" * 300))
    )
    assert asked == [] and list(tmp_path.iterdir()) == [taken]


def test_a_refusal_of_the_runtime_and_an_interruption(asked, tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise UserError("height", "height: 100 is not a multiple of 16")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    command = ["generate", "--prompt", "a", "--output-path", str(tmp_path)]
    monkeypatch.setattr(sys.modules["tinydiff.runtime.generate"], "generate", refuse)
    assert refused(capsys, *command) == "height: 100 is not a multiple of 16"
    monkeypatch.setattr(sys.modules["tinydiff.runtime.generate"], "generate", interrupt)
    assert cli.main(command) == 130
    assert capsys.readouterr().err == "tinydiff: interrupted\n"


class Terminal:
    """A stream that remembers what was written."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_the_bar_shows_stages_steps_and_seconds(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = progress.watch("info")
    bar.on_stage("load")
    bar.on_stage("denoise")
    bar.on_step(0, 4)
    for done in range(1, 5):
        bar.on_step(done, 4)
    bar.close()
    bar.close()
    assert "denoise" in terminal.text and "/4 steps" in terminal.text and "(4 steps, " in terminal.text
    assert terminal.text.count("s each)") == 1 and terminal.text.count("load") == 2


def test_nothing_is_shown_where_nobody_watches(monkeypatch, capsys):
    assert isinstance(progress.watch("info"), config.NoProgress)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(progress.watch("warning"), config.NoProgress)


def test_the_package_is_the_command():
    run = subprocess.run(
        [sys.executable, "-m", "tinydiff", "generate", "--sead", "1"], capture_output=True, text=True
    )
    assert run.returncode == 2 and "did you mean '--seed'?" in run.stderr
