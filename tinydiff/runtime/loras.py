"""LoRA adapters of a model: from the options that name them to differences in its networks.

An adapter is merged into the weights, or stays beside them (`runtime.adapters`), where each request may give
it another strength.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinydiff.config import ModelOptions
from tinydiff.entries import Entries
from tinydiff.io import hub
from tinydiff.io.lora import Adapter, Component, read_adapter
from tinydiff.models import registry
from tinydiff.models.family import Record
from tinydiff.models.layouts.recognise import key_maps
from tinydiff.models.recipe import Net
from tinydiff.parallel.plan import decoded_row
from tinydiff.records import UserError, nearest
from tinydiff.runtime import adapters
from tinydiff.runtime.components import SHIPPED
from tinydiff.runtime.net_plan import Described

log = logging.getLogger(__name__)

Mode = Literal["auto", "merge", "dynamic"]

DISTILLED = "distilled"
"""Name of the adapter of the second stage."""
USUAL_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Names that diffusers and peft give to the one file of an adapter."""


@dataclass(frozen=True)
class Chosen:
    """An adapter as the options name it."""

    name: str
    source: str
    """The path or hub id that was given."""
    file: Path
    strength: float
    target: str
    """The component that it changes; "all" takes every one that it fits."""
    alpha: float | None = None
    lenient: bool = False
    refines: bool = False
    """Whether it is meant for the second stage alone."""


@dataclass(frozen=True)
class Read:
    """An adapter that was read for a model's components."""

    chosen: Chosen
    adapter: Adapter


@dataclass(frozen=True)
class Attached:
    """An adapter in a loaded model."""

    chosen: Chosen
    layout: str
    """How its file names the layers, in words."""
    layers: Mapping[str, int]
    """Component -> how many of its weights are changed."""
    merged: bool
    """Whether it is in the weights; else each request may choose its strength."""


def chosen(options: ModelOptions) -> tuple[Chosen, ...]:
    """The adapters that the options name, their files found. Raises UserError."""
    count = len(options.lora_path)
    for field, most in (("lora_nickname", count), ("lora_weight_name", count), ("lora_target", count)):
        if len(values := getattr(options, field)) > most:
            raise UserError(field, f"{field}: {len(values)} are given for {count} adapters (lora_path)")
    if not count and options.lora_scale != ModelOptions().lora_scale:
        raise UserError("lora_scale", "lora_scale: is given without an adapter; --lora-path names one")
    if len(options.lora_scale) not in {1, count}:
        message = (
            f"{len(options.lora_scale)} are given for {count} adapters (lora_path); give one, or one for each"
        )
        raise UserError("lora_scale", f"lora_scale: {message}")
    names = [*options.lora_nickname, *_defaults(len(options.lora_nickname), count)]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise UserError(
            "lora_nickname", f"lora_nickname: {twice!r} names two adapters; give each its own name"
        )
    both = tuple(
        Chosen(
            name=names[i],
            source=source,
            file=adapter_file(source, _nth(options.lora_weight_name, i)),
            strength=options.lora_scale[i if len(options.lora_scale) > 1 else 0],
            target=_nth(options.lora_target, i) or "all",
            alpha=options.lora_alpha,
            lenient=options.lora_lenient,
        )
        for i, source in enumerate(options.lora_path)
    )
    return both if options.distilled_lora_path is None else (*both, _refining(options, names))


def _refining(options: ModelOptions, others: Sequence[str]) -> Chosen:
    """The adapter of the second stage. Raises UserError."""
    if DISTILLED in others:
        message = f"{DISTILLED!r} is the adapter of distilled_lora_path; give the other one another name"
        raise UserError("lora_nickname", f"lora_nickname: {message}")
    if "spatial_upsampler" not in options.component_paths:
        message = "changes the second stage alone, and there is none; name an upsampler"
        raise UserError(
            "distilled_lora_path", f"distilled_lora_path: {message} with --spatial-upsampler-path"
        )
    source = str(options.distilled_lora_path)
    file = adapter_file(source, field="distilled_lora_path")
    return Chosen(DISTILLED, source, file, 1.0, "all", options.lora_alpha, options.lora_lenient, refines=True)


def _defaults(first: int, count: int) -> Iterator[str]:
    for number in range(first, count):
        yield "default" if number == 0 else f"default_{number + 1}"


def _nth(values: Sequence[str], index: int) -> str | None:
    return values[index] if index < len(values) else None


def adapter_file(source: str, weight_name: str | None = None, field: str = "lora_path") -> Path:
    """The safetensors file of an adapter.

    It is given as a file, a directory, a hub id, or a hub id and a file as `id:file`. field: the option that
    gives it. Raises UserError.
    """
    path = hub.file(source, field)
    if path is not None:
        if weight_name is not None and weight_name != path.name:
            message = f"{weight_name!r} is given, but {field} {source!r} is one file"
            raise UserError("lora_weight_name", f"lora_weight_name: {message}")
        return path
    only = () if weight_name is None else (weight_name, "adapter_config.json")
    own = source == registry.SHIPPED
    directory = SHIPPED / "loras" if own else hub.resolve(source, field=field, only=only)
    files = {str(file.relative_to(directory)): file for file in sorted(directory.rglob("*.safetensors"))}
    if weight_name is not None:
        if weight_name not in files:
            hint = nearest(weight_name, files)
            raise UserError("lora_weight_name", f"lora_weight_name: {source!r} has no {weight_name!r}{hint}")
        return files[weight_name]
    if not files:
        raise UserError(field, f"{field}: {source!r} has no *.safetensors file")
    usual = [files[name] for name in USUAL_FILES if name in files]
    if len(files) > 1 and len(usual) != 1:
        names = ", ".join([*files][:5]) + (", ..." if len(files) > 5 else "")
        message = f"{source!r} has {len(files)} files; choose one with lora_weight_name: {names}"
        if field != "lora_path":
            message = f"{source!r} has {len(files)} files; name one, as in {source}:{next(iter(files))}"
        raise UserError(field, f"{field}: {message}")
    return usual[0] if usual else next(iter(files.values()))


def attach(
    nets: Mapping[str, Net[Record]], read: Sequence[Read], mode: Mode = "auto", prefer_merged: bool = False
) -> tuple[dict[str, Net[Record]], dict[str, Attached]]:
    """Networks with adapters, in place of those that were beside their weights.

    mode: as the option lora_merge_mode. prefer_merged: what auto does where both can be done.
    Raises UserError for an adapter that does not fit, or cannot be attached in that mode.
    """
    changed, attached = dict(nets), dict[str, Attached]()
    beside: dict[str, dict[str, adapters.Differences]] = {name: {} for name in nets}
    for each, adapter in ((one.chosen, one.adapter) for one in read):
        if each.refines and mode == "merge":
            message = f"{each.name!r} changes the second stage alone, so it cannot be merged into the weights"
            raise UserError("lora_merge_mode", f"lora_merge_mode: {message}")
        merge = only_merges(each, adapter, "dynamic" if each.refines else mode) or mode == "merge"
        if (quantised := _quantised(adapter, changed)) is not None and merge:
            message = (
                f"{each.name!r} changes {quantised}, whose weights stay quantised, so it cannot be merged"
            )
            raise UserError(
                "lora_merge_mode", f"lora_merge_mode: {message}; --quantization none decodes them"
            )
        absent = next((name for name in adapter.targets if changed[name].absent), None)
        if merge and absent is not None:
            message = f"the weights of {absent} are offloaded, so {each.name!r} cannot be merged into them"
            raise UserError("lora_merge_mode", f"lora_merge_mode: {message}")
        stays = merge or each.refines or quantised is not None or absent is not None
        if mode == "auto" and prefer_merged and not stays:
            merge = not _rounds_away(each, adapter, changed)
        for component, differences in adapter.targets.items():
            if merge:
                changed[component] = adapters.merged(changed[component], differences, each.strength)
            else:
                beside[component][each.name] = differences
        layers = {component: len(differences) for component, differences in adapter.targets.items()}
        attached[each.name] = Attached(each, adapter.layout, layers, merge)
        how = "merged" if merge else "dynamic"
        log.info("LoRA %s, %s; strength %g, %s", each.name, adapter.summary(), each.strength, how)
    for component, named in beside.items():
        if named or changed[component].adapters:
            changed[component] = adapters.beside(changed[component], named)
    return changed, attached


def read(each: Chosen, nets: Mapping[str, Described]) -> Read:
    """Read an adapter's file for the components that it may change. Raises UserError."""
    can = {name: net for name, net in nets.items() if net.family.role in ("dit", "text_encoder")}
    if each.target not in ("all", *can):
        names = ("all", *can)
        message = f"{each.target!r} is not one of {', '.join(names)}{nearest(each.target, names)}"
        raise UserError("lora_target", f"lora_target: {message}")
    components = {name: _component(net) for name, net in can.items()}
    targets = None if each.target == "all" else [each.target]
    adapter = read_adapter(each.file, components, alpha=each.alpha, lenient=each.lenient, targets=targets)
    if adapter.unmatched:
        count, keys = len(adapter.unmatched), ", ".join(adapter.unmatched)
        log.warning("LoRA %s: %d keys match no weight and are ignored: %s", each.name, count, keys)
    return Read(each, adapter)


def _component(net: Described) -> Component:
    rows = {row.name: row for row in map(decoded_row, net.family.spec(net.config))}
    own = net.family.keys(net.config)
    spellings = (own,) if any(line.alias for line in own.lines) else ()
    return Component(net.family.role, rows, (*key_maps(net.family, net.config), *spellings))


def _quantised(adapter: Adapter, nets: Mapping[str, Net[Record]]) -> str | None:
    """A layer that an adapter changes whose weights are not in the network's own type; None without one."""
    for component, differences in adapter.targets.items():
        for row in nets[component].rows:
            if row.stored is not None and (name := decoded_row(row).name) in differences:
                return name.removesuffix(".weight")
    return None


def only_merges(each: Chosen, adapter: Adapter, mode: Mode = "dynamic") -> bool:
    """Whether an adapter can only be merged, not stay beside the weights.

    Raises UserError where `mode` asks for what it cannot be.
    """
    whole = next((name for part in adapter.targets.values() for name in part if not _stays(part, name)), None)
    if whole is not None and mode == "dynamic":
        message = f"{each.name!r} changes {whole} by more than a low-rank product, so it can only be merged"
        raise UserError("lora_merge_mode", f"lora_merge_mode: {message}")
    return whole is not None


def _stays(differences: adapters.Differences, name: str) -> bool:
    return name.endswith("weight") and differences[name].low_rank() is not None


def _rounds_away(each: Chosen, adapter: Adapter, nets: Mapping[str, Net[Record]]) -> bool:
    for component, differences in adapter.targets.items():
        lost = adapters.rounded_away(nets[component], differences, each.strength)
        if lost > adapters.ROUNDED_AWAY:
            log.info("LoRA %s: merging would round %d %% of it away", each.name, 100 * lost)
            return True
    return False


def for_request(
    nets: Mapping[str, Net[Record]], attached: Mapping[str, Attached], loras: Mapping[str, float]
) -> Mapping[str, Net[Record]]:
    """The networks as one request sees them.

    loras: the strengths that it asks for; without any, each adapter has its own.
    Raises UserError for an adapter that is not loaded, or that is in the weights.
    """
    for name in (name for name, strength in loras.items() if strength):
        if name not in attached:
            raise UserError("loras", f"loras: {unknown(name, attached)}")
        if attached[name].merged:
            message = f"{name!r} is merged into the weights, so its strength is fixed"
            raise UserError("loras", f"loras: {message}; load the model with --lora-merge-mode dynamic")
    asked = strengths(attached, loras)
    return {name: adapters.with_strengths(net, asked) for name, net in nets.items()}


def strengths(attached: Mapping[str, Attached], loras: Mapping[str, float]) -> dict[str, float]:
    """The strength of each adapter for a request that asks for `loras`."""
    merged = {name: each.chosen.strength for name, each in attached.items() if each.merged}
    own = _own(attached)
    return {name: strength for name, strength in (merged | (dict(loras) or own)).items() if strength}


def _own(attached: Mapping[str, Attached], refines: bool = False) -> dict[str, float]:
    """The strengths that adapters beside the weights were loaded with: those of all stages, or of the second
    alone.
    """
    beside = {name: each.chosen for name, each in attached.items() if not each.merged}
    return {name: each.strength for name, each in beside.items() if each.refines == refines}


def refining(
    attached: Mapping[str, Attached], loras: Mapping[str, float], asked: Mapping[str, float]
) -> dict[str, float]:
    """The strength of each adapter in the second stage. loras: what the request asks for in the first. asked:
    what it asks for in the second.
    """
    return dict(asked) or ((dict(loras) or _own(attached)) | _own(attached, refines=True))


def unknown(name: str, names: Entries | Sequence[str]) -> str:
    """The sentence for an adapter that is not loaded."""
    loaded = f"loaded are {', '.join(names)}" if names else "none is loaded; see --lora-path"
    return f"{name!r} is no adapter of this model; {loaded}{nearest(name, names)}"
