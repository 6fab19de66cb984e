"""Fetches images from URLs on the public internet, and from nowhere else. No torch here."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager, suppress
from urllib.parse import SplitResult, urljoin, urlsplit

from tinydiff import paths
from tinydiff.records import UserError

PORTS = (80, 443)
"""Ports that a URL may have. Other services of a public host may trust this server as a neighbour."""
MOST_REDIRECTS = 3
FETCH_S = 20.0
"""Time limit of a fetch, name lookups and redirects included."""
PIECE = 2**16

HIDDEN = tuple(
    ipaddress.ip_network(text)
    for text in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)
"""Networks for protocols, examples and tunnels (Teredo, 6to4) that some versions of Python call public."""
IPV6_PUBLIC = ipaddress.ip_network("2000::/3")
NAT64 = ipaddress.ip_network("64:ff9b::/96")

Resolve = Callable[[str, int, float], list[str]]
"""(host, port, seconds) -> IP addresses. Raises OSError."""
Connect = Callable[[str, int, "str | None", float], socket.socket]
"""(IP address, port, name on the certificate or None without TLS, seconds) -> a connection.

Raises OSError.
"""


def resolve(host: str, port: int, seconds: float) -> list[str]:
    """The host's IP addresses. Raises OSError where none is found in time."""
    found: list[str] = []

    def look() -> None:  # in a thread, because getaddrinfo has no timeout
        with suppress(OSError, ValueError):
            found.extend(
                str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            )

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(max(0.0, seconds))
    if thread.is_alive() or not found:
        raise OSError("the name was not found")
    return list(dict.fromkeys(found))


def connect(
    address: str, port: int, name: str | None, seconds: float, context: ssl.SSLContext | None = None
) -> socket.socket:
    """A connection to an IP address; with `name` over TLS, with a certificate for that name."""
    end = time.monotonic() + seconds
    raw = socket.create_connection((address, port), seconds)
    if name is None:
        return raw
    try:
        raw.settimeout(max(0.001, end - time.monotonic()))
        return (context or ssl.create_default_context()).wrap_socket(raw, server_hostname=name)
    except BaseException:
        raw.close()
        raise


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet.

    Private, loopback, link-local, multicast, reserved and unspecified addresses are not. An IPv4 address that
    is mapped into IPv6 (::ffff:0:0/96, NAT64's 64:ff9b::/96) is judged as IPv4; other tunnels are refused.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None)
        if inner is not None:
            return is_public(str(inner))
        if ip not in IPV6_PUBLIC or ip.scope_id is not None:
            return False
    shut = ip.is_multicast or ip.is_reserved or any(ip.version == net.version and ip in net for net in HIDDEN)
    return ip.is_global and not shut


def fetch(
    url: str,
    field: str,
    most_bytes: int,
    seconds: float = FETCH_S,
    *,
    resolve: Resolve = resolve,
    connect: Connect = connect,
) -> bytes:
    """The bytes at a public http(s) URL, at most `most_bytes`, in `seconds` altogether.

    Each host name, of redirects too, is looked up once. All its addresses must be public (`is_public`), and
    the connection goes to one of them, so a later change of the name has no effect. Proxies of the
    environment are ignored. Raises UserError naming `field`.
    """
    end = time.monotonic() + seconds
    for _ in range(MOST_REDIRECTS + 1):
        split = _split_url(url, field)
        port = split.port or (443 if split.scheme == "https" else 80)
        addresses = _addresses(split, port, field, end, resolve)
        try:
            sock = _first(addresses, port, split.hostname if split.scheme == "https" else None, end, connect)
            data, onward = _answer(sock, split, field, most_bytes, end)
            if onward is None:
                return data
            url = urljoin(url, onward)
        except UserError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = (
                f"was not received within {seconds:g} seconds"
                if time.monotonic() >= end
                else "cannot be fetched"
            )
            raise UserError(field, f"{field}: {_for_message(split)} {why}") from error
    raise UserError(
        field,
        f"{field}: {_for_message(split)} redirects more than {MOST_REDIRECTS} times, the limit",
    )


def too_large(field: str, most_bytes: int) -> UserError:
    """The mistake of a file that is too large."""
    return UserError(field, f"{field}: is larger than {most_bytes / 1e6:g} MB, the limit of this server")


def _split_url(url: str, field: str) -> SplitResult:
    """The parts of a URL, its host in ASCII. Raises UserError for a URL that is never fetched."""
    try:
        split = urlsplit(url)
        port, host = split.port, split.hostname or ""
        if split.scheme in ("http", "https") and host:
            split = urlsplit(paths.ascii_url(url))
    except ValueError:
        raise UserError(
            field, f"{field}: is not a valid URL; the form is http://HOST/... or https://HOST/..."
        ) from None
    if split.scheme not in ("http", "https") or not host:
        raise UserError(
            field,
            f"{field}: {url[:20]!r} is not an http(s) URL; the form is http://HOST/... or https://HOST/...",
        )
    if split.username is not None or split.password is not None:
        raise UserError(field, f"{field}: the URL contains a user name or a password; remove them")
    if port is not None and port not in PORTS:
        raise UserError(field, f"{field}: the URL has port {port}; it may be {' or '.join(map(str, PORTS))}")
    return split


def _for_message(split: SplitResult) -> str:
    """A URL for messages, without its query, which may contain a key."""
    text = f"{split.scheme}://{split.netloc}{split.path}"
    return repr(text if len(text) <= 120 else f"{text[:120]}...")


def _addresses(split: SplitResult, port: int, field: str, end: float, resolve: Resolve) -> list[str]:
    """The IP addresses of a host, all public. Raises UserError.

    A name that is not found gives the error of a private one, so private names cannot be probed.
    """
    try:
        addresses = resolve(split.hostname or "", port, end - time.monotonic())
    except OSError:
        addresses = []
    if not addresses or not all(map(is_public, addresses)):
        raise UserError(field, f"{field}: {_for_message(split)} is not on the public internet")
    return addresses


def _first(addresses: list[str], port: int, name: str | None, end: float, connect: Connect) -> socket.socket:
    """A connection to the first address that accepts one. Raises OSError."""
    failed: OSError = TimeoutError()
    for address in addresses:
        if (left := end - time.monotonic()) <= 0:
            break
        try:
            return connect(address, port, name, left)
        except OSError as error:
            failed = error
    raise failed


def _answer(
    sock: socket.socket, split: SplitResult, field: str, most: int, end: float
) -> tuple[bytes, str | None]:
    """(bytes, None), or (b"", the URL of a redirect), of one request.

    Raises OSError and HTTPException, TimeoutError after `end`.
    """
    connection = http.client.HTTPConnection(split.netloc)
    connection.sock = sock
    target = (split.path or "/") + (f"?{split.query}" if split.query else "")
    headers = {
        "Host": split.netloc,
        "User-Agent": "tinydiff",
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    with _ended_at(sock, end), closing(connection):
        connection.request("GET", target, headers=headers)
        with connection.getresponse() as answer:
            if answer.status in (301, 302, 303, 307, 308) and (location := answer.getheader("Location")):
                return b"", location
            if answer.status != 200:
                raise UserError(
                    field, f"{field}: {_for_message(split)} was answered with status {answer.status}"
                )
            data = bytearray()
            while (answer.length or 0) <= most and len(data) <= most and (piece := answer.read1(PIECE)):
                data += piece
            if max(answer.length or 0, len(data)) > most:
                raise too_large(field, most)
            if answer.length:
                raise http.client.IncompleteRead(b"", answer.length)
    if time.monotonic() >= end:  # the connection was shut down, which looks like the end of the data
        raise TimeoutError
    return bytes(data), None


@contextmanager
def _ended_at(sock: socket.socket, end: float) -> Generator[None]:
    """Shut a connection down at `end`; a socket's own timeout starts again with every byte."""

    def shut() -> None:
        with suppress(OSError):
            socket.socket.shutdown(
                sock, socket.SHUT_RDWR
            )  # not the TLS shutdown, because another thread uses TLS

    timer = threading.Timer(max(0.0, end - time.monotonic()), shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
