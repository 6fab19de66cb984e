"""HunyuanVideo against diffusers' own pipeline: latents after every step and the frames, from the same start,
in float64.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as image_to_video
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests import vocabularies
from tests.parity import draw
from tests.runtime import compare
from tests.runtime.compare import exact, ours, same_frames
from tests.runtime.folders import load, released, saved
from tinydiff.config import ModelOptions, SamplingOptions
from tinydiff.models import hunyuan_video
from tinydiff.records import UserError
from tinydiff.runtime import blueprint, pipeline
from tinydiff.runtime.admit import admit

PROMPT, NEGATIVE, STEPS = "A red  circle and a star &amp; more", "blurry, left of", 3
HEIGHT, WIDTH = 16, 32  # latents of 4 x 8, tokens of 2 x 4
TRANSFORMER = {
    **{"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16},
    **{"num_layers": 1, "num_single_layers": 2, "text_embed_dim": 20, "pooled_projection_dim": 12},
    **{"rope_axes_dim": (4, 6, 6)},
}
VAE = {
    **{"block_out_channels": (4, 6, 8), "latent_channels": 4, "norm_num_groups": 2, "layers_per_block": 1},
    **{"down_block_types": ("HunyuanVideoDownBlock3D",) * 3, "spatial_compression_ratio": 4},
    **{"up_block_types": ("HunyuanVideoUpBlock3D",) * 3},
}
KINDS = {
    "token_replace": {},
    "latent_concat": {"in_channels": 9, "guidance_embeds": False},
}
"""Kinds of a given first frame -> the transformer's other entries."""
EYES = {
    **{"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 7},
}
NAMES = ("hunyuanvideo-community/HunyuanVideo", "FastVideo/FastHunyuan-diffusers")


def build(folder, shift=7.0, kind=None):
    """The reference's pipeline in float64, saved in float32 to `folder`. kind: of its given first frame."""
    folder.mkdir()
    for name in ("llama", "clip"):
        (folder / name).mkdir()
    llama = {
        **{"vocab_size": 800, "hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 4},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "rope_theta": 5e5, "head_dim": 10},
        **{"pad_token_id": 5},
    }
    clip = {
        **{"vocab_size": 914, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    }
    networks = {
        "transformer": HunyuanVideoTransformer3DModel(
            **TRANSFORMER | KINDS.get(kind, {}), image_condition_type=kind
        ),
        "vae": AutoencoderKLHunyuanVideo(**VAE),
        "text_encoder": LlamaModel(LlamaConfig(**llama)),
        "text_encoder_2": CLIPTextModel(CLIPTextConfig(**clip)),
    }
    texts = [hunyuan_video.TEMPLATE, hunyuan_video.IMAGE_TEMPLATE, PROMPT] * 3
    words = vocabularies.llama(folder / "llama", texts)
    files = {
        "tokenizer": PreTrainedTokenizerFast.from_pretrained(words),
        "tokenizer_2": CLIPTokenizer.from_pretrained(vocabularies.clip(folder / "clip", model_max_length=77)),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=shift),
    }
    pipeline_class = HunyuanVideoPipeline
    if kind is not None:
        pipeline_class = HunyuanVideoImageToVideoPipeline
        settings = {"vision_config": CLIPVisionConfig(**EYES), "text_config": LlamaConfig(**llama)}
        networks["text_encoder"] = LlavaForConditionalGeneration(
            LlavaConfig(**settings, image_token_index=6, pad_token_id=5, image_seq_length=16)
        )
        files["image_processor"] = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)
    pipe = saved(pipeline_class, folder, networks, **files)
    # diffusers embeds time in float32 whatever comes; `doubles` would widen that, were it not float32 before.
    transformer = networks["transformer"]
    for embed in (transformer.time_text_embed, transformer.context_embedder.time_text_embed):
        embed.time_proj.register_forward_pre_hook(
            lambda _, args: (torch.tensor(args[0].tolist(), dtype=torch.float32),)
        )
    return pipe


request_for = partial(
    compare.request_for, prompt=PROMPT, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS
)


CASES = {
    "nine frames": {"num_frames": 9, "guidance_scale": 6.0},
    "an image": {"num_frames": 1, "guidance_scale": 2.5},
    "in tiles along time": {"num_frames": 21, "guidance_scale": 6.0},
    "true CFG": {"num_frames": 9, "guidance_scale": 2.0, "negative_prompt": NEGATIVE, "true_cfg_scale": 2.5},
    "more text than is read": {"num_frames": 1, "guidance_scale": 6.0, "prompt": "a large red circle " * 90},
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_and_the_frames_equal_diffusers(case, tmp_path):
    fields = CASES[case]
    pipe = build(tmp_path / "model")
    model = load(tmp_path / "model")
    assert model.blueprint.row.name == NAMES[0]
    request = request_for(model, **fields)
    assert request.guidance.embedded == fields["guidance_scale"]
    assert request.guidance.on == ("true_cfg_scale" in fields)
    start = draw(1, 4, (fields["num_frames"] - 1) // 4 + 1, 4, 8, seed=9)
    given = {"prompt": PROMPT, "height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, **fields}
    theirs = []
    with exact(pipe):
        video = pipe(
            **given,
            latents=start,
            output_type="np",
            callback_on_step_end=lambda pipe, i, t, kept: theirs.append(kept["latents"]) or {},
        ).frames
    latents, frames = ours(model, request, start)
    assert len(latents) == len(theirs) == STEPS
    compare.same_steps(latents, theirs)
    same_frames(frames, video)


FROM_IMAGE = {
    "a given first frame": ("token_replace", {"guidance_scale": 6.0}),
    "a frame beside the noise": ("latent_concat", {}),
    "a negative prompt": (
        "token_replace",
        {"guidance_scale": 2.0, "negative_prompt": NEGATIVE, "true_cfg_scale": 2.5},
    ),
    "more text than is read": ("latent_concat", {"prompt": "a large red circle " * 90}),
}


@pytest.mark.parametrize("case", FROM_IMAGE)
def test_every_step_of_a_video_from_an_image_equals_diffusers(case, tmp_path):
    kind, fields = FROM_IMAGE[case]
    pipe = build(tmp_path / "model", kind=kind)
    model = load(tmp_path / "model")
    assert model.blueprint.row.shape == {"image_condition_type": kind}
    pixels = np.random.default_rng(0).integers(0, 256, (9, 17, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((51, 31)).save(tmp_path / "image.png")
    image = Image.open(tmp_path / "image.png")
    given = {"prompt": PROMPT, "height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, **fields}
    given |= {"num_frames": 9}
    request = request_for(model, **given, image_path=(str(tmp_path / "image.png"),))
    tokens = model.tokenizers["tokenizer"].encode(hunyuan_video.IMAGE_TEMPLATE.format("a")).ids
    first = list(tokens).index(6)
    template = {
        **{"template": hunyuan_video.IMAGE_TEMPLATE, "crop_start": hunyuan_video.IMAGE_SKIPPED},
        **{"image_emb_start": first, "image_emb_end": first + 16, "image_emb_len": 16},
    }
    start, theirs = draw(1, 4, 3, 4, 8, seed=9), []
    with exact(pipe):
        video = pipe(
            **given,
            image=image,
            prompt_template=template,
            latents=start,
            output_type="np",
            callback_on_step_end=lambda pipe, i, t, kept: theirs.append(kept["latents"]) or {},
        ).frames
    latents, frames = ours(model, request, start)
    assert len(frames) == (9 if kind == "token_replace" else 5)
    compare.same_steps(latents, theirs)
    same_frames(frames, video)


def test_the_template_of_a_prompt_with_an_image_is_the_references():
    known = {"template": hunyuan_video.IMAGE_TEMPLATE, "crop_start": hunyuan_video.IMAGE_SKIPPED}
    assert known.items() <= image_to_video.DEFAULT_PROMPT_TEMPLATE.items()


def test_the_images_token_in_a_prompt_is_one_sentence(tmp_path):
    build(tmp_path / "model", kind="token_replace")
    model = load(tmp_path / "model")
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    images = (str(tmp_path / "image.png"),)
    with pytest.raises(UserError) as caught:
        pipeline.condition(model, request_for(model, prompt="an <image>", image_path=images, num_frames=5))
    assert str(caught.value) == (
        "prompt: <image> stands for the input image and cannot be in a text (the prompt has 2 image tokens "
        "and there are 1 images)"
    )


def test_the_template_is_the_references():
    known = {"template": hunyuan_video.TEMPLATE, "crop_start": hunyuan_video.SKIPPED}
    assert known == DEFAULT_PROMPT_TEMPLATE


def test_the_text_has_its_own_length_and_llamas_last_layers_are_not_loaded(tmp_path):
    build(tmp_path / "model")
    model = load(tmp_path / "model")
    llama = model.nets["text_encoder"]
    assert (llama.config.num_hidden_layers, llama.config.layers) == (4, 2)
    assert not any(name.startswith(("layers.2.", "norm.")) for name in llama.weights)
    lengths = {}
    for prompt in ("a", "a red circle"):
        inputs = pipeline.condition(model, request_for(model, prompt=prompt)).stages[0].inputs.branches[0]
        tokens = model.tokenizers["tokenizer"].encode(hunyuan_video.TEMPLATE.format(prompt)).ids
        lengths[prompt] = inputs["text"].shape[1]
        assert lengths[prompt] == len(tokens) - hunyuan_video.SKIPPED
    assert len(set(lengths.values())) == 2


def test_fast_hunyuan_is_known_by_its_name_and_runs_on_its_own_schedule(tmp_path):
    build(tmp_path / "FastHunyuan-diffusers", shift=17.0)
    model = load(tmp_path / "FastHunyuan-diffusers")
    assert model.blueprint.row.name == NAMES[1]
    request = request_for(model, num_inference_steps=None)
    assert (request.schedule.steps, request.guidance.embedded, request.guidance.on) == (6, 6.0, False)
    sigmas = pipeline.solver_table(model.blueprint, request).sigmas
    grid = np.linspace(1, 0, 7)[:-1]
    assert np.allclose(sigmas[:6], 17 * grid / (1 + 16 * grid), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"num_frames": 46},
            f"num_frames: 46 is not 4k + 1, which {NAMES[1]} needs; the nearest: 45 and 49",
        ),
        (
            {"height": 712},
            f"height: 712 is not a multiple of 16, which {NAMES[1]} needs; the nearest: 704 and 720",
        ),
        ({"image_path": ("IMAGE",)}, f"image_path: {NAMES[1]} works from text alone; it takes no image"),
    ],
)
def test_bad_input_is_one_sentence(fields, sentence, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    if "image_path" in fields:
        fields = {"image_path": (str(tmp_path / "image.png"),)}
    read = blueprint.read(ModelOptions(model_path=str(released(NAMES[1], tmp_path))))
    with pytest.raises(UserError) as caught:
        admit(read, SamplingOptions(prompt=("a",), **fields))
    assert str(caught.value) == sentence
