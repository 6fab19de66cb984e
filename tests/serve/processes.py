"""A `tinydiff serve` of its own process, as users start it."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import requests

COMMAND = "import sys; from tinydiff.cli import main; sys.exit(main(sys.argv[1:]))"
TRACED = """
import sys
from tests.compiling import traced_by_dynamo
from tinydiff.cli import main
with traced_by_dynamo():
    sys.exit(main(sys.argv[1:]))
"""
"""The same without Inductor; tests must be on PYTHONPATH."""


class Server:
    """A running server: `url`, its process, and what it printed."""

    def __init__(self, folder, *options, command=COMMAND, **environment):
        self.log = (folder / f"server-{time.monotonic_ns()}.log").open("w+", encoding="utf-8")
        words = [
            sys.executable,
            "-c",
            command,
            "serve",
            "--port",
            "0",
            "--state-dir",
            str(folder / "state"),
            *options,
        ]
        self.process = subprocess.Popen(
            words, stdout=self.log, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
        self.url = self._address()
        self.session = requests.Session()

    def _address(self, seconds=60):
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            if found := re.search(r"http://[\d.]+:\d+", self.said()):
                return found.group()
            time.sleep(0.05)
        raise AssertionError(self.said())

    def get(self, path, **options):
        return self.session.get(self.url + path, timeout=120, **options)

    def post(self, path, **options):
        return self.session.post(self.url + path, timeout=120, **options)

    def said(self):
        self.log.flush()
        with open(self.log.name, encoding="utf-8") as text:
            return text.read()

    def wait_ready(self, seconds=60):
        wait(lambda: self.get("/ready").status_code == 200, seconds)
        return self

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self):
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(60)


def wait(condition, seconds=60):
    """Until it is so."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "not in time"
        time.sleep(0.05)
    return found


@contextmanager
def serving(folder, *options, **environment):
    server = Server(folder, *options, **environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()
        server.session.close()
        server.log.close()
