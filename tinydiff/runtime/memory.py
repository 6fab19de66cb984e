"""Where each component's weights live, so that a request fits.

They are on the device all the time, moved in for their stage, or streamed block by block.

Every choice is tried. Of those that fit, the one that moves the fewest bytes per request is taken; so no
threshold is chosen by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from tinydiff.ops.store import loop_names, numbered
from tinydiff.parallel import cost
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.plan import Row, decoded_row
from tinydiff.residency import Kind, PerformanceMode, Residency
from tinydiff.runtime.estimate import RESERVED, Subject

KINDS: tuple[Kind, ...] = ("resident", "offloaded", "streamed")

ALONE = Layout()


@dataclass(frozen=True)
class Footprint:
    """A component as the plan sees it, in bytes.

    rest: what belongs to no block. blocks: what each block reads while it runs. unread: what blocks have and
    only `hoist` reads. working: what it needs beside weights. passes: how often a request reads all blocks.
    stays: whether it cannot be moved.
    """

    name: str
    rest: int
    blocks: tuple[int, ...]
    unread: int
    working: int
    passes: int
    stays: bool = False
    tiled: int | None = None
    """Of the autoencoder: what it needs beside weights on tiles, where that is less."""

    @property
    def weights(self) -> int:
        return self.rest + sum(self.blocks) + self.unread

    def held(self, where: Residency) -> int:
        """Bytes of its weights that are on the device all the time."""
        if where.kind == "resident":
            return self.weights
        if where.kind == "offloaded":
            return 0
        away = where.streams(len(self.blocks))
        kept = sum(size for i, size in enumerate(self.blocks) if i not in away)
        return self.rest + kept + (where.prefetch + 1) * max(self.blocks[i] for i in away)

    def stage(self, where: Residency) -> int:
        """Bytes that come on top while it runs."""
        return self.working + (self.weights if where.kind == "offloaded" else 0)

    def moved(self, where: Residency) -> int:
        """Bytes that come to the device for one request."""
        if where.kind == "resident":
            return 0
        if where.kind == "offloaded":
            return self.weights
        return self.unread + self.passes * sum(self.blocks[i] for i in where.streams(len(self.blocks)))


@dataclass(frozen=True)
class MemoryPlan:
    """A residency for each component. peak, moved: bytes; see `Footprint`. room: bytes of the device."""

    footprints: tuple[Footprint, ...]
    where: Mapping[str, Residency]
    room: float
    tiles: bool = False
    """Whether the autoencoder runs on tiles."""

    @property
    def peak(self) -> int:
        held = sum(part.held(self.where[part.name]) for part in self.footprints)
        return held + max(part.stage(self.where[part.name]) for part in self.footprints)

    @property
    def moved(self) -> int:
        return sum(part.moved(self.where[part.name]) for part in self.footprints)

    @property
    def away(self) -> int:
        """Bytes of weights that the host's memory holds."""
        return sum(part.weights for part in self.footprints if self.where[part.name].kind != "resident")

    @property
    def fits(self) -> bool:
        return self.peak <= self.room


def footprints(subject: Subject) -> tuple[Footprint, ...]:
    """The components of a subject, for one image on one device."""
    net, work, b = subject.net, subject.work, subject.b
    prefixes = [rows[0].name[: _block_end(rows)] for rows in net.blocks]
    hoisted = cost.hoisted_bytes(net, ALONE, work, b)  # kept for the other outputs of a request
    working = cost.activation_bytes(net, ALONE, work, b) + hoisted + cost.decoded_bytes(net.rows)
    names = ("transformer", "transformer_2")[: subject.experts]
    steps = -(-work.steps // subject.experts)
    found = [_part(name, net.rows, loop_names(net.rows, prefixes), b, working, steps) for name in names]
    for name, (rows, size) in subject.others.items():
        is_vae = name == "vae"
        need = (
            (subject.decoding[0] or 0) + hoisted
            if is_vae
            else _encoder_working(rows, max(work.text, work.views), size) + cost.decoded_bytes(rows)
        )
        part = _part(name, rows, numbered(rows), size, need, 1)
        tiled = need if not is_vae or subject.tiled is None else subject.tiled + hoisted
        found.append(replace(part, tiled=tiled) if tiled < need else part)
    for name, (weights, working) in subject.after.items():
        found.append(Footprint(name, weights, (), 0, working, 1, stays=True))
    return tuple(found)


def _block_end(rows: Sequence[Row]) -> int:
    """Where the prefix of the block of these rows ends."""
    words = rows[0].name.split(".")
    cut = next(i for i, word in enumerate(words) if word.isdigit())
    return len(".".join(words[: cut + 1]))


def _part(
    name: str,
    rows: Sequence[Row],
    blocks: Mapping[str, tuple[str, ...]],
    b: int,
    working: int,
    passes: int,
) -> Footprint:
    sizes = {row.name: row.numel * cost.itemsize(row, b) for row in rows}
    below = tuple(f"{prefix}." for prefix in blocks)
    inside = {row for row in sizes if row.startswith(below)} if below else set[str]()
    read = {row for names in blocks.values() for row in names}
    return Footprint(
        name,
        rest=sum(size for row, size in sizes.items() if row not in inside),
        blocks=tuple(sum(sizes[row] for row in names) for names in blocks.values()),
        unread=sum(sizes[row] for row in inside - read),
        working=working,
        passes=passes,
    )


def _encoder_working(rows: Sequence[Row], tokens: int, b: int) -> int:
    """About what an encoder needs beside weights: six tensors as wide as its widest layer reads."""
    return 6 * tokens * max((decoded_row(row).shape[1] for row in rows if len(row.shape) == 2), default=0) * b


def choose(
    found: Sequence[Footprint],
    vram: float,
    mode: PerformanceMode = "auto",
    fixed: Mapping[str, Residency] | None = None,
    ruled_out: Mapping[str, set[Kind]] | None = None,
    tiling: bool | None = None,
) -> MemoryPlan:
    """The residencies for a device of `vram` GB.

    manual: what is not `fixed` is resident. speed: the same, but for what cannot fit. auto: the fewest bytes
    moved among what fits, else the smallest peak. memory: the smallest peak, and of those the fewest bytes.
    fixed: what an option says, which holds in every mode. ruled_out: kinds that an option excludes. tiling:
    whether the autoencoder runs on tiles; None: where nothing else fits in mode auto, and where it is smaller
    in mode memory, since tiles change the image.
    """
    asked = found, vram, mode, fixed or {}, ruled_out or {}
    whole = _chosen(*asked)
    able = tiling is not False and any(part.tiled is not None for part in found)
    if tiling is None:
        able = able and (mode == "memory" or (mode == "auto" and not whole.fits))
    if not able:
        return replace(whole, tiles=tiling is True)
    small = [part if part.tiled is None else replace(part, working=part.tiled) for part in found]
    tiled = replace(_chosen(small, *asked[1:]), tiles=True)
    return tiled if tiling or tiled.peak < whole.peak else whole


def _chosen(
    found: Sequence[Footprint],
    vram: float,
    mode: PerformanceMode,
    fixed: Mapping[str, Residency],
    ruled_out: Mapping[str, set[Kind]],
) -> MemoryPlan:
    """The plan with the working sets as they are."""
    room = (vram - RESERVED) * 1e9
    if mode in ("manual", "speed"):
        where = {part.name: fixed.get(part.name, Residency()) for part in found}
        return MemoryPlan(tuple(found), where, room)
    names = [part.name for part in found]
    options = [_options(part, fixed, ruled_out.get(part.name, set())) for part in found]
    plans = [
        _filled(MemoryPlan(tuple(found), dict(zip(names, combination, strict=True)), room), fixed)
        for combination in product(*options)
    ]
    if mode == "memory":
        return min(plans, key=lambda plan: (plan.peak, plan.moved))
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        return min(fitting, key=lambda plan: (plan.moved, plan.peak))
    return min(plans, key=lambda plan: (plan.peak, plan.moved))


def _options(part: Footprint, fixed: Mapping[str, Residency], ruled_out: set[Kind]) -> list[Residency]:
    if part.name in fixed or part.stays:
        return [fixed.get(part.name, Residency())]
    return [
        Residency(kind)
        for kind in KINDS
        if kind not in ruled_out and (kind != "streamed" or len(part.blocks) > 1)
    ]


def _filled(plan: MemoryPlan, fixed: Mapping[str, Residency]) -> MemoryPlan:
    """The plan with as many resident blocks of streamed components as fit, those read most often first."""
    for part in sorted(plan.footprints, key=lambda part: -part.passes):
        where = plan.where[part.name]
        if where.kind != "streamed" or part.name in fixed or not plan.fits:
            continue
        low, high = 0, len(part.blocks) - 1
        while low < high:
            middle = -(-(low + high) // 2)
            tried = _with(plan, part.name, replace(where, resident_blocks=middle))
            low, high = (middle, high) if tried.fits else (low, middle - 1)
        plan = _with(plan, part.name, replace(where, resident_blocks=low))
    return plan


def _with(plan: MemoryPlan, name: str, where: Residency) -> MemoryPlan:
    return replace(plan, where={**plan.where, name: where})


# --- in words


def flags(plan: MemoryPlan) -> str:
    """The options of `generate` that make this plan."""
    modes = {"resident": "resident", "offloaded": "component-offload", "streamed": "layerwise-offload"}
    away = {name: where for name, where in plan.where.items() if where.kind != "resident"}
    tiles = ["--vae-tiling"] * plan.tiles
    if not away:
        return " ".join(tiles)
    words = [f"--component-residency {','.join(f'{name}={modes[each.kind]}' for name, each in away.items())}"]
    # Zeros too: text_encoder names a group as well, of which text_encoder_2 is.
    kept = {name: each.resident_blocks for name, each in away.items() if each.kind == "streamed"}
    if any(kept.values()):
        words.append(f"--layerwise-resident-layers {','.join(f'{name}={n}' for name, n in kept.items())}")
    return " ".join([*words, *tiles])


def rows(plan: MemoryPlan) -> list[tuple[str, ...]]:
    """The plan as the rows of a table, the head first."""
    table = [("component", "weights", "working", "where", "on the GPU", "moved per request")]
    for part in plan.footprints:
        where = plan.where[part.name]
        sizes = (part.weights, part.working, part.held(where), part.moved(where))
        weights, working, held, moved = (f"{size / 1e9:.1f} GB" for size in sizes)
        table.append((part.name, weights, working, described(part, where), held, moved))
    return table


def described(part: Footprint, where: Residency) -> str:
    """Where a component is, in words."""
    if where.kind == "resident":
        return "resident"
    if where.kind == "offloaded":
        return "moved in for its stage"
    away = len(where.streams(len(part.blocks)))
    return f"{away} of {len(part.blocks)} blocks streamed"
