"""Weights on several ranks as DTensors: torch's own placements and slices are the oracle of ours."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.parallel.pool import on_ranks
from tests.parallel.test_families import weights as random_weights
from tests.parallel.test_shards import BLOCKS, ROWS, draw
from tinydiff.io.weights import load_weights, save_weights
from tinydiff.models.recipe import Net
from tinydiff.parallel import plan as words
from tinydiff.parallel.dtensors import Sharding, as_dtensors, full, fused_order, real, replaced
from tinydiff.parallel.layout import AXES, COMBINED_AXES, Layout, rank_groups
from tinydiff.parallel.placements import WeightMesh, placements, size, weight_mesh
from tinydiff.parallel.plan import Plan, Replicate, Row, Shard, linear_rows
from tinydiff.parallel.ranks import make_ranks, weights_mesh
from tinydiff.parallel.shards import shard_weights
from tinydiff.parity.denoisers import DENOISERS
from tinydiff.runtime import adapters

MESHES = {
    "tp": (Layout(tp=4), "dit"),
    "tp x ulysses": (Layout(ulysses=2, tp=2), "dit"),
    "full sharding": (Layout(cfg=2, ring=2, fsdp=True), "dit"),
    "full sharding x tp": (Layout(ulysses=2, tp=2, fsdp=True), "dit"),
    "encoders": (Layout(ulysses=2, tp=2, encoders=True), "text_encoder"),
    "encoders of replicas": (Layout(dp=2, cfg=2, encoders=True), "text_encoder"),
    "an autoencoder": (Layout(ulysses=4), "vae"),
}


# --- words


@pytest.mark.parametrize("placement", [Replicate(), Shard(0), Shard(-3), words.Partial()])
def test_a_placement_is_called_what_torch_calls_it(placement):
    theirs = real(placement)
    assert type(theirs).__name__ == type(placement).__name__
    assert repr(theirs).replace("Partial(sum)", "Partial()") == repr(placement)


def test_the_plan_of_a_network():
    rows = [
        *linear_rows("blocks.0.qkv", 4, 12, "out", parts=(4, 4, 4)),
        *linear_rows("blocks.0.out", 4, 4, "in"),
        Row("norm", (4,)),
    ]
    across = {"blocks.0.qkv.weight": 0, "blocks.0.qkv.bias": 0, "blocks.0.out.weight": 1}
    plain, sharded = (weight_mesh(Layout(ulysses=2, tp=2, fsdp=fsdp), "dit") for fsdp in (False, True))
    assert plain.axes == AXES and sharded.axes == ("dp", "tp", "shard")
    got, packed = placements(rows, plain, ["blocks.0"]), placements(rows, sharded, ["blocks.0"])
    for row in rows:
        tp = Shard(across[row.name]) if row.name in across else Replicate()
        inside = Shard(0) if row.name.startswith("blocks.") else Replicate()
        assert got[row.name] == (Replicate(),) * 4 + (tp,)
        assert packed[row.name] == (Replicate(), tp, inside)


@pytest.mark.parametrize("case", MESHES)
def test_a_mesh_has_every_axis_once(case):
    layout, role = MESHES[case]
    where = weight_mesh(layout, role)
    assert sorted(axis for name in where.axes for axis in COMBINED_AXES.get(name, (name,))) == sorted(AXES)
    assert torch.tensor([size(layout, axis) for axis in where.axes]).prod() == layout.size == 4
    assert weight_mesh(layout, "text_encoder", whole=True) == WeightMesh(AXES)


def test_the_order_of_a_fused_weight():
    row = Row("qkv", (12, 2), 0, parts=(4, 8))
    #                        rank 0 of the parts | rank 1
    held_by_ranks = torch.tensor([0, 1, 4, 5, 6, 7, 2, 3, 8, 9, 10, 11])
    assert torch.equal(held_by_ranks[fused_order(row, 2)], torch.arange(12))
    assert fused_order(row, 1) is None and fused_order(Row("plain", (12, 2), 0), 2) is None


# --- by ranks


def sharding(ranks, role, blocks):
    """(a network's plan on this rank, how its weights lie)."""
    where = weight_mesh(ranks.layout, role)
    axes = {"tp": where.split, "shard": where.blocks}
    groups = tuple((name, ranks.groups[axis]) for name, axis in axes.items() if axis)
    lies = Sharding(weights_mesh(ranks, where.axes), where, frozenset(blocks if where.blocks else ()))
    return Plan(groups=groups), lies


def weights_as_dtensors(layout, role):
    """On this rank: names whose slice, whole weight or replacement is not torch's; placements; a mesh's
    ranks.
    """
    plan, lies = sharding(make_ranks(layout, 60), role, BLOCKS)
    weights, wrong = draw(), []
    mine = shard_weights(weights, ROWS, plan, lies.blocks)
    found = as_dtensors(mine, ROWS, plan, lies)
    doubled = replaced(
        mine, ROWS, plan, lies, ((name, 2 * x) for name, x in weights.items() if "qkv" in name)
    )
    for row in ROWS:
        value, order = weights[row.name], fused_order(row, lies.split)
        by_rank = value if order is None else value.index_select(row.split, order.argsort())
        theirs = distribute_tensor(by_rank, lies.mesh, found[row.name].placements, src_data_rank=None)
        after = full(as_dtensors(doubled, ROWS, plan, lies)[row.name], row, lies)
        same = (
            torch.equal(found[row.name].to_local(), theirs.to_local()),
            torch.equal(full(found[row.name], row, lies), value),
            torch.equal(after, value * (2 if "qkv" in row.name else 1)),
        )
        wrong += [(row.name, same)] * (not all(same))
    shared = [name for name in mine if doubled[name] is mine[name]]
    groups = [
        torch.distributed.get_process_group_ranks(lies.mesh.get_group(axis)) for axis in lies.where.axes
    ]
    plans = {name: tuple(map(repr, each.placements)) for name, each in found.items()}
    return wrong, shared, plans, groups, all(isinstance(each, DTensor) for each in found.values())


@pytest.mark.parametrize("case", MESHES)
def test_every_rank_holds_what_torch_would_give_it(case):
    layout, role = MESHES[case]
    where = weight_mesh(layout, role)
    ours = placements(ROWS, where, BLOCKS if where.blocks else ())
    for rank, (wrong, shared, plans, groups, kinds) in enumerate(
        on_ranks(4, weights_as_dtensors, layout, role)
    ):
        assert wrong == [] and kinds
        assert plans == {name: tuple(map(repr, each)) for name, each in ours.items()}
        assert "embed.weight" in shared and not any("qkv" in name for name in shared)
        assert groups == [next(t for t in rank_groups(layout, axis) if rank in t) for axis in where.axes]


# --- merging and saving


class Scaled:
    """A difference that needs the whole weight, as DoRA and LoKr do: it grows with the largest value."""

    def apply(self, weight, strength):
        return weight * (1 + strength * weight.abs().max())


def flux2(sharded_by=None):
    """A tiny FLUX.2, whose fused weights are split along both dimensions; on ranks, what this one holds."""
    family, config = DENOISERS["FLUX.2, references"].family, DENOISERS["FLUX.2, references"].config
    rows, whole = tuple(family.spec(config)), random_weights(family, config, torch.float64)
    if sharded_by is None:
        return Net(family, config, Plan(), whole, torch.float64)
    plan, lies = sharding(sharded_by, "dit", [prefix for _, prefix in family.blocks(config)])
    mine = shard_weights(whole, rows, plan, lies.blocks)
    return Net(family, config, plan, mine, torch.float64, sharding=lies)


def changes(net):
    blocks = [row for row in net.family.spec(net.config) if row.parts or row.split is None]
    return {row.name: Scaled() for row in blocks if row.name.endswith("weight")}


def merged_and_saved(layout, path):
    """The first rank saves a checkpoint after merging on ranks that hold parts of the weights."""
    ranks = make_ranks(layout, 60)
    net = flux2(ranks)
    lost = adapters.rounded_away(net, changes(net), 0.5)
    whole = dict(adapters.merged(net, changes(net), 0.5).whole())
    if ranks.rank == 0:
        save_weights(path, whole)
    return lost


@pytest.mark.parametrize("case", ["tp x ulysses", "full sharding x tp"])
def test_an_adapter_is_merged_into_shards_and_the_whole_is_saved(case, tmp_path):
    path, net = tmp_path / "merged.safetensors", flux2()
    lost = adapters.rounded_away(net, changes(net), 0.5)
    assert on_ranks(4, merged_and_saved, MESHES[case][0], path) == [lost] * 4
    saved = load_weights(path, net.family.spec(net.config), torch.float64)
    for name, value in adapters.merged(net, changes(net), 0.5).weights.items():
        assert torch.equal(saved[name], value), name
        assert torch.equal(value, net.weights[name]) == (name not in changes(net))
