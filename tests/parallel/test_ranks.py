"""Ranks: the groups of a layout, and the words between ranks, on two and four processes."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from tests.parallel.pool import on_ranks
from tinydiff.parallel.layout import AXES, COMBINED_AXES, Layout, rank_groups
from tinydiff.parallel.plan import ALONE
from tinydiff.parallel.ranks import (
    barrier,
    describe_failure,
    from_first,
    make_ranks,
    replica_numbers,
    take_number,
    to_first,
)


def told_each_other(layout: Layout):
    """Of one rank: its groups, and what it hears in each."""
    ranks = make_ranks(layout, 60)
    heard = {}
    for name, group in ranks.groups.items():
        heard[name] = (from_first(group, {"rank": ranks.rank})["rank"], to_first(group, ranks.rank))
        barrier(group)
    return ranks, heard


@pytest.mark.parametrize(
    "layout", [Layout(tp=2), Layout(cfg=2, tp=2), Layout(dp=2, ulysses=2), Layout(ring=2, ulysses=2)], ids=str
)
def test_each_group_is_the_team_of_its_name(layout):
    answers = on_ranks(layout.size, told_each_other, layout)
    for rank, (ranks, heard) in enumerate(answers):
        assert ranks.rank == rank and ranks.layout == layout and set(ranks.groups) == {*AXES, *COMBINED_AXES}
        for name, group in ranks.groups.items():
            [team] = [team for team in rank_groups(layout, name) if rank in team]
            assert (group.size, group.rank) == (len(team), team.index(rank))
            assert (group == ALONE) == (len(team) == 1)
            assert heard[name] == (team[0], team if rank == team[0] else [])
        assert ranks.leads == (heard["replica"][0] == rank)


def test_names_with_the_same_teams_share_a_group():
    for ranks, _ in on_ranks(4, told_each_other, Layout(cfg=2, tp=2)):
        names = {name: group.name for name, group in ranks.groups.items() if group.size > 1}
        assert (
            names["replica"] == names["world"]
            and names["shard"] == names["cfg"] == names["peers"] != names["tp"]
        )
        assert len(set(names.values())) == 3


def a_layout_of_other_size():
    make_ranks(Layout(tp=2), 20)


def test_as_many_must_have_met_as_the_layout_has():
    with pytest.raises(AssertionError, match="the layout has 2 ranks, but 4 are running"):
        on_ranks(4, a_layout_of_other_size)


def work(layout: Layout, count: int):
    """The numbers that a rank's replica takes. The first number that the first of several replicas takes
    keeps it until none is left.
    """
    ranks = make_ranks(layout, 60)
    store = dist.distributed_c10d._get_default_store()
    mine = []
    for number in replica_numbers(ranks, count):
        mine.append(number)
        while (
            layout.dp > 1 and ranks.rank < layout.size // layout.dp and store.add("tinydiff/work", 0) < count
        ):
            time.sleep(0.01)
    return mine, take_number(ranks, "other")


def test_replicas_share_a_queue_and_none_waits_for_a_slow_one():
    done = on_ranks(4, work, Layout(dp=2, tp=2), 12)
    taken = [numbers for numbers, _ in done]
    assert taken[0] == taken[1] and taken[2] == taken[3]  # all ranks of a replica do the same
    assert sorted(taken[0] + taken[2]) == list(range(12)) and len(taken[0]) <= 1
    assert sorted(number for _, number in done) == [0, 0, 1, 1]  # another queue starts anew


def test_one_replica_does_all_in_order():
    assert [numbers for numbers, _ in on_ranks(2, work, Layout(tp=2), 3)] == [[0, 1, 2]] * 2


def test_failures_in_a_sentence():
    assert (
        describe_failure(3, ValueError("a\n  b")) == "rank 3: ValueError: a b"
        and describe_failure(0, KeyError()) == "rank 0: KeyError"
    )
    assert describe_failure(1, MemoryError()) == "rank 1: out of memory"
    assert (
        describe_failure(1, torch.OutOfMemoryError("CUDA out of memory."))
        == "rank 1: out of memory: CUDA out of memory."
    )
    assert "longer than dist_timeout allows: Timed out waiting 3000ms" in describe_failure(
        0, RuntimeError("Timed out waiting 3000ms")
    )
