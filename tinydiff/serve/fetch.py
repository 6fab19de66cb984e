"""Images at addresses on the public internet, and nothing else that an address may lead to. No torch here."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from urllib.parse import SplitResult, urljoin, urlsplit

from tinydiff import paths
from tinydiff.records import UserError

PORTS = (80, 443)
"""What an address may name. Other services of a public address may be open to its neighbours alone, of whom
this server may be one.
"""
MOST_REDIRECTS = 3
FETCH_S = 20.0
"""Seconds that all of a fetch may take, with the names looked up and every redirect."""
PIECE = 2**16

HIDDEN = tuple(
    ipaddress.ip_network(text)
    for text in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)
"""Networks that Python calls public in some versions, and are for protocols, examples or ways into IPv4
(Teredo, 6to4).
"""
IPV6_PUBLIC = ipaddress.ip_network("2000::/3")
NAT64 = ipaddress.ip_network("64:ff9b::/96")

Resolve = Callable[[str, int, float], list[str]]
"""(host, port, seconds) -> numeric addresses. Raises OSError."""
Connect = Callable[[str, int, "str | None", float], socket.socket]
"""(numeric address, port, name of the certificate or None for no TLS, seconds) -> a connection. Raises
OSError.
"""


def resolve(host: str, port: int, seconds: float) -> list[str]:
    """The host's numeric addresses. Raises OSError where it has none, or they are not found in time."""
    found: list[str] = []

    def look() -> None:  # in a thread, because the system takes its own time
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
    """A connection to a numeric address; with `name` under TLS, where the other side proves to be that."""
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
    """Whether a numeric address is on the public internet: not private, loopback, link-local, multicast,
    reserved or unspecified, and none of those in IPv6's clothes. An IPv4 address that a network has mapped
    into IPv6 (::ffff:0:0/96, NAT64's 64:ff9b::/96) counts as what it is; other ways from IPv6 into IPv4 are
    closed."""
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
    """The bytes at a public http(s) address, at most so many, in so many seconds altogether.

    Each name, that of a redirect too, is looked up once, all its addresses must be public (`is_public`), and
    the connection goes to one of those addresses, so that a name which leads elsewhere a moment later leads
    nobody there. Proxies of the environment are not asked.
    Raises UserError naming `field`.
    """
    end = time.monotonic() + seconds
    for _ in range(MOST_REDIRECTS + 1):
        parts = _parts(url, field)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        addresses = _addresses(parts, port, field, end, resolve)
        try:
            sock = _first(addresses, port, parts.hostname if parts.scheme == "https" else None, end, connect)
            data, onward = _answer(sock, parts, field, most_bytes, end)
            if onward is None:
                return data
            url = urljoin(url, onward)
        except UserError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = (
                f"did not come within {seconds:g} seconds" if time.monotonic() >= end else "cannot be fetched"
            )
            raise UserError(field, f"{field}: {_shown(parts)} {why}") from error
    raise UserError(
        field,
        f"{field}: {_shown(parts)} is the last of more than {MOST_REDIRECTS} redirects, the most that are followed",
    )


def too_large(field: str, most_bytes: int) -> UserError:
    return UserError(
        field, f"{field}: is larger than {most_bytes / 1e6:g} MB, the most that this server takes"
    )


def _parts(url: str, field: str) -> SplitResult:
    """An address taken apart, its host in ASCII. Raises UserError for what is not fetched, wherever it leads."""
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname or ""
        if parts.scheme in ("http", "https") and host:
            parts = urlsplit(paths.ascii_url(url))
    except ValueError:
        raise UserError(
            field, f"{field}: is not an address that can be read; it is http://HOST/... or https://HOST/..."
        ) from None
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(
            field, f"{field}: leads to {url[:20]!r}; an address is http://HOST/... or https://HOST/..."
        )
    if parts.username is not None or parts.password is not None:
        raise UserError(
            field, f"{field}: the address holds a name or a password, which are not sent; leave them out"
        )
    if port is not None and port not in PORTS:
        raise UserError(
            field, f"{field}: the address names port {port}; it may be {' or '.join(map(str, PORTS))}"
        )
    return parts


def _shown(parts: SplitResult) -> str:
    """An address as messages say it, without its query, which may hold a key."""
    text = f"{parts.scheme}://{parts.netloc}{parts.path}"
    return repr(text if len(text) <= 120 else f"{text[:120]}...")


def _addresses(parts: SplitResult, port: int, field: str, end: float, resolve: Resolve) -> list[str]:
    """The numeric addresses of a host, all public. A name that is not found gets the answer of a private one:
    which of them there are is not for everybody."""
    try:
        found = resolve(parts.hostname or "", port, end - time.monotonic())
    except OSError:
        found = []
    if not found or not all(map(is_public, found)):
        raise UserError(field, f"{field}: {_shown(parts)} is not a public address")
    return found


def _first(addresses: list[str], port: int, name: str | None, end: float, connect: Connect) -> socket.socket:
    """A connection to the first of the addresses that takes one. Raises OSError."""
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
    sock: socket.socket, parts: SplitResult, field: str, most: int, end: float
) -> tuple[bytes, str | None]:
    """(the bytes, None), or (b"", where a redirect leads), of one request. Raises OSError and HTTPException,
    TimeoutError after `end`.
    """
    connection = http.client.HTTPConnection(parts.netloc)
    connection.sock = sock
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {
        "Host": parts.netloc,
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
                raise UserError(field, f"{field}: {_shown(parts)} was answered with status {answer.status}")
            data = bytearray()
            while (answer.length or 0) <= most and len(data) <= most and (piece := answer.read1(PIECE)):
                data += piece
            if max(answer.length or 0, len(data)) > most:
                raise too_large(field, most)
            if answer.length:
                raise http.client.IncompleteRead(b"", answer.length)
    if time.monotonic() >= end:  # it was shut, which reads like its end
        raise TimeoutError
    return bytes(data), None


@contextmanager
def _ended_at(sock: socket.socket, end: float) -> Iterator[None]:
    """Shut a connection down when its time is over, whatever it is in: the time-outs of a socket begin anew
    with every byte that drips.
    """

    def shut() -> None:
        with suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not TLS's own, which another thread is in

    timer = threading.Timer(max(0.0, end - time.monotonic()), shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
