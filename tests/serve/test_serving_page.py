"""docs/serving.md: its examples run against a server, and what it names is there."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
from falcon import testing

from tests.serve.fake import listening, service
from tests.sources import ROOT
from tinydiff import config
from tinydiff.io.images import read_image
from tinydiff.serve.app import make_app
from tinydiff.serve.openapi import operations
from tinydiff.serve.options import ServeOptions

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:30000"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def run(tmp_path):
    """Run a program over a block, against a server of its own; what it printed."""
    (tmp_path / "state").mkdir()
    with listening(service(tmp_path / "state")) as address:

        def run(program, text):
            path = shutil.which(program)
            if path is None:
                pytest.skip(f"no {program} on this machine")
            assert ADDRESS in text
            environment = {**os.environ, "no_proxy": "127.0.0.1"}
            done = subprocess.run(
                [path, "-"],
                input=text.replace(ADDRESS, address),
                capture_output=True,
                text=True,
                cwd=tmp_path,
                timeout=60,
                env=environment,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        yield run


@pytest.mark.parametrize("block", range(2))
def test_curl(run, tmp_path, block):
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    run("bash", "set -euo pipefail\n" + blocks("sh")[block])
    made = tmp_path / ("answer.json", "clip.mp4")[block]
    assert made.read_bytes()[:1] == b"{" if block == 0 else made.read_bytes()[4:8] == b"ftyp"


def test_python(run, tmp_path):
    printed = run(sys.executable, "\n".join(blocks("py")))
    assert printed.startswith("[7, 8] {") and "done " in printed
    assert read_image(tmp_path / "star-1.png").shape == (128, 128, 3)
    assert (tmp_path / "right.mp4").read_bytes()[4:8] == b"ftyp" and (tmp_path / "right.webp").read_bytes()[
        8:12
    ] == b"WEBP"


def test_javascript(run):
    [block] = blocks("js")
    printed = run("node", f"(async () => {{{block}}})()")
    assert "/v1/files/" in printed and "signature=" in printed


def test_the_error_is_as_shown(tmp_path):
    made = service(tmp_path)
    answer = testing.TestClient(make_app(made), {"Host": "localhost"}).simulate_post(
        "/v1/images/generations", json={"prompt": "a", "guidance_scal": 1}
    )
    made.scheduler.close()
    assert blocks("json") == [answer.text + "\n"]


def test_every_option_is_there():
    named = {name.replace("-", "_") for name in re.findall(r"--([a-z][\w-]+)", PAGE)}
    assert len(named) > 20 and named <= {*config.NAMES, *(entry.name for entry in fields(ServeOptions))}


def test_every_url_is_described():
    """Written in full, or beside one that is."""
    known = {one.path for one in operations("")} | {
        "/",
        "/docs",
        "/openapi.json",
        "/release_memory_occupation",
        "/resume_memory_occupation",
    }
    named = {
        path.removeprefix("GET ").removeprefix("POST ")
        for path in re.findall(r"`((?:GET |POST )?/[\w/]*)`", PAGE)
    }
    assert len(named) > 10 and named <= known


def test_the_limits_are_the_defaults():
    rows = re.findall(r"^\| `--([\w-]+)` \| .* \| (\d+)( million)? \|$", PAGE, re.MULTILINE)
    assert len(rows) == 5
    for name, number, million in rows:
        assert getattr(ServeOptions(), name.replace("-", "_")) == int(number) * (10**6 if million else 1)
