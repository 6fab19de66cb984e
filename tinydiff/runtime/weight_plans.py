"""The plans of a model's networks on a layout: where every weight lies, from configs alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from tinydiff.models.family import Denoiser
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.placements import WeightMesh, placements, size, weight_mesh
from tinydiff.parallel.plan import Placement, Row
from tinydiff.parallel.shards import why_indivisible
from tinydiff.runtime.net_plan import Described


@dataclass(frozen=True)
class NetworkPlacements:
    """A network's weights on a mesh.

    sizes: ranks along each dimension of the mesh. whole: why ranks that could share the weights hold all of
    them; None where they share them or need not.
    """

    rows: tuple[Row, ...]
    mesh: WeightMesh
    sizes: tuple[int, ...]
    placements: dict[str, tuple[Placement, ...]]
    blocks: frozenset[str] = frozenset()
    whole: str | None = None


def network_placements(net: Described, layout: Layout) -> NetworkPlacements:
    """Where each weight of a network lies.

    An encoder whose weights the ranks cannot share evenly is whole on all of them. Such a denoiser is refused
    before (`launch.check_divides`).
    """
    rows, role = tuple(net.family.spec(net.config)), net.family.role
    mesh, why = weight_mesh(layout, role), None
    if role != "dit" and mesh.split and (ranks := size(layout, mesh.split)) > 1:
        why = why_indivisible(rows, ranks)
        mesh = mesh if why is None else weight_mesh(layout, role, whole=True)
    stack = cast(Denoiser, net.family).blocks(net.config) if mesh.blocks else ()
    blocks = frozenset(prefix for _, prefix in stack)
    sizes = tuple(size(layout, axis) for axis in mesh.axes)
    return NetworkPlacements(rows, mesh, sizes, placements(rows, mesh, blocks), blocks, why)
