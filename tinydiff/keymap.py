"""Where the weights of a network stand in a file of another layout: a table, read in both directions.

No torch.

A layout is a tuple of `Line`s. A line says: these stored tensors, one behind the other along their first
dimension, are these rows of the family's `spec`, one behind the other. So a fused projection is one name on
the stored side and three on the other, two halves of a gate are two and one, and a swap is a line of its own
kind. Names are those of a module or of a tensor: a line holds for the tensor of that name and for all below
it, and `*` stands for a number, the same on both sides. The first line that fits counts. A name that no line
has is the same on both sides.

    LINES = (
        moved("img_in", "x_embedder"),
        *under("double_blocks.*", "transformer_blocks.*",
               fused("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
               moved("img_attn.norm.query_norm.scale", "attn.norm_q.weight")),
        swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
        unread("norm_final"),
    )
    keys = KeyMap(LINES, prefix="model.diffusion_model.")
    keys.of_key("model.diffusion_model.double_blocks.3.img_attn.qkv.weight").rows  # three rows
    keys.of_row("transformer_blocks.3.attn.to_k.weight").keys                      # the one stored key
    runs(match, rows)["transformer_blocks.3.attn.to_k.weight"]                     # rows h:2h of it

`io.weights.load_weights(..., keys=keys)` reads a file by it and `io.weights.exported` writes one. The tables
are in `models/layouts`; `models.layouts.recognise` finds the one that a file has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from tinydiff.parallel.plan import Row

Shape = tuple[int, ...]


class Line(NamedTuple):
    """These stored tensors are these rows. No rows: what is stored there is known and not read.

    swapped: what is stored is the second half of the row, then the first. lead, ones: dimensions of length
    one that the stored tensor has more at its beginning and at its end. transposed: its two dimensions are
    the other way round. interleaved: width of the heads along the first dimension whose two halves are
    stored entry by entry in turns. alias: another spelling, which is read and never written.
    """

    stored: tuple[str, ...]
    rows: tuple[str, ...]
    swapped: bool = False
    lead: int = 0
    ones: int = 0
    transposed: bool = False
    interleaved: int = 0
    alias: bool = False


class Match(NamedTuple):
    """A line applied: the stored keys and the rows that they are."""

    keys: tuple[str, ...]
    rows: tuple[str, ...]
    line: Line


class Run(NamedTuple):
    """`size` entries along the first dimension.

    They are from `at` on in the stored tensor, and from `into` on in the row.
    """

    key: str
    at: int
    into: int
    size: int


SAME = Line((), ())
"""The line of a name that no line has."""


def moved(stored: str, row: str, *, lead: int = 0, ones: int = 0) -> Line:
    """One tensor under another name."""
    return Line((stored,), (row,), lead=lead, ones=ones)


def also(stored: str, row: str) -> Line:
    """Another spelling of a row, which is read and never written."""
    return Line((stored,), (row,), alias=True)


def fused(stored: str, *rows: str) -> Line:
    """Rows that are stored in one tensor, one behind the other."""
    return Line((stored,), rows)


def joined(stored: Iterable[str], row: str) -> Line:
    """A row that is stored in several equal tensors, one behind the other."""
    return Line(tuple(stored), (row,))


def swapped(stored: str, row: str) -> Line:
    """A row whose halves are stored the other way round."""
    return Line((stored,), (row,), swapped=True)


def transposed(stored: str, row: str) -> Line:
    """A matrix that is stored the other way round."""
    return Line((stored,), (row,), transposed=True)


def interleaved(stored: str, row: str, head: int) -> Line:
    """A row whose heads are stored with their halves in turns, as a rotary embedding of pairs wants them."""
    return Line((stored,), (row,), interleaved=head)


def unread(*stored: str) -> tuple[Line, ...]:
    """What is known and not read."""
    return tuple(Line((name,), ()) for name in stored)


def under(stored: str, row: str, *lines: Line) -> tuple[Line, ...]:
    """The lines with their stored names below one prefix and their rows below another."""
    return tuple(
        line._replace(
            stored=tuple(_below(stored, name) for name in line.stored),
            rows=tuple(_below(row, name) for name in line.rows),
        )
        for line in lines
    )


def _below(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


@dataclass(frozen=True)
class KeyMap:
    """A layout's lines, and what stands before every key of the component in the file."""

    lines: tuple[Line, ...] = ()
    prefix: str = ""

    def of_key(self, key: str) -> Match | None:
        """What a stored key is. None: it belongs to another component of the file."""
        if not key.startswith(self.prefix):
            return None
        name = key.removeprefix(self.prefix)
        return self._first(name, self._by_key) or Match((key,), (name,), SAME)

    def row(self, key: str) -> str | None:
        """The one row that a stored key is, in a layout that only renames. None: it is not read."""
        match = self.of_key(key)
        if match is None or not match.rows:
            return None
        (name,) = match.rows
        return name

    def of_row(self, name: str) -> Match:
        """Where a row stands."""
        return self._first(name, self._by_row) or Match((self.prefix + name,), (name,), SAME)

    def _first(self, name: str, index: Mapping[str, list[tuple[str, Line]]]) -> Match | None:
        for pattern, line in index.get(name.partition(".")[0], ()):
            if found := _regex(pattern).fullmatch(name):
                *numbers, below = found.groups(default="")
                keys = tuple(self.prefix + _filled(each, numbers) + below for each in line.stored)
                return Match(keys, tuple(_filled(each, numbers) + below for each in line.rows), line)
        return None

    @cached_property
    def _by_key(self) -> dict[str, list[tuple[str, Line]]]:
        return _index((name, line) for line in self.lines for name in line.stored)

    @cached_property
    def _by_row(self) -> dict[str, list[tuple[str, Line]]]:
        return _index((name, line) for line in self.lines if not line.alias for name in line.rows)


AS_IS = KeyMap()
"""Every row under its own name."""


def trimmed(shape: Shape, line: Line) -> Shape:
    """A stored shape in the dimensions of its rows."""
    return shape[line.lead : len(shape) - line.ones]


def stored_shapes(match: Match, rows: Mapping[str, Row]) -> dict[str, Shape]:
    """The shape that each stored tensor of a match must have."""
    shapes = [rows[name].shape for name in match.rows]
    shape = shapes[0]
    if len(shapes) > 1 or len(match.keys) > 1:
        shape = (sum(each[0] for each in shapes) // len(match.keys), *shape[1:])
    if match.line.transposed:
        shape = shape[::-1]
    return dict.fromkeys(match.keys, (1,) * match.line.lead + shape + (1,) * match.line.ones)


def runs(match: Match, rows: Mapping[str, Row]) -> dict[str, tuple[Run, ...]]:
    """Of what each row of a match is made. ValueError where the rows cannot lie in one tensor."""
    shapes = [rows[name].shape for name in match.rows]
    if len({shape[1:] for shape in shapes}) > 1:
        raise ValueError(f"{' and '.join(match.rows)} differ in more than their first dimension")
    if len(match.rows) == len(match.keys) == 1 and not match.line.swapped:
        return {match.rows[0]: (Run(match.keys[0], 0, 0, shapes[0][0] if shapes[0] else 1),)}
    width = sum(shape[0] for shape in shapes) // len(match.keys)
    made: dict[str, list[Run]] = {name: [] for name in match.rows}
    start = 0
    for name, into, size in _segments(match, shapes):
        for i, key in enumerate(match.keys):
            low, high = max(start, i * width), min(start + size, (i + 1) * width)
            if low < high:
                made[name].append(Run(key, low - i * width, into + low - start, high - low))
        start += size
    return {name: tuple(each) for name, each in made.items()}


def _segments(match: Match, shapes: list[Shape]) -> Iterator[tuple[str, int, int]]:
    """(row, from which entry, how many) in the order in which they are stored."""
    for name, shape in zip(match.rows, shapes, strict=True):
        half = shape[0] // 2
        if match.line.swapped:
            yield name, half, shape[0] - half
            yield name, 0, half
        else:
            yield name, 0, shape[0]


def stored_rows(keys: KeyMap, rows: Iterable[Row]) -> dict[str, Shape]:
    """The keys and shapes of a file in this layout that holds these rows."""
    wanted = {row.name: row for row in rows}
    shapes: dict[str, Shape] = {}
    for name in wanted:
        shapes |= stored_shapes(keys.of_row(name), wanted)
    return shapes


def _index(names: Iterable[tuple[str, Line]]) -> dict[str, list[tuple[str, Line]]]:
    """The lines by the first part of a name, so that a key is held against few of them."""
    index: dict[str, list[tuple[str, Line]]] = {}
    for name, line in names:
        index.setdefault(name.partition(".")[0], []).append((name, line))
    return index


@lru_cache(maxsize=4096)
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"(\d+)") + r"(\..+)?")


def _filled(pattern: str, numbers: list[str]) -> str:
    first, *rest = pattern.split("*")
    return first + "".join(number + part for number, part in zip(numbers, rest, strict=False))
