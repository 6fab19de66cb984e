"""`tinydiff plan --placements`: the plan of every weight on a layout, in DTensor's terms."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from tinydiff.config import ParallelOptions, SamplingOptions
from tinydiff.parallel import layout
from tinydiff.parallel.plan import Placement, Row

if TYPE_CHECKING:
    from tinydiff.runtime.weight_plans import NetworkPlacements

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def text(
    model: str,
    sampling: SamplingOptions,
    parallel: ParallelOptions,
    as_json: bool,
    options: Mapping[str, object] | None = None,
) -> str:
    """The plan of every weight on the layout that a generation with these options has. Raises UserError."""
    from tinydiff.runtime import estimate, launch  # torch, for those who get here
    from tinydiff.runtime.weight_plans import network_placements

    ranks = layout.count(parallel)
    subject = estimate.subject(model, sampling, ranks, 2, options)
    guided, tokens = subject.request.guidance.on, subject.work.image
    chosen, why = layout.choose(parallel, ranks, subject.net.heads, guided, tokens)
    plan = estimate.blueprint_of(model, options)
    launch.check_divides(plan, chosen)
    networks = {name: network_placements(net, chosen) for name, net in plan.nets.items()}
    if as_json:
        return json.dumps({"model": subject.name, "layout": why, "networks": objects(networks)}, indent=2)
    return "\n".join([f"{subject.name}, {why}", "", *lines(networks)])


def lines(networks: Mapping[str, NetworkPlacements]) -> Iterator[str]:
    """What is printed: a table per network. Blocks that are alike share a line."""
    for name, each in networks.items():
        mesh = ", ".join(f"{axis}={n}" for axis, n in zip(each.mesh.axes, each.sizes, strict=True))
        yield f"{name}: DeviceMesh({mesh})"
        if each.whole is not None:
            yield f"  whole on every rank: {each.whole}"
        table = [("weight", "shape", *each.mesh.axes), *_rows(each)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for cells in table:
            padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            yield f"  {'  '.join(padded)}".rstrip()
        yield ""


def objects(networks: Mapping[str, NetworkPlacements]) -> dict[str, object]:
    """The same with every weight by its own name."""
    return {
        name: {
            "mesh": dict(zip(each.mesh.axes, each.sizes, strict=True)),
            "weights": {
                row.name: {
                    "shape": list(row.shape),
                    "placements": list(map(repr, each.placements[row.name])),
                    **({"parts": list(row.parts)} if row.parts else {}),
                }
                for row in each.rows
            },
        }
        for name, each in networks.items()
    }


def _rows(network: NetworkPlacements) -> Iterator[tuple[str, ...]]:
    alike: dict[tuple[str, str, tuple[Placement, ...]], list[int]] = {}
    for row in network.rows:
        pattern, number = _numbered(row.name)
        alike.setdefault((pattern, _shape(row), network.placements[row.name]), []).append(number)
    for (pattern, shape, placements), numbers in alike.items():
        yield pattern.replace("#", _range(numbers)), shape, *map(repr, placements)


def _numbered(name: str) -> tuple[str, int]:
    """A name with "#" for the number of its block, and that number."""
    found = NUMBER.search(name)
    return (name, 0) if found is None else (f"{name[: found.start()]}#{name[found.end() :]}", int(found[0]))


def _range(numbers: list[int]) -> str:
    """Numbers in rising order, such as "0-29" or "0,2,4"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _shape(row: Row) -> str:
    """A shape, such as "[24 = 8+8+8, 5]" where parts are fused."""
    parts = f" = {'+'.join(map(str, row.parts))}" if row.parts else ""
    return (
        str([*row.shape])
        if not parts
        else "["
        + ", ".join(f"{size}{parts}" if dim == row.split else f"{size}" for dim, size in enumerate(row.shape))
        + "]"
    )
