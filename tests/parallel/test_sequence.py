"""A sequence dealt to ranks: every token once, pads told apart, and the moves against DTensor's own."""

from __future__ import annotations

import pytest
import torch

from tests.parallel.pool import on_ranks
from tests.parallel.test_families import plan_of
from tinydiff.parallel import sequence
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.moves import reshard, rotate, wait
from tinydiff.parallel.plan import Cond, Group, Partial, Plan, Replicate, Shard

RING, ULYSSES = 3, 2


def places():
    """A plan for every rank of a ring of Ulysses groups; no rank runs."""
    for ring in range(RING):
        for ulysses in range(ULYSSES):
            yield Plan(groups=(("ring", Group("r", RING, ring)), ("ulysses", Group("u", ULYSSES, ulysses))))


CONDS = (Cond("cos", "image"), Cond("text", "text", dim=1))


@pytest.mark.parametrize(("text", "image"), [(5, 17), (12, 6), (1, 7), (6, 6)])
def test_every_rank_meets_every_token_once(text, image):
    """In each stream: the real keys of all turns of the ring, as the ranks of a Ulysses group gather them."""
    request = {"text": torch.arange(text)[None], "cos": torch.arange(100, 100 + image)}
    shares = [sequence.shard_request(plan, CONDS, request) for plan in places()]
    chunks = {  # what a ring's member has gathered of a stream
        "image": [
            torch.cat([each["cos"] for each in shares[i : i + ULYSSES]])
            for i in range(0, RING * ULYSSES, ULYSSES)
        ],
    }
    chunks["joint"] = [
        torch.cat([torch.cat([each["text"][0], each["cos"]]) for each in shares[i : i + ULYSSES]])
        for i in range(0, RING * ULYSSES, ULYSSES)
    ]
    for plan, own in zip(places(), shares, strict=True):
        for stream, wanted in (
            ("image", [*range(100, 100 + image)]),
            ("joint", [*range(text), *range(100, 100 + image)]),
        ):
            met = [
                chunks[stream][(plan.group("ring").rank + turn) % RING][k]
                for turn, k in enumerate(sequence.keys(plan, own, stream))
            ]
            assert sorted(torch.cat(met).tolist()) == wanted


def test_shares_are_equal_dense_and_never_of_one_token():
    for tokens in (1, 2, 5, 6, 7, 30):
        made = [sequence.shard(plan, torch.ones(1, tokens, 4), 1) for plan in places()]
        assert len({each.shape for each in made}) == len({each.stride() for each in made}) == 1
        assert made[0].shape[1] >= 2 and made[0].stride() == (made[0].shape[1] * 4, 4, 1)
        assert sum(each.sum() for each in made) == tokens * 4


def test_one_rank_deals_nothing():
    x, request = torch.ones(1, 5, 2), {"text": torch.ones(1, 3)}
    assert sequence.shard(Plan(), x, 1) is x and sequence.gather(Plan(), x, 1, 5) is x
    assert (
        sequence.shard_request(Plan(), CONDS, request) == request
        and sequence.keys(Plan(), request, "joint") == ()
    )


def there_and_back():
    plan = plan_of(Layout(ring=2, ulysses=2))
    x = torch.arange(2 * 7 * 3.0).view(2, 7, 3)
    return torch.equal(sequence.gather(plan, sequence.shard(plan, x, 1), 1, 7), x), sequence.sum_over_tokens(
        plan, torch.ones(2)
    ).tolist()


def test_what_is_dealt_comes_back_whole():
    assert on_ranks(4, there_and_back) == [(True, [4.0, 4.0])] * 4


def moved():
    """Which moves differ from DTensor's own on this rank, and whose value the ring brought."""
    import torch.distributed as dist
    from torch.distributed import tensor
    from torch.distributed.tensor import DTensor, init_device_mesh

    rank, size = dist.get_rank(), dist.get_world_size()
    mesh, group = init_device_mesh("cpu", (size,)), Group(dist.group.WORLD.group_name, size, rank)

    def oracle(x, source, target):
        return DTensor.from_local(x, mesh, [source]).redistribute(placements=[target]).to_local()

    torch.manual_seed(0)
    x, wrong = torch.randn(2, 4 * size, 6 * size, 8), []
    for before, after in ((1, 2), (2, 1), (3, 2), (1, None), (3, None), (None, 2)):
        ours = [Replicate() if dim is None else Shard(dim) for dim in (before, after)]
        theirs = [tensor.Replicate() if dim is None else tensor.Shard(dim) for dim in (before, after)]
        local = oracle(x, tensor.Replicate(), theirs[0])
        if not torch.equal(reshard(local, *ours, group), oracle(local, *theirs)):
            wrong.append((before, after))
    part = torch.randn(3, 2) * (rank + 1)
    if not torch.equal(
        reshard(part, Partial(), Replicate(), group), oracle(part, tensor.Partial(), tensor.Replicate())
    ):
        wrong.append("sum")
    return wrong, wait(rotate(torch.full((2, 3), float(rank)), group)).unique().tolist()


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_move_is_dtensors(ranks):
    told = on_ranks(ranks, moved)
    assert [wrong for wrong, _ in told] == [[]] * ranks
    assert [got for _, got in told] == [[float((rank + 1) % ranks)] for rank in range(ranks)]
