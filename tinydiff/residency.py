"""Where the weights of each component live: on the device, in the host's memory, or streamed by block.

`resolve` reads every option that speaks of it, in one place. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Literal, TypeVar

from tinydiff.entries import Entries
from tinydiff.records import UserError, check_known

V = TypeVar("V")
ModelOptions = Any
"""`config.ModelOptions`, whose fields have the names of the options."""
Kind = Literal["resident", "offloaded", "streamed"]
Policy = Literal["leading", "strided"]
PerformanceMode = Literal["manual", "auto", "speed", "memory"]
OnOom = Literal["degrade", "fail"]
Mode = Literal["resident", "component-offload", "layerwise-offload"]

KINDS: dict[str, Kind] = {
    "resident": "resident",
    "component-offload": "offloaded",
    "layerwise-offload": "streamed",
}
"""SGLang's modes of a component."""
ROLES = ("dit", "text_encoder", "image_encoder", "vae")
"""Groups of components, named by their role."""
SWITCHES: tuple[tuple[str, str, Kind], ...] = (
    ("dit_cpu_offload", "dit", "offloaded"),
    ("text_encoder_cpu_offload", "text_encoder", "offloaded"),
    ("image_encoder_cpu_offload", "image_encoder", "offloaded"),
    ("vae_cpu_offload", "vae", "offloaded"),
    ("dit_layerwise_offload", "dit", "streamed"),
)
"""Options of a group of components: (name, role, the kind that it asks for)."""
LISTS: tuple[tuple[str, Kind], ...] = (
    ("cpu_offload_components", "offloaded"),
    ("layerwise_offload_components", "streamed"),
)
"""Options that list components."""
DEFAULT_STREAMED = ("text_encoder", "image_encoder", "vae")
"""What `default` means in layerwise_offload_components."""


CONFLICTS: Mapping[str, tuple[Literal["refused"] | None, str]] = {
    "enable_torch_compile": (None, "torch's loop operator needs all weights on the device: each kind of "
                             "block is compiled alone, and a Python loop runs around them"),
    "use_fsdp_inference": ("refused", "its weights are sharded by use_fsdp_inference"),
    "lora_merge_mode": ("refused", "offloaded weights stay as they are stored; use dynamic"),
}  # fmt: skip
"""Option that does not go with a denoiser that is streamed or offloaded -> (refused, or None where something
else runs instead; why, or what)."""


@dataclass(frozen=True)
class Residency:
    """Where one component's weights live.

    resident: on the device. offloaded: on the device while the component runs. streamed: block by block.
    """

    kind: Kind = "resident"
    resident_blocks: int = 0
    """Blocks of a streamed component that stay on the device."""
    policy: Policy = "leading"
    """Which: the first ones, or evenly spaced ones."""
    prefetch: int = 1
    """Blocks that are fetched while one computes."""
    option: str = ""
    """The option that asked for it; empty where none did."""

    def streams(self, blocks: int) -> list[int]:
        """The numbers of the blocks that are not on the device all the time."""
        if self.kind != "streamed":
            return []
        kept = self.resident_blocks
        if self.policy == "leading":
            return list(range(kept, blocks))
        resident = {i * blocks // kept for i in range(kept)}
        return [i for i in range(blocks) if i not in resident]


@dataclass(frozen=True)
class Claim:
    """What one option says of one component. kind: None where it says only that it is not `without`."""

    option: str
    kind: Kind | None
    without: Kind | None = None


def resolve(
    options: ModelOptions, roles: Mapping[str, str], blocks: Mapping[str, int]
) -> dict[str, Residency]:
    """The residency of every component.

    Raises UserError for a component that is not there and for contradictions.

    roles: component -> its role. blocks: component -> how many blocks it has.
    """
    claims: dict[str, list[Claim]] = {name: [] for name in roles}
    for name, claim in _claims(options, roles):
        claims[name].append(claim)
    settled = {name: _settled(name, each) for name, each in claims.items()}
    return {name: _tuned(name, each, options, roles, blocks[name]) for name, each in settled.items()}


def excluded(options: ModelOptions, roles: Mapping[str, str]) -> dict[str, set[Kind]]:
    """Component -> the kinds that an option rules out."""
    ruled_out: dict[str, set[Kind]] = {name: set() for name in roles}
    for name, claim in _claims(options, roles):
        if claim.without is not None:
            ruled_out[name].add(claim.without)
    return ruled_out


def smallest(
    residencies: Mapping[str, Residency], ruled_out: Mapping[str, set[Kind]], blocks: Mapping[str, int]
) -> dict[str, Residency]:
    """The residencies of performance_mode memory: what no option asks for is streamed, or else offloaded."""

    def chosen(name: str, where: Residency) -> Residency:
        if where.option:
            return where
        kinds: tuple[Kind, ...] = ("streamed", "offloaded") if blocks[name] > 1 else ("offloaded",)
        left: list[Kind] = [kind for kind in kinds if kind not in ruled_out[name]]
        return Residency(left[0], option="performance_mode") if left else where

    return {name: chosen(name, where) for name, where in residencies.items()}


def _claims(options: ModelOptions, roles: Mapping[str, str]) -> Iterator[tuple[str, Claim]]:
    for option, role, kind in SWITCHES:
        value = getattr(options, option)
        members = [name for name in roles if roles[name] == role]
        if value and not members:
            raise UserError(option, f"{option}: the model has no {role.replace('_', ' ')}")
        if value is not None:
            claim = Claim(option, kind, None) if value else Claim(option, None, kind)
            yield from ((name, claim) for name in members)
    for option, kind in LISTS:
        words: tuple[str, ...] = getattr(options, option)
        named = _listed(option, words, roles)
        for name in roles if words else ():
            yield name, Claim(option, kind) if name in named else Claim(option, None, kind)
    for name, (key, mode) in _exact("component_residency", options.component_residency, roles).items():
        yield name, Claim(f"component_residency ({key})", KINDS[mode])


def _listed(option: str, words: Sequence[str], roles: Mapping[str, str]) -> set[str]:
    """The components that a list names, by their own names or by group."""
    named: set[str] = set()
    for word in words:
        if word == "default" and option == "layerwise_offload_components":
            named |= {name for name in roles if roles[name] in DEFAULT_STREAMED}
        elif word != "none":
            named |= set(_members(option, word, roles))
    if "none" in words and len(words) > 1:
        raise UserError(option, f"{option}: none cannot stand beside {words[words[0] == 'none']}")
    return named


def _members(option: str, word: str, roles: Mapping[str, str]) -> list[str]:
    if word == "all":
        return list(roles)
    if word in ROLES:
        if members := [name for name in roles if roles[name] == word]:
            return members
        raise UserError(option, f"{option}: the model has no {word.replace('_', ' ')}")
    check_known(option, word, [*roles, *(role for role in ROLES if role not in roles), "all"])
    return [word]


def _exact(option: str, values: Mapping[str, V], roles: Mapping[str, str]) -> dict[str, tuple[str, V]]:
    """Component -> (the key that speaks of it, its value): its own name before its group before `all`."""
    chosen: dict[str, tuple[str, V]] = {}
    rank = {"all": 0} | dict.fromkeys(ROLES, 1)
    for key, value in sorted(values.items(), key=lambda pair: rank.get(pair[0], 2)):
        for name in _members(option, key, roles):
            if name not in chosen or chosen[name][0] != name:
                chosen[name] = key, value
    return chosen


def _settled(name: str, claims: Sequence[Claim]) -> Residency:
    asked = [claim for claim in claims if claim.kind is not None]
    if not asked:
        return Residency()
    first = asked[0]
    for other in claims:
        if other.kind not in (None, first.kind) or other.without == first.kind:
            option = first.option.partition(" ")[0]
            says = f"not {other.without}" if other.kind is None else other.kind
            message = f"{name} is {first.kind} by {first.option} and {says} by {other.option}"
            raise UserError(option, f"{option}: {message}; leave one of them out")
    assert first.kind is not None
    return Residency(first.kind, option=first.option.partition(" ")[0])


def _tuned(
    name: str, residency: Residency, options: ModelOptions, roles: Mapping[str, str], blocks: int
) -> Residency:
    """The residency with its numbers of blocks."""
    own = {
        "prefetch": ("layerwise_prefetch_size", "dit_offload_prefetch_size"),
        "resident_blocks": ("layerwise_resident_layers", "dit_layerwise_resident_layers"),
        "policy": ("layerwise_residency_policy", "dit_layerwise_residency_policy"),
    }
    for field, (by_component, of_dit) in own.items():
        values_of: Entries = getattr(options, by_component)
        values = _exact(by_component, values_of, roles)
        option, value = by_component, values[name][1] if name in values else None
        if value is None and roles[name] == "dit":
            option, value = of_dit, getattr(options, of_dit)
        if value is None:
            continue
        if residency.kind != "streamed":
            hint = "dit_layerwise_offload" if roles[name] == "dit" else "layerwise_offload_components"
            raise UserError(option, f"{option}: {name} is not streamed by block; add {hint}")
        if field == "policy":
            residency = replace(residency, policy=value)
        elif field == "prefetch":
            residency = replace(residency, prefetch=_count(option, name, value, blocks) or 1)
        else:
            residency = replace(residency, resident_blocks=_count(option, name, value, blocks))
    if residency.kind == "streamed" and blocks == 0:
        raise UserError(residency.option, f"{residency.option}: {name} has no blocks to stream")
    return residency


def _count(option: str, name: str, value: float, blocks: int) -> int:
    """A number of blocks; below 1, a share of them."""
    if 0 < value < 1:
        return ceil(value * blocks)
    if value != int(value):
        message = f"{value:g} is neither a whole number of blocks nor a share below 1"
        raise UserError(option, f"{option}: {message}")
    if value >= blocks:
        raise UserError(option, f"{option}: {value:g} must be below {blocks}, the number of blocks of {name}")
    return int(value)
