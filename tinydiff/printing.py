"""What is printed: all that a stream takes, and never an exception for the rest. Work is not lost because
nobody could read of it.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast


class Steady:
    """A text stream whose writing never raises.

    Characters that the stream's encoding has not are written as escapes. After the first refusal of the
    system, a full disk or a reader that has gone, nothing more is written. refused: that refusal.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        self.refused: OSError | None = None

    def write(self, text: str) -> int:
        """Print what can be printed of a text."""
        with self._noted():
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        """Hand on what is still held back."""
        with self._noted():
            self._stream.flush()

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Note what the system refuses, and from then on write to the null device, also what Python flushes
        when it ends.
        """
        try:
            yield
        except OSError as error:
            self.refused = self.refused or error
            with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
        except ValueError:  # the stream is closed
            pass

    def __getattr__(self, name: str) -> Any:
        """Whatever else a stream has, such as its encoding."""
        return getattr(self._stream, name)


@contextmanager
def steady() -> Iterator[Steady]:
    """Within it, all that this process prints goes through `Steady` streams. Yields the one of stdout."""
    _hold_numbers()
    out = Steady(sys.stdout)
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, Steady(sys.stderr))):
        yield out


def lost(out: Steady) -> str | None:
    """Why not all was printed; None where it was, and where its reader left early, as `head` does."""
    out.flush()
    if out.refused is None or out.refused.errno == errno.EPIPE:
        return None
    return (out.refused.strerror or str(out.refused)).lower()


def _hold_numbers() -> None:
    """Open the null device in place of a standard stream that is closed: else the next file opened is what
    libraries print into.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
