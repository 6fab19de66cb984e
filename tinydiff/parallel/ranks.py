"""The processes of a job: they are started, joined into groups, and exchange values.

What the networks exchange is in `ops` and the other files of this directory.

Everything is torch.distributed's. Its elastic launcher starts the ranks of a machine and ends all of them
when one fails; its store and process groups carry messages. Every rank makes the same groups in the same
order.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tinydiff import environment
from tinydiff.parallel.layout import AXES, COMBINED_AXES, Layout, rank_groups
from tinydiff.parallel.plan import ALONE, Group
from tinydiff.records import RankError, UserError

T = TypeVar("T")
_untyped: Any = dist  # torch does not annotate all of it
_c10d: Any = dist.distributed_c10d  # the store, and a group by its name, have no public function

MONITOR = 0.1
"""Seconds between two checks of the ranks by their parent."""
GRACE = 10 * MONITOR
"""Seconds that a rank waits after it has written down its failure, so that a rank that died without a message
is seen to have failed first.
"""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a job.

    mesh: torch's, with the dimensions `AXES`. rank: in the order of the mesh. groups: this rank's place along
    each of `AXES` and in each of `COMBINED_AXES`, ALONE where no other rank is.
    """

    layout: Layout
    rank: int
    groups: Mapping[str, Group]
    mesh: DeviceMesh

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its replica: it writes the files."""
        return self.groups["replica"].rank == 0


def meet(timeout: float, device: str) -> Group:
    """Meet the other ranks at the place that the environment names: all of them, once they are there.

    timeout: seconds that a collective waits for a rank before it fails. device: "cpu" or "cuda"; this rank
    takes its own GPU.
    """
    place, limit = environment.under_torchrun(), timedelta(seconds=timeout)
    assert place is not None, "a rank is started by torchrun or by start"
    torch.set_num_threads(min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // place.local_size)))
    if device == "cuda":
        torch.cuda.set_device(place.local_rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl", timeout=limit, device_id=torch.device("cuda", place.local_rank)
        )
    else:
        dist.init_process_group("gloo", timeout=limit)
    return everyone()


def everyone() -> Group:
    """The group of all ranks that have met."""
    world = dist.group.WORLD
    assert world is not None, "the ranks have met"
    return _seen(world)


def make_ranks(layout: Layout, timeout: float, device: str = "cpu") -> Ranks:
    """The mesh of a layout, in a job whose processes have met.

    One process group serves all names with the same teams.
    """
    rank, limit = dist.get_rank(), timedelta(seconds=timeout)
    if dist.get_world_size() != layout.size:
        raise ValueError(f"the layout has {layout.size} ranks, but {dist.get_world_size()} are running")
    process_groups: dict[tuple[tuple[int, ...], ...], Any] = {(tuple(range(layout.size)),): dist.group.WORLD}
    for name in (*AXES, *COMBINED_AXES):
        teams = tuple(map(tuple, rank_groups(layout, name)))
        if teams not in process_groups:  # by hand, as init_device_mesh takes no timeout
            both = [(team, _untyped.new_group(list(team), timeout=limit)) for team in teams]
            process_groups[teams] = next(group for team, group in both if rank in team)
    group_of = {
        name: process_groups[tuple(map(tuple, rank_groups(layout, name)))] for name in (*AXES, *COMBINED_AXES)
    }
    ranks = torch.arange(layout.size).view(layout.sizes)
    mesh = DeviceMesh.from_group([group_of[axis] for axis in AXES], device, ranks, mesh_dim_names=AXES)
    groups = {axis: mesh.get_group(axis) for axis in AXES} | {name: group_of[name] for name in COMBINED_AXES}
    return Ranks(layout, rank, {name: _seen(group) for name, group in groups.items()}, mesh)


def weights_mesh(ranks: Ranks, axes: tuple[str, ...]) -> DeviceMesh:
    """The same ranks as a mesh of other dimensions.

    Each is an axis or a group of `COMBINED_AXES`, and together they have every axis once.
    """
    if axes == AXES:
        return ranks.mesh
    united = [COMBINED_AXES.get(axis, (axis,)) for axis in axes]
    groups = [
        _process_group(ranks.groups[axis]) if ranks.groups[axis].size > 1 else ranks.mesh.get_group(first)
        for axis, (first, *_) in zip(axes, united, strict=True)
    ]
    order = [AXES.index(axis) for each in united for axis in each]
    sizes = [prod(ranks.mesh.size(AXES.index(axis)) for axis in each) for each in united]
    return DeviceMesh.from_group(
        groups,
        ranks.mesh.device_type,
        ranks.mesh.mesh.permute(order).reshape(sizes).contiguous(),
        mesh_dim_names=axes,
    )


def _seen(group: dist.ProcessGroup) -> Group:
    return Group(group.group_name, group.size(), group.rank()) if group.size() > 1 else ALONE


def close() -> None:
    """Leave the other ranks."""
    dist.destroy_process_group()


def from_first(group: Group, value: T) -> T:
    """The value of the group's first rank, a small object that can be pickled, on all of them."""
    if group.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=_process_group(group), group_src=0)
    return values[0]


def once(group: Group, make: Callable[[], T]) -> T:
    """What `make` returns on the group's first rank, which alone calls it. Its UserError is raised on all."""
    outcome: tuple[T | None, UserError | None] = None, None
    if group.rank == 0:
        try:
            outcome = make(), None
        except UserError as error:
            outcome = None, error
    value, mistake = from_first(group, outcome)
    if mistake is not None:
        raise mistake
    return cast("T", value)


def to_first(group: Group, value: T) -> list[T]:
    """On the group's first rank, the values of all ranks in order; on the others nothing."""
    if group.size == 1:
        return [value]
    values: list[Any] = [None] * group.size if group.rank == 0 else []
    dist.gather_object(value, values or None, group=_process_group(group), group_dst=0)
    return values


def to_all(group: Group, value: T) -> list[T]:
    """On every rank of the group, the values of all ranks in order, small objects that can be pickled."""
    if group.size == 1:
        return [value]
    values: list[Any] = [None] * group.size
    _untyped.all_gather_object(values, value, group=_process_group(group))
    return values


def command_group() -> Group:
    """A group of all ranks on the CPU in which they may wait for the first one as long as it is idle.

    All ranks call this.
    """
    return _seen(_untyped.new_group(backend="gloo", timeout=timedelta(days=365)))


def barrier(group: Group) -> None:
    """Wait until every rank of the group is here."""
    if group.size > 1:
        _untyped.all_reduce(torch.zeros(1), group=_process_group(group))


def take_number(ranks: Ranks, queue: str = "work") -> int:
    """The next number, from 0, of a counter that all replicas share, so that each number goes to one replica.
    All ranks of a replica call this.
    """
    number = _c10d._get_default_store().add(f"tinydiff/{queue}", 1) - 1 if ranks.leads else 0
    return from_first(ranks.groups["replica"], number)


def replica_numbers(ranks: Ranks, count: int) -> Iterator[int]:
    """The numbers below `count` that this replica runs.

    One replica runs all of them. Several take them as they become free.
    """
    if ranks.layout.dp == 1:
        yield from range(count)
        return
    while (number := take_number(ranks)) < count:
        yield number


def first_to_fail() -> bool | None:
    """Whether this rank is the first that asks this; None where the ranks have not met."""
    return _c10d._get_default_store().add("tinydiff/failed", 1) == 1 if dist.is_initialized() else None


def describe_failure(rank: int, error: BaseException) -> str:
    """A rank's failure in one sentence."""
    said = " ".join(str(error).split())
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"rank {rank}: out of memory{': ' * bool(said)}{said}"
    if isinstance(error, RuntimeError) and "timed out" in said.lower():
        return f"rank {rank}: waited for another rank longer than dist_timeout allows: {said}"
    return f"rank {rank}: {type(error).__name__}{': ' * bool(said)}{said}"


def start(
    fn: Callable[..., T],
    args: tuple[object, ...],
    here: int,
    *,
    nodes: int = 1,
    node: int = 0,
    address: tuple[str, int] = ("localhost", 0),
    timeout: float = 3600,
    graceful: bool = False,
) -> dict[int, T]:
    """Run a module's function `fn(*args)` in `here` processes on this machine: global rank -> its result.

    nodes: the number of machines, each of which calls this with its number `node`. address: host and port
    where they meet; port 0 is a free one, for one machine only. timeout: seconds to wait for the other
    machines. graceful: SIGTERM and SIGINT reach the ranks as SIGTERM, and they end by themselves.

    When a rank fails, the others are ended. Raises its UserError, or RankError for any other failure. Raises
    KeyboardInterrupt or SystemExit, with the status of a process ended by that signal, where this process is
    told to end. In every case no process is left.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    host, port = address
    if port and node == 0:
        _check_free(port)
    with tempfile.TemporaryDirectory(prefix="tinydiff-") as folder:
        launch = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=here,
            run_id="tinydiff",
            rdzv_backend="c10d" if nodes == 1 else "static",
            rdzv_endpoint=f"{host}:{port}",
            rdzv_configs={"timeout": int(timeout)} | ({"rank": node} if nodes > 1 else {}),
            local_addr=host if nodes == 1 else None,
            max_restarts=0,
            monitor_interval=MONITOR,
            # not SIGINT, which is Python's KeyboardInterrupt
            signals_to_handle="SIGHUP" if graceful else "SIGTERM,SIGHUP",
            logs_specs=DefaultLogsSpecs(folder),
        )
        try:
            with _nothing_left():
                if graceful:
                    for number in (signal.SIGTERM, signal.SIGINT):
                        signal.signal(number, _end_ranks)
                return elastic_launch(launch, _work)(folder, fn, args)
        except ChildFailedError as error:
            raise _first_failure(Path(folder), *error.get_first_failure()) from None
        except SignalException as error:
            raise SystemExit(128 + error.sigval) from None
        except (RendezvousError, dist.DistNetworkError, dist.DistStoreError) as error:
            raise RankError(
                f"{nodes} machines did not meet at {host}:{port}: {' '.join(str(error).split())}"
            ) from None


def _end_ranks(number: int, frame: FrameType | None) -> None:
    """Ask the ranks of this machine to end."""
    for child in multiprocessing.active_children():
        if child.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGTERM)


def _work(folder: str, fn: Callable[..., T], args: tuple[object, ...]) -> T:
    """What a started process does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no word of its own: the parent speaks for all of them
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        return fn(*args)
    except BaseException as error:
        place = environment.under_torchrun()
        rank = place.rank if place else 0
        field = error.field if isinstance(error, UserError) else None
        entry = {
            "field": field,
            "message": str(error) if field else describe_failure(rank, error),
            "trace": traceback.format_exc(),
        }
        written = Path(folder) / f"{rank}.failure"
        written.write_text(json.dumps(entry))
        time.sleep(GRACE)
        raise


def _first_failure(folder: Path, rank: int, failure: Any) -> UserError | RankError | KeyboardInterrupt:
    """The exception for the rank that failed first.

    A signal explains itself; other failures are in the file that the rank wrote.
    """
    if (
        failure.exitcode == -signal.SIGINT
    ):  # Ctrl-C went to all, and a rank was quicker to end than this process to hear of it
        return KeyboardInterrupt()
    if failure.exitcode < 0 and not (folder / f"{rank}.failure").exists():
        memory = ", as the system does where memory runs out" if failure.exitcode == -signal.SIGKILL else ""
        return RankError(f"rank {rank}: ended by {signal.Signals(-failure.exitcode).name}{memory}")
    written = sorted(folder.glob("*.failure"), key=lambda path: path.stat().st_mtime_ns)
    if not written:
        return RankError(f"rank {rank}: ended with exit code {failure.exitcode}")
    entry = json.loads(written[0].read_text())
    logging.getLogger(__name__).debug("%s", entry["trace"])
    return (
        RankError(entry["message"]) if entry["field"] is None else UserError(entry["field"], entry["message"])
    )


def _check_free(port: int) -> None:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(
                "master_port",
                f"master_port: {port} is not available on this machine ({reason}); choose another port",
            ) from None


@contextmanager
def _nothing_left() -> Generator[None]:
    """While the launcher works, its log, which repeats every failure with its own tracebacks, is off, and
    Ctrl-C goes to this process only. Afterwards no process that it started is left, and signals are handled
    as before.
    """
    before, silent = set(multiprocessing.active_children()), logging.root.manager.disable
    handled = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in handled}
    done = threading.Event()
    threading.Thread(
        target=done.wait, daemon=True
    ).start()  # a thread to hear of Ctrl-C, which is then blocked in this one and, as
    resource_tracker.ensure_running()  # (it would unblock it)
    mask = signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGINT}
    )  # they inherit that, in ranks that still import
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(silent)
        for child in set(multiprocessing.active_children()) - before:
            with suppress(OSError):
                child.kill()
            child.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        done.set()
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _process_group(group: Group) -> dist.ProcessGroup:
    return _c10d._resolve_process_group(group.name)
