"""1,000 malformed requests: none is an error of the server, each is refused in the one shape, and the next
good request works.
"""

import io
import json
import random
import socket
import struct
import zlib

import pytest
from falcon import testing

from tests.serve.counting import counting
from tests.serve.fake import eventually, form, listening, picture, service
from tinydiff.serve import fields
from tinydiff.serve.app import make_app
from tinydiff.serve.openapi import operations

COUNT = 1000
GOOD = {"prompt": "a red circle", "width": 64, "height": 64, "seed": 1}
IMAGES, EDITS, VIDEOS = "/v1/images/generations", "/v1/images/edits", "/v1/videos"
WEIRD = [
    None, True, -1, 0, 1.5, 1e308, 10**30, -(10**30), "", " ", "x" * 40_000, "\0", "\ud800", "a\u202eb",
    "NaN", "1e400", "0x10",
    "../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1/", "data:image/png;base64,!!!", "${7*7}",
    "'; DROP TABLE jobs; --",
    "<script>alert(1)</script>", [], [[]], [None], ["a", 1], {}, {"a": 1}, {"image_url": 1},
    {"image_url": "file:///etc/passwd"},
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    made = service(tmp_path_factory.mktemp("fuzz"), max_body=2.0, max_pixels=2**18)
    made.scheduler.step_seconds = 0.0
    yield made
    made.scheduler.close()


@pytest.fixture(scope="module")
def client(made):
    return testing.TestClient(make_app(made), {"Host": "localhost"})


def works(client):
    answer = client.simulate_post(IMAGES, json=GOOD)
    assert answer.status_code == 200 and len(answer.json["data"]) == 1


# --- each returns what falcon's test client takes: method, path, and more ---


def broken_json(rng):
    good = json.dumps(GOOD).encode()
    data = rng.choice([
        good[: rng.randrange(len(good))],
        good + rng.choice([b"}", b",", b"[]", b"\0", b"x"]),
        good.replace(b":", rng.choice([b"=", b"", b"::"]), 1),
        b"\xef\xbb\xbf\xff\xfe" + good,
        good.replace(b"a red", bytes([rng.randrange(128, 256)])),
        rng.choice([b"", b" ", b"null", b"true", b"1", b'"text"', b"[]", b"[{}]", b"NaN", b"-Infinity", b"{]",
        b"{'a': 1}"]),
        b"[" * rng.choice([100, 10_000, 500_000]),
        b'{"a":' * rng.choice([50, 20_000]) + b"1" + b"}" * 50,
        b'{"prompt": ' + b"9" * rng.choice([5_000, 100_000]) + b"}",
        b'{"prompt": "a", "seed": %s}' % rng.choice([b"NaN", b"Infinity", b"1e999", b"-0.0", b"01", b"1_000",
        b"9" * 40]),
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\u0000"}',
        rng.randbytes(rng.randrange(1, 400)),
    ])  # fmt: skip
    return (
        "POST",
        rng.choice([IMAGES, EDITS, VIDEOS]),
        {"body": data, "headers": {"Content-Type": "application/json"}},
    )


def wrong_value(rng):
    """One field, or several, of a value that it cannot have."""
    path, kind = rng.choice([(IMAGES, "image"), (EDITS, "image"), (VIDEOS, "video")])
    body = dict(GOOD)
    for name in rng.sample(fields.names(kind), rng.choice([1, 1, 3])):
        body[name] = rng.choice(WEIRD)
    body["num_inference_steps"] = rng.choice(
        [0, -3, 1001, 2.5, "many", [1, 2], {}]
    )  # wrong whatever the others are
    return "POST", path, {"body": json.dumps(body).encode(), "headers": {"Content-Type": "application/json"}}


def unknown_field(rng):
    known = rng.choice(fields.names("image"))
    place = rng.randrange(len(known))
    name = rng.choice(
        [
            known[:place] + rng.choice("qz_") + known[place:],
            known.upper() + "!",
            "x" * 5000,
            "__class__",
            "é",
            "$ref",
            "a.b.c",
            " prompt",
        ]
    )
    body = {**GOOD, name: rng.choice(WEIRD)} if rng.random() < 0.5 else {**GOOD, "extra_body": {name: 1}}
    return (
        "POST",
        rng.choice([IMAGES, VIDEOS]),
        {"body": json.dumps(body).encode(), "headers": {"Content-Type": "application/json"}},
    )


def header(width, height):
    """A PNG that says it is so large and holds nothing."""
    about = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + about + struct.pack(">I", zlib.crc32(about))


def bad_form(rng):
    """A form whose boundary, parts, names or files are wrong."""
    mark = b"xyzzy"
    files = [
        b"",
        b"no image",
        header(60_000, 60_000),
        header(0, 0),
        picture()[:60],
        b"GIF89a",
        b"<svg/>",
        rng.randbytes(200),
        b"%PDF-1.7",
    ]
    file = b'Content-Disposition: form-data; name="%s"; filename="%s"\r\n\r\n' % (
        rng.choice([b"image", b"image[]", b"mask", b"input_reference"]), rng.choice([b"a.png", b"../../a",
        b"", b"\xff", b"a" * 5000]),
    ) + rng.choice(files)  # fmt: skip
    names = [
        b"prompt",
        b"",
        b"a[b",
        b"a]",
        b"[]",
        b"seed[]" + b"[]" * 60,
        b"\xff\xfe",
        b"x" * 9000,
        b"a\0",
        b"prompt[a][b]",
    ]
    word = b'Content-Disposition: form-data; name="%s"\r\n\r\n%s' % (
        rng.choice(names),
        rng.choice([b"\xff\xff", b"", b"a" * 40_000, b"\0"]),
    )
    none = rng.choice(
        [
            b"no header",
            b"Content-Disposition: attachment\r\n\r\nx",
            b"\r\n\r\n",
            b"Content-Disposition\r\n\r\n",
            b": x\r\n\r\ny",
        ]
    )
    parts = rng.choices([file, word, none], k=rng.choice([1, 2, 3, 700]))
    ends = [
        b"--" + mark + b"--\r\n",
        b"",
        b"--" + mark,
        b"--other--\r\n",
        b"--" + mark + b"--" + rng.randbytes(20),
    ]
    data = b"".join(b"--" + mark + b"\r\n" + part + b"\r\n" for part in parts) + rng.choice(ends)
    data = rng.choice([data, data[: rng.randrange(len(data))], data.replace(b"\r\n", b"\n")])
    said = rng.choice(["xyzzy", "other", '"xyzzy', "", "x" * 300, "xyzzy; boundary=b"])
    return (
        "POST",
        rng.choice([EDITS, VIDEOS]),
        {"body": data, "headers": {"Content-Type": f"multipart/form-data; boundary={said}"}},
    )


def wrong_type(rng):
    kinds = [
        "text/plain",
        "application/xml",
        "application/x-www-form-urlencoded",
        "application/json; charset=utf-16",
        "application/jsonx",
    ]
    kinds += ["*/*", ";", "multipart/form-data", "multipart/mixed; boundary=a", "x" * 3000]
    body = rng.choice([b"prompt=a", b"<a/>", json.dumps(GOOD).encode("utf-16"), b"\0"])
    return (
        "POST",
        rng.choice([IMAGES, EDITS, VIDEOS]),
        {"body": body, "headers": {"Content-Type": rng.choice(kinds)}},
    )


def wrong_method(rng):
    path = rng.choice(
        [
            IMAGES,
            EDITS,
            VIDEOS,
            "/v1/models",
            "/ready",
            "/",
            "/page/page.js",
            "/v1/videos/a/remix",
            "/openapi.json",
            "/v1/files/a/content",
        ]
    )
    method = rng.choice(["PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "BREW"])
    return method, path, {"body": rng.choice([b"", b"{}", b"\xff"])}


def wrong_place(rng):
    """Addresses of nothing, and of what lies outside."""
    up = rng.choice(["../", "..%2f", "%2e%2e/", "..%5c", "....//", "%00", "%ff", "~/", "//"]) * rng.randrange(
        1, 6
    )
    tail = rng.choice(["etc/passwd", "tinydiff/serve/pages.py", "", "content", "state.db"])
    root = rng.choice(["/page/", "/v1/files/", "/v1/images/", "/v1/videos/", "/v1/models/", "/v1/", "/"])
    return rng.choice(["GET", "POST"]), f"{root}{up}x{tail}{rng.choice(['', '/content'])}", {}


def wrong_query(rng):
    path = rng.choice(
        [
            VIDEOS,
            "/v1/videos/video_x",
            "/v1/videos/video_x/content",
            "/v1/images/img_x/content",
            "/v1/files/f/content",
        ]
    )
    names = ["limit", "after", "order", "variant", "index", "expires", "signature", "x", "limit[]", "\xe9"]
    values = ["-1", "0", "101", "1e9", "abc", "9" * 50, "%00", "%ff", "a" * 4000, "²", "", "1&limit=2"]
    query = "&".join(f"{rng.choice(names)}={rng.choice(values)}" for _ in range(rng.randrange(1, 4)))
    return "GET", path, {"query_string": query + "&order=no&x=1"}


def wrong_header(rng):
    """Headers that mean nothing, on a request that cannot succeed either."""
    names = [
        "Authorization",
        "Idempotency-Key",
        "x-stainless-retry-count",
        "Range",
        "If-None-Match",
        "If-Modified-Since",
        "Accept",
        "Origin",
        "Host",
        "Cookie",
        "X-Forwarded-For",
    ]
    values = [
        "Bearer",
        "Bearer " + "k" * 60_000,
        "abc",
        "-1",
        "\xff\xfe",
        "bytes=9-1,",
        "bytes=" + "0-1," * 9000,
        '"',
        "Mon, 99 Foo 2020",
        ";;;,,,",
        "é",
    ]
    headers = {name: rng.choice(values) for name in rng.sample(names, rng.randrange(1, 5))}
    return (
        "GET",
        rng.choice(["/v1/videos/none", "/v1/models/none", "/v1/images/none/content"]),
        {"headers": headers},
    )


KINDS = (
    broken_json,
    wrong_value,
    unknown_field,
    bad_form,
    wrong_type,
    wrong_method,
    wrong_place,
    wrong_query,
    wrong_header,
)


def in_the_one_shape(answer):
    error = answer.json.get("error")
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and 5 < len(error["message"]) < 2000
    assert (
        isinstance(error["type"], str)
        and isinstance(error["code"], str)
        and isinstance(error["param"], str | None)
    )


MOST_CALLS, MOST_BYTES, MOST_COPIES = 200_000, 2**23, 6
"""What a request may cost: function calls, bytes beside its body, and how many times over its body is held.
"""


def within_budget(cost, more, told):
    sent = len(more.get("body") or b"")
    assert cost.calls < MOST_CALLS, f"{cost.calls:,} calls: {told}"
    assert cost.bytes < MOST_BYTES + MOST_COPIES * sent, f"{cost.bytes:,} bytes for {sent:,}: {told}"


ROUTES = [
    (one.method.upper(), one.path) for one in operations("") if one.path not in ("/v1/sleep", "/v1/wake")
]
NUMBERS = [
    "1" + "0" * 309,
    "-1" + "0" * 309,
    "1e309",
    "9" * 4301,
    "1_0",
    "+1",
    " 1",
    "\u0661",
    "0x10",
    "Infinity",
    "nan",
    "-0",
    "1.5e-400",
]
MARKS = [
    "",
    "[]",
    "[0]",
    "[1]",
    "[9999]",
    "[a]",
    "[0][0]",
    "[][a]",
    "[a][]",
    "[",
    "]",
    "[99999999999999999999]",
]
HOSTS = [
    "localhost",
    "localhost:80",
    "localhost:",
    "127.0.0.1:abc",
    "[::1]:x",
    "[",
    "a b",
    "",
    "localhost:" + "9" * 400,
    "\xe9",
    "@",
]
ODD = [
    "",
    "*",
    "\xe9",
    ";" * 3000,
    '"' * 500,
    "a" * 8000,
    "0",
    "-1",
    "1e999",
    "bytes=0-",
    "bytes=99999999999999999999-",
    ", " * 2000,
]
HEADERS = [
    "Accept", "Accept-Encoding", "Authorization", "Cookie", "Idempotency-Key", "If-Modified-Since",
    "If-None-Match", "If-Range",
    "Origin", "Range", "X-Forwarded-For", "X-Request-Id", "x-stainless-read-timeout",
    "x-stainless-retry-count", "x-stainless-timeout",
]  # fmt: skip


def any_form(rng, kind):
    """Fields by any name and in any form, repeated or nested, numbers that no reader should take, files by
    any name.
    """
    names = [*fields.names(kind), "image_path", "mask"]
    parts = [("prompt", "a")]
    for name in rng.choices(names, k=rng.choice([1, 2, 6])):
        value = rng.choice(
            [
                *NUMBERS,
                "true",
                "",
                "{}",
                "[1,2]",
                "a" * 33_000,
                picture(16, 16),
                b"",
                b"\xff\xd8\xff" + rng.randbytes(40),
            ]
        )
        parts += [(name + rng.choice(MARKS), value)] * rng.choice([1, 1, 2])
    return form(*parts), "multipart/form-data; boundary=B"


def any_json(rng, kind):
    body = ", ".join(
        f"{json.dumps(name)}: "
        f"{rng.choice([rng.choice(NUMBERS), json.dumps(rng.choice(WEIRD)), '[' + rng.choice(NUMBERS) + ']'])}"
        for name in rng.sample(fields.names(kind), rng.choice([1, 3]))
    )
    return f"{{{body}}}".encode("utf-8", "surrogatepass"), rng.choice(
        ["application/json", "application/json; charset=UTF-8", 'application/json; a="']
    )


def test_any_request_at_every_route_has_an_answer_within_its_budget(tmp_path):
    """Good or bad: no answer is an error of the server, and each costs what it sends, in calls and bytes."""
    rng, seen, made = random.Random(11), set(), service(tmp_path, max_body=2.0, max_pixels=2**18)
    client = testing.TestClient(make_app(made), {"Host": "localhost"})
    ids = {}
    for kind, path in (("images", IMAGES), ("videos", VIDEOS)):
        ids[kind] = client.simulate_post(path, json=GOOD).json["id"]
    eventually(lambda: made.store.get(ids["videos"]).status == "completed")
    for round in range(30):
        for method, path in ROUTES:
            kind = "video" if "video" in path else "image"
            id = rng.choice(
                [ids["videos" if kind == "video" else "images"], "none", "%00", "a" * 3000, "..%2f"]
            )
            headers = {"Host": rng.choice(["localhost"] * 9 + HOSTS)}
            headers |= {name: rng.choice(ODD) for name in rng.sample(HEADERS, rng.choice([0, 1, 3]))}
            more = {"headers": headers}
            if method == "POST":
                more["body"], headers["Content-Type"] = rng.choice([any_form, any_json])(rng, kind)
            elif round % 3 == 0:
                more["query_string"] = (
                    f"{rng.choice(['limit', 'index', 'variant', 'after', 'x'])}"
                    f"={rng.choice(['1', '-1', '9' * 400, '%ff', ''])}"
                )
            if method == "DELETE":
                id = "none"
            with counting() as cost:
                answer = client.simulate_request(method, path.replace("{id}", id), **more)
            told = (
                f"round {round}: {method} {path} {str(more)[:600]} -> {answer.status} "
                f"{answer.content[:300]!r}"
            )
            assert answer.status_code < 500, told
            if answer.status_code >= 400 and method != "HEAD":
                in_the_one_shape(answer)
            within_budget(cost, more, told)
            seen.add((method, path, answer.status_code))
    assert {path for _, path, status in seen if status < 300} >= {"/liveness", "/v1/models", "/v1/videos"}
    assert {200, 400, 404} <= {status for _, _, status in seen}
    made.scheduler.close()


@pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")
def test_a_thousand_malformed_requests(client, made):
    rng = random.Random(5)
    statuses = {}
    for number in range(COUNT):
        make = KINDS[number % len(KINDS)]
        method, path, more = make(rng)
        with counting() as cost:
            answer = client.simulate_request(method, path, **more)
        told = (
            f"number {number}, {make.__name__}: {method} {path[:80]!r} {str(more)[:300]} -> "
            f"{answer.status} {answer.text[:300]}"
        )
        assert 400 <= answer.status_code < 500, told
        within_budget(cost, more, told)
        in_the_one_shape(answer)
        statuses.setdefault(make.__name__, set()).add(answer.status_code)
        if number % 100 == 99:
            works(client)
    assert (
        statuses["wrong_type"] == {400, 415}
        and statuses["unknown_field"] == {400}
        and 405 in statuses["wrong_method"]
    )
    assert {400, 404} <= set().union(*statuses.values())
    counts = made.store.counts()
    assert (
        counts.get("queued", 0) == counts.get("in_progress", 0) == 0 and counts["completed"] == COUNT // 100
    )
    assert counts.get("failed", 0) == 0, "a request that cannot be made was taken for a job"


def test_what_is_refused_leaves_no_file(client, made):
    before = sorted(path for path in made.files.folder.rglob("*") if path.is_file())
    for rng in map(random.Random, range(40)):
        method, path, more = bad_form(rng)
        client.simulate_request(method, path, **more)
    assert sorted(path for path in made.files.folder.rglob("*") if path.is_file()) == before


# --- what no test client can send ---

RAW = [
    b"",
    b"\r\n\r\n",
    b"GET\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"GET / HTTP/x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 400_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /page/../../../../etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /v1/videos HTTP/1.1\r\nHost: a\r\nContent-Length: abc\r\n\r\n",
    b"POST /v1/videos HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/videos HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999\r\n\r\n",
    b"POST /v1/videos HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: "
    b"100\r\n\r\n{\"prompt\"",
    b"POST /v1/videos HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/videos HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Type: "
    b"application/json\r\n\r\n5\r\n{"
    b"\"a\":\r\n",
    b"POST /v1/videos HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: "
    b"3\r\n\r\n0\r\n\r\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A server of its own, and its port."""
    made = service(tmp_path_factory.mktemp("raw"))
    with listening(made) as address:
        yield made, int(address.rpartition(":")[2])


def said(port, data, ends=False):
    """The first bytes of the answer to `data`. ends: the client closes its side then."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.sendall(data)
        if ends:
            sock.shutdown(socket.SHUT_WR)
        try:
            return sock.recv(65536)
        except ConnectionError:
            return b""


def test_what_is_not_http_harms_nothing(live):
    port = live[1]
    for data in RAW:
        answer = said(port, data, ends=True)
        assert answer == b"" or answer.split(b" ", 2)[1][:1] == b"4", (data[:80], answer[:200])
        good = said(port, b"GET /liveness HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert good.startswith(b"HTTP/1.1 200"), data[:80]


def test_an_unknown_transfer_coding_is_not_implemented(live):
    """The one status from 500 on: RFC 9112 asks for it."""
    assert said(
        live[1], b"POST /v1/videos HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n"
    ).startswith(b"HTTP/1.1 501")


def test_a_body_that_ends_early_is_no_job(live):
    made, port = live
    whole = json.dumps(GOOD).encode()
    head = (
        b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
        b"application/json\r\nContent-Length: %d\r\n\r\n" % (len(whole) + 5)
    )
    assert said(port, head + whole, ends=True) == b""
    assert made.scheduler.submitted == []


def test_images_made_of_noise_are_refused(client):
    rng = random.Random(7)
    good = picture()
    for _ in range(30):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 30)):
            data[rng.randrange(8, 40)] ^= 1 << rng.randrange(8)  # the header, which says how large it is
        form, kind = encoded({"prompt": "a"}, {"input_reference": bytes(data)})
        answer = client.simulate_post(VIDEOS, body=form, headers={"Content-Type": kind})
        assert answer.status_code in (200, 400)
        if answer.status_code == 400:
            in_the_one_shape(answer)
            assert answer.json["error"]["param"] == "input_reference"


def encoded(words, files):
    """(body, Content-Type) of a form."""
    out = io.BytesIO()
    for name, value in words.items():
        out.write(f'--m\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
    for name, data in files.items():
        out.write(
            f'--m\r\nContent-Disposition: form-data; name="{name}"; filename="upload"\r\n\r\n'.encode()
            + data
            + b"\r\n"
        )
    return out.getvalue() + b"--m--\r\n", "multipart/form-data; boundary=m"
