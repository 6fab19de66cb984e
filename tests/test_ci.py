"""The script that checks everything runs what the README tells a newcomer to run."""

import os
import subprocess

import pytest

from tests.sources import ROOT

SCRIPT = ROOT / ".ci" / "run"
MARK = "pip install -e '.[test]'"


def steps(text):
    """The steps of the command in a text that installs the test extra: `$ a && b` gives [a, b]."""
    command = next((line for line in text.splitlines() if MARK in line), "")
    return [step.strip(" `$") for step in command.split("&&")]


def test_it_runs_the_commands_of_the_readme():
    asked = steps((ROOT / "README.md").read_text(encoding="utf-8"))
    script = SCRIPT.read_text(encoding="utf-8").splitlines()
    done = [line.removesuffix(' "$@"').removesuffix(" --everything") for line in script]
    assert asked[0] == MARK and asked[-1].startswith("pytest")
    assert [step for step in asked if step not in done] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [(f"x\n    $ {MARK} && pytest\n", [MARK, "pytest"]), (f"`{MARK}`", [MARK]), ("pip install .", [""])],
)
def test_the_command_is_found(text, found):
    assert steps(text) == found


def test_it_is_a_script_that_bash_reads():
    assert os.access(SCRIPT, os.X_OK)
    assert SCRIPT.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
