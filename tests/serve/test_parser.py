"""Requests as they arrive: bodies that are not read, lengths, and what two servers may read in two ways."""

import contextlib
import errno
import socket

import pytest
import waitress.buffers
import waitress.receiver

from tests.serve.fake import listening, service
from tests.serve.wire import KEY, PROMPT, WELL, Client, get, post, probes
from tinydiff.serve import connections
from tinydiff.serve.connections import MOST_HEADERS, PROBES


@pytest.fixture
def made(tmp_path):
    return service(tmp_path)


@pytest.fixture
def keyed(tmp_path):
    return service(tmp_path, api_key=("k",))


# --- bodies ---


@pytest.fixture
def kept(monkeypatch):
    """Lengths of the pieces of bodies that were read."""
    counted = []

    def counting(received):
        def counts(self, data):
            counted.append(len(data))
            return received(self, data)

        return counts

    for kind in (waitress.receiver.FixedStreamReceiver, waitress.receiver.ChunkedReceiver):
        monkeypatch.setattr(kind, "received", counting(kind.received))
    return counted


BIG = b"x" * 20_000_000
CHUNKED = b"Transfer-Encoding: chunked"


@pytest.mark.parametrize("key", [[], [b"Authorization: Bearer wrong"]])
def test_nothing_of_a_body_is_kept_for_who_has_no_key(keyed, kept, key):
    with listening(keyed) as address:
        status, headers, answer = Client(address).send(post(b"/v1/images/edits", BIG, *key)).answer()
        assert (status, headers["connection"], answer["error"]["code"]) == (401, "close", "invalid_api_key")
        chunked = b"\r\n".join(
            [b"POST /v1/videos HTTP/1.1", b"Host: localhost", CHUNKED, *key, b"", b"f4240", b"x" * 10**6, b""]
        )
        assert Client(address).send(chunked).answer()[0] == 401
        assert kept == []
        assert Client(address).send(post(b"/v1/images/generations", PROMPT, KEY.strip())).answer()[0] == 200
        assert sum(kept) == len(PROMPT)


def test_a_client_that_asks_first_gets_no_continue(keyed, kept):
    asked = (
        b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000000\r\nExpect: 100-continue\r\n"
    )
    with listening(keyed) as address:
        assert Client(address).send(asked + b"\r\n").answer()[0] == 401
        assert (
            Client(address).send(asked.replace(b"20000000", b"99999999999") + KEY + b"\r\n").answer()[0]
            == 413
        )
        client = Client(address).send(
            post(b"/v1/images/generations", PROMPT, KEY.strip(), b"Expect: 100-continue")[: -len(PROMPT)]
        )
        assert client.head()[0] == 100
        assert client.send(PROMPT).answer()[0] == 200
        client.send(get(b"/liveness", b"Expect: 100-continue"))  # no body, so there is nothing to wait for
        assert client.answer()[0] == client.send(get(b"/liveness")).answer()[0] == 200
    assert sum(kept) == len(PROMPT)


def test_a_foreign_page_and_too_much_are_refused_by_their_headers(made, kept):
    with listening(made) as address:
        assert (
            Client(address).send(post(b"/v1/videos", BIG, b"Origin: https://evil.example")).answer()[0] == 403
        )
        too_large = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 64000001\r\n\r\n"
        status, headers, answer = Client(address).send(too_large).answer()
        assert (status, headers["connection"], answer["error"]["code"]) == (413, "close", "request_too_large")
        assert (
            Client(address).send(get(b"/v1/models", b"Content-Length: 20000000") + BIG).answer()[0] == 200
        )  # means nothing there
    assert kept == []


def test_a_refused_body_is_not_read_as_requests(keyed):
    inner = get(b"/liveness")
    with listening(keyed) as address:
        client = Client(address).send(get(b"/health") + post(b"/v1/videos", inner * 50))
        assert [client.answer()[0] for _ in range(2)] == [200, 401]
        assert client.rest() == b""


def test_a_full_disk_is_reported_to_who_sends_a_body(made, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(waitress.buffers.TempfileBasedBuffer, "append", full)
    with listening(made) as address:
        status, headers, answer = Client(address).send(post(b"/v1/videos", BIG)).answer()
        assert (status, answer["error"]["code"]) == (507, "storage_failed")
        assert headers["content-type"] == "application/json" and headers["connection"] == "close"
        assert probes(address) == WELL


def chunked(*pieces):
    return b"\r\n".join(
        [
            b"POST /v1/images/generations HTTP/1.1",
            b"Host: localhost",
            b"Content-Type: application/json",
            CHUNKED,
            b"",
        ]
    ) + (b"\r\n" + b"".join(pieces))


def test_a_chunked_body(made):
    whole = chunked(
        b"%x\r\n%s\r\n" % (len(PROMPT) - 9, PROMPT[:-9]), b"9;a=b\r\n" + PROMPT[-9:] + b"\r\n", b"0\r\n\r\n"
    )
    with listening(made) as address:
        client = Client(address)
        assert client.send(whole).answer()[0] == client.send(whole).answer()[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "read"),
    [
        (b"1" * 10**6, 400, 2 * connections.MOST_LINE + 2**14),  # a length without an end
        (b"1\r\nx\r\n" * 200_000, 400, 3 * connections.MOST_FRAMING),  # six bytes for one
        (b"0\r\n" + b"a: b\r\n" * 200_000, 400, 2 * MOST_HEADERS + 2**14),  # headers behind it without an end
        (b"\r\n" * 200_000, 400, 3 * connections.MOST_FRAMING),  # no chunk at all
        (b"g\r\n", 400, 100),
        (b"5\r\nabcdefgh", 400, 100),
        (b"f" * 15 + b"\r\n" + b"x" * 70_000_000, 413, 66_000_000),
    ],
)
def test_a_chunked_body_without_end_ends(made, kept, body, status, read):
    with listening(made) as address:
        client = Client(address)
        with contextlib.suppress(ConnectionError):
            client.send(chunked(body))
        assert client.answer()[0] == status
    assert sum(kept) <= read


# --- headers ---


@pytest.mark.parametrize(
    "request_",
    [
        get(b"/liveness", b"a: " + b"b" * MOST_HEADERS),
        get(b"/" + b"x" * MOST_HEADERS),
        get(b"/liveness", *[b"a: b"] * 3000),
        b"GET / HTTP/1.1\r\n" + b"x" * 100_000,
    ],
)
def test_more_than_8_kb_of_headers(made, request_):
    with listening(made) as address:
        status, headers, answer = Client(address).send(request_).answer()
        assert (status, answer["error"]["code"], answer["error"]["type"]) == (
            431,
            "headers_too_large",
            "invalid_request_error",
        )
        assert headers["connection"] == "close"
        assert headers["x-request-id"].startswith("req_")


def test_8_kb_of_headers(made):
    plain = len(get(b"/liveness", b"a: "))
    with listening(made) as address:
        assert (
            Client(address).send(get(b"/liveness", b"a: " + b"b" * (MOST_HEADERS - plain))).answer()[0] == 200
        )
        assert (
            Client(address).send(get(b"/liveness", b"a: " + b"b" * (MOST_HEADERS - plain + 1))).answer()[0]
            == 431
        )


@pytest.mark.parametrize(
    "head",
    [
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5, 5",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: +5",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 5000,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked",
        b"POST / HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length : 5",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n folded: a",
        b"GET / HTTP/1.1\r\nHost: localhost\r\na: b\x00",
        b"GET / HTTP/2.0\r\nHost: localhost",
        b"GET / HTTP/3",
        b"GET /",
        b"GET http://[ HTTP/1.1\r\nHost: localhost",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost",
        b"GET / HTTP/1.1\r\nHost: localhost\nX: y",
    ],
)
def test_what_two_servers_may_read_in_two_ways_is_refused(made, head):
    with listening(made) as address:
        status, _, answer = Client(address).send(head + b"\r\n\r\n").answer()
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        assert Client(address).send(get(b"/liveness")).answer()[0] == 200


def test_requests_in_a_row_are_answered_in_a_row(made):
    with listening(made) as address:
        client = Client(address).send(
            get(b"/liveness") + get(b"/none") + get(b"/v1/models") + b"\r\n" + get(b"/health")
        )
        assert [client.answer()[0] for _ in range(4)] == [200, 404, 200, 200]


def test_urgent_data_ends_a_connection(made):
    with listening(made) as address:
        client = Client(address)
        client.socket.send(b"!", socket.MSG_OOB)
        assert client.rest() == b""
        assert Client(address).send(get(b"/liveness")).answer()[0] == 200


def test_a_health_check_of_http_1_0_names_no_host(made):
    with listening(made) as address:
        for path in (*PROBES, "/v1/models"):
            assert Client(address).send(b"GET %s HTTP/1.0\r\n\r\n" % path.encode()).head()[0] == 200
