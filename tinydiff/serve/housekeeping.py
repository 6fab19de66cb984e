"""What a server does for its jobs beside making them: leases, cancelled ones, files that are too old. In a
thread of its own.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from tinydiff.serve.files import Files
from tinydiff.serve.jobs import Unreachable
from tinydiff.serve.options import ServeOptions
from tinydiff.serve.store import Store

log = logging.getLogger(__name__)
Made = TypeVar("Made")

AWAY = (Unreachable, sqlite3.Error)
"""What the store raises where its database is away, or its disk full."""
PAUSE_S = 1.0
"""Seconds before it is asked again."""
SWEEP_S = 30.0
"""Seconds between looks for files that are too old."""


def server_name() -> str:
    """A name that no other server of the database has, nor had."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def keep(
    server: str,
    store: Store,
    files: Files,
    options: ServeOptions,
    cancelled: Callable[[set[str]], None],
    end: threading.Event,
) -> None:
    """Until `end`: renew the leases of `server`, take back jobs whose lease ran out, hand on the ids of those
    that others were asked to cancel, remove old files. Errors are logged and it goes on: a database may be
    away for a while."""
    swept = 0.0
    while not end.is_set():
        now = time.time()
        try:
            store.renew(server, now + options.lease)
            if count := store.reclaim(now, options.unfinished):
                log.warning("%d jobs of servers that no longer answer were taken back", count)
            if asked := store.cancelled(server):
                cancelled(set(asked))
            if now - swept > SWEEP_S:
                swept = now
                files.sweep(store, now)
        except Exception:
            log.exception("keeping the jobs failed; it is tried again")
        end.wait(min(1.0, options.lease / 3))


def patiently(
    call: Callable[[], Made], end: threading.Event, away: Callable[[], None] = lambda: None
) -> Made | None:
    """What `call` returns, once the database that it speaks to is there; None where `end` came first. away:
    called where it is not.
    """
    while True:
        try:
            return call()
        except AWAY as error:
            log.warning("%s; it is tried again", error)
            away()
            if end.wait(PAUSE_S):
                return None
