"""The official JavaScript client for tests, run by node.

The package is installed once into a directory of the machine's temporary files. Without node, npm or the
registry such tests are skipped.

A script defines `parts`, one async function each. Every part has a time limit of its own, gets an AbortSignal
that fires when the limit is reached, and reports itself on stderr when it starts and ends.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PACKAGE = "openai@6"
OLDEST_NODE = 20
PART_SECONDS = 60

RUN = r"""
import { setTimeout as sleep } from "node:timers/promises";
// Polls until `check` returns a value other than undefined. The part's signal ends the polling.
async function until(signal, check, milliseconds = 50) {
  for (;;) {
    signal.throwIfAborted();
    const found = await check();
    if (found !== undefined) return found;
    await sleep(milliseconds, undefined, { signal });
  }
}
async function run(name, part) {
  const stop = new AbortController(), begun = Date.now();
  const report = (text) => process.stderr.write(`${name}: ${text}\n`);
  report("starts");
  let timer;
  const late = new Promise((_, fail) => {
    timer = setTimeout(() => {
      const error = new Error(`${name} took more than PART_SECONDS seconds`);
      stop.abort(error);
      fail(error);
    }, PART_SECONDS * 1000);
  });
  try { return await Promise.race([part(stop.signal), late]); }
  catch (e) { return { thrown: String(e.stack) }; }
  finally {
    clearTimeout(timer);
    report(`ends after ${Date.now() - begun} ms`);
  }
}
const results = {};
for (const [name, part] of Object.entries(parts)) results[name] = await run(name, part);
// An open connection or timer must not hold the process.
process.stdout.write(JSON.stringify(results), () => process.exit(0));
"""


@dataclass(frozen=True)
class Results:
    """What each part returned, by its name. A part that threw fails the tests that read it, and no other."""

    parts: dict[str, Any]

    def __getitem__(self, name):
        part = self.parts[name]
        if isinstance(part, dict) and "thrown" in part:
            pytest.fail(f"part {name} of the script threw: {part['thrown']}")
        return part


@pytest.fixture(scope="session")
def package():
    """A directory with the installed package."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here, which runs the JavaScript client")
    check_version(subprocess.run(["node", "--version"], check=True, capture_output=True, text=True).stdout)
    directory = Path(tempfile.gettempdir()) / f"tinydiff-tests-{os.getuid()}-{PACKAGE.replace('@', '-')}"
    if not directory.is_dir():
        with tempfile.TemporaryDirectory(dir=directory.parent) as fresh:
            install(Path(fresh) / "package")
            try:  # in one step, so that another process never sees half a package
                (Path(fresh) / "package").rename(directory)
            except OSError:
                assert directory.is_dir()  # another process was faster
    return directory


def check_version(version):
    """version: what `node --version` prints."""
    if int(version.strip().removeprefix("v").split(".")[0]) < OLDEST_NODE:
        pytest.fail(f"node is {version.strip()}; OpenAI's JavaScript client needs {OLDEST_NODE} or newer")


def install(directory):
    directory.mkdir()
    options = ["--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline", "--prefix", str(directory)]
    try:
        subprocess.run(["npm", "install", *options, PACKAGE], check=True, capture_output=True, timeout=180)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        reason = (error.stderr or b"").decode(errors="replace")[-300:] or error
        pytest.skip(f"npm cannot install {PACKAGE}: {reason}")


def run_parts(package, script, *arguments, seconds=PART_SECONDS):
    """The `Results` of the script's `parts`. seconds: the time limit of one part."""
    number = len(re.findall(r"^  async \w+\(", script, re.MULTILINE))
    command = ["node", "--input-type=module", "-", *arguments]
    try:
        run = subprocess.run(
            command,
            input=script + RUN.replace("PART_SECONDS", str(seconds)),
            cwd=package,
            capture_output=True,
            text=True,
            timeout=seconds * number + PART_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        progress = (error.stderr or b"").decode(errors="replace")
        pytest.fail(f"node did not end within {error.timeout} seconds; its progress:\n{progress}")
    if run.returncode != 0:
        pytest.fail(f"node ended with {run.returncode}:\n{run.stderr}")
    return Results(json.loads(run.stdout))
