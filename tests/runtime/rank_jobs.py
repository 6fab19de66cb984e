"""What ranks run in tests/runtime/test_launch.py. Every process imports this file, so it imports little."""

from __future__ import annotations

import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tinydiff import cli
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.ranks import close, make_ranks, meet, start
from tinydiff.records import UserError


def here(folder: str) -> int:
    """Leave this rank's process id in the directory, and return its rank once all have."""
    meet(60, "cpu")
    ranks = make_ranks(Layout(dp=2), 60)
    written = Path(folder) / f"{ranks.rank}.written"
    written.write_text(str(os.getpid()))
    written.rename(Path(folder) / f"{ranks.rank}.pid")  # whoever sees the file finds the id in it
    dist.barrier()
    return ranks.rank


def sums(folder: str) -> list[int]:
    """(rank, the sum of 1 and 2, seconds that a collective may take)"""
    x = torch.tensor([here(folder) + 1])
    dist.all_reduce(x)
    world: Any = dist.group.WORLD
    limit = world._get_backend(torch.device("cpu")).options._timeout
    seen = [dist.get_rank(), int(x), int(limit.total_seconds())]
    close()
    return seen


def fails(folder: str, how: str) -> None:
    """Rank 1 fails while rank 0 waits for it, five seconds at most."""
    rank, group = here(folder), dist.new_group(timeout=timedelta(seconds=1000 if how == "waits" else 5))
    if rank == 1:
        (Path(folder) / "failed").touch()
        if how == "user":
            raise UserError("height", "height: 100 is not a multiple of 16")
        if how == "error":
            raise ValueError("boom")
        if how == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)
    dist.all_reduce(torch.zeros(1), group=group)


def all_four(folder: str) -> int:
    meet(60, "cpu")
    ranks = make_ranks(Layout(dp=2, tp=2), 60)
    x = torch.tensor([ranks.rank + 1])
    dist.all_reduce(x)
    close()
    return int(x)


def parent(folder: str, fn: str, given: str = "", **more) -> int:
    """The command line over a stand-in for what it runs."""
    cli._run = lambda argv: print(json.dumps(start(globals()[fn], (folder, *given.split()), 2, **more))) or 0  # type: ignore[assignment]
    return cli.main([])
