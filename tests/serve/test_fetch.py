"""Addresses in requests: that nothing but public ones is ever asked, and for how much and how long."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.serve.internet import PICTURE, PUBLIC, Web, redirects, send, serving
from tinydiff.records import UserError
from tinydiff.serve.fetch import fetch, is_public, resolve

# --- which addresses are public ---


@pytest.mark.parametrize(
    "address", [PUBLIC, "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "223.255.255.1"]
)
def test_public(address):
    assert is_public(address)


PRIVATE = [
    "127.0.0.1", "127.8.9.1", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "100.64.0.1",
    "100.127.255.254",    "169.254.169.254", "192.0.0.1", "192.0.0.9", "192.0.2.1", "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1", "192.88.99.1", "224.0.0.1",
    "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::127.0.0.1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:a9fe:a9fe",
    "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b::10.0.0.1", "64:ff9b:1::1", "2002:7f00:1::", "2002:808:808::1", "2001::1",
    "2001:db8::1", "3fff::1",
    "fc00::1", "fd00::8", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "100::1",
    "5f00::1", "2606:4700::1%1",
    "localhost", "", "2130706433", "0x7f.1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_not_public(address):
    assert not is_public(address)


# --- addresses in requests ---


@pytest.fixture
def web():
    with serving(lambda handler: send(handler, PICTURE)) as made:
        yield made


def test_an_image_is_fetched_from_the_address_that_was_checked(web):
    assert web.fetch("http://images.example/a%20b/ä.png?x=1&y=ü#part") == PICTURE
    assert web.looked == [("images.example", 80)] and web.connected == [(PUBLIC, 80)]
    [(path, headers)] = web.requests
    assert path == "/a%20b/%C3%A4.png?x=1&y=%C3%BC" and headers["Host"] == "images.example"


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "localhost.", "LOCALHOST", "10.1.2.3", "192.168.0.1", "172.20.0.1",
        "169.254.169.254", "0.0.0.0", "0",
        "127.1", "2130706433", "0x7f000001", "017700000001", "0x7f.0.0.1", "0177.0.0.1", "100.64.1.1",
        "224.0.0.1", "255.255.255.255",
        "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[fd00::1]", "[fe80::1]",
        "[64:ff9b::7f00:1]", "[2002:7f00:1::]",
        "[::127.0.0.1]", "127。0。0。1", "①②⑦.0.0.1",
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["http://{}/", "https://{}/a.png", "http://{}:80/"])
def test_private_addresses_are_never_connected_to(web, host, form):
    assert "is not on the public internet" in web.refused(form.format(host))
    assert web.connected == [] and web.requests == []


@pytest.mark.parametrize("address", PRIVATE)
def test_a_name_may_not_lead_to_a_private_address(web, address):
    for answer in ([address], [PUBLIC, address], [address, PUBLIC]):
        web.names["evil.example"] = [answer]
        message = web.refused("http://evil.example/")
        assert message == "image: 'http://evil.example/' is not on the public internet"
    assert web.connected == []


def test_an_unknown_name_is_answered_as_a_private_one(web):
    def unknown(host, port, seconds):
        raise socket.gaierror("Name or service not known")

    with pytest.raises(UserError) as caught:
        fetch("http://intranet/", "image", 10, 1.0, resolve=unknown, connect=web.connect)
    assert str(caught.value) == "image: 'http://intranet/' is not on the public internet"


def test_dns_that_changes_leads_nobody_inside(web):
    web.names["evil.example"] = [[PUBLIC], ["127.0.0.1"]]
    assert web.fetch("http://evil.example/a.png") == PICTURE
    assert web.looked == [("evil.example", 80)] and web.connected == [(PUBLIC, 80)]


def test_dns_that_changes_at_a_redirect_leads_nobody_inside():
    with serving(redirects({"/": "/again"})) as web:
        web.names["evil.example"] = [[PUBLIC], ["10.0.0.1"]]
        assert "is not on the public internet" in web.refused("http://evil.example/")
        assert web.connected == [(PUBLIC, 80)] and [path for path, _ in web.requests] == ["/"]


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("http://127.0.0.1/", "is not on the public internet"),
        ("http://169.254.169.254/latest/meta-data/", "is not on the public internet"),
        ("//localhost/", "is not on the public internet"),
        ("https://[::1]/", "is not on the public internet"),
        ("http://2130706433/", "is not on the public internet"),
        ("http://images.example:22/", "has port 22"),
        ("http://me:secret@images.example/", "a user name or a password"),
        ("file:///etc/passwd", "'file:///etc/passwd' is not an http(s) URL"),
        ("gopher://images.example/_GET", "'gopher://"),
        ("data:image/png;base64,AAAA", "'data:"),
        ("http://[::1", "cannot be fetched"),
    ],
)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_checked_anew(location, said, status):
    with serving(lambda handler: send(handler, b"", status, Location=location)) as web:
        message = web.refused("http://images.example/")
        assert said in message and "secret" not in message
        assert len(web.connected) == 1


def test_redirects_are_followed_up_to_three():
    with serving(redirects({"/0": "/1", "/1": "http://images.example/2", "/2": "3?x=1"})) as web:
        assert web.fetch("http://images.example/0") == PICTURE
        assert [path for path, _ in web.requests] == ["/0", "/1", "/2", "/3?x=1"]


def test_a_fourth_redirect_is_one_too_many():
    with serving(redirects({f"/{k}": f"/{k + 1}" for k in range(9)})) as web:
        assert "redirects more than 3 times" in web.refused("http://images.example/0")
        assert len(web.connected) == 4


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://images.example:8080/", "has port 8080; it may be 80 or 443"),
        ("http://images.example:0/", "has port 0"),
        ("http://images.example:99999/", "is not a valid URL"),
        ("http://images.example:x/", "is not a valid URL"),
        ("http://user@images.example/", "a user name or a password"),
        ("http://user:key@images.example/", "a user name or a password"),
        ("http://images.example\\@127.0.0.1/", "a user name or a password"),
        ("http:///a.png", "is not an http(s) URL"),
        ("file:///etc/passwd", "is not an http(s) URL"),
        ("gopher://images.example/", "is not an http(s) URL"),
        ("http://" + "ä" * 300 + "/", "is not a valid URL"),
        ("http://[fe80::1%25eth0]/", "is not on the public internet"),
        ("http://a\0b/", "is not on the public internet"),
        ("http://a b/", "is not on the public internet"),
    ],
)
def test_addresses_that_are_refused_as_they_stand(web, url, said):
    assert said in web.refused(url) and web.connected == []


def test_the_other_port_may_be_named(web):
    assert web.fetch("http://images.example:443/") == PICTURE
    assert web.connected == [(PUBLIC, 443)] and web.requests[0][1]["Host"] == "images.example:443"


def test_the_next_address_is_tried_where_one_does_not_answer(web):
    web.names["images.example"] = [["2606:4700::1111", PUBLIC]]

    def connect(address, port, name, seconds):
        if ":" in address:
            raise ConnectionRefusedError
        return web.connect(address, port, name, seconds)

    assert (
        fetch("http://images.example/", "image", 10_000, 5.0, resolve=web.resolve, connect=connect) == PICTURE
    )


def test_keys_in_an_address_are_not_repeated(web):
    with serving(lambda handler: send(handler, b"", 403)) as made:
        message = made.refused("http://images.example/a.png?signature=secret")
    assert message == "image: 'http://images.example/a.png' was answered with status 403"


def test_what_does_not_answer_says_nothing_of_why(web):
    def connect(address, port, name, seconds):
        raise ConnectionRefusedError("[Errno 111] Connection refused by 10.0.0.7")

    with pytest.raises(UserError) as caught:
        fetch("http://images.example/", "image", 10, 5.0, resolve=web.resolve, connect=connect)
    assert str(caught.value) == "image: 'http://images.example/' cannot be fetched"


def test_too_large_by_its_own_word_is_not_read():
    def answer(handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000000000")
        handler.end_headers()

    with serving(answer) as web:
        assert "larger than 0.01 MB" in web.refused("http://images.example/")


def test_too_large_without_a_word_ends_while_streaming():
    sent = []

    def answer(handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(10_000):
            handler.wfile.write(bytes(10_000))
            sent.append(1)

    with serving(answer) as web:
        assert "larger than 0.01 MB" in web.refused("http://images.example/")
    assert len(sent) < 10_000


def test_a_body_that_ends_early_is_not_taken():
    def answer(handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"half")

    with serving(answer) as web:
        assert "cannot be fetched" in web.refused("http://images.example/")


@pytest.mark.parametrize("what", ["silence", "headers", "body", "endless"])
def test_the_time_limit_is_over_all_however_it_drips(what):
    over = threading.Event()

    def drip(handler, data: bytes) -> None:
        for k in range(len(data)):
            if over.wait(0.05):
                return
            handler.wfile.write(data[k : k + 1])
            handler.wfile.flush()

    def answer(handler) -> None:
        if what == "silence":
            over.wait(10)
        elif what == "headers":
            drip(handler, b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1000)
        else:
            handler.send_response(200)
            if what == "body":
                handler.send_header("Content-Length", "1000")
            handler.end_headers()
            drip(handler, bytes(1000))

    with serving(answer) as web:
        try:
            message = web.refused("http://images.example/", seconds=0.4)
        finally:
            over.set()
    assert "was not received within 0.4 seconds" in message


def test_the_time_limit_holds_over_redirects():
    def answer(handler) -> None:
        time.sleep(0.2)
        send(handler, b"", 302, Location="/")

    with serving(answer) as web:
        assert "was not received within 0.3 seconds" in web.refused("http://images.example/", seconds=0.3)


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    over, answers = threading.Event(), []

    def answer(*_, **__):
        over.wait(60)
        answers.append("late")
        return []

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    try:
        with pytest.raises(OSError, match="not found"):
            resolve("images.example", 80, 0.1)
        assert answers == []
    finally:
        over.set()


def test_no_connection_and_no_thread_is_left():
    before = threading.active_count()
    with serving(lambda handler: send(handler, b"", 404)) as web:
        made = []

        def connect(*arguments):
            made.append(web.connect(*arguments))
            return made[-1]

        with pytest.raises(UserError):
            fetch("http://images.example/", "image", 10, 5.0, resolve=web.resolve, connect=connect)
    assert [sock.fileno() for sock in made] == [-1]
    end = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before


# --- TLS ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A certificate of images.example, signed by itself, with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "images.example")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("images.example")]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    plain = serialization.NoEncryption()
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )
    return path


@pytest.fixture
def secure(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    asked = []
    context.sni_callback = lambda sock, name, _: asked.append(name)
    with serving(lambda handler: send(handler, PICTURE), context) as web:
        web.context = ssl.create_default_context(cafile=str(certificate))
        web.server_names = asked
        yield web


def test_tls_asks_for_the_name_at_the_checked_address(secure):
    assert secure.fetch("https://images.example/a.png") == PICTURE
    assert secure.connected == [(PUBLIC, 443)] and secure.server_names == ["images.example"]
    assert secure.requests[0][1]["Host"] == "images.example"


def test_a_handshake_that_drips_is_not_waited_for():
    over = threading.Event()

    def drip(listening: socket.socket) -> None:
        sock, _ = listening.accept()
        with sock, suppress(OSError):
            for byte in b"\x16\x03\x03\x40\x00" + bytes(1000):  # a record that says it is long
                if over.wait(0.05):
                    return
                sock.sendall(bytes([byte]))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=drip, args=[listening], daemon=True).start()
        web = Web(listening.getsockname()[1], [])
        web.names["images.example"] = [[PUBLIC]]
        try:
            assert "was not received within 0.4 seconds" in web.refused(
                "https://images.example/", seconds=0.4
            )
        finally:
            over.set()


def test_tls_of_another_name_is_refused(secure):
    secure.names["other.example"] = [[PUBLIC]]
    assert "cannot be fetched" in secure.refused("https://other.example/")
    assert secure.requests == []


def test_an_unknown_certificate_is_refused(secure):
    secure.context = None
    assert "cannot be fetched" in secure.refused("https://images.example/")
    assert secure.requests == []
