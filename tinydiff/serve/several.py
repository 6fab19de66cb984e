"""A server on several GPUs: the leading rank answers HTTP and schedules, the others follow its device."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from tinydiff.config import ParallelOptions
from tinydiff.environment import LaunchedRank
from tinydiff.parallel import layout
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.ranks import Ranks, close, make_ranks, meet
from tinydiff.records import RankError, UserError
from tinydiff.runtime import backends, blueprint, launch
from tinydiff.runtime.device import Device
from tinydiff.serve.adapters import Adapters
from tinydiff.serve.options import Serve

if TYPE_CHECKING:
    from tinydiff.runtime.blueprint import Blueprint

log = logging.getLogger(__name__)

Lead = Callable[[Serve, Ranks, tuple[signal.Signals, ...]], int]
"""(options, the leading rank, the signals that end the server) -> the exit code."""
TIMEOUT = 600
"""Default of `dist_timeout`: seconds that a rank waits for another in the middle of a command."""


def serve(asked: Serve, count: int, place: LaunchedRank | None, lead: Lead) -> int:
    """Serve on `count` ranks, which this process starts unless torchrun has. place: this rank of torchrun's.
    lead: what the leading rank runs, a function of a module. Raises UserError and RankError.
    """
    plan, parallel = backends.read(asked.model), asked.parallel
    launch.check_devices(plan, launch.ranks_here(parallel, count, place))
    chosen, why = choose_layout(plan, parallel, count)
    launch.check_divides(plan, chosen)
    if place is not None:
        return rank_main(asked, chosen, lead, (signal.SIGTERM, signal.SIGINT))
    if not parallel.node_rank:
        print(f"tinydiff: {why}", flush=True)
    args = asked, chosen, lead, (signal.SIGTERM,)
    codes = launch.start_ranks(parallel, count, rank_main, args, TIMEOUT, graceful=True)
    return max(codes.values(), default=0)


def choose_layout(plan: Blueprint, asked: ParallelOptions, count: int) -> tuple[Layout, str]:
    """(how the ranks share every request, the reason in one line).

    Guidance gets ranks of its own only where that is asked, because requests may be without. Raises
    UserError.
    """
    if (asked.data_parallel_size or 1) > 1:
        message = "a server has one replica of the model; start one for each replica, on one --state-url"
        raise UserError("data_parallel_size", f"data_parallel_size: {asked.data_parallel_size}: {message}")
    guided = layout.degrees(asked).get("cfg", 1) > 1
    return layout.choose(replace(asked, data_parallel_size=1), count, launch.denoiser_heads(plan), guided)


def rank_main(asked: Serve, chosen: Layout, lead: Lead, signals: tuple[signal.Signals, ...]) -> int:
    """What every rank runs. signals: those that end the server. Returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the leading rank ends the others
    timeout, device = asked.parallel.dist_timeout or TIMEOUT, blueprint.here().type
    leads = meet(timeout, device).rank == 0
    ranks = make_ranks(chosen, timeout, device)
    code = lead(asked, ranks, signals) if leads else _follow(asked, ranks)
    close()
    return code


def _follow(asked: Serve, ranks: Ranks) -> int:
    launch.log_to_stderr("error")
    base = Adapters(backends.read(asked.model)).base
    device = Device({"": base}, asked.server.batching_max_size, ranks)
    try:
        device.follow()
    except RankError:
        raise
    except Exception:
        log.debug("the leading rank has ended", exc_info=True)
    return 0
