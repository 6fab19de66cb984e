"""Streamed and offloaded weights: the same bits as with resident ones, each block fetched once a step, and no
more of them in memory than asked for.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from tests.parallel.pool import on_ranks
from tests.parallel.test_families import TABLE, denoised, plan_of
from tests.runtime.test_adapters import dynamic
from tinydiff.ops.store import Berth, InOrder, Store, Whole, loop_names, numbered
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.plan import Plan
from tinydiff.parity.denoisers import DENOISERS
from tinydiff.sampling.compile import compiled_blocks, graph_breaks, graph_count

CPU = torch.device("cpu")


class Host:
    """A source in memory that counts what is asked of it, and the bytes that it gave and are still held."""

    def __init__(self, flat):
        self.flat, self.asked, self.alive, self.most = flat, [], 0, 0

    def start(self, names):
        self.asked.append(names)
        return {name: self.given(self.flat[name]) for name in names}

    def take(self, pending):
        return pending

    def given(self, x):
        y, size = x.clone(), x.nbytes
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(y, self.left, size)
        return y

    def left(self, size):
        self.alive -= size


def blocks_of(net):
    return [prefix for _, prefix in net.family.blocks(net.config)]


def streamed(net, resident=0, ahead=1, source=None):
    """The network with the loop's weights of all but its first blocks left in the host's memory."""
    blocks = loop_names(net.family.spec(net.config), blocks_of(net)[resident:])
    left = {name for names in blocks.values() for name in names}
    here = {name: x.to("meta") if name in left else x for name, x in net.weights.items()}
    return replace(net, weights=here, store=Store(source or Host(net.weights), CPU, blocks, ahead))


def offloaded(net, berth):
    """The network with all of its weights in the host's memory."""
    blocks = loop_names(net.family.spec(net.config), blocks_of(net))
    here = {name: x.to("meta") for name, x in net.weights.items()}
    return replace(net, weights=here, store=Store(Whole(lambda: net.weights, berth), CPU, blocks, 0))


def with_adapters(change, net):
    return dynamic(change(net))


@cache
def resident(name, adapt=None):
    return denoised(name, Plan(), dtype=torch.float32, adapt=adapt)


def whole(net):
    return offloaded(net, Berth())


FAMILIES = [*{d.family: name for name, d in reversed(DENOISERS.items())}.values()]
"""One tiny network of each family."""
QUICK = ("Wan, text", "FLUX.1", "ERNIE-Image")
SOME = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
"""Those that are always compiled, and those that only a thorough run compiles."""


@pytest.mark.parametrize("name", DENOISERS)
def test_every_family_gives_the_bits_of_resident_weights(name):
    assert resident(name).isfinite().all() and resident(name).std() > 0.01
    for change in (streamed, whole):
        assert torch.equal(denoised(name, Plan(), dtype=torch.float32, adapt=change), resident(name))


@pytest.mark.parametrize(("kept", "ahead"), [(0, 0), (1, 0), (1, 9), (2, 1)])
def test_so_do_any_number_of_resident_blocks_and_any_prefetch(kept, ahead):
    change = partial(streamed, resident=kept, ahead=ahead)
    made = denoised("Qwen-Image", Plan(), dtype=torch.float32, adapt=change)
    assert torch.equal(made, resident("Qwen-Image"))


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_beside_streamed_weights_give_the_same_bits(name):
    want = resident(name, dynamic)
    assert not torch.equal(want, resident(name))
    for change in (streamed, whole):
        adapt = partial(with_adapters, change)
        assert torch.equal(denoised(name, Plan(), dtype=torch.float32, adapt=adapt), want)


@pytest.mark.parametrize("name", SOME)
def test_compiled_blocks_give_the_same_bits_and_each_kind_is_one_graph(name, monkeypatch):
    traced = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **given: traced(fn, **given, backend="eager"))
    monkeypatch.setattr("tinydiff.sampling.compile._by_block", {})
    before, broken = graph_count(), graph_breaks()
    made = denoised(name, Plan(), dtype=torch.float32, run=compiled_blocks, adapt=streamed)
    assert torch.equal(made, resident(name))
    d = DENOISERS[name]
    kinds = {block for block, _ in d.family.blocks(d.config)}
    assert (graph_count() - before, graph_breaks()) == (len(kinds), broken)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_step_asks_for_each_block_once_and_holds_no_more_than_the_prefetched_ones(ahead):
    d, seen = DENOISERS["Qwen-Image"], []

    def change(net):
        seen.append(Host(net.weights))
        return streamed(net, ahead=ahead, source=seen[0])

    denoised("Qwen-Image", Plan(), dtype=torch.float32, adapt=change)
    blocks = loop_names(d.family.spec(d.config), [at for _, at in d.family.blocks(d.config)])
    in_loop = [names for names in seen[0].asked if names in blocks.values()]
    assert in_loop == [*blocks.values()] * TABLE.steps
    sizes = {row.name: 4 * row.numel for row in d.family.spec(d.config)}
    largest = max(sum(sizes[name] for name in names) for names in blocks.values())
    assert seen[0].alive == 0 and seen[0].most <= (ahead + 1) * largest
    hoisted_only = {name for names in seen[0].asked for name in names} - {
        n for b in blocks.values() for n in b
    }
    assert not hoisted_only  # what only `hoist` reads stays on the device here


def on_two(layout, change):
    return {
        name: denoised(name, plan_of(layout), dtype=torch.float32, adapt=change)
        for name in ("Wan, text", "FLUX.1")
    }


@pytest.mark.parametrize("layout", [Layout(tp=2), pytest.param(Layout(ulysses=2), marks=pytest.mark.slow)])
def test_two_ranks_stream_what_each_of_them_holds(layout):
    for got, want in zip(
        on_ranks(2, on_two, layout, streamed), on_ranks(2, on_two, layout, None), strict=True
    ):
        assert got.keys() == want.keys() and got
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_one_offloaded_network_is_on_the_device_at_a_time():
    berth, held = Berth(), {}
    for name in ("a", "b"):
        flat = {f"{name}.weight": torch.ones(2)}
        held[name] = Whole(lambda flat=flat: {key: x.clone() for key, x in flat.items()}, berth)
    for name, other in (("a", "b"), ("a", "b"), ("b", "a")):
        assert list(held[name].take(held[name].start((f"{name}.weight",)))) == [f"{name}.weight"]
        assert (len(held[name].there), len(held[other].there)) == (1, 0)


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_blocks_in_order_come_when_they_are_read_and_leave_for_the_next(ahead):
    names = [f"layers.{i}.{part}.weight" for i in range(4) for part in "qk"]
    flat = {name: torch.full((8,), float(i)) for i, name in enumerate(names)}
    rows = [type("Row", (), {"name": name}) for name in names]
    source = Host(flat)
    store = Store(source, CPU, numbered(rows), ahead)
    view = InOrder(store, {name: x.to("meta") for name, x in flat.items()} | {"embed": torch.ones(1)})
    for name in ("embed", *names, *names):  # a second walk begins again
        assert torch.equal(view[name], flat.get(name, torch.ones(1)))
    assert source.most <= min(4, ahead + 1) * 2 * 32 and len(source.asked) == 8
    assert torch.equal(view[names[1]], flat[names[1]]) and torch.equal(view[names[7]], flat[names[7]])
