"""Standard streams whose writing never raises: a full disk or closed terminal must not lose finished work."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast


class SafeStream:
    """A text stream whose writing never raises.

    Characters that the stream's encoding lacks are written as escapes. After the first write that the system
    refuses (a full disk, a closed pipe) nothing more is written. error: that refusal.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write what can be written of a text."""
        with self._guarded():
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with self._guarded():
            self._stream.flush()

    @contextmanager
    def _guarded(self) -> Generator[None]:
        """Keep the first error, and from then on write to the null device, as Python's flush at exit does
        too.
        """
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            with suppress(OSError, ValueError), open(os.devnull, "w") as null:
                os.dup2(null.fileno(), self._stream.fileno())
        except ValueError:  # the stream is closed
            pass

    def __getattr__(self, name: str) -> Any:
        """Other attributes of the stream, such as its encoding."""
        return getattr(self._stream, name)


@contextmanager
def safe_streams() -> Generator[SafeStream]:
    """Replace stdout and stderr of this process by `SafeStream`s. Yields that of stdout."""
    _open_missing_streams()
    out = SafeStream(sys.stdout)
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, SafeStream(sys.stderr))):
        yield out


def failure(out: SafeStream) -> str | None:
    """Why not everything was written.

    None on success, and if the reader closed the pipe early, as `head` does.
    """
    out.flush()
    if out.error is None or out.error.errno == errno.EPIPE:
        return None
    return (out.error.strerror or str(out.error)).lower()


def _open_missing_streams() -> None:
    """Open the null device for each standard stream that is closed.

    Otherwise the next file opened takes its number, and libraries print into that file.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
