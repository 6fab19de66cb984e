"""Layouts: what is chosen and why, what is refused in one sentence, and that the teams of every name share
out all ranks.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import prod

import pytest

from tinydiff import config
from tinydiff.parallel import layout
from tinydiff.parallel.layout import AXES, COMBINED_AXES, Layout, check, choose, count, rank_groups
from tinydiff.records import UserError


def asked(text: str) -> config.ParallelOptions:
    """The options of a command line: "num_gpus=4 tp_size=2"."""
    return config.options(dict(word.split("=") for word in text.split())).parallel


def refused(field: str, words: str, call, *given, **more):
    with pytest.raises(UserError) as caught:
        call(*given, **more)
    assert caught.value.field == field and words in str(caught.value), f"{caught.value.field}: {caught.value}"
    assert "\n" not in str(caught.value)


def sizes(made: Layout) -> dict[str, int]:
    return {axis: n for axis, n in zip(AXES, made.sizes, strict=True) if n > 1}


@pytest.mark.parametrize(
    ("options", "heads", "guided", "chosen"),
    [
        ("num_gpus=1", 12, True, {}),
        ("num_gpus=2", 12, True, {"cfg": 2}),
        ("num_gpus=2", 12, False, {"ulysses": 2}),
        (
            "num_gpus=3",
            12,
            True,
            {"ulysses": 3},
        ),  # guidance has two branches, and they would leave one and a half ranks each
        ("num_gpus=4", 12, True, {"cfg": 2, "ulysses": 2}),
        ("num_gpus=8", 40, False, {"ulysses": 8}),
        ("num_gpus=8", 12, True, {"cfg": 2, "ulysses": 4}),
        ("num_gpus=4", 30, False, {"ulysses": 2, "tp": 2}),  # 4 would pad
        ("num_gpus=16", 24, False, {"ulysses": 8, "tp": 2}),
        ("num_gpus=5", 24, False, {"ulysses": 5}),  # nothing divides: padded
        ("num_gpus=4 enable_cfg_parallel=false", 12, True, {"ulysses": 4}),
        ("num_gpus=4 enable_cfg_parallel=true", 12, True, {"cfg": 2, "ulysses": 2}),
        ("num_gpus=4 tp_size=2", 12, False, {"tp": 2, "ulysses": 2}),
        ("num_gpus=4 ulysses_degree=1", 12, False, {"tp": 4}),
        ("num_gpus=8 dp=2", 12, True, {"dp": 2, "cfg": 2, "ulysses": 2}),
        ("num_gpus=4 ring_degree=2", 12, False, {"ring": 2, "ulysses": 2}),
        ("sp_size=4 ring_degree=2", 12, False, {"ring": 2, "ulysses": 2}),
        ("sp_degree=4 ulysses_degree=4", 12, False, {"ulysses": 4}),
        ("sp_degree=4", 12, True, {"ulysses": 4}),
        (
            "ulysses_degree=2 ring_degree=2 tp_size=2 cfg_parallel_size=2 dp=2",
            12,
            True,
            dict.fromkeys(AXES, 2),
        ),
        ("ring_degree=16", 2, False, {"ring": 16}),
    ],
)
def test_what_is_chosen(options: str, heads: int, guided: bool, chosen: dict[str, int]):
    given = asked(options)
    ranks = count(given)
    made, why = choose(given, ranks, heads, guided, tokens=4096, outputs=8)
    assert sizes(made) == chosen and made.size == ranks == prod(chosen.values())
    assert why.startswith(f"{ranks} ranks") and all(f"{axis} {n} (" in why for axis, n in chosen.items())
    assert made.vae == (made.size > made.dp) and not made.fsdp and not made.encoders


def test_the_reasons():
    assert (
        choose(asked("num_gpus=8"), 8, 30, True)[1]
        == "8 ranks: cfg 2 (guidance runs), ulysses 2 (divides 30 heads), tp 2 (the rest)"
    )
    assert choose(asked("num_gpus=5"), 5, 24, True)[1] == "5 ranks: ulysses 5 (pads 24 heads)"
    assert choose(asked("tp_size=2 dp=2"), 4, 24, False)[1] == "4 ranks: dp 2 (asked), tp 2 (asked)"


def test_few_tokens_are_not_shared_by_many():
    assert sizes(choose(asked("num_gpus=4"), 4, 12, False, tokens=2)[0]) == {"ulysses": 2, "tp": 2}
    assert sizes(choose(asked("num_gpus=4"), 4, 12, False, tokens=1)[0]) == {"tp": 4}


def test_what_else_is_divided():
    made = choose(
        asked("num_gpus=4 use_fsdp_inference=true encoder_parallel=fold vae_sp=false"), 4, 12, False
    )[0]
    assert made == Layout(ulysses=4, fsdp=True, encoders=True, vae=False)
    assert choose(asked("num_gpus=2 vae_sp=true encoder_parallel=replicate"), 2, 12, False)[0] == Layout(
        ulysses=2, vae=True
    )
    assert choose(asked("dp=2"), 2, 12, False)[0] == Layout(dp=2)


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ("num_gpus=4 tp_size=3", "num_gpus", "4 does not match tp_size 3, which makes 3 ranks"),
        ("num_gpus=1 tp_size=2", "num_gpus", "1 does not match tp_size 2, which makes 2 ranks"),
        (
            "sp_degree=4 ulysses_degree=2 ring_degree=4",
            "sp_degree",
            "4 is not ulysses_degree times ring_degree; ulysses_degree 2 times ring",
        ),
        ("sp_degree=5 ring_degree=2", "sp_degree", "ring_degree 2 is given"),
        (
            "enable_cfg_parallel=true cfg_parallel_size=1",
            "cfg_parallel_size",
            "1 contradicts enable_cfg_parallel true",
        ),
        (
            "enable_cfg_parallel=false cfg_parallel_size=2",
            "cfg_parallel_size",
            "2 contradicts enable_cfg_parallel false",
        ),
        ("num_gpus=2 nnodes=2", "dist_init_addr", "2 machines (nnodes) need the first one's address"),
        (
            "num_gpus=3 nnodes=2 dist_init_addr=a:1",
            "num_gpus",
            "3 ranks do not divide equally among 2 machines",
        ),
        (
            "num_gpus=2 nnodes=2 dist_init_addr=a:1 node_rank=2",
            "node_rank",
            "2 is out of range for 2 machines, from 0; give 0 to 1",
        ),
        ("num_gpus=2 node_rank=1", "node_rank", "1 is out of range for 1 machines"),
        (
            "num_gpus=2 dist_init_addr=a:1",
            "dist_init_addr",
            "'a:1' is only used with several machines; give nnodes too",
        ),
        (
            "num_gpus=2 nnodes=2 dist_init_addr=a:port",
            "dist_init_addr",
            "'a:port' is not host:port, such as node0:30005",
        ),
        ("num_gpus=2 nnodes=2 dist_init_addr=:5", "dist_init_addr", "':5' is not host:port"),
        (
            "num_gpus=2 nnodes=2 dist_init_addr=a:5 master_port=6",
            "master_port",
            "6 is not the port of dist_init_addr, 5",
        ),
        ("use_fsdp_inference=true", "use_fsdp_inference", "true needs several ranks; give num_gpus too"),
        ("vae_sp=true", "vae_sp", "true needs several ranks; give num_gpus too"),
        ("encoder_parallel=fold", "encoder_parallel", "fold needs several ranks; give num_gpus too"),
    ],
)
def test_options_that_contradict_each_other(options: str, field: str, words: str):
    refused(field, words, count, asked(options))


def test_an_autoencoder_shared_by_one_rank_is_refused_for_replicas_of_one_rank_too():
    one_each = asked("num_gpus=2 data_parallel_size=2 vae_sp=true")
    refused("vae_sp", "true needs several ranks in a replica", choose, one_each, 2, 12, False)


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        (
            "num_gpus=32",
            "num_gpus",
            "32 ranks do not fit the denoiser's 12 heads; give fewer, or data_parallel_size or ring_degree",
        ),
        (
            "num_gpus=26 dp=2",
            "num_gpus",
            "26 ranks do not fit the denoiser's 12 heads beside data_parallel_size 2",
        ),
        (
            "tp_size=5",
            "tp_size",
            "5 does not divide the denoiser's 12 heads; choose one of 1, 2, 3, 4, 6, 12",
        ),
        (
            "ulysses_degree=16",
            "ulysses_degree",
            "16 is more than the denoiser's 12 heads; ring_degree has no such limit",
        ),
        (
            "ulysses_degree=4 tp_size=4",
            "ulysses_degree",
            "4 times tp_size 4 is more than the denoiser's 12 heads",
        ),
        (
            "enable_cfg_parallel=true",
            "cfg_parallel_size",
            "2 is only for requests with guidance",
        ),
        ("ring_degree=128", "sp_degree", "128 ranks cannot share an image of 64 tokens; give at most 64"),
        (
            "tp_size=2 use_fsdp_inference=true",
            "use_fsdp_inference",
            "no two ranks hold the same weights",
        ),
        ("dp=2 use_fsdp_inference=true", "use_fsdp_inference", "no two ranks hold the same weights"),
        ("dp=4", "data_parallel_size", "4 replicas for 3 outputs; give at most 3"),
        (
            "tp_size=2 encoder_parallel=fold",
            "encoder_parallel",
            "'fold' needs more ranks in a replica than those of tp_size",
        ),
        (
            "tp_size=2 encoder_parallel=replicate",
            "encoder_parallel",
            "'replicate' is not possible with tp_size 2",
        ),
        (
            "num_gpus=4 tp_size=1 ulysses_degree=2 ring_degree=1 cfg_parallel_size=1 dp=1",
            "num_gpus",
            "4 does not match",
        ),
    ],
)
def test_layouts_that_a_model_cannot_have(options: str, field: str, words: str):
    given = asked(options)
    refused(field, words, choose, given, count(given), 12, False, tokens=64, outputs=3)


def test_the_same_holds_for_a_layout_that_was_not_chosen():
    check(Layout(cfg=2, ulysses=2, tp=2, fsdp=True), 12, True, 64, 1)
    refused("tp_size", "5 does not divide", check, Layout(tp=5), 12, True)
    refused("cfg_parallel_size", "is only for requests with guidance", check, Layout(cfg=2), 12, False)


def test_under_torchrun_its_ranks_count():
    assert count(asked(""), 4) == count(asked("num_gpus=4 tp_size=2"), 4) == 4
    refused(
        "num_gpus", "2 is not the number of ranks that torchrun started, 4", count, asked("num_gpus=2"), 4
    )
    refused("num_gpus", "4 does not match tp_size 3", count, asked("tp_size=3"), 4)
    for name, value in (("nnodes", "2"), ("node_rank", "0"), ("dist_init_addr", "a:1"), ("master_port", "7")):
        refused(name, f"{name}: {value} cannot be given under torchrun", count, asked(f"{name}={value}"), 4)


def test_where_they_meet():
    assert layout.address(asked("num_gpus=2")) == ("localhost", 0)
    assert layout.address(asked("num_gpus=2 master_port=7")) == ("localhost", 7)
    several = "num_gpus=2 nnodes=2 dist_init_addr="
    assert layout.address(asked(several + "node0")) == ("node0", layout.PORT)
    assert (
        layout.address(asked(several + "node0 master_port=7"))
        == layout.address(asked(several + "node0:7"))
        == ("node0", 7)
    )
    assert layout.address(asked(several + "[::1]:7")) == ("::1", 7)


def test_the_teams_of_every_name_are_all_ranks_once():
    for n in product((1, 2, 3), repeat=len(AXES)):
        made = replace(Layout(), **dict(zip(AXES, n, strict=True)))
        for name in (*AXES, *COMBINED_AXES):
            found = rank_groups(made, name)
            assert sorted(rank for team in found for rank in team) == list(range(made.size))
            assert {len(team) for team in found} == {
                prod(getattr(made, axis) for axis in COMBINED_AXES.get(name, (name,)))
            }
            assert all(team == sorted(team) for team in found)


def test_neighbours_share_the_innermost_axis():
    made = Layout(dp=2, cfg=2, tp=2)
    assert rank_groups(made, "tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert rank_groups(made, "cfg") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert rank_groups(made, "replica") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert rank_groups(made, "shard") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert rank_groups(made, "peers") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert rank_groups(made, "world") == [list(range(8))]


DEGREES = {
    **{name: (1, 2, 3, 4) for name in ("tp_size", "sp_degree", "ulysses_degree", "ring_degree")},
    "num_gpus": (1, 2, 4, 6, 8, 12),
    "data_parallel_size": (1, 2),
    "cfg_parallel_size": (1, 2),
    "enable_cfg_parallel": (True, False),
    "use_fsdp_inference": (True, False),
    "encoder_parallel": ("auto", "fold", "replicate"),
    "vae_sp": (True, False),
}


def explicit(asked: config.ParallelOptions, made: Layout) -> Iterator[tuple[str, object, object]]:
    """(option, what it asks for, what the layout has) of each that is given."""
    sizes = {
        "num_gpus": made.size,
        "tp_size": made.tp,
        "sp_degree": made.sequence,
        "ulysses_degree": made.ulysses,
        "ring_degree": made.ring,
        "data_parallel_size": made.dp,
        "cfg_parallel_size": made.cfg,
        "enable_cfg_parallel": made.cfg == 2,
        "use_fsdp_inference": made.fsdp,
    }
    yield from ((name, getattr(asked, name), has) for name, has in sizes.items())
    if asked.vae_sp is not None:
        yield "vae_sp", asked.vae_sp, made.vae
    if asked.encoder_parallel != "auto":
        yield "encoder_parallel", asked.encoder_parallel == "fold", made.encoders


def test_no_combination_changes_an_explicit_option_and_contradictions_are_one_sentence():
    draw, seen, refused = random.Random(3), Counter[str](), Counter[str]()
    for _ in range(4000):
        names = draw.sample(sorted(DEGREES), draw.randrange(1, 6))
        asked = config.ParallelOptions(**{name: draw.choice(DEGREES[name]) for name in names})
        try:
            made, why = choose(asked, count(asked), draw.choice([12, 24]), draw.random() < 0.7)
        except UserError as error:
            assert "\n" not in str(error) and str(error).startswith(f"{error.field}: ")
            refused[error.field] += 1
            continue
        for name, wanted, has in explicit(asked, made):
            if wanted is not None:
                assert wanted == has, (name, asked, made)
                seen[name] += 1
        assert all(f"{axis} {n}" in why for axis, n in zip(AXES, made.sizes, strict=True) if n > 1)
    assert seen.keys() == DEGREES.keys() and min(seen.values()) > 50, seen
    assert set(refused) <= set(DEGREES) and len(refused) > 5, refused
