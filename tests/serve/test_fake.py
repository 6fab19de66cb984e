"""What the tests of the server rely on: neither the fake scheduler nor a script for node fails in silence."""

import pytest
import requests

from tests.serve import fake
from tests.serve.node import check_version, run_parts

SCRIPT = r"""
const parts = {
  async first() { return [1]; },
  async waits() { await new Promise(() => setInterval(() => {}, 1000)); },
  async polls(signal) { return until(signal, async () => undefined, 1); },
  async throws() { throw new Error("no such model"); },
  async last() { return [2]; },
};
"""


def test_the_death_of_the_schedulers_thread_reaches_the_client_and_the_test(tmp_path, monkeypatch):
    def locked(*_):
        raise OSError("database is locked")

    made = fake.service(tmp_path)
    with (
        pytest.raises(RuntimeError, match="the thread of the fake scheduler died") as caught,
        fake.listening(made) as url,
    ):
        made.scheduler.gate.clear()
        first, second = (post(url) for _ in range(2))
        fake.eventually(lambda: made.store.counts().get("in_progress"))
        monkeypatch.setattr(made.store, "take", locked)
        made.scheduler.gate.set()
        made.scheduler.thread.join(30)
        assert [retrieve(url, id) for id in (first, second)] == [200, 500]
    assert str(caught.value.__cause__) == "database is locked"


def post(url):
    body = {"prompt": "a red circle", "seconds": "1"}
    return requests.post(f"{url}/v1/videos", json=body, timeout=30).json()["id"]


def retrieve(url, id):
    return requests.get(f"{url}/v1/videos/{id}", timeout=30).status_code


def test_each_part_of_a_script_ends_and_fails_alone(package):
    results = run_parts(package, SCRIPT, seconds=1)
    assert (results["first"], results["last"]) == ([1], [2])
    for name, message in (
        ("waits", "waits took more than 1 seconds"),
        ("polls", "polls took more than 1 seconds"),
        ("throws", "no such model"),
    ):
        with pytest.raises(pytest.fail.Exception, match=message):
            results[name]


def test_a_script_that_does_not_run_is_shown(package):
    with pytest.raises(pytest.fail.Exception, match="ReferenceError: parts is not defined"):
        run_parts(package, "const nothing = {};\n")


def test_an_old_node_is_named():
    check_version("v20.0.0\n")
    with pytest.raises(pytest.fail.Exception, match=r"node is v18\.20\.4; .* needs 20 or newer"):
        check_version("v18.20.4\n")
