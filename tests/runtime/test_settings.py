"""Which of what is asked, stored and recommended holds, for guidance, experts and shift, and what
`parameters` says of it.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from tests.runtime.folders import edit, released
from tests.runtime.test_admit import DEV, EXPERTS, FAST, SCHNELL, T2V, read, refused, request
from tinydiff.config import SamplingOptions
from tinydiff.models.registry import MODELS
from tinydiff.runtime import pipeline
from tinydiff.runtime.settings import settle

QWEN, Z_IMAGE, SD3, OVIS, ERNIE = (
    *(
        "Qwen/Qwen-Image",
        "Tongyi-MAI/Z-Image",
        "stabilityai/stable-diffusion-3.5-medium",
        "AIDC-AI/Ovis-Image-7B",
        "baidu/ERNIE-Image",
    ),
)
KLEIN, DEV_2 = "black-forest-labs/FLUX.2-klein-base-4B", "black-forest-labs/FLUX.2-dev"


def shift_of(path, **asked):
    """(shift, what is said of it)."""
    made = settle(read(path), SamplingOptions(**asked))
    return made.flow_shift, made.notes.get("flow_shift")


def stored(path, **entries):
    edit(path / "scheduler" / "scheduler_config.json", **entries)
    return path


# --- two experts ---


def test_the_checkpoints_boundary_wins_and_an_option_wins_over_it(tmp_path):
    path = released(EXPERTS, tmp_path)
    assert (request(path).schedule.boundary_ratio, "boundary_ratio" in request(path).notes) == (0.875, False)
    edit(path / "model_index.json", boundary_ratio=0.7)
    made = request(path)
    assert (made.schedule.boundary_ratio, made.notes["boundary_ratio"]) == (
        *(0.7, "from model_index.json; Wan-AI/Wan2.2-T2V-A14B-Diffusers is released with 0.875"),
    )
    assert request(path, boundary_ratio=0.6).schedule.boundary_ratio == 0.6


def test_without_a_boundary_the_second_expert_is_not_guessed(tmp_path):
    path = released(EXPERTS, tmp_path)
    edit(path / "model_index.json", boundary_ratio=None)
    refused("boundary_ratio", "names no boundary", request, path)


def test_a_boundary_without_a_second_expert(tmp_path):
    path = released(EXPERTS, tmp_path)
    edit(path / "model_index.json", transformer_2=[None, None])
    refused("model_path", "gives boundary_ratio 0.875", request, path)


@pytest.mark.parametrize(
    ("asked", "scales"),
    [
        ({}, (4.0, 3.0)),
        ({"guidance_scale": 5.0}, (5.0, 5.0)),
        ({"guidance_scale_2": 0.4}, (4.0, 0.4)),
        ({"guidance_scale": 5.0, "guidance_scale_2": 0.0}, (5.0, 0.0)),
        ({"guidance_scale": 1.0, "guidance_scale_2": 3.0}, (1.0, 1.0)),
        ({"guidance_scale": 0.0}, (1.0, 1.0)),
    ],
)
def test_the_first_experts_scale_says_whether_there_is_guidance(asked, scales, tmp_path):
    made = request(released(EXPERTS, tmp_path), **asked)
    assert (made.guidance.scale, made.guidance.scale_2, made.guidance.on) == (*scales, scales[0] > 1)
    assert ("guidance_scale_2" in made.notes) == (scales[0] == 1 and "guidance_scale_2" in asked)


# --- the shift ---


@pytest.mark.parametrize("name", [row.name for row in MODELS[1:] if row.solver == "unipc"])
def test_a_recommended_shift_holds_only_over_the_releases_own_file(name, tmp_path):
    path, row = released(name, tmp_path), next(row for row in MODELS if row.name == name)
    assert read(path).scheduler["flow_shift"] == row.stored_shift
    note = f"recommended for {name}; its scheduler's file says {row.stored_shift:g}"
    assert shift_of(path) == (row.flow_shift, note if row.flow_shift != row.stored_shift else None)
    assert shift_of(stored(path, flow_shift=4.2)) == (
        4.2,
        f"from the scheduler's file; {row.flow_shift:g} is recommended for {name}",
    )
    assert shift_of(path, flow_shift=6.0) == (6.0, None)
    (path / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.5}'
    )
    assert shift_of(path)[0] == 2.5


def test_entries_of_another_type_are_one_sentence(tmp_path):
    path = released(EXPERTS, tmp_path)
    edit(path / "model_index.json", boundary_ratio="0.7")
    refused("model_path", "boundary_ratio is '0.7'", request, path)
    edit(path / "model_index.json", boundary_ratio=0.7)
    refused("scheduler.flow_shift", "flow_shift is None", request, stored(path, flow_shift=None))
    refused("scheduler.flow_shift", "flow_shift is 'much'", request, stored(path, flow_shift="much"))
    refused("scheduler", "it must be a string", request, stored(path, _class_name=["UniPC"]))
    refused(
        "scheduler.flow_shift",
        "flow_shift is 'much'",
        request,
        stored(released(FAST, tmp_path), flow_shift="much"),
    )


def test_a_distilled_schedule_is_not_in_the_file(tmp_path):
    made = request(stored(released(FAST, tmp_path), flow_shift=4.2))
    assert made.schedule.flow_shift == 8.0 and made.notes["flow_shift"].endswith(
        "the scheduler's file, which says 4.2, is not read"
    )


# --- guidance ---

GUIDED = {
    # What is asked -> the scale of guidance and its negative prompt, None without guidance: what diffusers
    # does, but for the standard negative prompts of Wan's authors and Qwen-Image's card.
    (DEV, None, None, None): None,
    (DEV, None, 2.6, None): None,
    (DEV, None, 2.6, ""): (2.6, ""),
    (DEV, None, 2.6, "x"): (2.6, "x"),
    (DEV, 7.0, 1.0, ""): None,
    (DEV, None, 0.5, ""): None,
    (SCHNELL, 3.5, None, None): None,
    (SCHNELL, 3.5, None, "x"): None,
    (SCHNELL, None, 2.6, None): None,
    (SCHNELL, None, 2.6, "x"): (2.6, "x"),
    (SCHNELL, 3.5, 2.6, "x"): (2.6, "x"),
    (DEV_2, None, None, None): None,
    (DEV_2, None, 2.6, None): None,
    (T2V, None, None, ""): (3.0, ""),
    (T2V, 1.0, None, "x"): None,
    (T2V, 0.5, None, None): None,
    (T2V, 0.0, None, None): None,
    (QWEN, None, None, None): (4.0, " "),
    (QWEN, None, None, ""): (4.0, ""),
    (QWEN, None, 1.0, "x"): None,
    (QWEN, None, 0.5, None): None,
    (Z_IMAGE, None, None, None): (6.0, ""),
    (Z_IMAGE, 0.5, None, None): (1.5, ""),
    (Z_IMAGE, 0.0, None, "x"): None,
    (SD3, None, None, None): (4.5, ""),
    (SD3, 1.0, None, "x"): None,
    (SD3, 0.0, None, None): None,
    (OVIS, None, None, None): (5.0, ""),
    (OVIS, 1.0, None, "x"): None,
    (OVIS, 0.5, None, None): None,
    (ERNIE, None, None, None): (4.0, ""),
    (ERNIE, 1.0, None, "x"): None,
    (ERNIE, 0.5, None, None): None,
    (KLEIN, None, None, None): (4.0, ""),
    (KLEIN, 1.0, None, "x"): None,
    (KLEIN, 0.0, None, None): None,
}


@pytest.mark.parametrize(
    ("asked", "wanted"), GUIDED.items(), ids=lambda each: "-".join(map(str, each or ("unguided",)))
)
def test_whether_a_request_is_guided_and_against_what(asked, wanted, tmp_path):
    name, guidance, true, negative = asked
    made = request(
        released(name, tmp_path), guidance_scale=guidance, true_cfg_scale=true, negative_prompt=negative
    )
    assert made.texts == (["a fox"] if wanted is None else ["a fox", wanted[1]])
    assert made.guidance.scale == (1.0 if wanted is None else wanted[0])


@pytest.mark.parametrize(
    ("name", "asked", "field"),
    [
        (DEV, {"true_cfg_scale": 2.6}, "true_cfg_scale"),
        (SCHNELL, {"true_cfg_scale": 2.6}, "true_cfg_scale"),
        (SCHNELL, {"guidance_scale": 3.5}, "guidance_scale"),
        (DEV_2, {"true_cfg_scale": 2.6}, "true_cfg_scale"),
        (SD3, {"guidance_scale": 1.0, "negative_prompt": "x"}, "negative_prompt"),
        (EXPERTS, {"guidance_scale": 1.0, "guidance_scale_2": 3.0}, "guidance_scale_2"),
    ],
)
def test_what_is_without_effect_is_said(name, asked, field, tmp_path, caplog):
    path = released(name, tmp_path)
    with caplog.at_level(logging.WARNING, "tinydiff"):
        made = request(path, **asked)
    assert made.notes[field].startswith("without effect: ")
    why = made.notes[field].removeprefix("without effect: ")
    assert caplog.messages == [f"{field} has no effect: {why}"]
    model = SimpleNamespace(blueprint=read(path), nets={}, adapters={})
    assert pipeline.parameters(model, made)["notes"][field] == made.notes[field]


def test_nothing_is_said_of_what_holds(tmp_path):
    assert (
        request(released(DEV, tmp_path), guidance_scale=2.0, true_cfg_scale=2.6, negative_prompt="x").notes
        == {}
    )
