"""The registry: rows agree with what was published, names and directories find their row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tinydiff
from tinydiff.models.registry import MODELS, SHIPPED, WAN_NEGATIVE, find, match, named
from tinydiff.records import UserError

SHAPES = {
    "1.3B": {"num_layers": 30, "num_attention_heads": 12, "in_channels": 16},
    "14B": {"num_layers": 40, "num_attention_heads": 40, "in_channels": 16},
    "14B image": {"num_layers": 40, "num_attention_heads": 40, "in_channels": 36},
    "5B": {"num_layers": 30, "num_attention_heads": 24, "in_channels": 48},
    "guided": {"guidance_embeds": True},
    "unguided": {"guidance_embeds": False},
}


def test_rows_are_consistent():
    assert MODELS[0].name == SHIPPED and len({row.name for row in MODELS}) == len(MODELS)
    for row in MODELS:
        assert row.height % row.size_multiple == row.width % row.size_multiple == 0
        over = 0 if row.speech else 1
        assert row.num_frames % row.frame_multiple == row.video_frames % row.frame_multiple == over
        assert (row.solver == "dmd") == (len(row.dmd_timesteps) == row.steps)
        assert (row.guidance_2 is None) == (row.boundary_ratio is None) == (row.experts == 1)
        guided = row.guidance + (row.guidance_form == "offset") > 1
        assert (row.negative_prompt is None) == (not guided or row.name == SHIPPED)
        least, most = row.images
        assert 0 <= least <= most and (row.image_use != "start" or row.images == (0, 1))


def test_the_negative_prompt_is_the_whole_one():
    parts = WAN_NEGATIVE.split("，")
    assert len(parts) == len(set(parts)) == 28 and parts[0] == "色调艳丽" and parts[-1] == "倒着走"


@pytest.mark.parametrize(
    ("name", "size", "frames", "fps", "steps", "guidance", "shift"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", (480, 832), 81, 16, 50, (3.0, None), 3),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", (720, 1280), 81, 16, 50, (5.0, None), 5),
        ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", (480, 832), 81, 16, 50, (5.0, None), 3),
        ("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", (720, 1280), 81, 16, 50, (5.0, None), 5),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", (720, 1280), 81, 16, 40, (4.0, 3.0), 12),
        ("Wan-AI/Wan2.2-I2V-A14B-Diffusers", (720, 1280), 81, 16, 40, (3.5, 3.5), 5),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", (704, 1280), 121, 24, 50, (5.0, None), 5),
        ("FastVideo/FastWan2.1-T2V-1.3B-Diffusers", (480, 832), 61, 16, 3, (1.0, None), 8),
        ("FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers", (704, 1280), 121, 24, 3, (1.0, None), 5),
    ],
)
def test_published_defaults(name, size, frames, fps, steps, guidance, shift):
    row = named(name)
    assert ((row.height, row.width), row.num_frames, row.fps, row.steps, row.flow_shift) == (
        size,
        frames,
        fps,
        steps,
        shift,
    )
    assert (row.guidance, row.guidance_2) == guidance


@pytest.mark.parametrize(
    ("name", "steps", "guidance", "form", "text_tokens", "images"),
    [
        ("black-forest-labs/FLUX.1-dev", 50, 3.5, "embedded", 512, (0, 1)),
        ("black-forest-labs/FLUX.1-schnell", 4, 1.0, "true", 256, (0, 1)),
        ("black-forest-labs/FLUX.1-Kontext-dev", 28, 2.5, "embedded", 512, (1, 4)),
        ("AIDC-AI/Ovis-Image-7B", 50, 5.0, "scale", 256, (0, 1)),
    ],
)
def test_published_defaults_of_images(name, steps, guidance, form, text_tokens, images):
    row = named(name)
    assert (row.height, row.width, row.num_frames, row.flow_shift) == (1024, 1024, 1, None)
    assert (row.steps, row.guidance, row.guidance_form, row.text_tokens, row.images) == (
        steps,
        guidance,
        form,
        text_tokens,
        images,
    )


def test_names():
    assert find("somewhere/Wan2.1-T2V-14B-Diffusers/") is named("Wan-AI/Wan2.1-T2V-14B-Diffusers")
    assert find("Wan2.1-T2V-14B") is None
    with pytest.raises(
        UserError,
        match=r"'Wan-AI/Wan2.1-T2V-14B' is not a known model .*did you mean 'Wan-AI/Wan2.1-T2V-14B-Diff",
    ):
        named("Wan-AI/Wan2.1-T2V-14B")


@pytest.mark.parametrize(
    ("class_name", "options", "shape", "wanted"),
    [
        ("WanPipeline", {}, "1.3B", "Wan2.1-T2V-1.3B-Diffusers"),
        ("WanPipeline", {}, "14B", "Wan2.1-T2V-14B-Diffusers"),
        ("WanPipeline", {"boundary_ratio": 0.875}, "14B", "Wan2.2-T2V-A14B-Diffusers"),
        ("WanPipeline", {"boundary_ratio": None, "expand_timesteps": True}, "5B", "Wan2.2-TI2V-5B-Diffusers"),
        ("WanImageToVideoPipeline", {}, "14B image", "Wan2.1-I2V-14B-480P-Diffusers"),
        ("WanImageToVideoPipeline", {"boundary_ratio": 0.9}, "14B image", "Wan2.2-I2V-A14B-Diffusers"),
        ("WanDMDPipeline", {}, "1.3B", "FastWan2.1-T2V-1.3B-Diffusers"),
        ("WanDMDPipeline", {"expand_timesteps": True}, "5B", "FastWan2.2-TI2V-5B-FullAttn-Diffusers"),
        ("FluxPipeline", {}, "guided", "FLUX.1-dev"),
        ("FluxPipeline", {}, "unguided", "FLUX.1-schnell"),
        ("FluxKontextPipeline", {}, "guided", "FLUX.1-Kontext-dev"),
    ],
)
def test_a_directory_of_unknown_name_is_known_by_its_kind_and_shape(class_name, options, shape, wanted):
    assert match(class_name, options, SHAPES[shape], "/data/mine").name.endswith("/" + wanted)


@pytest.mark.parametrize(
    ("class_name", "options", "name", "wanted"),
    [
        ("WanPipeline", {"boundary_ratio": 0.7}, "Wan2.1-T2V-14B-Diffusers", "Wan2.2-T2V-A14B-Diffusers"),
        ("WanPipeline", {}, "Wan2.2-T2V-A14B-Diffusers", "Wan2.1-T2V-14B-Diffusers"),
        ("Flux2KleinPipeline", {"is_distilled": False}, "FLUX.2-klein-4B", "FLUX.2-klein-base-4B"),
    ],
)
def test_a_name_of_another_kind_does_not_decide(class_name, options, name, wanted):
    shape = (
        SHAPES["14B"]
        if class_name == "WanPipeline"
        else {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
    )
    assert match(class_name, options, shape, name).name.endswith("/" + wanted)


def test_a_copy_of_the_shipped_model_is_known_under_any_name():
    config = json.loads(
        (Path(tinydiff.__file__).parent / "shapes" / "transformer" / "config.json").read_text()
    )
    options = {"boundary_ratio": None, "expand_timesteps": True}
    assert match("WanPipeline", options, config, "/data/mine") is named(SHIPPED)
    other = match("WanPipeline", options, {**config, "num_layers": 5}, "/data/mine")
    assert other is named("Wan-AI/Wan2.2-TI2V-5B-Diffusers"), "the shipped model stands for no other"


def test_an_unreleased_shape_takes_the_first_row_of_its_kind():
    assert match("WanPipeline", {}, {"num_layers": 2}, "mine").name == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def test_a_name_decides_between_equal_shapes():
    row = match("WanImageToVideoPipeline", {}, SHAPES["14B image"], "/data/Wan2.1-I2V-14B-720P-Diffusers")
    assert row.flow_shift == 5.0


def test_what_is_not_supported():
    with pytest.raises(UserError, match=r"model_path: 'x' is a WanPipelin; .*did you mean 'WanPipeline'\?"):
        match("WanPipelin", {}, {}, "x")
    with pytest.raises(UserError, match="a combination that no supported model has"):
        match("WanDMDPipeline", {"boundary_ratio": 0.9}, {}, "x")
