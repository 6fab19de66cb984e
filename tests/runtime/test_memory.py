"""The memory plan: it fits where it says so, explicit choices hold, and the table of the documentation is its
own.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from itertools import takewhile

import pytest

from tests.sources import ROOT
from tinydiff import config
from tinydiff.models import registry
from tinydiff.parallel import cost
from tinydiff.records import UserError
from tinydiff.residency import Residency, excluded, resolve, smallest
from tinydiff.runtime import blueprint, estimate, memory
from tinydiff.values import GIGABYTES, within_limits

CARDS = (8, 12, 16, 24, 48, 80, 141)
GPUS = (8, 4, 2)
NAMES = [row.name for row in registry.MODELS]


@cache
def parts(name):
    return memory.footprints(estimate.subject(name, config.SamplingOptions(), 1, 2))


@cache
def needs(name, gpus):
    """GB of each of several GPUs that share all they can; None where they cannot share the model."""
    of = estimate.subject(name, config.SamplingOptions(), gpus, 2)
    layout = estimate.usual(of, gpus)
    if layout is None:
        return None
    sharded = replace(layout, encoders=True, fsdp=True)
    return estimate.estimate(of, sharded, 0.0, cost.Machine(400.0, 300.0, 25.0, 8)).lacks


def instead(name, vram):
    """What to do where one GPU of `vram` GB is too small: the fewest of them that suffice, or larger ones."""
    enough = takewhile(lambda gpus: (needs(name, gpus) or vram + 1) <= vram, GPUS)
    return f"{least} GPUs" if (least := min(enough, default=0)) else "larger"


def cell(name, vram):
    """What a released model does on a GPU of `vram` GB, in words."""
    plan = memory.choose(parts(name), vram)
    if not plan.fits:
        return instead(name, vram)
    words = {where.kind for where in plan.where.values()} | ({"tiled"} if plan.tiles else set())
    return " + ".join(kind for kind in ("offloaded", "streamed", "tiled") if kind in words) or "resident"


def table():
    """The table of docs/memory.md."""
    yield "| model | " + " | ".join(f"{vram} GB" for vram in CARDS) + " |"
    yield "|---|" + "---|" * len(CARDS)
    for name in NAMES:
        yield f"| {name.rpartition('/')[2]} | " + " | ".join(cell(name, vram) for vram in CARDS) + " |"


@pytest.mark.slow
def test_the_table_of_the_documentation_is_what_the_plan_says():
    wanted = "\n".join(table())
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert wanted in page, f"the table of docs/memory.md should be:\n{wanted}"


def test_a_gpu_that_is_too_small_gets_the_fewest_that_suffice_or_a_larger_one(monkeypatch):
    gigabytes = {2: 20.2, 4: 11.0, 8: 6.4}
    monkeypatch.setitem(globals(), "needs", lambda name, gpus: gigabytes[gpus])
    said = {vram: instead("a model", vram) for vram in (6, 6.4, 8, 11, 20, 20.2)}
    assert said == {6: "larger", 6.4: "8 GPUs", 8: "8 GPUs", 11: "4 GPUs", 20: "4 GPUs", 20.2: "2 GPUs"}
    monkeypatch.setitem(globals(), "needs", lambda name, gpus: None)
    assert instead("a model", 80) == "larger"


@pytest.mark.parametrize("name", ["FLUX.1-dev", "Wan2.2-T2V-A14B-Diffusers", registry.SHIPPED])
def test_weights_are_those_of_the_rows(name):
    of = estimate.subject(name, config.SamplingOptions(), 1, 2)
    want = of.experts * cost.weight_bytes(of.net.rows, 2)
    want += sum(cost.weight_bytes(rows, b) for rows, b in of.others.values())
    assert sum(part.weights for part in memory.footprints(of)) == want


@pytest.mark.parametrize("name", ["FLUX.1-dev", "Wan2.2-T2V-A14B-Diffusers"])
def test_more_memory_never_moves_more_and_auto_fits_wherever_memory_does(name):
    moved = []
    for vram in (4, *CARDS):
        plan, least = memory.choose(parts(name), vram), memory.choose(parts(name), vram, "memory")
        assert plan.fits == least.fits and least.peak <= plan.peak
        assert memory.choose(parts(name), vram, "speed").moved == 0
        if plan.fits and not plan.tiles:
            moved.append(plan.moved)
    assert moved == sorted(moved, reverse=True) and moved[-1] == 0


def test_random_explicit_choices_hold_in_every_mode():
    draw, found = random.Random(0), parts("Wan2.2-T2V-A14B-Diffusers")
    for _ in range(60):
        fixed = {
            part.name: Residency(
                draw.choice(memory.KINDS), resident_blocks=draw.randrange(len(part.blocks) - 1)
            )
            for part in found
            if draw.random() < 0.5 and len(part.blocks) > 2
        }
        ruled_out = {part.name: {draw.choice(memory.KINDS[1:])} for part in found if part.name not in fixed}
        mode = draw.choice(["manual", "auto", "speed", "memory"])
        plan = memory.choose(found, draw.choice(CARDS), mode, fixed, ruled_out)
        assert {name: plan.where[name] for name in fixed} == fixed
        assert all(plan.where[name].kind not in kinds for name, kinds in ruled_out.items())


OPTIONS = {
    "dit_cpu_offload": (True, False),
    "text_encoder_cpu_offload": (True, False),
    "vae_cpu_offload": (True, False),
    "dit_layerwise_offload": (True, False),
    "cpu_offload_components": (["none"], ["vae"], ["dit", "text_encoder"], ["all"]),
    "layerwise_offload_components": (["default"], ["transformer"], ["vae"]),
    "component_residency": ({"all": "resident"}, {"dit": "layerwise-offload"}, {"vae": "component-offload"}),
}


def test_random_options_are_kept_or_refused_in_one_sentence():
    draw, kept, refused = random.Random(1), 0, 0
    roles = {"transformer": "dit", "text_encoder": "text_encoder", "vae": "vae"}
    blocks = dict.fromkeys(roles, 5)
    for _ in range(300):
        names = draw.sample(sorted(OPTIONS), draw.randrange(1, 4))
        given = config.options({name: draw.choice(OPTIONS[name]) for name in names}).model
        try:
            found = resolve(given, roles, blocks)
        except UserError as error:
            refused += 1
            assert "leave one of them out" in str(error) and "\n" not in str(error)
            continue
        kept += 1
        least = smallest(found, excluded(given, roles), blocks)
        for name, where in found.items():
            assert where.kind not in excluded(given, roles)[name]
            assert (
                least[name] == where if where.option else least[name].kind not in excluded(given, roles)[name]
            )
        if given.dit_cpu_offload:
            assert found["transformer"].kind == "offloaded"
        if given.vae_cpu_offload:
            assert found["vae"].kind == "offloaded"
    assert kept > 50 and refused > 50


def test_tiles_come_where_nothing_else_fits_and_never_against_an_option():
    found = parts("Wan2.2-T2V-A14B-Diffusers")
    tiles = {vram: memory.choose(found, vram).tiles for vram in (*CARDS, 300)}
    assert tiles[16] and tiles[24] and not tiles[48] and not tiles[300]
    assert memory.choose(found, 24).fits and not memory.choose(found, 24, tiling=False).fits
    assert memory.choose(found, 300, tiling=True).tiles and memory.choose(found, 24, "memory").tiles
    assert not any(memory.choose(found, 8, mode).tiles for mode in ("speed", "manual"))
    assert "--vae-tiling" in memory.flags(memory.choose(found, 24))


def test_memory_mode_leaves_explicit_options_alone():
    plan = blueprint.read(config.options({"mode": "memory", "vae_cpu_offload": False}).model)
    kinds = {name: net.residency.kind for name, net in plan.nets.items()}
    assert kinds == {"transformer": "streamed", "text_encoder": "streamed", "vae": "streamed"}
    resident = {"mode": "memory", "component_residency": {"all": "resident"}}
    plan = blueprint.read(config.options(resident).model)
    assert {net.residency.kind for net in plan.nets.values()} == {"resident"}


@pytest.mark.parametrize(
    ("text", "want"),
    [("12", 12.0), ("12G", 12.0), ("12GB", 12.0), ("16 gib", 16 * 2**30 / 1e9), ("8000M", 8.0)],
)
def test_memory_may_have_a_unit(text, want):
    assert within_limits("vram", float, text, {"units": GIGABYTES, "above": 0}) == pytest.approx(
        want, rel=1e-12
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", "must be above 0"),
        ("0G", "must be above 0"),
        ("12GBs", "did you mean 'GB'"),
        ("much", "is not a number"),
    ],
)
def test_a_wrong_amount_of_memory_is_one_sentence(text, words):
    with pytest.raises(UserError, match=words):
        within_limits("vram", float, text, {"units": GIGABYTES, "above": 0})
