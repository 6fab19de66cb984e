"""Where each component of a model lives on this device: the memory plan, applied before weights load."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from tinydiff.config import SamplingOptions
from tinydiff.records import Request
from tinydiff.residency import Residency
from tinydiff.runtime import estimate, memory, offload
from tinydiff.runtime.blueprint import Blueprint
from tinydiff.runtime.memory import MemoryPlan, Part

log = logging.getLogger(__name__)


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU. None for the CPU, where weights are mapped from their files."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def fitted(
    blueprint: Blueprint, requests: Sequence[Request], free: int | None, host: int | None = None
) -> Blueprint:
    """The blueprint with the residencies of its memory plan, told in one line for each component.

    requests: what will be asked for; where that is not known, an output of the model's default size. free:
    bytes of the device; None where nothing limits them. host: bytes of the machine; by default those of this.
    """
    if free is None:
        return blueprint
    plan = planned(blueprint, requests, free)
    for line in lines(plan, blueprint):
        log.info("%s", line)
    if not plan.fits:
        needs, room = plan.peak / 1e9, plan.room / 1e9
        log.warning(
            "about %.1f GB are needed, and there is room for %.1f GB: take a smaller size", needs, room
        )
    pinned = blueprint.pinned
    if pinned is None:
        pinned = plan.away <= (offload.host_bytes() if host is None else host)
        if not pinned:
            log.info("offloaded weights stay in their files: pinned memory has no room for them")
    nets = {name: replace(net, residency=plan.where[name]) for name, net in blueprint.nets.items()}
    return replace(blueprint, nets=nets, pinned=pinned)


def planned(blueprint: Blueprint, requests: Sequence[Request], free: int) -> MemoryPlan:
    """The plan for the largest of the requests on a device with `free` bytes."""
    asked = requests or [estimate.request_without_images(blueprint, SamplingOptions())]
    largest = max(asked, key=lambda each: each.output.num_frames * each.output.height * each.output.width)
    subject = estimate.subject_of(blueprint, largest, blueprint.row.name, 1, lambda net: net.dtype.itemsize)
    return memory.choose(
        memory.parts(subject),
        free / 1e9,
        blueprint.performance_mode,
        fixed={name: net.residency for name, net in blueprint.nets.items() if net.residency.option},
        ruled_out={name: set(net.excluded) for name, net in blueprint.nets.items()},
    )


def lines(plan: MemoryPlan, blueprint: Blueprint) -> Iterator[str]:
    """Each component with its residency and the reason for it."""
    whole = replace(plan, where={part.name: Residency() for part in plan.parts})
    for part in plan.parts:
        where = plan.where[part.name]
        yield f"{part.name}: {memory.described(part, where)} ({_reason(part, where, whole, blueprint)})"


def _reason(part: Part, where: Residency, whole: MemoryPlan, blueprint: Blueprint) -> str:
    """Why a component is where it is. whole: the plan with all components resident."""
    needs = f"with all on the GPU {whole.peak / 1e9:.1f} GB are needed, there is room for"
    mode = blueprint.performance_mode
    if where.option:
        return f"{where.option} asks for it" + f" with {mode}" * (where.option == "performance_mode")
    if mode in ("speed", "manual"):
        return f"performance_mode {mode} moves nothing unasked"
    if where.kind != "resident":
        return f"{needs} {whole.room / 1e9:.1f} GB"
    return "all fits" if whole.fits else "there is room for it"
