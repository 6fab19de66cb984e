"""`tinydiff serve`: from options to a running server, and its graceful shutdown."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from types import FrameType
from typing import TYPE_CHECKING, Any

from tinydiff import command_line, config, environment, flags, paths, values
from tinydiff.config import ModelOptions, OutputOptions, ParallelOptions, SamplingOptions
from tinydiff.parallel import layout
from tinydiff.records import UserError, brief
from tinydiff.serve.options import Serve, ServeOptions

if TYPE_CHECKING:
    from tinydiff.parallel.ranks import Ranks
    from tinydiff.records import Request
    from tinydiff.serve.jobs import Job
    from tinydiff.serve.service import Service

log = logging.getLogger(__name__)

ANSWERED_S = 5.0
"""Seconds that a server which stops waits for its answers to be sent."""
OWN_DESCRIPTORS = 256
"""File descriptors for databases, weights and outputs, beside those of connections."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ORIGIN = re.compile(
    r"(?:([A-Za-z][A-Za-z0-9+.-]*)://)?(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)(?::([0-9]{1,5}))?(?=/|$)"
)
"""Scheme, host and port at the start of a URL."""
PATH = re.compile(r"[A-Za-z0-9/._~%+-]*")
OWN = tuple(entry.name for entry in fields(ServeOptions))
TAKEN = (
    *OWN,
    *(entry.name for group in (ModelOptions, ParallelOptions) for entry in fields(group)),
    "log_level",
)
"""Options of the server, its model and its GPUs."""
SEVERAL = tuple(entry.name for entry in fields(ServeOptions) if str(entry.type).startswith("tuple"))
"""Options that may be given several times, as keys often are."""


def parse(argv: Sequence[str]) -> Serve:
    """The options of `tinydiff serve` with these words. Raises UserError."""
    return command_line.read(Serve, *normalise(argv))


def normalise(argv: Sequence[str]) -> tuple[Serve, list[str]]:
    """(The options of the `--config FILE` of a command line, else the defaults; its words in one spelling).

    Raises UserError.
    """
    if argv and not argv[0].startswith("--"):  # as SGLang's server takes it
        if any(word.partition("=")[0] in ("--model-path", "--model_path") for word in argv):
            raise UserError(
                "model_path", f"model_path: is given twice, as {brief(argv[0])} and with --model-path"
            )
        argv = ["--model-path", *argv]
    file, typed = flags.from_command_line(argv, [*config.NAMES, *OWN], SEVERAL)
    given = flags.merged(file, typed)
    _refuse({name: value for name, value in given.items() if name not in TAKEN})
    if "models" in given and "model_path" in given:
        message = "a model is named by it and others by --models; put all into --models, the default first"
        raise UserError("model_path", f"model_path: {message}")
    taken = {name: value for name, value in typed.items() if name in TAKEN}
    return values.filled(Serve, file), command_line.words(Serve, taken)


def _refuse(others: Mapping[str, object]) -> None:
    """Raise UserError for what is no option of a server, unless its value turns a feature off."""
    for entry in (*fields(SamplingOptions), *fields(OutputOptions)):
        if entry.name in others:
            raise UserError(entry.name, f"{entry.name}: is an option of a request, not of the server")
    made = config.options(others)
    if made.refusals:
        raise UserError("options", made.refusals[0])
    if made.ignored:
        name = made.ignored[0]
        raise UserError(name, f"{name}: is not an option of the server; `tinydiff serve --help` lists them")


def checked(options: ServeOptions) -> ServeOptions:
    """The options, with valid names and URLs. Raises UserError."""
    for name in ("host", "state_dir", "output_path", "served_model_name"):
        value = getattr(options, name)
        if value is not None and (not value.strip() or not value.isprintable()):
            raise UserError(name, f"{name}: {brief(value)} is empty or has unprintable characters")
    for origin in options.cors_origin:
        if origin != "*" and ((meant := _origin(origin)) == "" or origin != meant):
            hint = f"; did you mean {meant!r}?" if meant else ", such as 'https://example.com'"
            raise UserError(
                "cors_origin",
                f"cors_origin: {brief(origin)} is neither * nor SCHEME://HOST or SCHEME://HOST:PORT{hint}",
            )
    if options.public_url is not None and not _is_public(options.public_url):
        message = (
            f"public_url: {brief(options.public_url)} is not http(s)://HOST with an optional port and path"
        )
        raise UserError("public_url", f"{message}, such as 'https://example.com/images'")
    return options


def _origin(text: str) -> str:
    """The origin that a browser sends for a URL or a host name; "" for anything else."""
    found = ORIGIN.match(text)
    port = int(found[3] or 0) if found else 2**16
    if found is None or port >= 2**16:
        return ""
    scheme = (found[1] or "https").lower()
    return f"{scheme}://{found[2].lower()}" + (
        f":{port}" if port and port != {"http": 80, "https": 443}.get(scheme) else ""
    )


def _is_public(url: str) -> bool:
    found = ORIGIN.match(url)
    return bool(
        found
        and _origin(url)
        and (found[1] or "").lower() in ("http", "https")
        and PATH.fullmatch(url, found.end())
    )


def with_keys(options: ServeOptions) -> ServeOptions:
    """The options with the API keys of the environment and the key file."""
    for name, given in (
        ("api_key", options.api_key),
        ("admin_api_key", () if options.admin_api_key is None else (options.admin_api_key,)),
    ):
        if not all(key.strip() for key in given):
            raise UserError(name, f"{name}: is empty; a key has at least one character")
    keys = [*(key.strip() for key in options.api_key), *environment.keys("API_KEY")]
    if options.api_key_file is not None:
        lines = paths.lines(paths.read_text(options.api_key_file, "api_key_file"))
        if not (found := [line.strip() for line in lines if line.strip()]):
            raise UserError("api_key_file", f"api_key_file: {options.api_key_file!r} holds no key")
        keys += found
    admin = (
        options.admin_api_key.strip()
        if options.admin_api_key
        else next(iter(environment.keys("ADMIN_API_KEY")), None)
    )
    for name, given in (("api_key", keys), ("admin_api_key", [admin or ""])):
        if not all(key.isprintable() for key in given):
            raise UserError(name, f"{name}: holds a control character, which no client can send in a header")
    return replace(options, api_key=tuple(dict.fromkeys(keys)), admin_api_key=admin)


def build(model: ModelOptions, options: ServeOptions, ranks: Ranks | None = None) -> Service:
    """Build the parts of a server, with only the store open. ranks: this rank, which leads, among several.

    Raises UserError.
    """
    from tinydiff.serve import admission, models, storage, warmup
    from tinydiff.serve.files import Files, claim, secret
    from tinydiff.serve.metrics import Metrics
    from tinydiff.serve.scheduler import DeviceScheduler
    from tinydiff.serve.service import AdmittedRequests, Service, find
    from tinydiff.serve.store import open_store

    served = models.read(model, options)
    folder = paths.path(options.state_dir, "state_dir")
    signing = secret(folder)
    kept = (
        folder / "files"
        if options.output_path is None
        else claim(paths.path(options.output_path, "output_path"), signing)
    )
    files = Files(kept, signing, options.output_lifetime, int(options.output_limit * 1e9))
    store = open_store(
        folder, options.state_url, options.max_queue, options.output_lifetime, options.several_keys
    )
    metrics = Metrics()
    cloud = storage.from_environment()
    uploader = None if cloud is None else storage.Uploader(cloud, files, store)

    requests = AdmittedRequests()

    def admit(job: Job) -> Request:
        return admission.admitted(find(served, job.model).adapters, files, options, job)

    def request_of(job: Job) -> Request:
        return requests.take(job.id) or admit(job)

    scheduler = DeviceScheduler(options, served, store, files, metrics, request_of, uploader, ranks)
    for each in served:
        for job in warmup.jobs(options, each):
            admit(job)  # refuses a size that the model cannot make
    started = int(time.time())
    return Service(options, served, served[0], started, store, files, scheduler, metrics, uploader, requests)


def listening(options: ServeOptions) -> socket.socket:
    """A listening socket; on the next free port if the port is taken, unless strict. Raises UserError."""
    last = options.port if options.strict_ports or not options.port else min(options.port + 99, 2**16 - 1)
    for port in range(options.port, last + 1):
        try:
            family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
            return socket.create_server((options.host, port), family=family, backlog=1024)
        except (OSError, ValueError) as error:  # ValueError: an invalid name
            if getattr(error, "errno", None) != errno.EADDRINUSE:
                reason = (getattr(error, "strerror", None) or str(error)).lower()
                raise UserError("host", f"host: {brief(options.host)} cannot be used ({reason})") from error
    raise UserError("port", f"port: {options.port} is taken; choose another, or 0 for any free one")


@contextlib.contextmanager
def running(service: Service, sock: socket.socket) -> Iterator[str]:
    """Run the server in threads of its own; its URL. The end is graceful: running jobs get time to finish."""
    from tinydiff.serve.app import make_app
    from tinydiff.serve.connections import Limits, Server
    from tinydiff.serve.guard import Guard

    options, scheduler = service.options, service.scheduler
    connections = _connections(options.http_threads)
    limits = Limits(
        min(options.http_threads, connections // 2),
        int(options.max_body * 1e6),
        connections,
        Guard(service).wants_body,
    )
    server = Server(make_app(service), sock, limits, options.host)
    thread = threading.Thread(target=server.run, name="http", daemon=True)
    scheduler.start()
    thread.start()
    host, port = sock.getsockname()[:2]
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        scheduler.stop(options.http_graceful_shutdown_timeout)
        _answered(server)
        server.hang_up()
        thread.join(5)
        server.end()
        service.store.close()


def _connections(threads: int) -> int:
    """The number of connections, each with a file. Raises the process's descriptor limit if allowed."""
    wanted = max(1000, 4 * threads)
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted + OWN_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if most == resource.RLIM_INFINITY else min(needed, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))
    return wanted if soft == resource.RLIM_INFINITY else max(16, min(wanted, (soft - OWN_DESCRIPTORS) // 2))


def _answered(server: Any) -> None:
    """Wait up to `ANSWERED_S` seconds until all answers are sent. Idle connections may stay open."""
    until = time.monotonic() + ANSWERED_S
    while time.monotonic() < until and any(
        line.requests or line.total_outbufs_len for line in list(server.active_channels.values())
    ):
        time.sleep(0.02)


def serve(asked: Serve) -> int:
    """Run a server until SIGTERM or SIGINT, on as many ranks as asked for.

    Returns 0, or 1 if the scheduler failed. Raises UserError, and RankError where a rank fails.
    """
    asked = replace(asked, server=with_keys(checked(asked.server)))
    place = environment.under_torchrun()
    count = layout.count(asked.parallel, place and place.size)
    if count == 1:
        return serve_here(asked)
    if asked.server.models:
        message = f"several models share one GPU, and {count} ranks are asked for; start a server for each"
        raise UserError("models", f"models: {message}")
    from tinydiff.serve import several

    return several.serve(asked, count, place, serve_here)


def serve_here(
    asked: Serve,
    ranks: Ranks | None = None,
    signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
) -> int:
    """`serve` in this process. asked: with checked options. ranks: this rank, which leads, among several.
    signals: those that end the server.
    """
    from tinydiff.serve import models
    from tinydiff.serve.guard import configure_logging

    options = asked.server
    configure_logging(asked.log_level, options.log_format)
    service = build(asked.model, options, ranks)
    sock = listening(options)
    if options.host not in LOOPBACK and not options.api_key:
        print(
            f"tinydiff: anyone who reaches {options.host} can use this server; --api-key KEY requires a key",
            file=sys.stderr,
        )
    for line in models.told(service.models):
        print(f"tinydiff: {line}", flush=True)
    told = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if (
            told.is_set()
        ):  # asked twice: at once, for Python's own end would tear threads down in the middle of a step
            os.write(2, b"tinydiff: stopped at once; the next start runs unfinished jobs again\n")
            os._exit(128 + number)
        told.set()

    for number in signals:
        signal.signal(number, stop)
    with running(service, sock) as address:
        names = ", ".join(model.name for model in service.models)
        print(
            f"tinydiff: {names} at {address} (page /, API {address}/v1, documentation /docs)",
            flush=True,
        )
        while not told.wait(0.5):
            if service.scheduler.state().phase == "failed":
                print(f"tinydiff: error: {service.scheduler.state().detail}", file=sys.stderr)
                return 1
        print("tinydiff: stopping; running jobs may finish, the others stay in the queue", flush=True)
    if not service.scheduler.ended():
        # A step that takes longer than the time given cannot be broken off, and the interpreter would tear it
        # down under its thread.
        sys.stderr.flush()
        os._exit(0)
    return 0
