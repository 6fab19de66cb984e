"""Ranks for tests: processes, started once and only as many as are asked for, that run a function of a test
module side by side over gloo.
"""

from __future__ import annotations

import importlib
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT = 900
"""Seconds until ranks that do not answer fail the test."""
_started: list[tuple[Any, Connection]] = []


def on_ranks(ranks: int, fn: Callable[..., Any], *given: Any) -> list[Any]:
    """What `fn(*given)`, a function of a module, returns on each of `ranks` ranks of a process group.

    The failure of the rank that fails first is raised here; as the others may wait for it for ever, all
    processes are then new.
    """
    _start(ranks)
    deadline = time.monotonic() + TIMEOUT
    store = Path(tempfile.mkdtemp()) / "store"
    waiting = {pipe: rank for rank, (_, pipe) in enumerate(_started[:ranks])}
    for pipe, rank in waiting.items():
        pipe.send((fn.__module__, fn.__name__, given, rank, ranks, str(store)))
    answers = {}
    while waiting:
        ready = wait(list(waiting), deadline - time.monotonic())
        for pipe in ready:
            rank = waiting.pop(pipe)
            failed, answers[rank] = pipe.recv()
            if failed:
                _end()
                raise AssertionError(f"rank {rank}:\n{answers[rank]}")
        if not ready:
            _end()
            raise AssertionError(f"ranks {sorted(waiting.values())} do not answer")
    return [answers[rank] for rank in range(ranks)]


def _start(ranks: int) -> None:
    """Start what is missing of so many processes."""
    context = multiprocessing.get_context("spawn")
    while len(_started) < ranks:
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there,), daemon=True)
        process.start()
        _started.append((process, here))


def _end() -> None:
    for process, _ in _started:
        process.kill()
        process.join()
    _started.clear()


def _serve(pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            module, name, given, rank, ranks, store = pipe.recv()
        except EOFError:
            return
        answer: tuple[bool, Any]
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
            # a rank that is done at once must not part while another is still on its way to it
            dist.barrier()
            answer = (False, getattr(importlib.import_module(module), name)(*given))
        except Exception:
            answer = (True, traceback.format_exc())
        pipe.send(answer)
        if dist.is_initialized():
            dist.destroy_process_group()
