import json

import pytest

from tinydiff.records import UserError
from tinydiff.serve import fields
from tinydiff.serve.errors import Refusal
from tinydiff.serve.read_fields import FileId, read_fields


def refused(*args, **more):
    """(param, sentence) of the mistake in a body."""
    with pytest.raises((UserError, Refusal)) as caught:
        read_fields(*args, **more)
    return getattr(caught.value, "field", None) or caught.value.param, str(caught.value)


# --- what becomes of each field ---


def test_openais_fields_become_options_of_generate():
    asked = read_fields(
        {"prompt": "a circle", "n": 2, "size": "256x128", "output_compression": 80, "output_format": "jpg"},
        "image",
    )
    wanted = {
        "prompt": "a circle",
        "num_outputs_per_prompt": 2,
        "width": 256,
        "height": 128,
        "output_compression": 80,
    }
    assert {name: value for name, value in asked.options.items() if name != "seed"} == wanted
    assert asked.answer["output_format"] == "jpeg"


def test_every_sampling_option_is_a_field_at_top_level_and_in_extra_body():
    values = {
        "prompt": "p", "negative_prompt": "n", "strength": 0.5, "seed": 7, "num_outputs_per_prompt": 2,
        "height": 64, "width": 96,
        "num_frames": 5, "auto_duration": True, "auto_duration_min_seconds": 2.0,
        "auto_duration_max_seconds": 4.0, "fps": 8, "num_inference_steps": 4, "guidance_scale": 2.0,
        "true_cfg_scale": 2.0, "cfg_normalization": 1.0,
        "guidance_scale_2": 3.0, "boundary_ratio": 0.5, "flow_shift": 2.0, "dmd_denoising_steps": [1000, 500],
        "use_pe": False, "loras": {"style": 0.5}, "diffusers_kwargs": {"a": [1]}, "sigmas": [1.0, 0.5],
        "enable_upscaling": True, "upscaling_scale": 2, "audio": True, "refine_sigmas": [0.9, 0.5],
        "refine_loras": {"style": 1.0}, "image_frames": [0, -1], "audio_guidance_scale": 7.0,
        "stg_scale": 1.0, "audio_stg_scale": 1.0, "spatio_temporal_guidance_blocks": [28],
        "modality_scale": 3.0, "audio_modality_scale": 3.0, "guidance_rescale": 0.7,
        "audio_guidance_rescale": 0.7,
        "enable_frame_interpolation": True, "frame_interpolation_exp": 2, "frame_interpolation_scale": 0.5,
        "frame_interpolation_scene_threshold": 0.2,
        "enable_cache_dit": True, "cache_dit_params": {"rdt": 0.12},
    }  # fmt: skip
    assert values.keys() == set(fields.SAMPLING)
    top = read_fields(values, "video").options
    assert (
        top
        == read_fields(
            {"prompt": "p", "extra_body": {k: v for k, v in values.items() if k != "prompt"}}, "video"
        ).options
    )
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    assert top == {**values, "seed": (7,), **lists}


@pytest.mark.parametrize("name", ["extra_body", "extra_params", "extra_json"])
def test_extra_fields_may_be_the_text_of_an_object(name):
    assert read_fields({"prompt": "p", name: '{"height": 64}'}, "image", form=True).options["height"] == 64


def test_aliases_and_sizes_of_the_command_line_are_known():
    asked = read_fields({"prompt": "p", "num_outputs": 3, "720p": True}, "image")
    assert (asked.options["num_outputs_per_prompt"], asked.options["height"], asked.options["width"]) == (
        3,
        720,
        1280,
    )


def test_without_a_seed_each_request_has_its_own():
    seeds = {read_fields({"prompt": "p"}, "image").options["seed"][0] for _ in range(8)}
    assert len(seeds) == 8


def test_seeds_may_be_several():
    assert read_fields({"prompt": "p", "seed": [3, 1], "n": 2}, "image").options["seed"] == (3, 1)


def test_numbers_of_a_form_are_texts():
    said = {
        "prompt": "12",
        "n": "2",
        "seed": "1 5",
        "guidance_scale": "2.5",
        "stream": "true",
        "partial_images": "1",
        "height": "64",
    }
    asked = read_fields(said, "image", form=True)
    assert asked.options == {
        "prompt": "12",
        "num_outputs_per_prompt": 2,
        "seed": (1, 5),
        "guidance_scale": 2.5,
        "height": 64,
    }
    assert (asked.answer["stream"], asked.answer["partial_images"]) == (True, 1)


STRANGE = [
    "1_0",
    "+1",
    " 1",
    "1 ",
    "\u0661",
    "\uff11",
    "0x10",
    "1e1",
    "Infinity",
    "inf",
    "nan",
    "NaN",
    "1" + "0" * 309,
    "",
    "1.",
    "--1",
]
"""What Python's own readers take for an integer or a number, or nearly: 1_0 as ten, every script's digits,
blanks around them.
"""


@pytest.mark.parametrize("text", STRANGE)
@pytest.mark.parametrize(
    "name",
    ["n", "priority", "height", "fps", "num_inference_steps", "num_outputs_per_prompt", "output_compression"],
)
def test_the_text_of_an_integer_is_its_digits(name, text):
    param, said = refused({"prompt": "p", name: text}, "video" if name == "fps" else "image", form=True)
    assert param == name and ("integer" in said or "must be" in said)


@pytest.mark.parametrize("text", [text for text in STRANGE if text not in ("1.", "1e1")])
@pytest.mark.parametrize("name", ["guidance_scale", "strength", "flow_shift", "seconds"])
def test_the_text_of_a_number_is_digits_a_point_and_an_exponent(name, text):
    assert refused({"prompt": "p", name: text}, "video", form=True)[0] == name


@pytest.mark.parametrize(
    ("text", "number"), [("2", 2.0), ("2.5", 2.5), (".5", 0.5), ("1.", 1.0), ("1e1", 10.0), ("25E-1", 2.5)]
)
def test_numbers_of_a_form_are_read(text, number):
    assert (
        read_fields({"prompt": "p", "guidance_scale": text}, "image", form=True).options["guidance_scale"]
        == number
    )
    assert read_fields({"prompt": "p", "seconds": text}, "video", form=True).answer["seconds"] == number


HUGE = 10**309


@pytest.mark.parametrize("form", [False, True])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_no_number_overflows(kind, form):
    """Beyond a float's range an integer is still only too large."""
    numbers = {name for name in fields.SAMPLING if name not in ("prompt", "negative_prompt")} | {
        "output_compression",
        "n",
        "priority",
    }
    numbers |= {"seconds"} if kind == "video" else {"partial_images"}
    for name in numbers:
        for value in (HUGE, -HUGE):
            param, said = refused({"prompt": "p", name: str(value) if form else value}, kind, form=form)
            assert param == name and len(said) < 600


def test_null_is_as_if_absent():
    assert set(
        read_fields({"prompt": "p", "seed": 1, "size": None, "height": None, "loras": None}, "image").options
    ) == {"prompt", "seed"}


def test_images_come_as_bytes_urls_objects_and_lists():
    images = read_fields({"image": b"PNG", "mask": {"file_id": "f"}}, "image").images
    assert images == {"image_path": (b"PNG",), "mask_path": (FileId("f"),)}
    images = read_fields(
        {"images": [{"image_url": "https://x/y"}, "data:,a", {"file_id": "f", "image_url": None}]}, "image"
    ).images
    assert images == {"image_path": ("https://x/y", "data:,a", FileId("f"))}
    assert read_fields({"input_reference": {"image_url": "https://x"}}, "video").images == {
        "image_path": ("https://x",)
    }


@pytest.mark.parametrize("value", ["auto", "low"])
def test_moderation_asks_for_nothing(value):
    assert set(read_fields({"seed": 1, "moderation": value}, "image").options) == {"seed"}


# --- mistakes ---


@pytest.mark.parametrize(
    ("said", "param", "part"),
    [
        ({"guidence_scale": 3}, "guidence_scale", "did you mean 'guidance_scale'"),
        ({"size": "1024"}, "size", "WIDTHxHEIGHT"),
        ({"size": "0x64"}, "size", "WIDTHxHEIGHT"),
        ({"size": "256x256", "width": 64}, "size", "give either width or size"),
        ({"n": 0}, "n", "from 1 to 10000"),
        ({"n": 2, "num_outputs_per_prompt": 2}, "n", "give either"),
        ({"n": True}, "n", "true is not an integer"),
        ({"n": "2"}, "n", "'2' is not an integer"),
        ({"height": "64"}, "height", "'64' is not an integer"),
        ({"height": 64.5}, "height", "is not an integer"),
        ({"height": {}}, "height", "is not an integer"),
        ({"guidance_scale": [1, 2]}, "guidance_scale", "is not a number"),
        ({"guidance_scale": False}, "guidance_scale", "false is not a number"),
        ({"prompt": 5}, "prompt", "5 is not a string"),
        ({"prompt": ["a", "b"]}, "prompt", "is not a string"),
        ({"prompt": "x" * 40_000}, "prompt", "at most 32,000 are allowed"),
        ({"seed": "x"}, "seed", "is not an integer or a list of them"),
        ({"seed": [1, None]}, "seed", "null is not an integer"),
        ({"quality": "best"}, "quality", "is not one of auto, standard"),
        ({"quality": "low", "num_inference_steps": 3}, "quality", "give either"),
        ({"background": "clear"}, "background", "is not one of"),
        ({"output_format": "gif"}, "output_format", "is not one of png, webp, jpeg"),
        ({"output_format": "svg"}, "output_format", "is not one of"),
        ({"response_format": "b64json"}, "response_format", "did you mean 'b64_json'"),
        ({"response_format": "url", "stream": True}, "response_format", "not available with stream=true"),
        ({"partial_images": 1}, "partial_images", "needs stream"),
        ({"partial_images": 4, "stream": True}, "partial_images", "from 0 to 3"),
        ({"progress": True}, "progress", "needs stream"),
        ({"stream": 1}, "stream", "1 is not true or false"),
        ({"style": "vivid"}, "style", "describe the style in the prompt"),
        ({"input_fidelity": "high"}, "input_fidelity", "it may be 'low'"),
        ({"frame_count": 4}, "frame_count", "/v1/videos"),
        ({"markup": b"PNG"}, "markup", "a file is not supported"),
        ({"loras": [{"path": "x"}]}, "loras", "is not an adapter, such as"),
        ({"loras": ["x", "x"]}, "loras", "'x' is given twice"),
        ({"loras": {"x": "1"}}, "loras.x", "is not a number from -100 to 100"),
        ({"loras": 5}, "loras", "5 is not an object of adapters and strengths"),
        ({"diffusers_kwargs": 5}, "diffusers_kwargs", "5 is not an object of arguments and their values"),
        ({"cache_dit_params": {"rdt": "x"}}, "cache_dit_params", "is not an object of numbers"),
        ({"lora_path": "x"}, "lora_path", "when the server is started"),
        ({"enable_teacache": True}, "enable_teacache", "not supported yet: step caches"),
        ({"model_path": "x"}, "model_path", "when the server is started"),
        ({"save_output": False}, "save_output", "when the server is started"),
        ({"port": 5}, "port", "when the server is started"),
        ({"seconds": "4"}, "seconds", "/v1/videos"),
        ({"extra_body": {"prompt": "q"}, "prompt": "p"}, "prompt", "given twice"),
        ({"extra_body": "{"}, "extra_body", "is not JSON"),
        ({"extra_body": [1]}, "extra_body", "is not an object"),
        ({"image": 5}, "image", "5 is not an image"),
        ({"image": {"url": "x"}}, "image", "image_url"),
        ({"image": b"a", "images": [b"b"]}, "images", "give either image or images"),
        ({"image": [b"a"] * 17}, "image", "at most 16 images"),
        ({"mask": b"a"}, "mask", "needs an image to inpaint"),
        ({"mask": [b"a", b"b"], "image": b"a"}, "mask", "one mask"),
        ({"user": 5}, "user", "5 is not a string"),
        ({"priority": 11}, "priority", "from -10 to 10"),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(said, param, part):
    found, message = refused(said, "image")
    assert (found, part in message) == (param, True), message
    assert message.startswith(f"{param}: ")


def test_what_asks_for_nothing_is_taken():
    said = {
        "seed": 1,
        "enable_teacache": False,
        "frame_count": 1,
        "input_fidelity": "low",
    }
    assert read_fields(said, "image").options == {"seed": (1,)}


@pytest.mark.parametrize(
    "said",
    [
        {"style": 0.5, "ink": 1},
        [{"name": "style", "scale": 0.5}, {"name": "ink"}],
        [["style", 0.5], "ink"],
    ],
)
def test_adapters_come_as_an_object_and_as_a_list(said):
    for body, form in (({"loras": said}, False), ({"loras": json.dumps(said)}, True)):
        assert read_fields({"prompt": "p", **body}, "image", form).options["loras"] == {
            "style": 0.5,
            "ink": 1.0,
        }
    assert read_fields({"prompt": "p", "loras": []}, "image").options["loras"] == {}


def test_an_image_has_a_most_of_bytes():
    assert "at most 50 MiB" in refused({"image": b"x" * (50 * 2**20 + 1)}, "image")[1]


@pytest.mark.parametrize("value", [0, "x", True, 1e9, "nan", []])
def test_seconds_are_a_number(value):
    assert refused({"seconds": value}, "video")[0] == "seconds"


def test_a_mistake_shows_no_endless_value():
    assert len(refused({"size": "9" * 10_000}, "image")[1]) < 300
