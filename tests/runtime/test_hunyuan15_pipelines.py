"""HunyuanVideo-1.5 against diffusers' own pipeline: latents after the last step and the frames, from the same
start, in float64. The reference calls nothing back between steps.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from PIL import Image
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests import vocabularies
from tests.parity import close, draw
from tests.runtime.compare import exact, ours, same_frames
from tests.runtime.folders import load, released, saved
from tinydiff.config import ModelOptions, SamplingOptions
from tinydiff.models import hunyuan_video15
from tinydiff.records import UserError
from tinydiff.runtime import blueprint
from tinydiff.runtime.admit import admit

PROMPT, NEGATIVE, STEPS = 'A red circle says "hé" and “no”', "blurry", 3
HEIGHT, WIDTH, FRAMES = 16, 32, 9  # latents of 4 x 8
TRANSFORMER = {
    **{"in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16},
    **{"num_layers": 2, "text_embed_dim": 24, "text_embed_2_dim": 12, "image_embed_dim": 10},
    **{"rope_axes_dim": (4, 6, 6), "task_type": "t2v"},
}
VAE = {
    **{"block_out_channels": (8, 16, 16), "latent_channels": 4, "layers_per_block": 1},
    **{"spatial_compression_ratio": 4},
}
SIGLIP = {
    **{"hidden_size": 10, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
REPOSITORY = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-"
NAME = f"{REPOSITORY}480p_t2v"


def build(folder, guidance=6.0, **changes):
    """The reference's pipeline in float64, saved in float32 to `folder`. changes: of the transformer."""
    folder.mkdir()
    for name in ("qwen", "byt5"):
        (folder / name).mkdir()
    qwen = {
        **{"vocab_size": 700, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}},
    }
    byt5 = {
        **{"vocab_size": 400, "d_model": 12, "d_kv": 6, "d_ff": 16, "num_layers": 2, "num_heads": 2},
        **{"feed_forward_proj": "gated-gelu"},
    }
    networks = {
        "transformer": HunyuanVideo15Transformer3DModel(**TRANSFORMER | changes),
        "vae": AutoencoderKLHunyuanVideo15(**VAE),
        "text_encoder": Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**qwen)),
        "text_encoder_2": T5EncoderModel(T5Config(**byt5)),
    }
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    words = vocabularies.qwen(folder / "qwen", chat_template=template)
    files = {
        "tokenizer": Qwen2Tokenizer.from_pretrained(words),
        "tokenizer_2": ByT5Tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "guider": ClassifierFreeGuidance(guidance_scale=guidance),
    }
    kind = HunyuanVideo15Pipeline
    if changes.get("task_type") == "i2v":
        kind = HunyuanVideo15ImageToVideoPipeline
        networks["image_encoder"] = SiglipVisionModel(SiglipVisionConfig(**SIGLIP))
        files["feature_extractor"] = SiglipImageProcessorPil(
            size={"height": 28, "width": 28}, image_mean=[0.4, 0.5, 0.6]
        )
    pipe = saved(kind, folder, networks, **files)
    pipe.vision_num_semantic_tokens = 3  # zeros, which the network masks
    transformer = networks["transformer"]
    projections = [transformer.time_embed.time_proj, transformer.context_embedder.time_text_embed.time_proj]
    projections += [transformer.time_embed.time_proj_r] if transformer.config.use_meanflow else []
    for projection in projections:
        projection.register_forward_pre_hook(
            lambda _, args: (torch.tensor(args[0].tolist(), dtype=torch.float32),)
        )
    return pipe


@pytest.mark.parametrize(
    ("guidance", "fields"),
    [
        (6.0, {"negative_prompt": NEGATIVE}),
        (6.0, {"prompt": "nothing is written"}),
        (1.0, {}),
        (6.0, {"num_frames": 1}),
    ],
    ids=["guided", "an empty negative prompt and no glyphs", "distilled", "an image"],
)
def test_the_latents_and_the_frames_equal_diffusers(guidance, fields, tmp_path):
    pipe = build(tmp_path / "model", guidance)
    model = load(tmp_path / "model")
    assert model.blueprint.row.name == NAME
    given = {"prompt": PROMPT, "height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, **fields}
    given["num_inference_steps"] = STEPS
    asked = given | {"prompt": (given["prompt"],), "guidance_scale": guidance}
    [request] = admit(model.blueprint, SamplingOptions(**asked))
    assert request.guidance.on == (guidance > 1)
    start = draw(1, 4, (given["num_frames"] - 1) // 4 + 1, 4, 8, seed=9)
    with exact(pipe):
        final = pipe(**given, latents=start, output_type="latent").frames
        video = pipe(**given, latents=start, output_type="np").frames
    latents, frames = ours(model, request, start)
    assert len(latents) == STEPS
    close(latents[-1], final)
    same_frames(frames, video)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "guidance", "steps"),
    [
        ("480p_i2v", (40, 61), 6.0, 3),
        ("480p_i2v_distilled", (61, 40), 1.0, 3),
        ("480p_i2v_step_distilled", (40, 40), 1.0, 3),
        ("480p_i2v_step_distilled", (10, 90), 1.0, 1),  # longer than 4:1
    ],
)
def test_a_video_from_an_image_equals_diffusers(name, shape, guidance, steps, tmp_path):
    folder = tmp_path / f"HunyuanVideo-1.5-Diffusers-{name}"
    changes = {"task_type": "i2v", "target_size": 24, "use_meanflow": name.endswith("step_distilled")}
    pipe = build(folder, guidance, **changes)
    model = load(folder)
    assert model.blueprint.row.name == REPOSITORY + name
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((shape[1] * 3, shape[0] * 3)).save(tmp_path / "image.png")
    image = Image.open(tmp_path / "image.png")
    asked = {"num_inference_steps": steps, "num_frames": FRAMES, "image_path": (str(tmp_path / "image.png"),)}
    [request] = admit(model.blueprint, SamplingOptions(prompt=(PROMPT,), guidance_scale=guidance, **asked))
    height, width = request.output.height, request.output.width
    assert (height, width) == pipe.video_processor.calculate_default_height_width(
        image.height, image.width, 24
    )
    start = draw(1, 4, 3, height // 4, width // 4, seed=9)
    given = {"prompt": PROMPT, "image": image, "num_frames": FRAMES, "num_inference_steps": steps}
    with exact(pipe):
        final = pipe(**given, latents=start, output_type="latent").frames
        video = pipe(**given, latents=start, output_type="np").frames
    latents, frames = ours(model, request, start)
    assert len(latents) == steps
    close(latents[-1], final)
    same_frames(frames, video)


@pytest.mark.parametrize("target", [640, 960])
def test_the_size_of_an_image_is_that_of_the_references_buckets(target):
    """Squares, the limits of 4:1 and beyond them, and aspects that five digits round up or down."""
    processor = HunyuanVideo15ImageProcessor(vae_scale_factor=16)
    c = hunyuan_video15.Config(target_size=target)
    sizes = [(480, 848), (1, 1), (1, 4), (4, 1), (9, 1), (1, 9), (5, 3), (3, 5), (2, 3), (7, 6), (1023, 1024)]
    for height, width in sizes:
        expected = processor.calculate_default_height_width(height, width, target)
        assert hunyuan_video15.size_from_image(c, height, width, 16) == expected


def test_the_template_is_the_references(tmp_path):
    pipe = build(tmp_path / "model")
    turns = [{"role": "system", "content": pipe.system_message}, {"role": "user", "content": "a fox"}]
    text = pipe.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert hunyuan_video15.TEMPLATE.format("a fox") == text
    assert pipe.prompt_template_encode_start_idx == hunyuan_video15.SKIPPED
    assert (pipe.tokenizer_max_length, pipe.tokenizer_2_max_length) == (1000, hunyuan_video15.GLYPH_TOKENS)


@pytest.mark.parametrize(
    ("name", "size", "guidance", "shift", "steps"),
    [
        ("480p_t2v", (480, 848), 6.0, 5.0, 50),
        ("480p_t2v_distilled", (480, 848), 1.0, 5.0, 50),
        ("720p_t2v", (720, 1280), 6.0, 9.0, 50),
        ("480p_i2v", (480, 848), 6.0, 5.0, 50),
        ("480p_i2v_distilled", (480, 848), 1.0, 5.0, 50),
        ("480p_i2v_step_distilled", (480, 848), 1.0, 7.0, 12),
        ("720p_i2v", (720, 1264), 6.0, 7.0, 50),
        ("720p_i2v_distilled", (720, 1264), 1.0, 7.0, 50),
    ],
)
def test_a_released_model_is_known_by_its_name(name, size, guidance, shift, steps, tmp_path):
    read = blueprint.read(ModelOptions(model_path=str(released(REPOSITORY + name, tmp_path))))
    Image.new("RGB", (848, 480)).save(tmp_path / "image.png")
    images = (str(tmp_path / "image.png"),) if "i2v" in name else ()
    [request] = admit(read, SamplingOptions(prompt=("a",), image_path=images))
    output = request.output
    assert (output.height, output.width, output.num_frames) == (*size, 121)
    assert (read.scheduler["shift"], request.schedule.steps) == (shift, steps)
    assert request.guidance.on == (guidance > 1)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_frames": 120}, f"num_frames: 120 is not 4k + 1, which {NAME} needs; the nearest: 117 and 121"),
        ({"width": 850}, f"width: 850 is not a multiple of 16, which {NAME} needs; the nearest: 848 and 864"),
        ({"image_path": ("IMAGE",)}, f"image_path: {NAME} works from text alone; it takes no image"),
    ],
)
def test_bad_input_is_one_sentence(fields, sentence, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    if "image_path" in fields:
        fields = {"image_path": (str(tmp_path / "image.png"),)}
    read = blueprint.read(ModelOptions(model_path=str(released(NAME, tmp_path))))
    with pytest.raises(UserError) as caught:
        admit(read, SamplingOptions(prompt=("a",), **fields))
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"guidance_rescale": 0.7}, "the guider's guidance_rescale is 0.7; only 0.0 is implemented"),
        ({"stop": 0.5}, "the guider's stop is 0.5; only 1.0 is implemented"),
    ],
)
def test_another_form_of_guidance_is_refused(entries, words, tmp_path):
    path = released(NAME, tmp_path)
    (path / "guider").mkdir()
    (path / "guider" / "guider_config.json").write_text(json.dumps(entries))
    with pytest.raises(UserError) as caught:
        blueprint.read(ModelOptions(model_path=str(path)))
    assert str(caught.value) == f"model_path: {words}"
