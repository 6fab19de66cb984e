"""Slices, shares and packs: what each rank holds, worked out without ranks and then gathered by them."""

import math
from itertools import product

import pytest
import torch

from tests.parallel.pool import on_ranks
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.plan import Group, Plan, Row, linear_rows, norm_rows, repeat
from tinydiff.parallel.ranks import make_ranks
from tinydiff.parallel.shards import (
    GatherOnRead,
    finish,
    gather,
    local_rows,
    packing,
    shard_range,
    shard_weights,
    start,
    unpack,
    why_indivisible,
)

BLOCK = (
    *linear_rows("attn.qkv", 5, 24, "out", parts=(8, 8, 8), head=2),
    *linear_rows("attn.out", 8, 5, "in", head=2),
    Row("fused.weight", (3, 24), split=1, parts=(8, 16)),
    *norm_rows("norm", 5, float32=True),
    Row("table", (1, 6, 5), float32=True),
)
ROWS = (
    Row("embed.weight", (12, 5), split=0),
    *repeat("blocks", 2, BLOCK),
    Row("blocks_out.weight", (7, 5)),
    Row("scale", ()),
    Row("again.weight", (12, 5), split=0, tied=True),
)
BLOCKS = ("blocks.0", "blocks.1")


def draw(rows=ROWS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    types = {True: torch.float32, False: dtype}
    return {row.name: torch.randn(row.shape, generator=generator).to(types[row.float32]) for row in rows}


def place(tp=(1, 0), shard=(1, 0)):
    return Plan(groups=(("tp", Group("none", *tp)), ("shard", Group("none", *shard))))


def sliced(row, whole, tp):
    """The slice of a weight that a rank computes with: the oracle."""
    size, rank = tp
    if row.split is None:
        return whole
    parts = whole.split(list(row.parts) or [whole.shape[row.split]], row.split)
    return torch.cat([part.chunk(size, row.split)[rank] for part in parts], row.split)


def packed(tensors, shard):
    """This rank's shares of the tensors, flat and one behind the other: the oracle."""
    size, rank = shard
    shares = []
    for tensor in tensors:
        width = math.ceil(len(tensor) / size)
        padded = torch.cat([tensor, tensor.new_zeros(width * size - len(tensor), *tensor.shape[1:])])
        shares.append(padded[rank * width : (rank + 1) * width].flatten())
    return torch.cat(shares)


def expected(whole, rows, tp, shard, blocks):
    mine = {row.name: sliced(row, whole[row.name], tp) for row in rows if row.name in whole}
    below = {name for name in mine if name.startswith(tuple(f"{block}." for block in blocks))}
    kept = {name: tensor for name, tensor in mine.items() if name not in below}
    for block, wide in product(blocks, (False, True)):
        chosen = [mine[row.name] for row in rows if row.name.startswith(f"{block}.") and row.float32 == wide]
        if chosen:
            kept[f"{block}.pack32" if wide else f"{block}.pack"] = packed(chosen, shard)
    return kept


@pytest.mark.parametrize("blocks", [(), BLOCKS])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 3), (4, 2)])
def test_every_rank_holds_its_slices_and_shares(sizes, blocks):
    whole = draw(dtype=torch.bfloat16)
    del whole["again.weight"]
    for tp, shard in product(range(sizes[0]), range(sizes[1])):
        plan = place((sizes[0], tp), (sizes[1], shard))
        mine = shard_weights(whole, ROWS, plan, blocks)
        wanted = expected(whole, ROWS, (sizes[0], tp), (sizes[1], shard), blocks)
        assert mine.keys() == wanted.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]), name
        rows = {row.name: row for row in local_rows(ROWS, plan, blocks)}
        assert {name: rows[name].shape for name in mine} == {
            name: tuple(tensor.shape) for name, tensor in mine.items()
        }
        assert all(rows[name].float32 == name.endswith(("norm.weight", "table", "pack32")) for name in rows)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 4), (2, 3)])
def test_gathered_packs_are_the_weights(sizes):
    whole = draw()
    every = [
        shard_weights(whole, ROWS, place((sizes[0], 0), (sizes[1], rank)), BLOCKS) for rank in range(sizes[1])
    ]
    rows = {row.name: row for row in ROWS}
    packs = packing(ROWS, place((sizes[0], 0), (sizes[1], 0)), BLOCKS)
    assert list(packs) == [f"{block}.{name}" for block in BLOCKS for name in ("pack", "pack32")]
    assert packs["blocks.0.pack"] == packs["blocks.1.pack"]
    names = set()
    for home, pack in packs.items():
        block = home.rpartition(".")[0]
        for name, tensor in unpack(torch.stack([mine[home] for mine in every]), pack).items():
            full = f"{block}.{name}"
            assert torch.equal(tensor, sliced(rows[full], whole[full], (sizes[0], 0)))
            names.add(full)
    assert names == {row.name for row in ROWS if row.name.startswith("blocks.")}


def test_a_pack_holds_no_more_than_its_share_and_the_padding():
    packs = packing(ROWS, place(shard=(4, 0)), BLOCKS)
    assert packs["blocks.0.pack"].numel == 6 * 5 + 6 + 2 * 8 + 2 + 1 * 24  # 24 / 4, 5 / 4 up, 3 / 4 up
    assert packs["blocks.0.pack32"].numel == 2 + 1 * 6 * 5
    assert packing(ROWS, place(shard=(4, 0)), ()) == {}
    assert list(packing([Row("a.b.weight", (4,))], place(), ("a", "a.b"))) == ["a.pack"]


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match=r"blocks\.0\.x cannot be in a pack: it is a single number"):
        packing([Row("blocks.0.x", ())], place(shard=(2, 0)), BLOCKS)


def test_what_does_not_divide_is_named():
    assert [ranks for ranks in range(1, 9) if why_indivisible(ROWS, ranks) is None] == [1, 2, 4]
    assert why_indivisible(ROWS, 5) == "embed.weight has a width of 12, which 5 ranks cannot share evenly"
    assert why_indivisible(BLOCK, 8) == "attn.qkv.weight has 4 heads, which 8 ranks cannot share evenly"
    assert (
        why_indivisible([Row("a", (24,), 0, parts=(8, 16))], 3)
        == "a has a width of 8, which 3 ranks cannot share evenly"
    )
    assert why_indivisible([Row("norm", (7,))], 2) is None
    for act in (local_rows, lambda *given: packing(*given, BLOCKS).items()):
        with pytest.raises(ValueError, match="3 ranks cannot share"):
            list(act(BLOCK if act is local_rows else ROWS, place(tp=(3, 0))))


@pytest.mark.parametrize(("size", "ranks"), [(0, 2), (1, 4), (5, 2), (8, 4), (9, 4)])
def test_shares_cover_a_dimension_once(size, ranks):
    shares = [shard_range(size, ranks, rank) for rank in range(ranks)]
    assert [at for _, start, count in shares for at in range(start, start + count)] == list(range(size))
    assert (
        all(0 <= count <= width for width, _, count in shares) and len({width for width, _, _ in shares}) == 1
    )


# --- by ranks ---


def _reads(layout):
    """Every weight read through `Unpacked`, in an order of the reader's, equals this rank's slice."""
    groups = make_ranks(layout, 60).groups
    plan = Plan(groups=(("tp", groups["tp"]), ("shard", groups["shard"])))
    whole, tp = draw(), plan.group("tp")
    mine = shard_weights(whole, ROWS, plan, BLOCKS)
    seen = GatherOnRead(mine, packing(ROWS, plan, BLOCKS), plan)
    assert set(seen) == set(whole) and len(seen) == len(whole)
    assert "blocks.1.attn.qkv.weight" in seen and "blocks.1.pack" not in list(seen) and "nothing" not in seen
    assert seen.get("blocks.0.attn.out.scale") is None
    return [
        torch.equal(seen[row.name], sliced(row, whole[row.name], (tp.size, tp.rank)))
        for row in reversed(ROWS)
    ]


@pytest.mark.parametrize(
    "layout", [Layout(ulysses=2), Layout(cfg=2, ring=2), Layout(ulysses=2, tp=2), Layout(dp=2, cfg=2)]
)
def test_weights_are_read_by_their_names(layout):
    assert on_ranks(layout.size, _reads, layout) == [[True] * len(ROWS)] * layout.size


def _prefetched(layout):
    """Both blocks are started before the first is finished."""
    plan, whole = Plan(groups=(("shard", make_ranks(layout, 60).groups["shard"]),)), draw()
    mine, packs = shard_weights(whole, ROWS, plan, BLOCKS), packing(ROWS, plan, BLOCKS)
    pending = {home: start(mine[home], plan.group("shard")) for home in packs}
    blocks = {home: finish(pending[home], pack) for home, pack in packs.items()}
    return [
        torch.equal(tensor, whole[f"{home.rpartition('.')[0]}.{name}"])
        for home, block in blocks.items()
        for name, tensor in block.items()
    ]


def test_the_next_block_is_gathered_ahead():
    assert on_ranks(3, _prefetched, Layout(ring=3)) == [[True] * 2 * len(BLOCK)] * 3
    plan, whole = place(), draw()
    mine, packs = shard_weights(whole, ROWS, plan, BLOCKS), packing(ROWS, plan, BLOCKS)
    alone = finish(start(mine["blocks.0.pack"], plan.group("shard")), packs["blocks.0.pack"])
    assert all(torch.equal(tensor, whole[f"blocks.0.{name}"]) for name, tensor in alone.items())


def _along_two(layout):
    groups = make_ranks(layout, 60).groups
    axes = [groups["dp"], groups["tp"]]
    rank = axes[0].rank * 2 + axes[1].rank
    return [
        gather(torch.full((1, 2), float(rank)), *axes)[:, 0].tolist(),
        gather(torch.full((1,), float(rank)), *axes[1:]).tolist(),
    ]


def test_gathering_along_several_axes_is_in_their_order():
    assert on_ranks(4, _along_two, Layout(dp=2, tp=2)) == [
        [[0, 1, 2, 3], pair] for pair in ([0, 1], [0, 1], [2, 3], [2, 3])
    ]
