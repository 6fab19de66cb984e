"""Reading a model's directory and admitting a request: the released models' defaults, and one sentence for
whatever does not fit.

The directories hold the released configs and no weights: all of this happens before a weight is read.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runtime.folders import edit, released
from tinydiff import config
from tinydiff.config import ModelOptions, SamplingOptions
from tinydiff.io.video import write_wav
from tinydiff.models.recipe import rectangle_side
from tinydiff.models.registry import MODELS, SHIPPED
from tinydiff.records import Sound, UserError
from tinydiff.runtime import blueprint
from tinydiff.runtime.admit import admit
from tinydiff.runtime.pipeline import solver_table

T2V, I2V, EXPERTS = (
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
)
DEV, SCHNELL, KONTEXT = (f"black-forest-labs/FLUX.1-{name}" for name in ("dev", "schnell", "Kontext-dev"))
I2V_EXPERTS, TI2V, FAST = (
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "FastVideo/FastWan2.1-T2V-1.3B-Diffusers",
)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.fixture
def mask(tmp_path: Path) -> str:
    """A mask of the image's size, its right half white."""
    path = tmp_path / "mask.png"
    Image.fromarray(np.repeat(np.arange(160)[None] >= 80, 90, 0)).save(path)
    return str(path)


def read(path: str | Path, **options):
    return blueprint.read(ModelOptions(model_path=str(path), **options))


def request(path, as_video=False, options=None, **fields):
    """The one admitted request of a model."""
    asked = SamplingOptions(**{"prompt": ("a fox",)} | fields)
    [made] = admit(read(path, **options or {}), asked, as_video)
    return made


def refused(field: str, words: str, call, *args, **fields) -> None:
    """The call ends in one sentence about `field` that holds `words`."""
    with pytest.raises(UserError) as caught:
        call(*args, **fields)
    sentence = str(caught.value)
    assert caught.value.field == field and words in sentence and "\n" not in sentence, sentence


# --- what a request becomes ---


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.name.split("/")[-1])
def test_defaults_are_the_registrys(row, tmp_path, picture):
    path = row.name if row.name == SHIPPED else released(row.name, tmp_path)
    image = (picture,) * row.images[0]
    fields = {"height": row.height, "width": row.width} if image else {}
    if row.speech:
        write_wav(tmp_path / "a.wav", Sound(np.zeros((3200, 1), np.float32), 16000))
        fields["audio_path"] = str(tmp_path / "a.wav")
    made = request(path, image_path=image, **fields)
    assert (made.output.height, made.output.width, made.output.num_frames, made.output.fps) == (
        row.height,
        row.width,
        row.num_frames,
        row.fps,
    )
    assert (made.schedule.steps, made.schedule.dmd_timesteps) == (row.steps, row.dmd_timesteps)
    forms = {
        "scale": (row.guidance, None),
        "offset": (row.guidance + 1, None),
        "embedded": (1.0, row.guidance),
        "true": (1.0, None),
    }
    scale, told = forms[row.guidance_form]
    assert (made.guidance.scale, made.guidance.embedded) == (max(1.0, scale), told) and made.guidance.on == (
        scale > 1
    )
    assert (made.guidance.scale_2, made.schedule.boundary_ratio) == (row.guidance_2, row.boundary_ratio)
    assert (made.schedule.flow_shift, made.text.negative_prompt, made.seeds) == (
        row.flow_shift,
        row.negative_prompt or "",
        (42,),
    )
    assert len(made.images.originals) == len(image) and len(made.images.resized) == (
        0 if row.image_use == "references" else len(image)
    )
    assert (made.images.mask, made.schedule.strength) == (None, 1.0)


@pytest.mark.parametrize(("name", "shift"), [(EXPERTS, 3.0), (TI2V, 5.0), (FAST, 8.0)])
def test_a_directory_of_another_name_is_known_by_its_shape_and_keeps_its_own_scheduler(name, shift, tmp_path):
    """But a distilled model does not run by the scheduler that lies in its directory."""
    path = released(name, tmp_path).rename(tmp_path / "renamed")
    made, row = request(path), next(row for row in MODELS if row.name == name)
    assert (made.schedule.flow_shift, made.schedule.steps, made.schedule.boundary_ratio) == (
        shift,
        row.steps,
        row.boundary_ratio,
    )
    assert request(path, options={"model_id": name}).schedule.flow_shift == row.flow_shift


def test_several_prompts_and_seeds(tmp_path):
    made = admit(
        read(SHIPPED), SamplingOptions(prompt=("a", "b"), seed=(5, 6, 7, 8), num_outputs_per_prompt=2)
    )
    assert [(one.text.prompt, one.seeds) for one in made] == [("a", (5, 6)), ("b", (7, 8))]
    assert admit(read(SHIPPED), SamplingOptions(prompt=("a",), seed=(5,), num_outputs_per_prompt=3))[
        0
    ].seeds == (5, 6, 7)


def test_a_video_is_made_where_its_file_or_its_first_frame_asks_for_one(picture):
    assert [
        request(SHIPPED).output.num_frames,
        request(SHIPPED, as_video=True).output.num_frames,
        request(SHIPPED, image_path=(picture,)).output.num_frames,
    ] == [
        1,
        17,
        17,
    ]
    assert request(SHIPPED, as_video=True, num_frames=5).output.num_frames == 5


@pytest.mark.parametrize(("name", "multiple"), [(I2V, 16), (TI2V, 32), (DEV, 16)])
def test_the_size_takes_the_images_shape_and_the_models_area(name, multiple, tmp_path, picture):
    row = next(row for row in MODELS if row.name == name)
    made = request(released(name, tmp_path), image_path=(picture,))
    height, width = made.output.height, made.output.width
    assert height % multiple == width % multiple == 0
    assert width / height == pytest.approx(160 / 90, rel=0.05)
    assert height * width == pytest.approx(row.height * row.width, rel=0.06)
    assert made.images.resized[0].shape == (height, width, 3)
    assert made.images.originals[0].shape == (90, 160, 3)


def test_guidance_at_one_and_below_is_off(tmp_path):
    made = request(released(EXPERTS, tmp_path), guidance_scale=0.0)
    assert (made.guidance.scale, made.guidance.scale_2, made.guidance.on) == (1.0, 1.0, False)
    made = request(tmp_path / EXPERTS, guidance_scale=0.5, guidance_scale_2=2.0)
    assert (made.guidance.scale, made.guidance.scale_2, made.guidance.on) == (1.0, 1.0, False)
    assert request(tmp_path / EXPERTS, guidance_scale=6.0).guidance.scale_2 == 6.0


def test_first_and_last_frame(tmp_path, picture):
    assert len(request(released(I2V_EXPERTS, tmp_path), image_path=(picture, picture)).images.resized) == 2
    path = released(I2V, tmp_path)
    refused("image_path", "2 images are given", request, path, image_path=(picture, picture))
    edit(path / "transformer" / "config.json", pos_embed_seq_len=514)
    assert len(request(path, image_path=(picture, picture)).images.resized) == 2
    refused("image_path", "from a first to a last frame", request, path, image_path=(picture,))


def test_embedded_guidance_and_guidance_by_a_negative_prompt(tmp_path):
    path = released(DEV, tmp_path)
    made = request(path, guidance_scale=0.0)
    assert (made.guidance.embedded, made.guidance.scale, made.texts) == (0.0, 1.0, ["a fox"])
    made = request(path, true_cfg_scale=4.0, negative_prompt="blurry")
    assert (made.guidance.embedded, made.guidance.scale, made.texts) == (3.5, 4.0, ["a fox", "blurry"])
    made = request(released(SCHNELL, tmp_path), true_cfg_scale=4.0, negative_prompt="")
    assert (made.guidance.embedded, made.guidance.scale, made.texts) == (None, 4.0, ["a fox", ""])


def test_an_image_to_start_from(tmp_path, picture, mask):
    path = released(DEV, tmp_path)
    made = request(path, image_path=(picture,))
    assert (made.schedule.strength, made.images.mask) == (0.6, None)
    assert made.images.resized[0].shape == (made.output.height, made.output.width, 3)
    made = request(path, image_path=(picture,), mask_path=mask, height=32, width=64)
    mask_made = made.images.mask
    assert (made.schedule.strength, mask_made.shape, mask_made.dtype) == (1.0, (32, 64), np.uint8)
    assert (mask_made[:, :30] == 0).all() and (mask_made[:, 34:] == 255).all()
    assert request(path, image_path=(picture,), mask_path=mask, strength=0.25).schedule.strength == 0.25


@pytest.mark.parametrize(
    ("strength", "left"), [(1, 50), (0.6, 30), (0.5, 25), (0.3, 15), (0.01, 1), (1e-9, 1)]
)
def test_strength_leaves_so_many_steps(strength, left, tmp_path, picture):
    """As diffusers' image-to-image pipelines count them."""
    blueprint = read(released(DEV, tmp_path))
    [made] = admit(blueprint, SamplingOptions(prompt=("a fox",), image_path=(picture,), strength=strength))
    rows = solver_table(blueprint, made)
    assert rows.steps == left and (rows.sigmas[0] == 1) == (strength == 1)


def test_references_keep_their_own_sizes_and_lend_theirs(tmp_path, picture):
    made = request(released(KONTEXT, tmp_path), image_path=(picture,) * 3)
    assert made.images.resized == ()
    assert [image.shape for image in made.images.originals] == [(90, 160, 3)] * 3
    assert (made.output.height, made.output.width) == (1024, 1024)  # as the reference, whatever is given


@pytest.mark.parametrize(
    ("given", "size"), [((832, 480), (480, 832)), ((480, 832), (832, 480)), ((600, 600), (624, 624))]
)
def test_an_image_of_the_models_own_size_keeps_it(given, size, tmp_path):
    """By the rounding of diffusers' own example: round(sqrt(area * aspect)) // multiple * multiple, 479.9999
    for the first.
    """
    Image.new("RGB", given).save(tmp_path / "a.png")
    made = request(released(I2V, tmp_path), image_path=(str(tmp_path / "a.png"),))
    assert (made.output.height, made.output.width) == size


def test_a_side_is_the_integer_nearest_to_the_root():
    for along in range(1, 400, 7):
        for across in range(1, 400, 11):
            nearest = rectangle_side(480 * 832, along, across)
            assert (2 * nearest - 1) ** 2 * across <= 4 * 480 * 832 * along < (2 * nearest + 1) ** 2 * across


# --- requests that cannot be ---


@pytest.mark.parametrize(
    ("name", "fields", "field", "words"),
    [
        (
            SHIPPED,
            {"height": 100},
            "height",
            "100 is not a multiple of 16, which tinydiff/shapes needs; the nearest: 96 and 112",
        ),
        (SHIPPED, {"width": 15}, "width", "the nearest: 16"),
        (T2V, {"height": 488}, "height", "488 is not a multiple of 16"),
        (
            T2V,
            {"num_frames": 80},
            "num_frames",
            "80 is not 4k + 1, which Wan-AI/Wan2.1-T2V-1.3B-Diffusers needs; the nearest: 77 and 81",
        ),
        (T2V, {"guidance_scale_2": 3.0}, "guidance_scale_2", "has only one expert"),
        (T2V, {"boundary_ratio": 0.5}, "boundary_ratio", "has only one expert"),
        (T2V, {"dmd_denoising_steps": (1000, 500)}, "dmd_denoising_steps", "is not distilled"),
        (FAST, {"num_inference_steps": 4}, "num_inference_steps", "4 does not fit"),
        (I2V, {}, "image_path", "starts from an image"),
        (
            KONTEXT,
            {},
            "image_path",
            "black-forest-labs/FLUX.1-Kontext-dev edits an image; give one with --image-path",
        ),
        (
            DEV,
            {"num_frames": 5},
            "num_frames",
            "5 would be a video, but black-forest-labs/FLUX.1-dev makes images",
        ),
        (
            DEV,
            {"negative_prompt": "blurry"},
            "negative_prompt",
            "reads a negative prompt only with true_cfg_scale above 1",
        ),
        (T2V, {"guidance_scale": 3.0, "true_cfg_scale": 3.0}, "true_cfg_scale", "has one guidance"),
        (
            DEV,
            {"strength": 0.5},
            "strength",
            "no image is given for it to change; give one with --image-path",
        ),
        (T2V, {"strength": 0.5}, "strength", "does not start from a noised image"),
        (
            DEV,
            {"width": 1000},
            "width",
            "1000 is not a multiple of 16, which black-forest-labs/FLUX.1-dev needs",
        ),
    ],
)
def test_requests_that_the_model_cannot_serve(name, fields, field, words, tmp_path):
    refused(field, words, request, name if name == SHIPPED else released(name, tmp_path), **fields)


def test_images_that_the_model_cannot_take(tmp_path, picture):
    refused("image_path", "takes no image", request, released(T2V, tmp_path), image_path=(picture,))
    refused("image_path", "takes one, the first frame", request, SHIPPED, image_path=(picture, picture))
    refused(
        "num_frames",
        "1 leaves no frame to generate",
        request,
        released(I2V, tmp_path),
        image_path=(picture,),
        num_frames=1,
    )
    refused(
        "strength",
        "ask for one image, with num_frames 1",
        request,
        SHIPPED,
        image_path=(picture,),
        strength=0.5,
    )


@pytest.mark.parametrize("strength", [0, -0.5, 1.01, float("inf"), float("nan")])
def test_a_strength_out_of_range(strength, tmp_path, picture):
    path = released(DEV, tmp_path)
    refused(
        "strength", "", config.options, {"image_path": picture, "strength": strength}
    )  # where words and keys become options
    refused(
        "strength", "must be above 0 and at most 1", request, path, image_path=(picture,), strength=strength
    )


def test_a_strength_that_leaves_no_step(tmp_path, picture):
    path = released(DEV, tmp_path)
    refused(
        "strength",
        "of 50 steps leaves no step; give more steps",
        request,
        path,
        image_path=(picture,),
        strength=1e-20,
    )


def test_a_solver_with_a_history_starts_in_between_too(tmp_path, picture):
    path = released(DEV, tmp_path)
    solver = {
        "_class_name": "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
    }
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(solver))
    assert request(path, image_path=(picture,)).schedule.strength == 0.6


def test_a_model_that_continues_an_image_starts_from_it_where_one_image_is_asked_for(picture):
    assert request(SHIPPED, image_path=(picture,), num_frames=1).images.start
    assert not request(SHIPPED, image_path=(picture,), num_frames=5).images.start
    assert not request(SHIPPED, num_frames=1).images.start


def test_masks_that_cannot_be(tmp_path, picture, mask):
    path, given = released(DEV, tmp_path), {"image_path": (picture,), "mask_path": mask}
    refused(
        "mask_path", "no image is given to inpaint; give one with --image-path", request, path, mask_path=mask
    )
    refused(
        "mask_path", "'nowhere.png' does not exist", request, path, **given | {"mask_path": "nowhere.png"}
    )
    for name in (KONTEXT, TI2V):
        refused(
            "mask_path",
            "does not inpaint; it takes no mask",
            request,
            released(name, tmp_path),
            **given,
        )
    Image.new("L", (160, 90)).save(mask)
    refused("mask_path", "the mask has no white pixel", request, path, **given)
    Image.new("L", (161, 90), 255).save(mask)
    words = "the mask is 161 x 90 and the image 160 x 90 pixels; both must be the same"
    refused("mask_path", words, request, path, **given)
    Path(mask).write_text("no image")
    refused("mask_path", "is not an image that can be read", request, path, **given)


def test_more_images_than_the_model_takes(tmp_path, picture):
    for name, most in ((DEV, 1), (KONTEXT, 4)):
        path = released(name, tmp_path)
        words = f"{most + 1} images are given; {name} takes at most {most}"
        refused("image_path", words, request, path, image_path=(picture,) * (most + 1))


def test_two_experts_need_a_boundary(tmp_path):
    path = released(EXPERTS, tmp_path).rename(tmp_path / "renamed")
    edit(path / "model_index.json", boundary_ratio=None)
    refused("boundary_ratio", "names no boundary", request, path)
    assert request(path, boundary_ratio=0.6).schedule.boundary_ratio == 0.6


def test_a_scheduler_that_is_not_known_is_refused_at_once(tmp_path):
    path = released(T2V, tmp_path)
    edit(path / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")
    refused("scheduler", "'DDIMScheduler' is not supported", request, path)
    edit(path / "scheduler" / "scheduler_config.json", _class_name="UniPCMultistepScheduler", solver_order=3)
    refused(
        "scheduler.solver_order",
        "solver_order of UniPCMultistepScheduler is 3; supported is 2",
        request,
        path,
    )


# --- models that cannot be ---


def test_options_that_name_a_component(tmp_path):
    path = released(T2V, tmp_path)
    refused(
        "component_precisions",
        "'transfomer' is not one of",
        read,
        path,
        component_precisions={"transfomer": "bf16"},
    )
    refused(
        "component_precisions",
        "'scheduler' is not one of",
        read,
        path,
        component_precisions={"scheduler": "bf16"},
    )
    refused(
        "component_attention_backends",
        "'vae' is not one of",
        read,
        path,
        component_attention_backends={"vae": "math"},
    )
    refused(
        "component_paths",
        "'image_encoder' is not one of",
        read,
        path,
        component_paths={"image_encoder": str(tmp_path)},
    )
    refused("vae_path", "is neither a file nor a", read, path, component_paths={"vae": "nowhere"})
    refused("text_encoder_precisions", "2 are given", read, path, text_encoder_precisions=("fp32", "bf16"))
    refused("image_encoder_precision", "has no image encoder", read, path, image_encoder_precision="fp32")
    refused("revision", "is a local directory", read, path, revision="main")
    refused("revision", "is a local directory", read, SHIPPED, revision="main")


def test_components_from_elsewhere(tmp_path):
    path, other = released(T2V, tmp_path), tmp_path / "elsewhere"
    for name in ("vae", "scheduler"):
        (path / name).rename(other.with_name(f"my-{name}"))
    (path / "tokenizer").mkdir()
    edit(tmp_path / "my-scheduler" / "scheduler_config.json", flow_shift=7.0)
    elsewhere = {name: str(tmp_path / f"my-{name}") for name in ("vae", "scheduler")} | {
        "tokenizer": str(path / "tokenizer")
    }
    made = read(path, component_paths=elsewhere)
    assert made.scheduler["flow_shift"] == 7.0 and made.nets["vae"].component.place == tmp_path / "my-vae"
    assert (
        made.tokenizers["tokenizer"].place == path / "tokenizer"
        and made.nets["transformer"].component.place == path / "transformer"
    )


def test_types_and_attention_of_each_component():
    made = read(SHIPPED, dit_precision="bf16", component_precisions={"vae": "fp16"}, attention_backend="math")
    assert {name: blueprint.PRECISIONS[net.dtype] for name, net in made.nets.items()} == {
        **{"transformer": "bf16", "vae": "fp16", "text_encoder": "fp32"},
    }
    assert (made.nets["transformer"].plan.attention, made.nets["text_encoder"].plan.attention) == (
        "math",
        "sdpa",
    )
    made = read(SHIPPED, component_attention_backends={"text_encoder": "math"})
    assert (made.nets["transformer"].plan.attention, made.nets["text_encoder"].plan.attention) == (
        "sdpa",
        "math",
    )


@pytest.mark.parametrize(
    "options", [{"attention_backend": "cudnn"}, {"component_attention_backends": {"transformer": "cudnn"}}]
)
def test_attention_that_this_machine_cannot_run(options, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    [field] = options
    refused(
        field,
        "'cudnn' cannot run the transformer in fp32 on this machine (cpu); the backends that can are sdpa",
        lambda **options: blueprint.load(read(SHIPPED, **options)),
        **options,
    )


def test_the_second_expert_follows_the_first_in_its_attention(tmp_path):
    path = released(EXPERTS, tmp_path)
    made = read(path, component_attention_backends={"transformer": "math"})
    assert made.nets["transformer_2"].plan.attention == "math"
    field = "component_attention_backends"
    refused(
        field,
        "run in one loop and need the same",
        read,
        path,
        component_attention_backends={"transformer_2": "math"},
    )


def test_a_model_id_of_another_kind(tmp_path):
    path = released(T2V, tmp_path)
    refused("model_id", "'Wan2.1-T2V' is not a known model", read, path, model_id="Wan2.1-T2V")
    refused(
        "model_id", "is a WanImageToVideoPipeline, and", read, path, model_id="Wan2.1-I2V-14B-480P-Diffusers"
    )


@pytest.mark.parametrize("absent", ["vae", "tokenizer", "scheduler", "transformer"])
def test_a_component_that_is_not_there(absent, tmp_path):
    path = released(T2V, tmp_path)
    edit(path / "model_index.json", **{absent: [None, None]})
    refused("model_path", f"model_index.json has no {absent}", read, path)


@pytest.mark.parametrize(
    ("component", "entries", "words"),
    [
        ("vae", {"z_dim": 48}, "the transformer's in_channels is 16, and the vae's latents need 48"),
        (
            "transformer",
            {"out_channels": 4},
            "the transformer's out_channels is 4, and the vae's latents need 16",
        ),
        (
            "text_encoder",
            {"d_model": 64},
            "the transformer's text_dim is 4096, and the text encoder gives 64",
        ),
        (
            "transformer",
            {"num_layer": 3},
            "field 'num_layer' is unknown to WanTransformer3DModel; did you mean 'num_layers'?",
        ),
        ("transformer", {"qk_norm": "layer"}, "qk_norm is 'layer'"),
    ],
)
def test_configs_that_do_not_fit(component, entries, words, tmp_path):
    path = released(T2V, tmp_path)
    edit(path / component / "config.json", **entries)
    refused("model_path", words, read, path)


def test_two_experts_of_different_shape(tmp_path):
    path = released(EXPERTS, tmp_path)
    edit(path / "transformer_2" / "config.json", num_layers=3)
    refused("model_path", "must have one config", read, path)


def test_pipelines_and_components_that_are_not_supported(tmp_path):
    path = released(T2V, tmp_path)
    edit(path / "model_index.json", vae=["diffusers", "AutoencoderDC"])
    refused("model_path", "component 'vae' has the class AutoencoderDC, which is not supported", read, path)
    edit(path / "model_index.json", _class_name="WanPipelin")
    classes = ", ".join(sorted({row.pipeline for row in MODELS}))
    refused("model_path", f"supported classes are {classes}; did you mean 'WanPipeline'?", read, path)


def test_only_z_image_limits_its_guidance(tmp_path):
    made = request(released("Tongyi-MAI/Z-Image", tmp_path), cfg_normalization=1.0)
    assert made.guidance.normalization == 1.0 and made.guidance.scale == 6.0
    refused(
        "cfg_normalization",
        "only Z-Image does",
        request,
        released("Qwen/Qwen-Image", tmp_path),
        cfg_normalization=1.0,
    )


@pytest.mark.parametrize(("shift", "steps"), [(1000, 999), (1000, 1000)])
def test_steps_closer_together_than_float32_tells_apart(shift, steps, tmp_path):
    path, asked = released(TI2V, tmp_path), {"flow_shift": shift, "num_inference_steps": steps}
    refused("flow_shift", f"{steps} steps of a flow_shift of {shift} lie closer", request, path, **asked)


@pytest.mark.parametrize("steps", [1, 2, 50, 600])
@pytest.mark.parametrize("shift", [1000, 1, 1e-3])
def test_a_schedule_that_is_admitted_has_finite_numbers(shift, steps, tmp_path):
    made = read(released(TI2V, tmp_path))
    [asked] = admit(made, SamplingOptions(prompt=("a",), flow_shift=float(shift), num_inference_steps=steps))
    rows = solver_table(made, asked)
    assert all(column.isfinite().all() for column in (rows.a, rows.c, rows.b1, rows.b2, rows.n))
