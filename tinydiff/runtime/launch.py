"""From a command line to the ranks that run it.

They are this process alone, ranks that it starts, or ranks that torchrun started.

Whatever can be refused is refused here, before a process is started or a rank waits for another.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Protocol, TypeVar

from tinydiff import environment
from tinydiff.config import Options, ParallelOptions
from tinydiff.environment import LaunchedRank
from tinydiff.parallel import layout
from tinydiff.parallel.layout import Layout
from tinydiff.records import RankError, Request, Result, UserError

if TYPE_CHECKING:
    from tinydiff.runtime.blueprint import Blueprint
    from tinydiff.runtime.generate import Work

T = TypeVar("T")
log = logging.getLogger(__name__)

TIMEOUT = 3600
"""Default of `dist_timeout`: seconds that a rank waits for another."""
LINGER = 60
"""Seconds that a failed rank waits for another to fail first."""


class Display(Protocol):
    """A `tinydiff.config.Progress` that can be closed."""

    def on_stage(self, name: str) -> None: ...
    def on_step(self, done: int, total: int) -> None: ...
    def close(self) -> None: ...


MakeDisplay = Callable[[str], Display]
"""A function of a module: log level -> the progress display."""


def generate(options: Options, watch: MakeDisplay) -> list[Result]:
    """Generate everything asked for, on as many ranks as asked for.

    One result per prompt; none where another process is rank 0.

    Raises UserError as `runtime.generate.generate` does, and RankError where a rank fails otherwise.
    """
    place = environment.under_torchrun()
    ranks = layout.count(options.parallel, place and place.size)
    if ranks == 1:
        from tinydiff.runtime.generate import generate  # torch, for those who get here

        with closing(watch(options.output.log_level)) as display:
            return generate(options, display)
    from tinydiff.runtime.generate import read

    plan = read(options)
    check_devices(plan, ranks_here(options.parallel, ranks, place))
    if place is None:
        return _start_ranks(options, plan, ranks, watch)
    try:
        return rank_main(options, ranks, watch)
    except UserError:
        raise
    except Exception as error:
        from tinydiff.parallel.ranks import describe_failure

        log.debug("", exc_info=error)
        raise RankError(describe_failure(place.rank, error)) from error


def wait_unless_first_to_fail() -> None:
    """Called before a failure is reported.

    Under torchrun several ranks may hit the same error: all but the first sleep here until torchrun ends
    them, so that it is printed once.
    """
    place = environment.under_torchrun()
    if place is None or place.size == 1:
        return
    ranks = sys.modules.get("tinydiff.parallel.ranks")  # where it was never needed, they have not met
    first = None if ranks is None else ranks.first_to_fail()
    if not (place.local_rank == 0 if first is None else first):
        time.sleep(LINGER)


def admit_with_layout(options: Options, plan: Blueprint, ranks: int) -> tuple[Work, Layout]:
    """What is made, and how the ranks share it, told in a line. One process alone calls this for all of them.

    Reads the given images and no weights. Raises UserError.
    """
    from tinydiff.runtime.generate import admitted

    work = admitted(options, plan)
    outputs = sum(len(request.seeds) for request in work.requests)
    tokens = min(_tokens(plan, request) for request in work.requests)
    heads, guided = denoiser_heads(plan), work.requests[0].guidance.branches > 1
    chosen, why = layout.choose(options.parallel, ranks, heads, guided, tokens, outputs)
    check_divides(plan, chosen)
    log.info("%s", why)
    return work, chosen


def denoiser_heads(plan: Blueprint) -> int:
    """Attention heads of the denoiser."""
    net = plan.denoiser
    return net.family.heads(net.config)


def check_divides(plan: Blueprint, chosen: Layout) -> None:
    """Raises UserError where tp ranks cannot share the denoiser's weights evenly."""
    from tinydiff.parallel.shards import why_indivisible

    net = plan.denoiser
    if chosen.tp > 1 and (why := why_indivisible(net.family.spec(net.config), chosen.tp)):
        raise UserError(
            "tp_size", f"tp_size: {chosen.tp} ranks cannot share the transformer's weights: {why}"
        )


def ranks_here(asked: ParallelOptions, ranks: int, place: LaunchedRank | None) -> int:
    """How many of `ranks` ranks run on this machine. place: this rank of torchrun's, if it is one."""
    return ranks // (asked.nnodes or 1) if place is None else place.local_size


def check_devices(plan: Blueprint, here: int) -> None:
    """Raises UserError for more ranks on this machine than it has GPUs.

    Without a GPU, ranks share the CPU.
    """
    import torch

    if plan.foreign is not None:
        raise UserError("num_gpus", f"num_gpus: {plan.foreign.library} runs a model on one device here")
    if plan.device.type == "cuda" and here > torch.cuda.device_count():
        message = f"{here} ranks are requested on this machine, which has {torch.cuda.device_count()} GPUs"
        raise UserError("num_gpus", f"num_gpus: {message}; give at most that many")


def _tokens(plan: Blueprint, request: Request) -> int:
    from tinydiff.models.recipe import token_count

    net = plan.denoiser
    return token_count(plan.autoencoder.config, request.output, net.family.patch(net.config))


def _start_ranks(options: Options, plan: Blueprint, ranks: int, watch: MakeDisplay) -> list[Result]:
    """Start this machine's ranks and wait for them.

    On one machine this process admits, so that a mistake starts nothing. Several machines have met only once
    their ranks have: there rank 0 admits.
    """
    admitted = admit_with_layout(options, plan, ranks) if (options.parallel.nnodes or 1) == 1 else None
    return start_ranks(options.parallel, ranks, rank_main, (options, ranks, watch, admitted)).get(0, [])


def start_ranks(
    asked: ParallelOptions,
    ranks: int,
    fn: Callable[..., T],
    args: tuple[object, ...],
    timeout: int = TIMEOUT,
    graceful: bool = False,
) -> dict[int, T]:
    """`parallel.ranks.start` of this machine's share of `ranks` ranks. timeout: where none is asked."""
    from tinydiff.parallel.ranks import start

    return start(
        fn,
        args,
        ranks_here(asked, ranks, None),
        nodes=asked.nnodes or 1,
        node=asked.node_rank or 0,
        address=layout.address(asked),
        timeout=asked.dist_timeout or timeout,
        graceful=graceful,
    )


def rank_main(
    options: Options, count: int, watch: MakeDisplay, admitted: tuple[Work, Layout] | None = None
) -> list[Result]:
    """What every rank runs. Rank 0 shows the progress and returns the results, the others return none.

    found: what `admit_with_layout` returned, the same on all ranks; None: rank 0 calls it once they have met.
    """
    from tinydiff.parallel.ranks import close, make_ranks, meet, once
    from tinydiff.runtime.blueprint import here
    from tinydiff.runtime.generate import generate_admitted, read

    timeout, device = options.parallel.dist_timeout or TIMEOUT, here().type
    plan, world = read(options), meet(timeout, device)
    log_to_stderr(options.output.log_level if world.rank == 0 else "error")
    work, chosen = admitted or once(world, lambda: admit_with_layout(options, plan, count))
    ranks = make_ranks(chosen, timeout, device)
    log_to_stderr(options.output.log_level if ranks.leads else "error")
    with closing(watch(options.output.log_level if ranks.rank == 0 else "error")) as display:
        results = generate_admitted(options, plan, work, display, ranks)
    close()
    return results


def log_to_stderr(log_level: str) -> None:
    """Print this process's log messages of `log_level` and above on stderr."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("tinydiff").setLevel(log_level.upper())
