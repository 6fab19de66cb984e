"""Starting ranks: what fails is told once and by its own name, nothing is left running, and one command makes
what one rank makes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE

import pytest

from tests.runtime.rank_jobs import fails, sums
from tests.sources import ROOT
from tinydiff import cli, config
from tinydiff.io.images import read_image
from tinydiff.parallel.ranks import start
from tinydiff.records import RankError, UserError
from tinydiff.runtime import launch, library

pytestmark = pytest.mark.slow

WITHIN = 180
"""Seconds for started processes to import torch, on a busy machine; what is measured begins after that."""


def gone(folder: Path) -> bool:
    """Whether no process that left its id in the directory runs any more."""
    for path in folder.glob("*.pid"):
        try:
            os.kill(int(path.read_text()), 0)
            return False
        except ProcessLookupError:
            pass
    return True


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("user", UserError, "height: 100 is not a multiple of 16"),
        ("error", RankError, "rank 1: ValueError: boom"),
        ("memory", RankError, "rank 1: out of memory: CUDA out of memory. Tried to allocate 2 GiB."),
        ("killed", RankError, "rank 1: ended by SIGKILL, as the system does where memory runs out"),
        ("sleeps", RankError, "rank 0: waited for another rank longer than dist_timeout allows: "),
    ],
)
def test_the_rank_that_failed_is_named_and_no_other_is_left(how, kind, words, tmp_path, capfd):
    with pytest.raises(kind) as caught:
        start(fails, (str(tmp_path), how), 2)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)
    assert getattr(caught.value, "field", "height") == "height"
    assert (tmp_path / "failed").is_file()
    assert len(list(tmp_path.glob("*.pid"))) == 2 and gone(tmp_path)
    assert capfd.readouterr().out == ""
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@contextmanager
def started(*calls: str) -> Iterator[list[subprocess.Popen]]:
    """Processes that call `parent` with these arguments. Neither they nor their ranks outlive the block."""
    code = "import sys; from tests.runtime import rank_jobs; sys.exit(rank_jobs.parent({}))"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code.format(call)],
            cwd=ROOT,
            stdout=PIPE,
            stderr=PIPE,
            text=True,
            start_new_session=True,
        )
        for call in calls
    ]
    try:
        yield running
    finally:
        for process in running:
            with suppress(ProcessLookupError):  # each leads a process group of its own
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(folder: Path, process: subprocess.Popen, pids: int) -> None:
    limit = time.time() + WITHIN
    while len(list(folder.glob("*.pid"))) < pids:
        assert process.poll() is None, process.communicate()
        assert time.time() < limit, f"not started: {list(folder.iterdir())}"
        time.sleep(0.1)


def test_a_job_that_is_stopped_leaves_nothing(tmp_path):
    """Ctrl-C, which a terminal sends to all of them; SIGTERM at the parent; and a parent that is killed."""
    ends = {"interrupt": 130, "terminate": 143, "kill": -signal.SIGKILL}
    folders = [tmp_path / name for name in ends]
    for folder in folders:
        folder.mkdir()
    with started(*(f"{str(folder)!r}, 'fails', 'waits'" for folder in folders)) as running:
        for folder, process, number in zip(
            folders, running, (signal.SIGINT, signal.SIGTERM, signal.SIGKILL), strict=True
        ):
            wait_for(folder, process, 2)
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        for folder, process, (name, status) in zip(folders, running, ends.items(), strict=True):
            out, err = process.communicate(timeout=WITHIN)
            assert process.returncode == status, (name, out, err)
            assert name == "kill" or err == ("tinydiff: interrupted\n" if name == "interrupt" else ""), err
            limit = time.time() + WITHIN
            while not gone(folder):
                assert time.time() < limit, f"{name}: a rank still runs"
                time.sleep(0.1)


def test_two_jobs_at_once_do_not_meet(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    with started(*(f"{str(tmp_path / name)!r}, 'sums'" for name in "ab")) as running:
        for process in running:
            out, err = process.communicate(timeout=WITHIN)
            assert process.returncode == 0 and json.loads(out) == {"0": [0, 3, 60], "1": [1, 3, 60]}, err


def test_two_machines_meet_at_the_first(tmp_path):
    """Both on this one: each starts two ranks of four."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    calls = (
        f"{str(tmp_path)!r}, 'all_four', nodes=2, node={node}, address=('localhost', {port})"
        for node in (0, 1)
    )
    made = []
    with started(*calls) as running:
        for process in running:
            out, err = process.communicate(timeout=WITHIN)
            assert process.returncode == 0, err
            made.append(json.loads(out))
    assert made == [{"0": 10, "1": 10}, {"2": 10, "3": 10}]


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError,
            match=rf"^master_port: {port} is not available on this machine \(address already in use\); "
            r"choose another port$",
        ):
            start(sums, ("",), 2, address=("localhost", port))


SMALL = [
    "--height",
    "32",
    "--width",
    "64",
    "--num-inference-steps",
    "2",
    "--num-outputs",
    "2",
    "--output-file-name",
    "a.png",
]


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: read_image(str(path)).tobytes() for path in sorted(folder.iterdir())}


def test_replicas_make_what_one_rank_makes(tmp_path, capfd, caplog, image_server):
    """The image to start from is downloaded once by each command, however many ranks it has."""
    url, downloads = image_server
    command = ["generate", "--prompt", "a red circle", "--image-path", url, "--num-frames", "1", *SMALL]
    command.append("--output-path")
    assert cli.main([*command, str(tmp_path / "one")]) == 0
    assert len(downloads) == 1
    one = capfd.readouterr().out
    assert cli.main([*command, str(tmp_path / "two"), "--num-gpus", "2", "--dp", "2"]) == 0
    two = capfd.readouterr()
    assert two.out.splitlines()[:2] == [line.replace("/one/", "/two/") for line in one.splitlines()[:2]]
    assert [part.split()[0] for part in two.out.splitlines()[2].split(", ")] == [
        "load",
        "encode",
        "denoise",
        "decode",
        "save",
    ]
    assert "2 ranks: dp 2 (asked)" in caplog.text
    assert len(downloads) == 2
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tinydiff.cli"]
    under = subprocess.run(
        [*run, *command, str(tmp_path / "three"), "--dp", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(downloads) == 3
    assert under.stdout.splitlines()[:2] == [
        line.replace("/one/", "/three/") for line in one.splitlines()[:2]
    ]
    assert (
        pictures(tmp_path / "one") == pictures(tmp_path / "two") == pictures(tmp_path / "three")
        and len(pictures(tmp_path / "one")) == 2
    )


def test_a_mistake_under_torchrun_is_reported_once(tmp_path):
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "tinydiff.cli",
        "generate",
        "--prompt",
        "a",
    ]
    done = subprocess.run(
        [*run, "--height", "100", "--output-path", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("tinydiff: error: height: 100 is not a multiple of 16") == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num-gpus", "4", "--tp-size", "4", "--height", "32"], "tp_size: 4 does not divide"),
        (["--dp", "2"], "data_parallel_size: 2 replicas for 1 outputs; give at most 1"),
        (
            ["--num-gpus", "2", "--nnodes", "2"],
            "dist_init_addr: 2 machines (nnodes) need the first one's address",
        ),
        (["--num-gpus", "2", "--height", "100"], "height: 100 is not a multiple of 16"),
    ],
)
def test_what_is_refused_before_a_process_is_started(argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tinydiff.parallel.ranks.start", lambda *_, **__: pytest.fail("started"))
    assert cli.main(["generate", "--prompt", "a", "--output-path", str(tmp_path), *argv]) == 2
    assert f"tinydiff: error: {words}" in capsys.readouterr().err


def test_one_rank_starts_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr("tinydiff.parallel.ranks.start", lambda *_, **__: pytest.fail("started"))
    options = config.options(
        {
            "prompt": "a",
            "num_gpus": 1,
            "save_output": False,
            "height": 32,
            "width": 32,
            "num_inference_steps": 1,
        }
    )
    [result] = launch.generate(options, quiet)
    assert result.seeds == (42,)


def quiet(log_level: str):

    return config.NoProgress()


def test_a_program_shares_a_model_under_torchrun_only():
    with pytest.raises(
        UserError, match="tp_size: a Python program runs as one rank; start it with torchrun"
    ) as caught:
        library.load(None, {"tp_size": 2})
    assert caught.value.field == "tp_size"
    assert library.load(None, {"num_gpus": 1}).blueprint.row.name == "tinydiff/shapes"
