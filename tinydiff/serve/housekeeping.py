"""Housekeeping of a server's jobs in a thread of its own: leases, cancelled jobs, files to remove."""

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
Result = TypeVar("Result")

STORE_ERRORS = (Unreachable, sqlite3.Error)
"""What the store raises while its database is unreachable or its disk is full."""
PAUSE_S = 1.0
"""Seconds between two attempts at a call that failed with one of STORE_ERRORS."""
SWEEP_S = 30.0
"""Seconds between two searches for files to remove."""


def server_name() -> str:
    """A name that no other server of the database has or had."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def run(
    server: str,
    store: Store,
    files: Files,
    options: ServeOptions,
    cancel: Callable[[set[str]], None],
    end: threading.Event,
) -> None:
    """Renew leases, take back jobs of dead servers, report cancelled jobs and remove old files, until `end`.

    cancel: gets the ids of jobs of `server` that other servers were asked to cancel. Errors are logged and
    the loop goes on, because a database may be unreachable for a while.
    """
    swept = 0.0
    while not end.is_set():
        now = time.time()
        try:
            store.renew(server, now + options.lease)
            if count := store.reclaim(now, options.unfinished):
                log.warning("took back %d jobs of servers that no longer answer", count)
            if ids := store.cancelled(server):
                cancel(set(ids))
            if now - swept > SWEEP_S:
                swept = now
                files.sweep(store, now)
        except Exception:
            log.exception("housekeeping of the jobs failed; it will be tried again")
        end.wait(min(1.0, options.lease / 3))


def retried(
    call: Callable[[], Result], end: threading.Event, on_error: Callable[[], None] = lambda: None
) -> Result | None:
    """The result of `call`, repeated until the database answers; None where `end` is set first.

    on_error: called after each failed attempt.
    """
    while True:
        try:
            return call()
        except STORE_ERRORS as error:
            log.warning("%s; the call will be repeated", error)
            on_error()
            if end.wait(PAUSE_S):
                return None
