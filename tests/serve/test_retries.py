import threading

import pytest
from falcon import testing

from tests.serve.fake import eventually, service
from tinydiff.serve import images, retries
from tinydiff.serve.app import make_app
from tinydiff.serve.jobs import Failure

AGAIN = {"x-stainless-retry-count": "1"}


@pytest.fixture
def both(tmp_path):
    """(service, client) of the shipped model."""
    made = service(tmp_path)
    yield made, testing.TestClient(make_app(made), {"Host": "localhost"})
    made.scheduler.close()


def generate(client, headers=None, **fields):
    return client.simulate_post(
        "/v1/images/generations", json={"prompt": "a circle", "size": "64x48", **fields}, headers=headers
    )


def started(both):
    """A request that waits at the gate: (its thread, its answers, its job)."""
    made, client = both
    made.scheduler.gate.clear()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(generate(client)))
    thread.start()
    eventually(lambda: made.scheduler.submitted)
    return thread, answers, made.scheduler.submitted[0]


# --- requests that come again ---


def test_a_retry_joins_the_running_request(both):
    thread, answers, job = started(both)
    second = []
    retry = threading.Thread(target=lambda: second.append(generate(both[1], AGAIN)))
    retry.start()
    eventually(lambda: both[0].scheduler.watched == [job.id] * 2)
    both[0].scheduler.gate.set()
    thread.join(10), retry.join(10)
    assert answers[0].json["id"] == second[0].json["id"]
    assert len(both[0].scheduler.submitted) == 1


@pytest.mark.parametrize("key", [{}, {"Idempotency-Key": "once"}])
def test_a_retry_finds_what_was_completed_after_the_client_gave_up(both, key, monkeypatch):
    first, again = generate(both[1], key), generate(both[1], {**AGAIN, **key})
    assert again.json["id"] == first.json["id"] and again.json["data"] == first.json["data"]
    monkeypatch.setattr(retries, "RETRY_S", 0.0)
    assert generate(both[1], {**AGAIN, **key}).json["id"] != first.json["id"]


@pytest.mark.parametrize("headers", [{}, AGAIN])
def test_a_retry_of_what_failed_is_made_anew(both, headers):
    made, client = both
    made.scheduler.fail = lambda job: Failure("server_restarted", "the server was started again")
    assert generate(client).status_code == 503
    made.scheduler.fail = lambda job: None
    assert generate(client, headers).status_code == 200


@pytest.mark.parametrize(("headers", "more"), [({}, {}), (AGAIN, {"n": 2})])
def test_a_new_request_or_another_body_does_not(both, headers, more):
    thread, _, _ = started(both)
    other = threading.Thread(target=lambda: generate(both[1], headers, **more))
    other.start()
    eventually(lambda: len(both[0].scheduler.submitted) == 2)
    both[0].scheduler.gate.set()
    thread.join(10), other.join(10)


def test_a_retry_of_what_was_turned_away_is_a_request_of_its_own(both):
    """Two clients say the same; the second is told to come back, and then wants its own image."""
    thread, _, _ = started(both)
    both[0].scheduler.busy = 1.0
    assert generate(both[1]).status_code == 429
    both[0].scheduler.busy = None
    other = threading.Thread(target=lambda: generate(both[1], AGAIN))
    other.start()
    eventually(lambda: len(both[0].scheduler.submitted) == 2)
    both[0].scheduler.gate.set()
    thread.join(10), other.join(10)


def test_an_idempotency_key_joins_and_is_of_one_body(both):
    made, client = both
    made.scheduler.gate.clear()
    answers, key = [], {"Idempotency-Key": "once"}
    threads = [threading.Thread(target=lambda: answers.append(generate(client, key))) for _ in range(3)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(made.scheduler.watched) == 3)
    answer = generate(client, key, n=2)
    assert (answer.status_code, answer.json["error"]["code"]) == (409, "idempotency_key_reused")
    made.scheduler.gate.set()
    for thread in threads:
        thread.join(10)
    assert len({answer.json["id"] for answer in answers}) == len(made.scheduler.submitted) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_few_wait_for_one_request_however_many_ask(both, stream):
    """Each that waits holds a thread of the server, so a hundred of one key would hold them all."""
    made, client = both
    made.scheduler.gate.clear()
    key, answers = {"Idempotency-Key": "once"}, []
    ask = lambda: answers.append(generate(client, key, stream=stream))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(retries.MOST_WAITING)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(made.scheduler.watched) == retries.MOST_WAITING)
    for _ in range(3):
        refused = generate(client, key, stream=stream)
        assert (refused.status_code, refused.json["error"]["code"]) == (429, "too_many_waiting")
        assert refused.headers["retry-after"] == "2"
    made.scheduler.gate.set()
    for thread in threads:
        thread.join(10)
    assert [answer.status_code for answer in answers] == [200] * retries.MOST_WAITING and len(
        made.scheduler.submitted
    ) == 1
    assert generate(client, key, stream=stream).status_code == 200


# --- clients that go ---


class Patient:
    """What waitress knows of a connection."""

    def __init__(self):
        self.gone = self.missed = False

    def __call__(self):
        self.missed = self.gone
        return self.gone


@pytest.mark.parametrize("stream", [False, True])
def test_a_job_whose_client_went_is_cancelled(both, monkeypatch, stream):
    monkeypatch.setattr(images, "CHECK_S", 0.02)
    made, client = both
    made.scheduler.gate.clear()
    line = Patient()
    said = {"json": {"prompt": "p", "stream": stream}, "extras": {"waitress.client_disconnected": line}}
    thread = threading.Thread(target=lambda: client.simulate_post("/v1/images/generations", **said))
    thread.start()
    eventually(lambda: made.scheduler.submitted)
    line.gone = True
    thread.join(10)
    eventually(lambda: made.store.get(made.scheduler.submitted[0].id).error is not None)
    assert made.store.get(made.scheduler.submitted[0].id).error.code == "cancelled"


def test_a_client_out_of_patience_finds_its_job_again(both, monkeypatch):
    monkeypatch.setattr(images, "CHECK_S", 0.02)
    made, client = both
    made.scheduler.gate.clear()
    line, answers = Patient(), []
    headers = {"x-stainless-read-timeout": "1"}
    said = {"extras": {"waitress.client_disconnected": line}}
    body = {"prompt": "a circle", "size": "64x48"}
    first = threading.Thread(
        target=lambda: client.simulate_post("/v1/images/generations", json=body, headers=headers, **said)
    )
    first.start()
    eventually(lambda: made.scheduler.submitted)
    line.gone = True
    again = threading.Thread(target=lambda: answers.append(generate(client, {**headers, **AGAIN})))
    again.start()
    eventually(lambda: line.missed and len(made.scheduler.watched) == 2)
    made.scheduler.gate.set()
    first.join(10), again.join(10)
    assert (answers[0].status_code, len(made.scheduler.submitted)) == (200, 1)


def test_a_job_goes_on_while_one_of_its_clients_waits(both, monkeypatch):
    monkeypatch.setattr(images, "CHECK_S", 0.02)
    thread, answers, job = started(both)
    line = Patient()
    extras = {"waitress.client_disconnected": line}
    body = {"prompt": "a circle", "size": "64x48"}
    joined = threading.Thread(
        target=lambda: both[1].simulate_post(
            "/v1/images/generations", json=body, headers=AGAIN, extras=extras
        )
    )
    joined.start()
    eventually(lambda: both[0].scheduler.watched == [job.id] * 2)
    line.gone = True
    joined.join(10)
    both[0].scheduler.gate.set()
    thread.join(10)
    assert answers[0].status_code == 200
