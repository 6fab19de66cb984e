"""Decodes input images and sounds in other processes, few at a time, with a time limit; see `unpack`.

No torch here.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from tinydiff.entries import EntryDict
from tinydiff.records import Sound, Speech, UserError
from tinydiff.serve import unpack

if TYPE_CHECKING:
    import numpy as np

AT_ONCE = 2
"""Requests whose images are decoded and resized at the same time; others wait."""
SECONDS = 30.0
"""Time limit for one image."""

PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from tinydiff.serve import unpack; unpack.main()"
)


class Decoder:
    """Processes that decode images, started when needed."""

    def __init__(self, seconds: float = SECONDS, command: Sequence[str] | None = None) -> None:
        self.seconds = seconds
        self.command = command or [sys.executable, "-c", PROGRAM, json.dumps(sys.path)]
        self._idle: list[subprocess.Popen[bytes]] = []

    def pixels(
        self, data: bytes, field: str, most_pixels: float, with_alpha: bool = False, mask: bool = False
    ) -> np.ndarray:
        """As `unpack.pixels`, elsewhere.

        Raises UserError also for an image that takes too much time or memory.
        """
        import numpy as np

        ask = {"field": field, "most_pixels": most_pixels, "with_alpha": with_alpha, "mask": mask}
        answer, values = self._answer(ask, data, "image; save it as a plain PNG or JPEG")
        return np.frombuffer(values, np.uint8).reshape(answer["shape"])

    def sound(self, data: bytes, field: str, rate: int) -> Speech:
        """As `io.audio.read`, elsewhere. Raises UserError also for one that takes too much time or memory."""
        import numpy as np

        answer, values = self._answer({"field": field, "rate": rate}, data, "sound; save it as a WAV", True)
        samples = np.frombuffer(values, np.float32)
        heard, kept = samples[: answer["heard"]], samples[answer["heard"] :]
        return Speech(heard, Sound(kept.reshape(answer["shape"]), answer["rate"]))

    def _answer(
        self, ask: EntryDict, data: bytes, instead: str, new: bool = False
    ) -> tuple[EntryDict, bytearray]:
        """What a process answers. new: it is started for this alone. instead: how an error ends."""
        field = ask["field"]
        with self._process(new) as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                unpack.send(process.stdin, ask, data)
                answer, values = unpack.receive(process.stdout)
            except (EOFError, OSError):
                message = f"needs more time or memory to decode than this server allows for one {instead}"
                raise UserError(field, f"{field}: {message}") from None
            if answer.get("last"):
                process.wait()  # it exits, which returns its memory to the system
        if "error" in answer:
            raise UserError(field, str(answer["error"]))
        return answer, values

    def close(self) -> None:
        """End the idle processes."""
        while self._idle:
            _end(self._idle.pop())

    @contextmanager
    def _process(self, new: bool = False) -> Generator[subprocess.Popen[bytes]]:
        """A process for one image or sound, killed at its time limit."""
        process = None if new else self._waiting()
        if process is None:
            process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        timer = threading.Timer(self.seconds, process.kill)
        timer.daemon = True
        timer.start()
        answered = False
        try:
            yield process
            answered = True
        finally:
            timer.cancel()
            if answered and not new and process.poll() is None and len(self._idle) < AT_ONCE:
                self._idle.append(process)
            else:
                _end(process)

    def _waiting(self) -> subprocess.Popen[bytes] | None:
        """An idle process; None where there is none."""
        while self._idle:
            with suppress(IndexError):  # another thread took the last one
                process = self._idle.pop()
                if process.poll() is None:
                    return process
                _end(process)
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with suppress(OSError):
        process.communicate()


DECODER = Decoder()
"""The decoder of this process."""
atexit.register(DECODER.close)

_slots = threading.BoundedSemaphore(AT_ONCE)


@contextmanager
def slot() -> Generator[None]:
    """Hold one of AT_ONCE slots for decoding and resizing; returns free memory to the system at the end."""
    with _slots:
        try:
            yield
        finally:
            _trim()


def _trim() -> None:
    """Let the C library return free memory to the system; else it keeps gigabytes."""
    with suppress(AttributeError, OSError):  # only glibc can
        ctypes.CDLL(None).malloc_trim(0)
