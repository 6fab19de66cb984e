"""Networks whose weights are not on the device all the time: from options to the store beside the weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tinydiff import residency
from tinydiff.config import ModelOptions
from tinydiff.entries import Entries
from tinydiff.io.weights import unread
from tinydiff.models.family import Denoiser, Record
from tinydiff.ops.store import (
    Berth,
    Buckets,
    Mapped,
    Names,
    Read,
    Store,
    Whole,
    bucket,
    loop_names,
    numbered,
)
from tinydiff.parallel import cost
from tinydiff.parallel.plan import Plan, Row
from tinydiff.records import UserError
from tinydiff.runtime.net_plan import NetPlan

log = logging.getLogger(__name__)

MEMORY = Path("/proc/meminfo")
"""Where Linux says how much memory is free."""


def settled(nets: Mapping[str, NetPlan[Record]], options: ModelOptions) -> dict[str, NetPlan[Record]]:
    """The networks with their residencies. Raises UserError for options that contradict each other."""
    roles = {name: net.family.role for name, net in nets.items()}
    counts = {name: len(blocks(net)) for name, net in nets.items()}
    found = residency.resolve(options, roles, counts)
    ruled_out = residency.excluded(options, roles)
    if options.lora_merge_mode == "merge":
        for name in (name for name, role in roles.items() if role == "dit"):
            ruled_out[name] |= {"offloaded", "streamed"}
    if options.performance_mode == "memory":
        found = residency.smallest(found, ruled_out, counts)
    if options.enable_torch_compile:
        for name, each in found.items():
            if roles[name] == "dit" and each.kind != "resident":
                log.info("%s is %s: %s", name, each.kind, residency.CONFLICTS["enable_torch_compile"][1])
    return {
        name: replace(net, residency=found[name], excluded=frozenset(ruled_out[name]))
        for name, net in nets.items()
    }


def blocks(net: NetPlan[Record]) -> dict[str, Names]:
    """Prefix of each block of a network -> the weights that it reads while it runs."""
    rows = list(net.family.spec(net.config))
    if isinstance(net.family, Denoiser):
        return loop_names(rows, [prefix for _, prefix in net.family.blocks(net.config)])
    return numbered(rows)


def store(
    net: NetPlan[Record], plan: Plan, device: torch.device, variant: str | None, pinned: bool, berth: Berth
) -> tuple[set[str], Store | None]:
    """(names of the weights that are left where they are, the store that brings them)."""
    if not net.absent:
        return set(), None
    where = net.residency
    if plan.group("shard").size > 1:
        option, why = where.option or "performance_mode", residency.CONFLICTS["use_fsdp_inference"][1]
        message = f"{net.name} is {where.kind} by it, and {why}"
        raise UserError(option, f"{option}: {message}; leave one of them out")
    rows, every = list(net.family.spec(net.config)), blocks(net)
    read = unread(net.component.place, rows, net.dtype, net.keys, plan.along("tp"), variant)
    if where.kind == "offloaded":
        names = [row.name for row in rows]
        _check_pinned(rows, net, device, pinned)
        source = Whole(_bringer(read, names, device, pinned), berth)
        return set(names), Store(source, device, every if net.family.role == "dit" else {}, 0)
    prefixes = list(every)
    chosen = {prefixes[i]: every[prefixes[i]] for i in where.streams(len(prefixes))}
    left = [row for row in rows if _is_below(row.name, chosen)]
    _check_pinned(left, net, device, pinned)
    if device.type == "cuda" and pinned:
        source = _pinned(read, left, chosen, device, where.prefetch)
    else:
        source = Mapped(read, device)
    return {row.name for row in left}, Store(source, device, chosen, where.prefetch)


def _is_below(name: str, prefixes: Entries) -> bool:
    return any(name[:i] in prefixes for i, letter in enumerate(name) if letter == ".")


def _pinned(
    read: Read, left: list[Row], chosen: Mapping[str, Names], device: torch.device, ahead: int
) -> Buckets:
    """One bucket for each block, and one for what only `hoist` reads."""
    in_loop = {name for names in chosen.values() for name in names}
    rest = [row.name for row in left if row.name not in in_loop]
    buckets = {names: bucket(read(names), pinned=True) for names in chosen.values()}
    return Buckets(buckets, bucket(read(rest), pinned=True), device, ahead)


def _bringer(
    read: Read, names: list[str], device: torch.device, pinned: bool
) -> Callable[[], Mapping[str, Tensor]]:
    """What brings a whole network to the device."""
    if device.type != "cuda" or not pinned:
        return lambda: {name: x.to(device) for name, x in read(names).items()}
    held = bucket(read(names), pinned=True)

    def bring() -> dict[str, Tensor]:
        here = held.data.to(device, non_blocking=True)
        return {part.name: part.of(here) for part in held.parts}

    return bring


def _check_pinned(rows: list[Row], net: NetPlan[Record], device: torch.device, pinned: bool) -> None:
    """Raises UserError where more memory would be pinned than this machine has."""
    size = cost.weight_bytes(rows, net.dtype.itemsize)
    if device.type == "cuda" and pinned and size > (have := host_bytes()):
        message = (
            f"{net.name} needs {size / 1e9:.1f} GB of pinned memory, and this machine has {have / 1e9:.1f} GB"
        )
        raise UserError("pin_cpu_memory", f"pin_cpu_memory: {message}; set it to false")


def host_bytes() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_host_bytes() -> int:
    """Bytes of memory that this process may take, pages that only cache files among them."""
    lines = MEMORY.read_text().splitlines() if MEMORY.exists() else []
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return host_bytes() if kilobytes is None else 1024 * int(kilobytes)
