"""Files on their way out: ranges, conditions and HEAD, without a server and through one."""

import http.client
import os
from contextlib import closing

import falcon
import falcon.testing
import pytest

from tests.serve import fake
from tinydiff.serve.downloads import send_file

PIECE = 2**18
DATA = bytes(range(256)) * 40
CHANGED = 1_700_000_000
DATE = "Tue, 14 Nov 2023 22:13:20 GMT"


class Resource:
    def __init__(self, path):
        self.path = path

    def on_get(self, req, resp):
        send_file(req, resp, self.path, "video/mp4")

    on_head = on_get


def app(path):
    os.utime(path, ns=(CHANGED * 10**9 + 5, CHANGED * 10**9 + 5))
    made = falcon.App()
    made.add_route("/f", Resource(path))
    return made


@pytest.fixture
def client(tmp_path):
    (tmp_path / "f").write_bytes(DATA)
    return falcon.testing.TestClient(app(tmp_path / "f"))


def test_the_whole_file(client):
    answer = client.simulate_get("/f")
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, DATA, "video/mp4")
    assert answer.headers["content-length"] == str(len(DATA))
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["last-modified"] == DATE


def test_head_is_the_same_without_the_bytes(client):
    whole, answer = client.simulate_get("/f"), client.simulate_head("/f", headers={"Range": "bytes=0-1"})
    assert (answer.status_code, answer.content) == (200, b"")
    assert {name: answer.headers[name] for name in ("content-length", "etag")} == {
        name: whole.headers[name] for name in ("content-length", "etag")
    }


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [("0-0", 0, 1), ("0-", 0, 10240), ("100-199", 100, 200), ("10239-", 10239, 10240), ("10000-99999", 10000,
    10240), ("-40", 10200, 10240),
     ("-99999", 0, 10240)],
)  # fmt: skip
def test_a_range(client, asked, start, stop):
    answer = client.simulate_get("/f", headers={"Range": f"bytes={asked}"})
    assert (answer.status_code, answer.content) == (206, DATA[start:stop])
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/10240"
    assert answer.headers["content-length"] == str(stop - start)


@pytest.mark.parametrize("asked", ["bytes=10240-", "bytes=99999-100000", "bytes=-0"])
def test_a_range_behind_the_end(client, asked):
    answer = client.simulate_get("/f", headers={"Range": asked})
    assert (answer.status_code, answer.headers["content-range"]) == (416, "bytes */10240")


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=0-1,4-5",
        "bytes=5-2",
        "bytes=-",
        "lines=0-1",
        "bytes=x-1",
        "bytes=١-٢",
        "bytes=" + "9" * 5000 + "-",
    ],
)
def test_what_is_no_single_range_gets_the_whole(client, asked):
    answer = client.simulate_get("/f", headers={"Range": asked.encode().decode("latin-1")})
    assert (answer.status_code, answer.content) == (200, DATA)


def test_a_client_that_has_it_gets_nothing(client):
    tag = client.simulate_get("/f").headers["etag"]
    for known in (tag, f'"other", W/{tag}', "*"):
        answer = client.simulate_get("/f", headers={"If-None-Match": known})
        assert (answer.status_code, answer.content) == (304, b"")
    assert client.simulate_get("/f", headers={"If-Modified-Since": DATE}).status_code == 304


@pytest.mark.parametrize(
    "conditions",
    [{"If-None-Match": '"other"'}, {"If-None-Match": '"other"', "If-Modified-Since": DATE},
    {"If-None-Match": ""},
     {"If-Modified-Since": "Tue, 14 Nov 2023 22:13:19 GMT"}, {"If-Modified-Since": "yesterday"}],
)  # fmt: skip
def test_a_client_that_has_another_gets_it(client, conditions):
    assert client.simulate_get("/f", headers=conditions).content == DATA


def test_a_range_of_what_the_client_began_with_or_else_the_whole(client):
    tag = client.simulate_get("/f").headers["etag"]
    for condition, status in (
        (tag, 206),
        (DATE, 206),
        ('"other"', 200),
        (f"W/{tag}", 200),
        ("Tue, 14 Nov 2023 22:13:21 GMT", 200),
    ):
        assert (
            client.simulate_get("/f", headers={"Range": "bytes=1-2", "If-Range": condition}).status_code
            == status
        )


def test_an_empty_file(tmp_path):
    (tmp_path / "f").write_bytes(b"")
    client = falcon.testing.TestClient(app(tmp_path / "f"))
    assert (client.simulate_get("/f").status_code, client.simulate_get("/f").content) == (200, b"")
    assert client.simulate_get("/f", headers={"Range": "bytes=0-"}).status_code == 416


def test_another_file_in_its_place_has_another_tag(tmp_path):
    (tmp_path / "f").write_bytes(DATA)
    client = falcon.testing.TestClient(app(tmp_path / "f"))
    before = client.simulate_get("/f").headers["etag"]
    (tmp_path / "f").write_bytes(DATA[::-1])
    assert client.simulate_get("/f").headers["etag"] != before


def test_no_file_is_left_open(client):
    for headers in ({}, {"Range": "bytes=0-1"}, {"Range": "bytes=99999-"}, {"If-None-Match": "*"}):
        client.simulate_get("/f", headers=headers)
        client.simulate_head("/f", headers=headers)
    assert not [link for link in map(_target, os.listdir("/proc/self/fd")) if link.endswith("/f")]


def _target(number):
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


def test_through_a_server_and_one_connection(tmp_path):
    large = os.urandom(3 * PIECE + 17)
    (tmp_path / "f").write_bytes(large)
    with fake.running(app(tmp_path / "f")) as url, closing(connect(url)) as connection:
        for asked, wanted in (
            (None, large),
            ("5-", large[5:]),
            (f"7-{2 * PIECE}", large[7 : 2 * PIECE + 1]),
            ("-9", large[-9:]),
        ):
            connection.request("GET", "/f", headers={"Range": f"bytes={asked}"} if asked else {})
            assert connection.getresponse().read() == wanted
        connection.request("HEAD", "/f")
        answer = connection.getresponse()
        assert (answer.read(), answer.headers["content-length"]) == (b"", str(len(large)))


def connect(url):
    return http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
