"""Which weights of a network stay quantised: as their file has them, or in 8 bits as an option asks.

A network whose weights stay quantised has a family of its own, whose `spec` has the types and the rows of the
scales. So whoever reads rows (loading, sharding, plans, streaming) needs to know nothing else.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import lru_cache, reduce
from pathlib import Path
from typing import TypeVar

from tinydiff.config import ModelOptions
from tinydiff.io.weight_sources import kept_kinds
from tinydiff.keymap import KeyMap
from tinydiff.models.family import Denoiser, Encoder, Record
from tinydiff.ops.store import numbered
from tinydiff.parallel.placements import block_of
from tinydiff.parallel.plan import PACKED, Row, kept_rows
from tinydiff.records import UserError, nearest
from tinydiff.runtime.net_plan import NetPlan

log = logging.getLogger(__name__)

R = TypeVar("R", Denoiser, Encoder)
Kinds = Mapping[str, tuple[str, int]]
"""Row -> (type as in `Row.stored`, scales of a row)."""

Kind = tuple[str, tuple[str, int]]
"""An entry of them."""
E4M3_SINCE = (8, 9)
"""The compute capability of the first GPUs for which Triton, and so torch.compile, reads float8_e4m3fn."""

TYPES = {"fp8": "float8_e4m3fn", "int8": "int8"}
"""Value of the option -> type by torch's name."""
NAMES = {"float8_e4m3fn": "fp8", "float8_e5m2": "fp8", "int8": "int8"}
"""Type by torch's name -> what users call it, as they do packed types by their own names."""


def settled(
    nets: Mapping[str, NetPlan[Record]],
    options: ModelOptions,
    capability: Callable[[], tuple[int, int] | None],
) -> dict[str, NetPlan[Record]]:
    """The networks, denoisers and encoders with the rows of what stays quantised.

    Raises UserError for options that contradict each other or name no layer. capability: gives the compute
    capability of the GPU, None on a CPU; it is called only where fp8 is to be compiled.
    """
    asked = _asked(nets, options)
    experts = [name for name, net in nets.items() if net.family.role == "dit"]
    field = "component_quantizations" if options.component_quantizations else "quantization"
    if any(asked[name] == "fp8" for name in experts) and (have := _too_old(options, capability)):
        had, needed = (".".join(map(str, each)) for each in (have, E4M3_SINCE))
        message = (
            f"'fp8' with enable_torch_compile needs a GPU of compute capability {needed}; this one has {had}"
        )
        raise UserError(field, f"{field}: {message}; take int8")
    if options.quantization_ignored_layers and not any(asked[name] in TYPES for name in experts):
        field = "quantization_ignored_layers"
        message = "leaves layers as they are while others are quantised; --quantization says to what"
        raise UserError(field, f"{field}: {message}")
    kinds = {name: frozenset(_kinds(net, asked[name], options).items()) for name, net in nets.items()}
    shared = reduce(frozenset[Kind].__and__, (kinds[name] for name in experts))
    kinds |= dict.fromkeys(experts, shared)
    has_e4m3 = any(stored == TYPES["fp8"] for name in experts for _, (stored, _) in kinds[name])
    if has_e4m3 and _too_old(options, capability):
        kinds |= {name: frozenset(_without_e4m3(name, kinds[name])) for name in experts}
    kept = {name: each for name, each in kinds.items() if each}
    changed = {
        name: replace(nets[name], family=keeping(nets[name].family, each)) for name, each in kept.items()
    }
    for name, net in changed.items():
        log.info("%s: %d weights stay in %s", name, len(kept[name]), of(net.family.spec(net.config)))
    return dict(nets) | changed


def _asked(nets: Mapping[str, NetPlan[Record]], options: ModelOptions) -> dict[str, str | None]:
    """What each network's weights are to be quantised to: fp8, int8, none; None where nothing is asked."""
    own, field = options.component_quantizations, "component_quantizations"
    able = [name for name, net in nets.items() if next(matrices(net.family, net.config), None)]
    experts = [name for name, net in nets.items() if net.family.role == "dit"]
    for name in own:
        if name not in able:
            message = f"{name!r} is none of the components with layers to quantise: {', '.join(able)}"
            raise UserError(field, f"{field}: {message}{nearest(name, able)}")
    general = {
        name: options.quantization if name in experts or options.quantization == "none" else None
        for name in nets
    }
    of_experts = {own[name] for name in experts if name in own}
    if len(of_experts) > 1:
        message = f"{' and '.join(experts)} take turns with the same graph, so they take the same value"
        raise UserError(field, f"{field}: {message}; they are given {' and '.join(sorted(of_experts))}")
    return general | dict(own) | {name: each for name in experts for each in of_experts}


def _without_e4m3(name: str, kinds: frozenset[Kind]) -> Iterator[Kind]:
    """The weights of a denoiser that are not decoded because Triton has no float8_e4m3fn for this GPU."""
    yield from (each for each in kinds if each[1][0] != "float8_e4m3fn")
    if any(each[1][0] == "float8_e4m3fn" for each in kinds):
        log.info("%s: its fp8 weights are decoded, for torch.compile cannot read them on this GPU", name)


def _too_old(
    options: ModelOptions, capability: Callable[[], tuple[int, int] | None]
) -> tuple[int, int] | None:
    """The compute capability of a GPU for which torch.compile, which is asked for, cannot read e4m3."""
    have = capability() if options.enable_torch_compile else None
    return have if have is not None and have < E4M3_SINCE else None


def of(rows: Iterable[Row]) -> str | None:
    """What users call the types in which weights stay; None where none does."""
    return named(row.stored for row in rows if row.stored is not None)


def named(types: Iterable[str]) -> str | None:
    """The same for types as in `Row.stored`, that of most weights first."""
    counts = Counter(NAMES.get(each, each) for each in types)
    return " and ".join(sorted(counts, key=lambda name: (-counts[name], name))) or None


def _kinds(net: NetPlan[Record], asked: str | None, options: ModelOptions) -> dict[str, tuple[str, int]]:
    """How each weight of a network stays that does not stay in the network's own type."""
    if asked == "none":
        return {}
    found: dict[str, tuple[str, int]] = {}
    if net.component.files is not None:
        with suppress(UserError):  # loading tells it, with all there is to tell
            found = held(net.family, net.config, net.component.files, net.keys, options.variant)
    if asked is None:
        return found
    able = {row.name for row in matrices(net.family, net.config)}
    ignored = options.quantization_ignored_layers if net.family.role == "dit" else ()
    made = able - _ignored(able, ignored)
    return {name: (TYPES[asked], 1) for name in made} | found


def held(
    family: Record, config: object, files: Path, keys: KeyMap, variant: str | None = None
) -> dict[str, tuple[str, int]]:
    """The matrices of a network's blocks that stay as its files have them. UserError for broken ones."""
    able = {row.name: row for row in matrices(family, config)}
    if not able:
        return {}
    own: Kinds = kept_kinds(files, family.spec(config), keys, variant)
    return {name: own[name] for name in own.keys() & able.keys() if _divides(able[name], *own[name])}


def matrices(family: Record, config: object) -> Iterator[Row]:
    """The matrices of the blocks of a denoiser or an encoder, which `ops.linear` alone reads."""
    rows = list(family.spec(config))
    if isinstance(family, Denoiser):
        blocks = {prefix for _, prefix in family.blocks(config)}
    else:
        blocks = numbered(rows) if isinstance(family, Encoder) else {}
    for row in rows:
        is_matrix = row.name.endswith(".weight") and len(row.shape) == 2 and not row.float32
        if is_matrix and block_of(row, blocks) is not None:
            yield row


def _divides(row: Row, stored: str, groups: int) -> bool:
    """Whether no block and no group of one scale crosses the parts of a row that ranks share, nor the heads
    where a group has its own leaf.
    """
    cuts = row.parts if row.split == 1 else ()
    if stored in PACKED:
        return not any(cut % PACKED[stored][0] for cut in (row.shape[1], *cuts))
    width = row.shape[1] // groups
    heads = (row.head,) if row.split == 1 and row.head > 1 else ()
    return groups == 1 or not any(cut % width for cut in (row.shape[1], *cuts, *heads))


def _ignored(names: Collection[str], patterns: Iterable[str]) -> set[str]:
    """The weights whose layers have one of these in their names. Raises UserError for one that none has."""
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name.removesuffix(".weight"), f"*{pattern}*")}
        if not matched:
            field = "quantization_ignored_layers"
            parts = {part for name in names for part in name.split(".")[:-1]}
            message = f"{pattern!r} is in the name of no layer that is quantised{nearest(pattern, parts)}"
            raise UserError(field, f"{field}: {message}")
        found |= matched
    return found


@lru_cache(maxsize=64)
def keeping(family: R, kinds: frozenset[Kind]) -> R:
    """The family with these weights quantised.

    Equal arguments give one object, so that equal networks share compiled graphs.
    """
    stays = dict(kinds)

    def spec(config: object) -> Iterator[Row]:
        for row in family.spec(config):
            if row.name in stays:
                yield from kept_rows(row, *stays[row.name])
            else:
                yield row

    return replace(family, spec=spec)
