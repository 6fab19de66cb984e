"""The layers of a component under every name that a LoRA file may give them.

Underscored names cannot be taken apart (`attn_to_out_0`), so every name of the component is underscored and
looked up: its own, and those of each layout in which files hold its weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tinydiff.keymap import SAME, KeyMap, Match, Run, Shape, runs, stored_shapes
from tinydiff.parallel.plan import Row

_LEAVES = {
    "weight": ("_weight", "_scale", ""),
    "bias": ("_bias",),
    "modulation": ("_modulation", "_scale_shift_table"),
}
"""What is changed -> how the names of such tensors end."""


class Site(NamedTuple):
    """A tensor that a name of the file means.

    shape: its shape. runs: of what each row of the spec is made. own: whether it has the spec's own name.
    """

    shape: Shape
    runs: Mapping[str, tuple[Run, ...]]
    own: bool


@dataclass(frozen=True)
class Component:
    """A network that an adapter may change.

    role: "dit" or "text_encoder". rows: of its spec, by name. layouts: in which files hold it.
    """

    role: str
    rows: Mapping[str, Row]
    layouts: tuple[KeyMap, ...] = ()

    def find(self, stem: str) -> dict[str, Site]:
        """What the name of a layer means: "weight", "bias" and "modulation", those that it has."""
        flat = stem.replace(".", "_")
        if found := {leaf: site for leaf in _LEAVES if (site := self._site(flat, leaf))}:
            return found
        part = re.fullmatch(r"(.+)_(?:(\d+)|qkv)", flat)
        if part is None:
            return {}
        chosen = slice(int(part[2]), int(part[2]) + 1) if part[2] else slice(0, 3)
        return {leaf: site for leaf in _LEAVES if (site := self._part(part[1], leaf, chosen))}

    def _site(self, flat: str, leaf: str) -> Site | None:
        for end in _LEAVES[leaf]:
            if match := self._index.get(flat + end):
                key = next(key for key in match.keys if key.replace(".", "_") == flat + end)
                pieces = {
                    name: tuple(run for run in each if run.key == key)
                    for name, each in runs(match, self.rows).items()
                }
                shape = stored_shapes(match, self.rows)[key]
                return Site(shape, {name: each for name, each in pieces.items() if each}, match.line is SAME)
        return None

    def _part(self, flat: str, leaf: str, chosen: slice) -> Site | None:
        """Some rows of a fused layer, which the file holds by themselves."""
        for end in _LEAVES[leaf]:
            match = self._index.get(flat + end)
            if match and len(match.rows) > 1 and match.rows[chosen]:
                part = Match(match.keys, match.rows[chosen], match.line)
                return Site(stored_shapes(part, self.rows)[match.keys[0]], runs(part, self.rows), False)
        return None

    @cached_property
    def _index(self) -> dict[str, Match]:
        """Underscored name -> where it belongs."""
        index = {name.replace(".", "_"): Match((name,), (name,), SAME) for name in self.rows}
        for keys in self.layouts:
            aliases = (KeyMap((line._replace(alias=False),)) for line in keys.lines if line.alias)
            for spelling in (keys, *aliases):
                for name in self.rows:
                    match = spelling.of_row(name)
                    turned = match.line.transposed or match.line.interleaved
                    if not turned and all(row in self.rows for row in match.rows):
                        for key in match.keys:
                            index.setdefault(key.replace(".", "_"), match)
        return index
