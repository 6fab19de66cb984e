"""For all tests: the CPU, one thread, and no gradients unless a test asks for them with
`torch.enable_grad()`.

`pytest` alone leaves out what is slow and what needs more than Python. `pytest --everything`, and a run of
named files, leave out nothing; with `--everything` a test that is skipped for a missing tool fails.
"""

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# The values that tests compare are those of float32 and float64 on the CPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

torch.set_num_threads(1)

NEEDS = {"browser": "Chromium", "package": "npm", "postgres": "PostgreSQL"}
"""Fixture -> the program that it starts."""
LEFT_OUT = (
    f"Left out: slow tests, and those that need {', '.join(NEEDS.values())}. `pytest --everything` runs them."
)


def pytest_addoption(parser):
    parser.addoption(
        "--everything",
        action="store_true",
        help="Run the slow tests too, and those that need "
        f"{', '.join(NEEDS.values())}. A test that is skipped for a missing tool fails.",
    )


def pytest_configure(config):
    """Decides once what is left out: the workers of pytest-xdist get the options, and other arguments."""
    if not hasattr(config.option, "leave_out"):
        no_files_named = config.args_source is pytest.Config.ArgsSource.TESTPATHS
        config.option.leave_out = no_files_named and not config.option.everything


def pytest_collection_modifyitems(config, items):
    if config.option.leave_out:
        left_out = {item for item in items if item.get_closest_marker("slow") or needs_program(item)}
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=list(left_out))


def needs_program(item):
    """Whether a test starts more than Python."""
    parameters = getattr(item, "callspec", None)
    values = parameters.params.values() if parameters else ()
    return any(isinstance(name, str) and name in NEEDS for name in (*item.fixturenames, *values))


def pytest_terminal_summary(terminalreporter, config):
    if config.option.leave_out:
        terminalreporter.write_line(LEFT_OUT)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """With --everything, a skip is a failure. Marks that name a platform (`skipif`) still hold."""
    report = yield
    if report.skipped and item.config.option.everything and not item.get_closest_marker("skipif"):
        report.outcome = "failed"
        report.longrepr = f"{report.longrepr[2]}. With --everything nothing may be missing."
    return report


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def compiler():
    """For tests that compile: a machine with Python and nothing else cannot."""
    from tinydiff.sampling.compile import has_compiler

    if not has_compiler():
        pytest.skip("no C++ compiler here, which torch.compile needs")


@pytest.fixture
def dynamo():
    """For tests that count graphs: torch.compile without Inductor."""
    from tests.compiling import traced_by_dynamo

    with traced_by_dynamo():
        yield


@pytest.fixture
def image_server():
    """(the URL of an image on this machine, the paths that were downloaded so far)."""
    from io import BytesIO

    from PIL import Image

    data, downloads = BytesIO(), []
    Image.new("RGB", (64, 64), "orange").save(data, "PNG")

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            downloads.append(self.path)
            found = self.path == "/image.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(data.getvalue() if found else b"")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/image.png", downloads
        server.shutdown()
