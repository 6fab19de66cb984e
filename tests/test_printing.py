"""What is printed never costs the work, and the exit code tells the truth, whatever the streams are."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinydiff import cli, printing, progress
from tinydiff.records import UserError

COMMANDS = [
    ["--help"],
    ["--version"],
    ["models"],
    ["models", "--json"],
    ["generate", "--help"],
    ["plan", "--help"],
    ["doctor", "--help"],
]
COMMAND = [sys.executable, "-m", "tinydiff.cli"]
FULL = "tinydiff: error: not everything could be printed (no space left on device); the work itself is done\n"
ONE_IMAGE = ["generate", "--prompt", "a 円", "--num-inference-steps", "1", "--output-file-name"]


def ended(argv: list[str], out, encoding: str = "utf-8", folder: Path | None = None) -> tuple[int, str]:
    """The exit code of a command that prints into `out`, and what it says on stderr."""
    variables = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(
        [*COMMAND, *argv], stdout=out, stderr=subprocess.PIPE, env=variables, cwd=folder, check=False
    )
    return done.returncode, done.stderr.decode()


@pytest.fixture
def gone():
    """A pipe whose reader has left, as `head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_every_command_with_a_full_stdout_and_a_reader_that_left(argv, gone):
    with open("/dev/full", "w") as full:
        assert ended(argv, full) == (1, FULL)
    assert ended(argv, gone) == (0, "")


def test_help_in_ascii_and_without_stdout():
    for argv in (["generate", "--help"], ["models", "--json"]):
        assert ended(argv, subprocess.DEVNULL, "ascii") == (0, "")
    words = [*COMMAND, "generate", "--help"]
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *words]
    assert (
        subprocess.run(
            closed, env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}, check=False
        ).returncode
        == 0
    )


@pytest.mark.slow
def test_an_image_is_saved_whatever_becomes_of_its_report(tmp_path, gone):
    with open("/dev/full", "w") as full:
        assert ended([*ONE_IMAGE, "full.png"], full, folder=tmp_path) == (1, FULL)
    assert ended([*ONE_IMAGE, "gone.png"], gone, folder=tmp_path) == (0, "")
    with open(tmp_path / "said", "wb") as said:
        assert ended([*ONE_IMAGE, "円.png"], said, "ascii", tmp_path) == (0, "")
    assert (tmp_path / "said").read_text().startswith("outputs/\\u5186.png  seed 42\n")
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"full.png", "gone.png", "円.png"}


@pytest.mark.parametrize("argv", [["--prompt", "\udcff"], ["--prompt", "a", "--negative-prompt", "\ud83d"]])
def test_texts_that_are_not_utf8_are_one_sentence(argv, capsys):
    assert cli.main(["generate", *argv]) == 2
    said = capsys.readouterr().err
    assert "contains bytes that are not UTF-8, or half a character" in said and said.count("\n") == 1
    assert said.startswith(f"tinydiff: error: {argv[-2][2:].replace('-', '_')}: ")


class Refusing(io.StringIO):
    """A stream that refuses."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def test_a_refusal_is_remembered_and_nothing_raises():
    for error, reason in (
        (OSError(errno.EIO, "Input/output error"), "input/output error"),
        (BrokenPipeError(errno.EPIPE, "gone"), None),
    ):
        safe = printing.SafeStream(Refusing(error))
        assert safe.write("a") == 1
        safe.write("b")
        safe.flush()
        assert safe.error is error and printing.failure(safe) == reason
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        safe = printing.SafeStream(stream)
        print("a", file=safe, flush=True)  # type: ignore[arg-type]
        assert safe.error is None and printing.failure(safe) is None


def test_what_an_encoding_has_not_is_escaped():
    data = io.BytesIO()
    safe = printing.SafeStream(io.TextIOWrapper(data, encoding="latin-1"))
    safe.write("ü 円 \udcff\n")
    safe.flush()
    assert data.getvalue() == b"\xfc \\u5186 \\udcff\n" and safe.encoding == "latin-1"


def test_the_streams_are_restored(capsys):
    before = sys.stdout, sys.stderr
    with printing.safe_streams() as out:
        assert sys.stdout is out
        print("a")
        with pytest.raises(UserError):
            raise UserError("a", "b")
    assert (sys.stdout, sys.stderr) == before and capsys.readouterr().out == "a\n"


def test_a_terminal_that_is_gone_costs_no_step():
    bar = progress.Bar(Refusing(OSError(errno.EIO, "Input/output error")))
    bar.on_stage("denoise")
    for done in range(1, 5):
        bar.on_step(done, 4)
    bar.close()
