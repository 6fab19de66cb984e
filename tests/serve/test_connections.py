"""Connections: that nobody who reads nothing, sends nothing or waits takes the server from others."""

import contextlib
import json
import os
import resource
import socket
from types import SimpleNamespace

import pytest
import waitress.buffers

from tests.serve.fake import eventually, listening, service
from tests.serve.wire import KEY, PROMPT, WELL, Client, get, post, probes
from tinydiff.serve import connections
from tinydiff.serve.connections import TURN, Channel


@pytest.fixture
def made(tmp_path):
    return service(tmp_path)


@pytest.fixture
def keyed(tmp_path):
    return service(tmp_path, api_key=("k",))


# --- threads ---


def large_file(made, folder, count=2**28):
    path = folder / "large"
    with path.open("wb") as file:
        file.truncate(count)
    return made.files.url(made.files.put(path, "video/mp4"), "")


@pytest.mark.parametrize("part", ["bytes=0-", "bytes=1-268435000", None])
def test_whoever_reads_nothing_of_a_file_takes_no_thread(keyed, tmp_path, part):
    path = large_file(keyed, tmp_path).encode()
    with listening(keyed, threads=2, readers=1) as address:
        for _ in range(6):
            asked = [b"Range: " + part.encode()] if part else []
            assert Client(address).send(get(path, *asked)).head()[0] == (206 if part else 200)
        assert probes(address) == WELL
        assert Client(address).send(get(b"/v1/models", KEY.strip())).answer()[0] == 200


def test_a_part_of_a_file_is_all_of_the_part(keyed, tmp_path):
    data = os.urandom(3 * TURN)
    path = keyed.files.url(keyed.files.put(data, "video/mp4"), "").encode()
    with listening(keyed) as address:
        client = Client(address)
        for first, last in ((5, 3 * TURN - 9), (0, 0), (7, 3 * TURN - 1)):
            status, headers = client.send(get(path, b"Range: bytes=%d-%d" % (first, last))).head()
            assert (status, headers["content-length"]) == (206, str(last + 1 - first))
            assert client.read(last + 1 - first) == data[first : last + 1]


@pytest.mark.parametrize("stream", [True, False])
def test_streams_and_joiners_of_one_job_do_not_silence_the_server(made, stream):
    made.scheduler.gate.clear()
    asked = json.dumps({"prompt": "a", "stream": stream}).encode()
    with listening(made, threads=2, readers=1) as address:
        clients = [
            Client(address).send(post(b"/v1/images/generations", asked, b"Idempotency-Key: one"))
            for _ in range(12)
        ]
        eventually(lambda: made.scheduler.submitted)
        assert probes(address) == WELL
        assert Client(address).send(get(b"/v1/models")).answer()[0] == 200  # it looks, and waits for nothing
        made.scheduler.gate.set()
        assert {client.head()[0] for client in clients} == {200}


def test_too_many_that_wait_are_refused_and_leave_room(made):
    made.scheduler.gate.clear()
    asked = post(b"/v1/images/generations", json.dumps({"prompt": "a"}).encode())
    with listening(made, threads=1, connections=16) as address:
        clients = [Client(address).send(asked)]
        eventually(lambda: made.scheduler.submitted)  # one is served, two wait
        clients += [Client(address).send(asked) for _ in range(2)]
        eventually(lambda: probes(address) == WELL)
        status, headers, answer = Client(address).send(asked).answer()
        assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "overloaded", "5")
        assert probes(address) == WELL
        made.scheduler.gate.set()
        assert [client.answer()[0] for client in clients] == [200] * 3


def test_a_connection_has_its_turn_and_no_more():
    """A client as fast as the server would else have the loop to itself for as long as its file is."""
    ours, theirs = socket.socketpair()
    adj = SimpleNamespace(
        outbuf_overflow=2**20, send_bytes=1, log_socket_errors=True, outbuf_high_watermark=2**26
    )
    one = Channel(SimpleNamespace(active_channels={}), ours, ("", 0), adj, map={})
    one.socket = SimpleNamespace(send=len)  # takes whatever comes
    file = waitress.buffers.ReadOnlyFileBasedBuffer(open("/dev/zero", "rb"))  # noqa: SIM115
    file.remain = 100 * TURN
    one.outbufs.insert(0, file)
    one.total_outbufs_len = 100 * TURN
    one.handle_write()
    assert 99 * TURN - one.sendbuf_len <= one.total_outbufs_len <= 99 * TURN
    one.outbufs[0].close(), ours.close(), theirs.close()


# --- connections ---


def test_the_oldest_idle_connection_makes_way(made):
    made.scheduler.gate.clear()
    with listening(made, connections=8) as address:
        waits = Client(address).send(post(b"/v1/images/generations", PROMPT))
        eventually(lambda: made.scheduler.submitted)
        sends = Client(address).send(post(b"/v1/images/generations", PROMPT)[:-5])
        silent = [Client(address) for _ in range(20)]
        assert probes(address) == WELL
        assert silent[0].rest() == b""
        assert sends.send(PROMPT[-5:]) and waits  # who is within a request stays
        made.scheduler.gate.set()
        assert [client.answer()[0] for client in (waits, sends)] == [200, 200]


def test_more_connections_than_select_can_count(made):
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), most))
    with listening(made) as address, contextlib.ExitStack() as held:
        for _ in range(1100):
            held.callback(os.close, os.dup(0))
        client = Client(address)
        assert client.socket.fileno() > 1023
        assert client.send(get(b"/liveness")).answer()[0] == 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))


def state(**told):
    """A connection's bookkeeping at the time 1000, without a connection."""
    common = {
        "parted_at": 0,
        "total_outbufs_len": 0,
        "requests": [],
        "parting": False,
        "request": None,
        "answered": False,
    }
    return SimpleNamespace(**{**common, "creation_time": 1000, "last_activity": 1000, **told})


def coming(headers, count=0):
    return SimpleNamespace(headers_finished=headers, begun=1000, body_bytes_received=count)


@pytest.mark.parametrize(
    ("one", "seconds"),
    [
        (state(), connections.HEADERS_S),
        (state(request=coming(False)), connections.HEADERS_S),
        (state(answered=True), connections.KEPT_S),
        (state(answered=True, request=coming(False)), connections.HEADERS_S),
        (state(request=coming(True)), connections.HEADERS_S + connections.BODY_S),
        (state(request=coming(True, 10_000)), connections.HEADERS_S + connections.BODY_S + 20),
        (state(total_outbufs_len=1), connections.STALLED_S),
        (state(total_outbufs_len=1, requests=[1]), connections.STALLED_S),
        (state(parted_at=1000), connections.LINGER_S),
    ],
)
def test_how_long_a_client_has_for_what_it_does(one, seconds):
    assert not Channel.overdue(one, 1000 + seconds)
    assert Channel.overdue(one, 1001 + seconds)


def test_a_request_that_is_answered_has_all_the_time():
    assert not Channel.overdue(state(requests=[1]), 10**6)


def test_what_is_overdue_is_closed(made, monkeypatch):
    monkeypatch.setattr(connections, "HEADERS_S", -1)
    with listening(made) as address:
        assert Client(address).rest() == b""
        assert Client(address).send(b"GET / HTTP/1.1\r\nHost: ").rest() == b""
