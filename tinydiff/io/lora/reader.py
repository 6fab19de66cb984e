"""From a LoRA file to the differences of a model's weights.

So far: the layout of diffusers and peft, `transformer.MODULE.lora_A.weight`, with the modules named as the
model's own weights are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinydiff.io.lora.differences import Difference, LowRank
from tinydiff.parallel.plan import Row
from tinydiff.records import UserError

Component = tuple[Any, Any]
"""(record of the family, its config)."""

_HALF = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.\w+)?\.weight")


@dataclass(frozen=True)
class Adapter:
    """A LoRA file, read for one model."""

    layout: str
    """How the file names the layers, in words."""
    targets: Mapping[str, Mapping[str, Difference]]
    """Component -> name of a weight -> what is done to it."""
    unmatched: tuple[str, ...] = ()
    """Keys of the file that fit nothing of the model; only in lenient reading there are any."""


def read_adapter(
    file: Path, components: Mapping[str, Component], alpha: float | None = None, lenient: bool = False
) -> Adapter:
    """Read a LoRA file for a model's components, by name.

    alpha: of files that record none. lenient: keys that fit nothing are returned and not refused.
    Raises UserError for a file that is broken or does not fit.
    """
    tensors = _tensors(file)
    rows = {name: {row.name: row for row in record.spec(c)} for name, (record, c) in components.items()}
    pairs: dict[str, dict[str, dict[str, Tensor]]] = {name: {} for name in components}
    unmatched = []
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            continue
        matched = [name for name in components if _place(name, key, rows[name]) is not None]
        for name in matched:
            module, half = _place(name, key, rows[name]) or ("", "")
            pairs[name].setdefault(module, {})[half] = tensor
        if not matched:
            unmatched.append(key)
    if unmatched and not lenient:
        names = ", ".join(unmatched[:5]) + (", ..." if len(unmatched) > 5 else "")
        message = f"{str(file)!r} does not fit the model: {len(unmatched)} keys match no weight ({names})"
        raise UserError("lora_path", f"lora_path: {message}")
    targets = {
        name: {f"{module}.weight": _low_rank(file, module, halves, alpha) for module, halves in found.items()}
        for name, found in pairs.items()
        if found
    }
    return Adapter("diffusers", targets, tuple(unmatched))


def _place(component: str, key: str, rows: Mapping[str, Row]) -> tuple[str, str] | None:
    """(module, A or B) of a key in a component; None where it has no such weight."""
    match = _HALF.fullmatch(key)
    if match is None:
        return None
    module = match["module"].removeprefix(f"{component.removesuffix('_2')}.")
    return (module, match["half"]) if f"{module}.weight" in rows else None


def _low_rank(file: Path, module: str, halves: Mapping[str, Tensor], alpha: float | None) -> LowRank:
    if halves.keys() != {"A", "B"}:
        raise UserError("lora_path", f"lora_path: {str(file)!r} has half a pair only for {module}")
    a, b = halves["A"].flatten(1), halves["B"].flatten(1)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise UserError("lora_path", f"lora_path: {str(file)!r} has values that are not numbers in {module}")
    return LowRank(a, b, 1.0 if alpha is None else alpha / len(a))


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
            return {key: opened.get_tensor(key).to(torch.float32) for key in keys}
    except (SafetensorError, OSError) as error:
        message = f"{str(file)!r} is truncated or not a safetensors file ({error})"
        raise UserError("lora_path", f"lora_path: {message}") from error
