"""The official JavaScript client for tests, run by node.

The package is installed once into a directory of the machine's temporary files. Without node, npm or the
registry such tests are skipped.
"""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

PACKAGE = "openai@6"

RUN = r"""
const told = {};
for (const [name, part] of Object.entries(parts)) {
  try { told[name] = await part(); } catch (e) { told[name] = { thrown: String(e.stack) }; }
}
process.stdout.write(JSON.stringify(told));
"""


@pytest.fixture(scope="session")
def package():
    """A directory with the installed package."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here, which runs the JavaScript client")
    folder = Path(tempfile.gettempdir()) / f"tinydiff-tests-{os.getuid()}-{PACKAGE.replace('@', '-')}"
    if not (folder / "node_modules" / "openai").is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
            install = [
                "npm",
                "install",
                "--no-audit",
                "--no-fund",
                "--ignore-scripts",
                "--prefer-offline",
                "--prefix",
                fresh,
                PACKAGE,
            ]
            try:
                subprocess.run(install, check=True, capture_output=True, timeout=180)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                pytest.skip(
                    f"npm cannot install {PACKAGE}: "
                    f"{(error.stderr or b'').decode(errors='replace')[-300:] or error}"
                )
            shutil.copytree(fresh, folder, dirs_exist_ok=True)
    return folder


def told_by(package, script, *arguments):
    """What each of the functions in the script's `parts` returned, by its name."""
    command = ["node", "--input-type=module", "-", *arguments]
    run = subprocess.run(
        command, input=script + RUN, cwd=package, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    thrown = {
        name: part["thrown"] for name, part in found.items() if isinstance(part, dict) and "thrown" in part
    }
    assert thrown == {}
    return found
