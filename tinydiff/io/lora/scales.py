"""The scale of an adapter's layers: from its tensors, its metadata, or the configuration beside the file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

Config = Mapping[str, object]
"""A configuration of PEFT."""

GLOBAL = ("lora_alpha", "network_alpha", "alpha")
"""Entries of a file's metadata that hold one alpha for all layers."""


@dataclass(frozen=True)
class Scales:
    """How strong a file's layers are, as far as it is not in the tensors.

    configs: PEFT's, by component; "" is that of all. alpha: of all layers. own: whether `alpha` stands in the
    file.
    """

    configs: Mapping[str, Config]
    alpha: float | None = None
    own: bool = False

    def rank(self, component: str, module: str) -> int | None:
        """The rank that PEFT's configuration gives a layer."""
        config = self.config(component)
        found = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
        return None if found is None else int(number(found, f"r of {module}"))

    def configured(self, component: str, module: str, rank: int) -> float | None:
        """The scale of a layer whose tensors have no alpha, as configured; None where nothing says it."""
        config = self.config(component)
        alpha = _by_pattern(
            config.get("alpha_pattern"), module, config.get("lora_alpha", config.get("alpha"))
        )
        if alpha is not None:
            alpha = number(alpha, f"lora_alpha of {module}")
            return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return None if self.alpha is None else self.alpha / rank

    def config(self, component: str) -> Config:
        """PEFT's configuration of a component."""
        return self.configs.get(component, self.configs.get("", {}))


def read(file: Path, metadata: Mapping[str, str], alpha: float | None) -> Scales:
    """What the metadata and `adapter_config.json` beside the file say.

    alpha: of files that record none. ValueError for what is not a number or not JSON.
    """
    configs = _configs(metadata.get("lora_adapter_metadata"), "lora_adapter_metadata")
    beside = file.parent / "adapter_config.json"
    if not configs and beside.is_file():
        try:
            text = beside.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"adapter_config.json beside it cannot be read ({error})") from error
        configs = {"": _object(text, "adapter_config.json beside it")}
    for name in GLOBAL:
        if name in metadata:
            return Scales(configs, number(metadata[name], f"{name} of its metadata"), own=True)
    return Scales(configs, alpha)


def of_tensor(alpha: Tensor, module: str) -> float:
    """The number in an alpha tensor. ValueError where it has none."""
    if alpha.numel() != 1:
        raise ValueError(f"alpha of {module} has the shape {tuple(alpha.shape)}, not that of one number")
    return number(alpha.item(), f"alpha of {module}")


def number(value: object, what: str) -> float:
    """A finite number. ValueError naming what it is not."""
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found) or isinstance(value, bool):
        raise ValueError(f"{what} is {value!r}, not a number")
    return found


def _by_pattern(patterns: object, module: str, usual: object) -> object:
    if isinstance(patterns, Mapping):
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise ValueError(f"alpha_pattern {pattern!r} is no regular expression ({error})") from error
    return usual


def _configs(text: str | None, what: str) -> dict[str, Config]:
    """The entries of diffusers' metadata, `transformer.r`, by component."""
    configs: dict[str, dict[str, object]] = {}
    for name, value in _object(text, what).items() if text else ():
        component, _, entry = name.rpartition(".")
        configs.setdefault(component, {})[entry] = value
    return dict(configs)


def _object(text: str, what: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{what} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} is not a JSON object")
    return found
