"""`tinydiff inspect`: what a file or directory is, what of it is missing, and which command runs it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tinydiff.records import UserError
from tinydiff.values import positional

if TYPE_CHECKING:
    from tinydiff.runtime.contents import Contents

NOTHING = (None, "", (), {}, 0)
"""Facts that are not known or do not apply."""


@dataclass(frozen=True)
class InspectOptions:
    """What is inspected, and how it is printed."""

    path: str = positional()
    """A model directory, a component, a file (safetensors, GGUF, a torch pickle), a directory of such files,
    or a hub id that is in the download cache."""
    json: bool = False
    """Print JSON."""


def run(options: InspectOptions) -> int:
    """Run the command. Raises UserError."""
    if not options.path:
        raise UserError("path", "path: is missing; give a file, a directory or a hub id")
    from tinydiff.runtime.contents import contents  # torch, for those who get here

    item = contents(options.path)
    if options.json:
        print(json.dumps(as_json(item), indent=2, ensure_ascii=False))
    else:
        print("\n".join(lines(item)))
    return 0


def as_json(item: Contents) -> dict[str, object]:
    """Every fact that is known."""
    return {name: _jsonable(value) for name, value in asdict(item).items() if value not in NOTHING}


def _jsonable(value: object) -> object:
    if isinstance(value, tuple):
        return [
            {name: _jsonable(each) for name, each in item.items() if each not in NOTHING}
            if isinstance(item, dict)
            else item
            for item in value
        ]
    return value


def lines(item: Contents) -> Iterator[str]:
    """The facts as lines, the parts as a table."""
    yield f"{item.path}: {item.kind}"
    facts = {
        "class": item.model_class,
        "role": item.role,
        "family": item.family,
        "looks like": ", ".join(item.models),
        "layout": item.layout,
        "prefix": item.prefix,
        "format": item.format,
        "precision": precision(item.precision),
        "in memory": f"linear layers stay in {item.quantised}" if item.quantised else "",
        "layers": str(item.layers) if item.layers else "",
        "ranks": ", ".join(map(str, item.ranks)),
        "size": f"{size(item.bytes)} in {count(item.tensors, 'tensor')}, {count(item.files, 'file')}"
        if item.tensors
        else "",
    }
    yield from (f"  {name:<12}{value}" for name, value in facts.items() if value)
    if item.parts:
        yield "  holds"
        yield from (f"    {line}" for line in _table([_cells(part) for part in item.parts]))
    for part in item.parts:
        yield from (f"  problem     {part.path}: {problem}" for problem in part.problems)
    for name, value in item.metadata.items():
        yield f"  metadata    {name}: {value}"
    yield from (f"  missing     {what}" for what in item.missing)
    yield from (f"  problem     {what}" for what in item.problems)
    if item.command:
        yield f"  run it      {item.command}"


def _cells(part: Contents) -> tuple[str, ...]:
    what = part.model_class or part.kind
    sizes = size(part.bytes) if part.bytes else "-"
    return (
        part.path,
        what,
        sizes,
        precision(part.precision) or "-",
        count(part.files, "file") if part.files else "-",
    )


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()


def precision(shares: Mapping[str, int]) -> str:
    """The types of the tensors, the one with most bytes first, with shares where there are several."""
    total = sum(shares.values())
    if len(shares) < 2 or not total:
        return "".join(shares)
    return ", ".join(f"{name} {100 * share / total:.1f} %" for name, share in shares.items())


def size(bytes_: int) -> str:
    """Bytes in the largest unit that keeps a number above 1."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if bytes_ >= scale:
            return f"{bytes_ / scale:.1f} {unit}"
    return f"{bytes_} B"


def count(number: int, what: str) -> str:
    """So many of what, in words."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
