"""Where each component of a model lives on this device: the memory plan, applied before weights load."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from tinydiff import residency
from tinydiff.config import SamplingOptions
from tinydiff.models.family import Record
from tinydiff.records import Output, Request, UserError
from tinydiff.residency import Residency
from tinydiff.runtime import estimate, memory, offload
from tinydiff.runtime.blueprint import TILE, Blueprint
from tinydiff.runtime.estimate import RESERVED
from tinydiff.runtime.memory import Footprint, MemoryPlan
from tinydiff.runtime.net_plan import NetPlan

SHARES = 64
"""In how many parts of a side the largest size that fits is looked for."""
log = logging.getLogger(__name__)


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that this process may fill. None for the CPU, where weights are mapped from files."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def room(device: torch.device, held: int = 0) -> int:
    """Bytes that models may fill here. held: bytes of those that are loaded, which count as room."""
    free = free_bytes(device)
    return offload.free_host_bytes() + held if free is None else free


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
    tile = blueprint.tile
    if plan.tiles and tile is None:
        tile = TILE
        log.info("the autoencoder runs on tiles of %d pixels, which changes the result a little", tile)
    nets = {name: replace(net, residency=plan.where[name]) for name, net in blueprint.nets.items()}
    return replace(blueprint, nets=nets, pinned=pinned, tile=tile)


def alone(blueprint: Blueprint, free: int) -> MemoryPlan | None:
    """The plan of a model of a server where no other is loaded: it keeps it beside others.

    None where nothing is known of what it needs, as of another library's pipeline.
    """
    return None if blueprint.foreign is not None else planned(blueprint, (), free)


def in_the_way(plan: MemoryPlan | None, held: Sequence[int]) -> int:
    """How many models must leave the device, from the first on, before this plan fits beside the rest.

    plan: of a model that is to be loaded, see `alone`. held: bytes of the weights of each. A model of which
    nothing is known gets the device alone.
    """
    if plan is None:
        return len(held)
    fitting = (n for n in range(len(held)) if plan.peak + sum(held[n:]) <= plan.room)
    return next(fitting, len(held))


def together(blueprints: Mapping[str, Blueprint], free: int) -> Iterator[str]:
    """One line for each of several models: those beside which it fits, those with which it takes turns.

    free: bytes of the device without all of them. Models fit together where each has room beside the others.
    """
    plans = {name: alone(each, free) for name, each in blueprints.items()}
    held = {name: _held(each, plans[name]) for name, each in blueprints.items()}

    def fit_together(names: Sequence[str]) -> bool:
        return not any(
            in_the_way(plans[name], [held[other] for other in names if other != name]) for name in names
        )

    for name in blueprints:
        others = [other for other in blueprints if other != name]
        beside = [other for other in others if fit_together((name, other))]
        turns = [other for other in others if other not in beside]
        some = "" if fit_together((name, *beside)) else "some of "
        fits = f"fits on the device beside {some}{', '.join(beside)}" if beside else ""
        waits = f"takes turns with {', '.join(turns)}" if turns else ""
        yield f"{name} {' and '.join(filter(None, (fits, waits)))}"


def _held(blueprint: Blueprint, plan: MemoryPlan | None) -> int:
    """Bytes of weights on the device while other models run; 0 where a model gets the device alone anyway.

    A CPU keeps all weights, whatever is planned.
    """
    if plan is None:
        return 0
    kept = plan if blueprint.device.type != "cpu" else expected(blueprint, ())
    return sum(part.held(kept.where[part.name]) for part in plan.footprints)


def stepped_down(blueprint: Blueprint) -> Blueprint | None:
    """The blueprint with less on the device; None where nothing more may leave it.

    Everything leaves of which no option says otherwise. Nothing may where `on_oom` is fail.
    """
    if blueprint.foreign is not None or blueprint.on_oom == "fail":
        return None
    nets: dict[str, NetPlan[Record]] = {}
    for name, net in blueprint.nets.items():
        count = len(offload.blocks(net))
        fixed = net.residency if net.residency.option not in ("", "performance_mode") else None
        least = residency.smallest({name: fixed or Residency()}, {name: set(net.excluded)}, {name: count})
        nets[name] = replace(net, residency=least[name])
    if all(
        nets[name].residency.kind == net.residency.kind and not net.residency.resident_blocks
        for name, net in blueprint.nets.items()
    ):
        return None
    return replace(blueprint, nets=nets)


def fits(blueprint: Blueprint, request: Request) -> bool:
    """Whether a request fits on this device with the model as it is; True where nothing is known of it."""
    free = free_bytes(blueprint.device)
    return free is None or expected(blueprint, [request]).peak <= free - RESERVED * 1e9


def refusal(blueprint: Blueprint, request: Request, free: int | None) -> UserError:
    """The error of a request that does not fit into memory: it names the largest size that does."""
    output = request.output
    frames = f" of {output.num_frames} frames" if output.num_frames > 1 else ""
    message = f"{output.width}x{output.height}{frames} does not fit into memory"
    if blueprint.foreign is not None:
        free = None  # nothing is known of what another library's pipeline needs
    size = None if free is None else largest(blueprint, request, free)
    hint = f"; the largest that fits is about {size[0]}x{size[1]}" if size else "; take a smaller size"
    return UserError("size", f"size: {message}{hint}{' of as many frames' if size and frames else ''}")


def largest(blueprint: Blueprint, request: Request, free: int) -> tuple[int, int] | None:
    """(width, height) of the largest output of this shape that fits; None where none does.

    The model stays as it is.
    """
    net, vae = blueprint.denoiser, blueprint.autoencoder.config
    step = vae.scale_factor_spatial * max(net.family.patch(net.config))
    output = request.output

    def at(share: int) -> Output:
        sides = (max(step, side * share // SHARES // step * step) for side in (output.height, output.width))
        height, width = sides
        return replace(output, height=height, width=width)

    def fits(share: int) -> bool:
        return planned(blueprint, [replace(request, output=at(share))], free).fits

    low, high = 0, SHARES - 1
    while low < high:
        middle = -(-(low + high) // 2)
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    if low == 0:
        return None
    return at(low).width, at(low).height


def expected(blueprint: Blueprint, requests: Sequence[Request]) -> MemoryPlan:
    """The plan of the largest of the requests with the model as it is."""
    where = {name: net.residency for name, net in blueprint.nets.items()}
    tiling = blueprint.tile is not None
    return memory.choose(_footprints(blueprint, requests), 0.0, "manual", where, tiling=tiling)


def compared(blueprint: Blueprint, requests: Sequence[Request]) -> str | None:
    """The peak of this process on the GPU beside the expected one.

    None without a GPU, and for a pipeline of another library.
    """
    measured = peak_bytes(blueprint.device)
    if measured is None or blueprint.foreign is not None:
        return None
    peak = expected(blueprint, requests).peak
    return (
        f"peak of memory: {measured / 1e9:.2f} GB, {peak / 1e9:.2f} GB expected ({measured / peak - 1:+.0%})"
    )


def peak_bytes(device: torch.device) -> int | None:
    """The most bytes of a GPU that tensors of this process had at a time. None for the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def planned(blueprint: Blueprint, requests: Sequence[Request], free: int) -> MemoryPlan:
    """The plan for the largest of the requests on a device with `free` bytes."""
    return memory.choose(
        _footprints(blueprint, requests),
        free / 1e9,
        blueprint.performance_mode,
        fixed={name: net.residency for name, net in blueprint.nets.items() if net.residency.option},
        ruled_out={name: set(net.excluded) for name, net in blueprint.nets.items()},
        tiling=blueprint.tiling,
    )


def _footprints(blueprint: Blueprint, requests: Sequence[Request]) -> tuple[Footprint, ...]:
    """The components for the largest of the requests; by default an output of the model's default size."""
    asked = requests or [estimate.request_without_images(blueprint, SamplingOptions())]
    largest = max(asked, key=lambda each: each.output.num_frames * each.output.height * each.output.width)
    subject = estimate.subject_of(blueprint, largest, blueprint.row.name, 1, lambda net: net.dtype.itemsize)
    return memory.footprints(subject)


def lines(plan: MemoryPlan, blueprint: Blueprint) -> Iterator[str]:
    """Each component with its residency and the reason for it."""
    whole = replace(plan, where={part.name: Residency() for part in plan.footprints})
    for part in plan.footprints:
        where = plan.where[part.name]
        yield f"{part.name}: {memory.described(part, where)} ({_reason(part, where, whole, blueprint)})"


def _reason(part: Footprint, where: Residency, whole: MemoryPlan, blueprint: Blueprint) -> str:
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
