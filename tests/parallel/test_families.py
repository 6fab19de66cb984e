"""Every family on every layout: the loop over several ranks ends where it ends on one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from tests.parallel.pool import on_ranks
from tests.parity import close, draw
from tests.runtime import s2v
from tinydiff.models import sd3, wan_s2v, z_image
from tinydiff.models.family import Denoiser
from tinydiff.models.recipe import Net
from tinydiff.models.wan_s2v_recipe import layout as places_of
from tinydiff.parallel import sequence
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.plan import Plan
from tinydiff.parallel.ranks import make_ranks
from tinydiff.parallel.shards import shard_weights
from tinydiff.parity.denoisers import DENOISERS
from tinydiff.sampling import guidance, loop, solvers, step_cache

LAYOUTS = {
    "cfg": Layout(cfg=2),
    "ulysses": Layout(ulysses=2),
    "ring": Layout(ring=2),
    "tp": Layout(tp=2),
    "full sharding": Layout(ulysses=2, fsdp=True),
    "ulysses on 4, heads that do not divide": Layout(ulysses=4),
    "ring on 4": Layout(ring=4),
    "ring x ulysses": Layout(ring=2, ulysses=2),
    "tp x ulysses": Layout(ulysses=2, tp=2),
    "cfg x ulysses": Layout(cfg=2, ulysses=2),
    "cfg x tp, full sharding": Layout(cfg=2, tp=2, fsdp=True),
}
S2V = "Wan, speech to video"
"""Its class is in no library, so it is not among those that are compared with one."""
FULLEST = list({d.reference: name for name, d in DENOISERS.items()}.values())
"""The last case of each family, with all that its requests may give."""


class Subject(NamedTuple):
    """A network that is in no library."""

    family: Denoiser
    config: Any
    ask: Callable[[Any], Any]


def speech(c):
    """A segment that continues another."""
    places = places_of(c, (3, 6, 8), True)
    inputs = places | {
        "text": draw(1, 7, c.text_dim, seed=1),
        "reference": draw(1, 12, 4 * c.in_dim, seed=2),
        "motion": draw(1, c.in_dim, 3, 6, 8, seed=3),
        "audio": draw(1, c.audio_states, c.audio_dim, c.motion_frames + 12, seed=4),
    }
    tokens = draw(1, len(places["positions"]), 4 * c.in_dim, seed=5)
    return SimpleNamespace(inputs=inputs, tokens=tokens, kinds=())


SUBJECTS = DENOISERS | {S2V: Subject(wan_s2v.FAMILY, s2v.CONFIG, speech)}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
TABLE = solvers.with_guidance(solvers.from_scheduler_config(EULER, 2), 3.0)


@cache
def weights(family, config, dtype):
    """Random weights, the same on every rank. Drawing them takes longer than the steps that they serve."""
    generator = torch.Generator().manual_seed(5)
    drawn = {
        row.name: (torch.randn(row.shape, generator=generator, dtype=torch.float64), row)
        for row in family.spec(config)
    }
    scaled = {
        name: 1 + 0.1 * x if len(row.shape) == 1 else 0.5 * x / row.shape[-1] ** 0.5
        for name, (x, row) in drawn.items()
    }
    wide = torch.promote_types(dtype, torch.float32)
    return {name: x.to(wide if drawn[name][1].float32 else dtype) for name, x in scaled.items()}


def branches(family, inputs, dtype):
    """The prompt's inputs, and a negative prompt's: other words, where the family allows it two fewer."""
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    words = inputs["text"].shape[1] - 2 * any(cond.stream == "text" for cond in family.conds)
    other = {"text": inputs["text"][:, :words].flip(0) * 0.7}
    if "mask" in inputs:
        other["mask"] = inputs["mask"][:, :words]
    return [inputs, inputs | other]


def denoised(name, plan, fsdp=False, dtype=torch.float64, run=loop.eager_denoise, adapt=None, limits=None):
    """The tokens that a plan's ranks make together, after two steps with guidance.

    adapt: the network in memory -> the same with adapters. limits: those of a step cache.
    """
    d = SUBJECTS[name]
    if d.family is sd3.FAMILY:
        d = replace(
            d, config=replace(d.config, out_channels=d.config.in_channels)
        )  # the loop adds what comes out to what goes in
    if d.family is z_image.FAMILY:
        d = replace(
            d, config=replace(d.config, dim=96, n_heads=6, n_kv_heads=6)
        )  # the feed-forward's width follows, and divides
    asked, blocks = d.ask(d.config), {prefix for _, prefix in d.family.blocks(d.config)} if fsdp else ()
    mine = shard_weights(weights(d.family, d.config, dtype), d.family.spec(d.config), plan, blocks)
    net = Net(d.family, d.config, plan, mine, dtype)
    net = net if adapt is None else adapt(net)
    network = net.network
    inputs = branches(d.family, asked.inputs, dtype)
    hoisted = loop.hoist(network, net.weights, inputs, TABLE, net.lora_scale, net.store)
    x = sequence.shard(plan, asked.tokens.to(dtype), 1, asked.kinds)
    fetch = () if net.store is None else (net.store.fetch,)
    loop_of_steps = run(network, guidance.KINDS[d.family.guidance], *fetch)
    memory = limits and partial(step_cache.memory, network)
    *_, last = loop.run(loop_of_steps, TABLE, x, lambda _: hoisted, limits=limits, memory=memory)
    return sequence.gather(plan, last.x, 1, asked.tokens.shape[1], asked.kinds)


def plan_of(layout):
    groups = make_ranks(layout, 60).groups
    axes = ("cfg", "ring", "ulysses", "tp", *(("shard",) if layout.fsdp else ()))
    return Plan(groups=tuple((axis, groups[axis]) for axis in axes if groups[axis].size > 1))


def all_families(layout, names, dtype=torch.float64):
    plan = plan_of(layout)
    return {name: denoised(name, plan, layout.fsdp, dtype) for name in names}


def names(case):
    """All cases where two ranks communicate in one way, and where sequences lie on two axes: what a request
    gives is sharded there as on any other four.
    """
    every = LAYOUTS[case].size == 2 or case == "ring x ulysses"
    return [*(DENOISERS if every else FULLEST), S2V]


@cache
def alone(name):
    return denoised(name, Plan())


@cache
def together(case):
    return on_ranks(LAYOUTS[case].size, all_families, LAYOUTS[case], names(case))


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, marks=[pytest.mark.slow] if layout.size > 2 else [])
        for case, layout in LAYOUTS.items()
        for name in names(case)
    ],
)
def test_every_layout_gives_what_one_rank_gives(case, name):
    for rank in together(case):
        close(rank[name], alone(name))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ring x ulysses", "tp x ulysses"])
def test_float32_too(case):
    """As near to float64 as one rank in float32 is, which LTX-2 with its many sums misses by 1.3e-5."""
    for made in on_ranks(4, all_families, LAYOUTS[case], FULLEST, torch.float32):
        for name in FULLEST:
            close(made[name].double(), alone(name), max(1e-5, 2 * rounding(name)))


@cache
def rounding(name):
    """The largest error of one rank in float32."""
    return (denoised(name, Plan(), dtype=torch.float32).double() - alone(name)).abs().max().item()
