"""Weights that stay quantised: the bits of decoded ones, on every family, layout and road to the device."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from tests.blocks import blocks as drawn
from tests.parallel.pool import on_ranks
from tests.parallel.test_families import denoised, plan_of, weights
from tests.runtime.test_adapters import dynamic
from tests.runtime.test_streaming import FAMILIES, QUICK, streamed
from tinydiff.io.kept import LARGEST, quantised
from tinydiff.ops import packed
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.plan import PACKED, Plan, packed_leaf
from tinydiff.parallel.shards import shard_weights
from tinydiff.runtime.quantisation import keeping, matrices
from tinydiff.sampling.compile import compiled_blocks, graph_breaks, graph_count

TYPES = ("float8_e4m3fn", "float8_e5m2", "int8")


def changed(net, stored, kept, groups=1):
    """The network with the matrices of its blocks in 8 bits, or as those decode."""
    family, whole = net.family, dict(weights(net.family, net.config, net.dtype))
    names = [row.name for row in matrices(family, net.config)]
    if stored in PACKED:
        names = [name for name in names if whole[name].shape[1] % PACKED[stored][0] == 0]
        assert names
    for seed, name in enumerate(names):
        if stored in PACKED:
            rows, scale = drawn(stored, *whole[name].shape, seed)
            stem = name.removesuffix("weight")
            leaves = {f"{stem}{packed_leaf(stored)}": rows} | {f"{stem}weight_scale": scale}
            whole |= leaves if kept else {name: packed.decode(stored, rows, scale).to(net.dtype)}
            continue
        rows = whole[name].float()
        codes, scale = quantised(stored, rows.view(-1, rows.shape[1] // groups))
        codes, scale = codes.view(rows.shape), scale.view(-1, groups)
        scale_name = f"{name.removesuffix('weight')}weight_scale"
        decoded = (codes.float().view(len(rows), groups, -1) * scale[..., None]).view(rows.shape)
        whole |= {name: codes, scale_name: scale} if kept else {name: decoded.to(net.dtype)}
    if kept:
        family = keeping(family, frozenset((name, (stored, groups)) for name in names))
    blocks = {at for _, at in family.blocks(net.config)} if net.plan.group("shard").size > 1 else ()
    mine = shard_weights(whole, family.spec(net.config), net.plan, blocks)
    return replace(net, family=family, weights=mine)


def kept(net, stored="float8_e4m3fn"):
    return changed(net, stored, True)


def decoded(net, stored="float8_e4m3fn"):
    return changed(net, stored, False)


def both(change, net):
    return change(kept(net))


@cache
def plain(name, stored="float8_e4m3fn", dtype=torch.float32):
    return denoised(name, Plan(), dtype=dtype, adapt=partial(decoded, stored=stored))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_bits_of_decoded_weights(name):
    want = plain(name)
    assert want.isfinite().all() and not torch.equal(want, denoised(name, Plan(), dtype=torch.float32))
    assert torch.equal(denoised(name, Plan(), dtype=torch.float32, adapt=kept), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [*TYPES, "NVFP4"])
def test_so_does_every_type_in_every_compute_dtype(stored, dtype):
    made = denoised("FLUX.1", Plan(), dtype=dtype, adapt=partial(kept, stored=stored))
    assert torch.equal(made, plain("FLUX.1", stored, dtype))


@pytest.mark.parametrize("name", QUICK)
def test_streamed_blocks_bring_their_scales(name):
    made = denoised(name, Plan(), dtype=torch.float32, adapt=partial(both, streamed))
    assert torch.equal(made, plain(name))


@pytest.mark.parametrize("name", QUICK)
def test_adapters_stay_beside_them(name):
    want = denoised(name, Plan(), dtype=torch.float32, adapt=lambda net: dynamic(decoded(net)))
    assert not torch.equal(want, plain(name))
    assert torch.equal(denoised(name, Plan(), dtype=torch.float32, adapt=partial(both, dynamic)), want)


def pairs(layout):
    """Case -> the tokens with kept and with decoded weights, of every case on this layout."""
    cases = {
        (name, stored, groups): [
            denoised(
                name,
                plan_of(layout),
                layout.fsdp,
                torch.float32,
                adapt=partial(changed, stored=stored, kept=keeps, groups=groups),
            )
            for keeps in (True, False)
        ]
        for name, stored, groups in (
            ("Wan, text", "float8_e4m3fn", 1),
            ("FLUX.1", "int8", 1),
            ("Wan, text", "int8", 4),
        )
    }
    return cases


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(ulysses=2, fsdp=True)])
def test_two_ranks_share_codes_and_scales(layout):
    for rank in on_ranks(2, pairs, layout):
        assert len(rank) == 3
        for mine, theirs in rank.values():
            assert mine.isfinite().all() and torch.equal(mine, theirs)


@pytest.mark.parametrize("stored", ["float8_e4m3fn", "NVFP4"])
def test_they_compile_to_as_many_graphs_as_plain_ones_and_once(monkeypatch, stored):
    traced = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **given: traced(fn, **given, backend="eager"))
    monkeypatch.setattr("tinydiff.sampling.compile._by_block", {})
    counts, broken = [], graph_breaks()
    for change in (decoded, kept, kept):
        before, adapt = graph_count(), lambda net, change=change: streamed(change(net, stored))
        made = denoised("Wan, text", Plan(), dtype=torch.float32, run=compiled_blocks, adapt=adapt)
        assert torch.equal(made, plain("Wan, text", stored))
        counts.append(graph_count() - before)
    assert counts == [1, 1, 0] and graph_breaks() == broken


@pytest.mark.parametrize("stored", TYPES)
def test_made_codes_are_the_nearest_with_one_scale_a_row(stored):
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    rows[3] = 0
    codes, scale = quantised(stored, rows)
    want = rows.abs().amax(1, keepdim=True) / LARGEST[stored]
    want[3] = 1
    assert torch.equal(scale, want) and codes.dtype == getattr(torch, stored)
    nearest = (rows / want).round() if stored == "int8" else (rows / want)
    assert torch.equal(codes, nearest.to(codes.dtype))
    error = (codes.float() * scale - rows).abs()
    half = {"int8": 0.5 * scale, "float8_e4m3fn": rows.abs() / 16, "float8_e5m2": rows.abs() / 8}[stored]
    least = {"int8": 0, "float8_e4m3fn": 2**-10, "float8_e5m2": 2**-17}[stored] * scale
    assert (error <= half.clamp(min=least) * (1 + 1e-5) + 1e-7 * rows.abs()).all()
