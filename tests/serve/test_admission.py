import json
import time

import pytest

from tests.serve.fake import service
from tinydiff.records import UserError
from tinydiff.serve.admission import admitted, resolved
from tinydiff.serve.jobs import Job
from tinydiff.serve.read_fields import read_fields


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    found = service(tmp_path_factory.mktemp("state"))
    yield found
    found.scheduler.close()


def read(made, said, kind="image"):
    """The request that a body makes, through all of intake but HTTP."""
    asked = read_fields(said, kind)
    return admitted(
        made.adapters,
        made.files,
        made.options,
        Job("j_0", kind, time.time(), fields=resolved(made, asked, kind), answer=asked.answer),
    )


@pytest.mark.parametrize(
    ("quality", "steps"),
    [("auto", 30), ("standard", 30), ("low", 15), ("medium", 22), ("high", 30), ("max", 60)],
)
def test_quality_is_a_number_of_steps(made, quality, steps):
    assert read(made, {"prompt": "p", "quality": quality}).schedule.steps == steps


def test_an_image_is_one_frame_and_a_video_the_models_own(made):
    assert (
        read(made, {"prompt": "p"}).output.num_frames,
        read(made, {"prompt": "p"}, "video").output.num_frames,
    ) == (
        1,
        17,
    )


@pytest.mark.parametrize(("seconds", "fps", "frames"), [("4", 8, 33), (1, 8, 9), ("0.1", 8, 5), (4, 16, 65)])
def test_seconds_are_frames_that_the_model_can_make(made, seconds, fps, frames):
    assert read(made, {"prompt": "p", "seconds": seconds, "fps": fps}, "video").output.num_frames == frames


@pytest.mark.parametrize(
    ("said", "kind", "param", "part"),
    [
        ({"size": "100x128"}, "image", "size", "size: width 100 is not a multiple of 16"),
        ({"width": 100}, "image", "width", "width: 100 is not a multiple of 16"),
        ({"n": 2, "seed": [1, 2, 3]}, "image", "seed", "3 are given for 2 outputs"),
        ({"num_inference_steps": 0}, "image", "num_inference_steps", "must be at least 1"),
        ({"num_frames": 5}, "image", "num_frames", "/v1/videos"),
        ({"num_frames": 1}, "video", "num_frames", "/v1/images/generations"),
        ({"num_frames": 6}, "video", "num_frames", "is not 4k + 1"),
        ({"fps": 8}, "image", "fps", "/v1/videos"),
        ({"background": "transparent"}, "image", "background", "are opaque"),
        ({"output_compression": 50}, "image", "output_compression", "no effect on a PNG"),
        ({"output_quality": "low"}, "image", "output_quality", "no effect on a PNG"),
        ({"output_quality": "awful", "output_format": "webp"}, "image", "output_quality", "is not one of"),
        ({"x264_preset": "fast"}, "image", "x264_preset", "applies to .mp4 only"),
        ({"size": "272x256"}, "image", "size", "an output has 69,632 pixels; 65,536 are the most"),
        ({"size": "256x256", "num_frames": 21}, "video", "size", "1,376,256 pixels; 1,114,112 are the most"),
        ({"n": 11}, "image", "n", "11 outputs are more than the 10 allowed per request"),
        (
            {"num_outputs_per_prompt": 11},
            "video",
            "num_outputs_per_prompt",
            "11 outputs are more than the 10",
        ),
        ({"strength": 0.5}, "image", "strength", "takes no strength"),
    ],
)
def test_what_the_model_cannot_do_is_named_as_the_client_spelled_it(made, said, kind, param, part):
    with pytest.raises(UserError) as caught:
        read(made, {"prompt": "p", **said}, kind)
    assert (caught.value.field, part in str(caught.value)) == (param, True), str(caught.value)


def test_the_bound_on_pixels_follows_the_model_and_an_explicit_one_wins(tmp_path):
    """Four times the model's own image, and of a video its own frames too; each of several outputs may have
    as many.
    """
    for name, most, kind in (
        ("own", 4 * 128 * 128, "image"),
        ("own", 4 * 128 * 128 * 17, "video"),
        ("told", 10**6, "image"),
    ):
        found = service(tmp_path / name, **({"max_pixels": 1e6} if name == "told" else {}))
        assert found.options.pixel_limit(found.blueprint.row, kind) == most
        found.scheduler.close()
    found = service(tmp_path / "several", max_outputs=12)
    assert len(read(found, {"prompt": "p", "size": "256x256", "n": 12}).seeds) == 12
    found.scheduler.close()


def test_a_prompt_is_needed(made):
    with pytest.raises(UserError, match="prompt: is missing"):
        read(made, {})


def test_compression_has_an_effect_on_a_jpeg(made):
    assert read(made, {"prompt": "p", "output_format": "jpeg", "output_compression": 50}).output.width == 128


def test_the_fields_of_a_job_survive_json(made):
    found = resolved(made, read_fields({"prompt": "p", "seed": [1, 2], "n": 2}, "image"), "image")
    assert json.loads(json.dumps(found)) == found
