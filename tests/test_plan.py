"""`tinydiff plan`: every released model is planned from a table that says what its config.json says; what is
printed, and mistakes.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields, replace
from functools import cache

import huggingface_hub
import pytest

from tests.sources import PACKAGE, ROOT
from tinydiff import advise, cli, command_line, config
from tinydiff.io import hub
from tinydiff.models import registry
from tinydiff.parallel import cost
from tinydiff.parallel.cost import Machine
from tinydiff.parallel.layout import Layout, choose
from tinydiff.records import UserError
from tinydiff.runtime import estimate

NAMES = [row.name for row in registry.MODELS]
MACHINE = Machine()


@cache
def subject(name: str) -> estimate.Subject:
    return estimate.subject(name, config.SamplingOptions(), 8, 2)


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["plan", *argv]) == 0
    return capsys.readouterr().out


# --- what is known of released models


def test_nothing_is_written_and_no_device_is_asked(monkeypatch):
    """A released model is planned from the JSON in the package, and no attention kernel is tried."""

    def forbidden(*args, **options):
        raise AssertionError("a file is written or a kernel is run")

    monkeypatch.setattr("pathlib.Path.write_text", forbidden)
    monkeypatch.setattr("tempfile.mkdtemp", forbidden)
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", forbidden)
    for name in ("FLUX.1-dev", "Wan2.2-T2V-A14B-Diffusers", registry.SHIPPED):
        made = estimate.subject(name, config.SamplingOptions(), 8, 2)
        assert made.name == registry.named(name).name and made.net.rows


@pytest.mark.parametrize("name", NAMES)
def test_the_denoiser_has_as_many_parameters_as_released(name):
    of = subject(name)
    rows = [row for row in of.net.rows if row.name != "pos_embed.pos_embed"]  # a buffer
    assert of.experts * sum(row.numel for row in rows) == registry.named(name).params


# --- what a layout costs


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_planned_on_one_to_eight_gpus(name):
    of = subject(name)
    alone = [Layout()]
    assert [each.layout for each in estimate.estimates(of, 1, 1e6, MACHINE)] == alone
    spec = sum(cost.weight_bytes(rows, b) for rows, b in of.others.values()) + of.experts * cost.weight_bytes(
        of.net.rows, 2
    )
    assert estimate.estimate(of, Layout(), 80, MACHINE).weights == spec
    for ranks in (2, 4, 8):
        found = estimate.estimates(of, ranks, 80, MACHINE)
        assert found and {each.layout.size for each in found} == {ranks}
        assert [each.lacks > 0 for each in found] == sorted(each.lacks > 0 for each in found)
        assert all(each.layout.cfg <= of.work.branches for each in found)
        assert len({each.layout for each in found}) == len(found)
        assert min(each.seconds for each in found) < estimate.estimate(of, Layout(), 80, MACHINE).seconds


@pytest.mark.parametrize(
    "name", ["Wan2.2-T2V-A14B-Diffusers", "FLUX.1-dev", "Qwen-Image-Edit", "stable-diffusion-3.5-medium"]
)
def test_what_must_be_so(name):
    of = subject(name)

    def of_layout(machine: Machine = MACHINE, **sizes) -> estimate.Estimate:
        return estimate.estimate(of, Layout(**sizes), 80, machine)

    for less, more in ((1, 2), (2, 4)):
        assert of_layout(tp=more).weights < of_layout(tp=less).weights
        assert of_layout(ulysses=more).activations < of_layout(ulysses=less).activations
        assert of_layout(ring=more).seconds < of_layout(ring=less).seconds
    assert of_layout(ulysses=4).weights == of_layout(ring=4).weights == of_layout().weights
    assert (
        of_layout(ulysses=4, fsdp=True).weights
        < of_layout(ulysses=2, fsdp=True).weights
        < of_layout().weights
    )
    assert of_layout(ulysses=4, encoders=True).weights < of_layout(ulysses=4).weights
    assert of_layout(ulysses=2, vae=True).decoding < of_layout(ulysses=2).decoding
    assert of_layout(replace(MACHINE, link=25.0), ulysses=2).seconds > of_layout(ulysses=2).seconds
    assert of_layout(replace(MACHINE, ranks=1), ulysses=2).seconds > of_layout(ulysses=2).seconds
    assert of_layout(replace(MACHINE, tflops=200.0)).seconds == 2 * of_layout().seconds


def test_what_does_not_fit_is_shown_with_what_makes_it_fit():
    of = subject("Wan2.2-T2V-A14B-Diffusers")
    found = estimate.estimates(of, 4, 60, MACHINE)
    fits = {each.layout for each in found if each.lacks <= 0}
    assert Layout(ulysses=4, vae=True) in {each.layout for each in found} - fits
    assert Layout(ulysses=4, vae=True, fsdp=True) in fits and Layout(cfg=2, tp=2, vae=True) in fits
    assert all(each.total / 1e9 + estimate.RESERVED <= 60 for each in found if each.layout in fits)
    assert all(each.lacks > 0 for each in estimate.estimates(of, 4, 5, MACHINE))


@pytest.mark.parametrize("name", ["Wan2.2-T2V-A14B-Diffusers", "FLUX.2-dev"])
def test_the_options_shown_ask_generate_for_that_layout(name):
    of = subject(name)
    for each in estimate.estimates(of, 4, 20, MACHINE):
        asked = config.parse([*shlex.split(advise.flags(each.layout)), "--num-gpus", "4"]).parallel
        assert choose(asked, 4, of.net.heads, of.request.guidance.on, of.work.image)[0] == each.layout


# --- the command


def test_the_commands_that_are_printed_quantise_as_the_plan_does(capsys):
    given = ["--quantization", "fp8", "--quantization-ignored-layers", "attn.to_", "ff."]
    given += ["--component-quantizations", "text_encoder=int8"]
    words = "--quantization fp8 --component-quantizations text_encoder=int8"
    words = f"tinydiff generate {words} --quantization-ignored-layers attn.to_ ff."
    assert f"`{words} --num-gpus 2`" in printed(
        capsys, "FLUX.1-dev", "--num-gpus", "2", "--vram", "80", *given
    )
    alone = printed(capsys, "FLUX.1-dev", "--vram", "80", *given)
    assert f"`{words}" in alone and "text_encoder in int8" in alone
    assert "`tinydiff generate --num-gpus 2`" in printed(
        capsys, "FLUX.1-dev", "--num-gpus", "2", "--vram", "80"
    )


def test_what_is_printed(capsys):
    first, why, _, head, *lines = printed(
        capsys, "FLUX.1-dev", "--num-gpus", "2", "--vram", "80"
    ).splitlines()
    assert first.startswith(
        "black-forest-labs/FLUX.1-dev, 1024x1024, 50 steps, no guidance: 4096 image tokens and 512 of text"
    )
    assert (
        why.startswith("ulysses 2 is the fastest that fits")
        and "`tinydiff generate --num-gpus 2` selects it" in why
    )
    assert head.split() == [
        "layout",
        "weights",
        "activations",
        "decoding",
        "total",
        "fits",
        "sent/step",
        "s/step",
        "speed-up",
    ]
    rows = [re.split(r"  +", line) for line in lines[: lines.index("")]]
    assert [row[0] for row in rows] == ["ulysses 2", "ring 2", "tp 2"] and {row[5] for row in rows} == {"yes"}
    assert rows[0][1] == "33.9 GB" and rows[2][1] == "20.5 GB"
    assert any("Estimated, not measured" in line for line in lines)


def test_the_same_as_json(capsys):
    argv = [
        "Wan2.1-T2V-1.3B-Diffusers",
        "--num-gpus",
        "2",
        "--vram",
        "80",
        "--size",
        "832x480",
        "--num-frames",
        "5",
        "--bandwidth",
        "pcie",
    ]
    told = json.loads(printed(capsys, *argv, "--json"))
    assert told["request"] == {
        "width": 832, "height": 480, "num_frames": 5,
        "image": 2 * 30 * 52, "text": 512, "views": 0, "audio": 0, "images": 1, "branches": 2, "steps": 50,
    }  # fmt: skip
    assert told["recommended"] == "cfg 2" and told["machine"]["link"] == 25
    best = told["layouts"][0]
    assert (
        best["sent_bytes"] == {"cfg": 3120 * 64 * 2}
        and best["fits"]
        and best["lacks_gb"] == 0
        and best["options"] == "--cfg-parallel-size 2"
    )


def test_options_that_change_the_plan(capsys):
    def plan(*more: str) -> dict:
        return json.loads(printed(capsys, "Z-Image", "--num-gpus", "2", "--vram", "80", "--json", *more))

    usual, alone = plan(), plan("--guidance-scale", "0")
    assert usual["request"]["branches"] == 2 and alone["request"]["branches"] == 1
    assert {each["cfg"] for each in alone["layouts"]} == {1} and usual["recommended"] == "cfg 2"
    heavier = (
        plan("--dit-precision", "fp32")["layouts"][0]["weight_bytes"] - usual["layouts"][0]["weight_bytes"]
    )
    assert heavier == 2 * registry.named("Z-Image").params
    net = subject("Z-Image").net
    blocks = [
        row for rows in net.blocks for row in rows if row.name.endswith(".weight") and len(row.shape) == 2
    ]
    saved = sum(row.numel - 4 * row.shape[0] for row in blocks)
    lighter = plan("--quantization", "fp8")["layouts"][0]["weight_bytes"]
    assert usual["layouts"][0]["weight_bytes"] - lighter == saved > registry.named("Z-Image").params / 2
    assert plan("--num-inference-steps", "9")["request"]["steps"] == 9
    slower = plan("--gpus-per-node", "1", "--net-bandwidth", "1")
    assert slower["layouts"][0]["seconds_per_step"] > usual["layouts"][0]["seconds_per_step"]


def test_nothing_fits(capsys):
    out = printed(capsys, "FLUX.2-dev", "--num-gpus", "2", "--vram", "24")
    assert (
        "nothing fits into 24 GB; " in out
        and "comes nearest and lacks" in out
        and "yes" not in out.split("\n\n")[1]
    )


def test_one_gpu_is_assumed(capsys):
    argv = ("FLUX.1-dev", "--vram", "80", "--json")
    told = printed(capsys, *argv)
    assert told == printed(capsys, *argv, "--num-gpus", "1") and json.loads(told)["recommended"] == "one GPU"


def test_without_vram_the_usual_layout_is_held_against_the_usual_gpus(capsys):
    first, why, _, head, *lines = printed(capsys, "FLUX.1-dev").splitlines()
    rows = [re.split(r"  +", line) for line in lines[: lines.index("")]]
    assert first.endswith("of text, on one GPU") and why.startswith("one GPU needs 37.7 GB at its peak")
    assert head.split() == ["GPU", "peak", "fits"]
    assert [row[0] for row in rows] == [f"{size} GB" for size in (12, 16, 24, 32, 48, 80, 96, 141, 192)]
    assert [row[2] for row in rows] == [
        *(f"lacks {size} GB" for size in (26.7, 22.7, 14.7, 6.7)),
        *["yes"] * 5,
    ]
    assert {row[1] for row in rows} == {"37.7 GB"}


def test_the_cards_say_what_a_plan_for_each_says(capsys):
    name = "FLUX.1-dev"
    told = json.loads(printed(capsys, name, "--num-gpus", "2", "--json"))
    assert (
        told["vram_gb"] is None
        and "layouts" not in told
        and [each["vram_gb"] for each in told["cards"]] == list(estimate.CARDS)
    )
    for each in told["cards"]:
        planned = json.loads(
            printed(capsys, name, "--num-gpus", "2", "--vram", str(each["vram_gb"]), "--json")
        )["layouts"]
        assert {key: value for key, value in each.items() if key not in ("vram_gb", "help")} in planned
        assert each["fits"] == (each["help"] is None) and each["help"] in [None, *planned]


def test_help_is_the_smallest_that_is_enough(capsys):
    helped = {
        each["vram_gb"]: each["help"]
        for each in json.loads(printed(capsys, "FLUX.1-dev", "--num-gpus", "2", "--json"))["cards"]
    }
    said = {vram: each and (each["encoders"], each["fsdp"], each["fits"]) for vram, each in helped.items()}
    assert said == {
        12: (True, True, False), 16: (True, True, False), 24: (True, True, True), 32: (True, False, True),
        48: None, 80: None, 96: None, 141: None, 192: None,
    }  # fmt: skip


def test_a_directory_of_json_files_is_enough(tmp_path, capsys):
    for path in (PACKAGE / "shapes").rglob("*.json"):
        copy = tmp_path / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    ours, copied = (
        json.loads(printed(capsys, model, "--num-gpus", "2", "--vram", "2", "--json"))
        for model in (registry.SHIPPED, str(tmp_path / "shapes"))
    )
    assert ours["model"] == registry.SHIPPED and copied["model"] == str(tmp_path / "shapes")
    assert ours["layouts"] == copied["layouts"] and ours["recommended"] == "cfg 2"


def test_a_hub_ids_json_files_are_fetched_and_no_weights(monkeypatch):
    asked = {}

    def download(hub_id: str, **options: object) -> str:
        asked[hub_id] = options
        return str(PACKAGE / "shapes")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    of = estimate.subject("someone/else", config.SamplingOptions(), 1, 2)
    assert of.name == "someone/else" and asked["someone/else"]["allow_patterns"] == ["*.json"]
    assert hub.resolve("someone/else") and "*/*.safetensors" in asked["someone/else"]["allow_patterns"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["FLUX.1-dve", "--num-gpus", "2", "--vram", "80"], "did you mean 'FLUX.1-dev'?"),
        (["FLUX.1-dev", "--num-gpus", "0", "--vram", "80"], "num_gpus: 0 must be at least 1"),
        (["FLUX.1-dev", "--num-gpus", "2", "--vram", "-1"], "vram: -1.0 must be above 0"),
        (["FLUX.1-dev", "--num-gpus", "2", "--vram", "much"], "vram: 'much' is not a number"),
        (
            ["FLUX.1-dev", "--num-gpus", "2", "--vram", "80", "--size", "720p"],
            "size: '720p' is not WIDTHxHEIGHT, such as 1280x720",
        ),
        (
            ["FLUX.1-dev", "--num-gpus", "2", "--vram", "80", "--size", "100x1024"],
            "width: 100 is not a multiple of 16",
        ),
        (
            ["FLUX.1-dev", "--num-gpus", "2", "--vram", "80", "--num-frames", "5"],
            "num_frames: 5 would be a video",
        ),
        (
            ["FLUX.1-dev", "--num-gpus", "2", "--vram", "80", "--bandwidth", "fast"],
            "bandwidth: 'fast' is not nvlink, pcie or a number",
        ),
        (
            ["FLUX.1-dev", "--num-gpus", "2", "--vram", "80", "--frames", "5"],
            "--frames: no such flag; did you mean '--num-frames'?",
        ),
        (["--num-gpus", "2", "--vram", "80"], "model: is missing; `tinydiff models` lists the names"),
    ],
)
def test_mistakes(capsys, argv, words):
    assert cli.main(["plan", *argv]) == 2
    shown = capsys.readouterr()
    assert words in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_help_lists_every_option(capsys):
    shown = printed(capsys, "--help")
    assert shown.startswith("usage: tinydiff plan [-h] [PLAN OPTIONS] MODEL\n")
    for entry in fields(advise.PlanOptions):
        flag = "MODEL" if entry.name == "model" else f"--{entry.name.replace('_', '-')} "
        assert flag in shown, flag


def test_a_size_in_every_spelling_and_the_model_at_any_place():
    wanted = advise.PlanOptions(model="FLUX.1-dev", width=1280, height=720, vram=80.0, json=True)
    for argv in (
        ["FLUX.1-dev", "--size", "1280x720", "--vram", "80", "--json"],
        ["--vram", "80", "FLUX.1-dev", "--size=1280X720", "--json", "true"],
        ["--json", "FLUX.1-dev", "--720p", "--vram=80"],
        ["--vram", "80", "--json", "--width", "1280", "--height", "720", "FLUX.1-dev"],
    ):
        assert command_line.chosen(cli.COMMANDS, ["plan", *argv]) == wanted
    assert wanted.sampling == config.SamplingOptions(width=1280, height=720)


def test_an_unknown_model_that_looks_like_a_hub_id(monkeypatch):
    def refuse(*_: object, **__: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"did you mean 'Qwen/Qwen-Image'"):
        estimate.subject("Qwen/Qwen-Imag", config.SamplingOptions(), 1, 2)


def test_the_plans_on_the_page_are_what_is_printed(capsys):
    page = (ROOT / "docs" / "choosing-a-layout.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```console\n\$ tinydiff (plan [^\n]+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(shown) == 3
    for command, told in shown:
        assert printed(capsys, *shlex.split(command)[1:]) == told
