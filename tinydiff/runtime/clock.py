"""The seconds of each stage and step of a generation."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from tinydiff.config import Progress

T = TypeVar("T")


@dataclass(frozen=True)
class Clock:
    """Seconds of each stage and each step, reported to `progress` as they pass."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    step_seconds: list[float] = field(default_factory=list[float])

    @contextmanager
    def stage(self, name: str, shown: bool = True) -> Generator[None]:
        """Count the seconds within for stage `name`, but those of stages inside it. shown: to `progress`."""
        if shown:
            self.progress.on_stage(name)
        started, others = time.perf_counter(), sum(self.seconds.values())
        yield
        inside = sum(self.seconds.values()) - others
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started - inside

    def steps(self, results: Iterable[T], total: int) -> Iterator[T]:
        """Pass on the result of each of `total` steps, and note its seconds."""
        before = time.perf_counter()
        for done, latents in enumerate(results, 1):
            now = time.perf_counter()
            self.step_seconds.append(now - before)
            before = now
            self.progress.on_step(done, total)
            yield latents

    def within(self, name: str, results: Iterator[T]) -> Iterator[T]:
        """Pass on what is made, and count the seconds of making it for stage `name`."""
        missing = object()
        while True:
            with self.stage(name, shown=False):
                each = next(results, missing)
            if each is missing:
                return
            yield each  # type: ignore[misc]
