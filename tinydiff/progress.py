"""The progress display of a terminal: the stage, its steps, and the seconds of each."""

from __future__ import annotations

import sys
import time
from typing import TextIO, cast

from tinydiff.config import NoProgress
from tinydiff.entries import EntryDict
from tinydiff.printing import SafeStream

BAR: EntryDict = {
    "unit": "step",
    "leave": False,
    "smoothing": 0,
    "bar_format": "{desc} {bar:24} {n_fmt}/{total_fmt} steps, {rate_inv_fmt}, {remaining} left",
}
"""Options of tqdm."""


class Bar:
    """Shows stages and steps on a terminal; a `tinydiff.config.Progress`.

    Every finished stage leaves one line with its seconds.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        from tqdm import tqdm

        self._stream = cast(
            TextIO, SafeStream(stream or sys.stderr)
        )  # a closed terminal must not end the run
        self._tqdm = tqdm
        self._bar: tqdm | None = None
        self._stage = ""
        self._began = 0.0

    def on_stage(self, name: str) -> None:
        """End the previous stage and begin `name`."""
        self.close()
        self._stage, self._began = name, time.perf_counter()
        self._stream.write(f"{name:>8} ...\r")
        self._stream.flush()

    def on_step(self, done: int, total: int) -> None:
        """Show `done` of the stage's `total` steps."""
        if self._bar is None:
            self._bar = self._tqdm(total=total, desc=f"{self._stage:>8}", file=self._stream, **BAR)
            self._bar.start_t -= time.perf_counter() - self._began  # the first step is already finished
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the last stage."""
        if not self._stage:
            return
        seconds, steps = time.perf_counter() - self._began, 0
        if self._bar is not None:
            steps = self._bar.n
            self._bar.close()
            self._bar = None
        each = f" ({steps} steps, {seconds / steps:.3g} s each)" if steps else ""
        self._stream.write(f"\r\x1b[K{self._stage:>8} {seconds:.2f} s{each}\n")
        self._stream.flush()
        self._stage = ""


def watch(log_level: str) -> Bar | NoProgress:
    """A `Bar` if stderr is a terminal and `log_level` is info or below, else `NoProgress`."""
    return Bar() if log_level in ("debug", "info") and sys.stderr.isatty() else NoProgress()
