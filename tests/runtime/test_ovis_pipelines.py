"""Ovis-Image against diffusers' own pipeline: the latents after every step and the pixels, from the same
start, in float64.
"""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)
from PIL import Image
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from tests import vocabularies
from tests.parity import close, draw
from tests.runtime import compare
from tests.runtime.compare import ours, recorded, same_frames
from tests.runtime.folders import edit, load, saved
from tinydiff.models import ovis
from tinydiff.ops.patch import patchify
from tinydiff.records import UserError
from tinydiff.runtime import pipeline
from tinydiff.sampling import noise

PROMPT, NEGATIVE, STEPS = " A red  circle &amp; a star\n", "blurry, left of", 4
HEIGHT, WIDTH = 12, 20  # latents of 6 x 10, tokens of 3 x 5
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% "
    "endif %}{% endif %}"
)
"""What Qwen3's own template makes of turns without a system prompt, tools or earlier answers."""
TRANSFORMER = {
    **{
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
    },
    **{"num_attention_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": (4, 4, 8)},
}
VAE = {
    **{
        "block_out_channels": (4, 8),
        "latent_channels": 4,
        "norm_num_groups": 2,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
    **{"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
    **{"use_quant_conv": False, "use_post_quant_conv": False},
}
TEXT = {
    **{
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    **{"head_dim": 8, "rope_theta": 1e6, "bos_token_id": None, "eos_token_id": None},
}
DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ovis") / "model"


def build(folder):
    """The reference's pipeline, saved to `directory`."""
    folder.mkdir()
    tokenizer = Qwen2Tokenizer.from_pretrained(vocabularies.qwen(folder, chat_template=CHAT))
    networks = {
        "transformer": OvisImageTransformer2DModel(**TRANSFORMER),
        "vae": AutoencoderKL(**VAE),
        "text_encoder": Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **TEXT)),
    }
    pipe = saved(
        OvisImagePipeline,
        folder,
        networks,
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
    )
    # diffusers embeds time in float32 whatever comes; `doubles` would widen that, were it not float32 before.
    embed = networks["transformer"].time_proj
    embed.register_forward_pre_hook(lambda _, args: (torch.tensor(args[0].tolist(), dtype=torch.float32),))
    return pipe


@pytest.fixture(scope="module")
def pipe(folder):
    return build(folder)


@pytest.fixture(scope="module")
def model(pipe, folder):
    return load(folder)


request_for = partial(
    compare.request_for, prompt=PROMPT, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS
)


@pytest.mark.parametrize(
    "fields",
    [
        {"negative_prompt": NEGATIVE},
        {"guidance_scale": 2.5},
        {"guidance_scale": 1.0},
        {"prompt": "a large red circle " * 70},
    ],
    ids=["with a negative prompt", "with none", "without guidance", "more text than is read"],
)
def test_every_step_and_the_pixels_equal_diffusers(fields, pipe, model, caplog):
    start = draw(1, 4, 1, 6, 10, seed=9)
    given = {"prompt": PROMPT, "height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, **fields}
    theirs, images = recorded(pipe, **given, latents=patchify(start, ovis.PATCH))
    request = request_for(model, **fields)
    assert request.guidance.scale == fields.get("guidance_scale", 5.0)
    with caplog.at_level(logging.WARNING, "tinydiff"):
        latents, frames = ours(model, request, start)
    assert len(latents) == len(theirs)
    for got, expected in zip(latents, theirs, strict=True):
        close(patchify(got, ovis.PATCH), expected)
    same_frames(frames, images[None])
    length = len(model.tokenizers["tokenizer"].encode(ovis.TEMPLATE.format(request.text.prompt)).ids)
    said = (
        [f"prompt: the last {length - 284} of its tokens were cut, the model reads 284"]
        if length > 284
        else []
    )
    assert [record.getMessage() for record in caplog.records if record.name.startswith("tinydiff")] == said


def test_an_image_to_start_from(pipe, model, tmp_path):
    """The reference has no pipeline for it; it is the last two of four steps, from the image made noisy as
    far.
    """
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(
        tmp_path / "picture.png"
    )
    request = request_for(model, image_path=(str(tmp_path / "picture.png"),), strength=0.3)
    picture = np.array(Image.open(tmp_path / "picture.png").resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))
    pixels = torch.from_numpy(picture).double().permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        clean = (pipe.vae.encode(pixels).latent_dist.mode() - VAE["shift_factor"]) * VAE["scaling_factor"]
    start = draw(1, 4, 1, 6, 10, seed=9)
    sigma = pipeline.solver_table(model.blueprint, request).sigmas[0].item()
    noisy = patchify(sigma * start + (1 - sigma) * clean[:, :, None], ovis.PATCH)
    given = {
        "prompt": PROMPT,
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": 2,
        "sigmas": [0.5, 0.25],
    }
    theirs, images = recorded(pipe, **given, latents=noisy)
    latents, frames = ours(model, request, start)
    assert len(latents) == len(theirs) == 2 and 0.5 < sigma < 0.7
    for got, expected in zip(latents, theirs, strict=True):
        close(patchify(got, ovis.PATCH), expected)
    same_frames(frames, images[None])


def test_noise_is_what_the_reference_draws(pipe):
    drawn, ids = pipe.prepare_latents(
        1, 4, HEIGHT, WIDTH, torch.float32, "cpu", torch.Generator().manual_seed(5)
    )
    [made] = noise.noise(5, 0, (1, 4, 1, 6, 10))
    assert torch.equal(patchify(made, ovis.PATCH), drawn) and torch.equal(
        ovis.positions((1, 6, 10)), ids.long()
    )


def test_the_template_is_the_references(pipe):
    assert [ovis.TEMPLATE.format("{a}")] == pipe._get_messages(
        "{a}"
    ) and pipe.user_prompt_begin_id == ovis.SKIPPED


@pytest.mark.parametrize(
    ("component", "entries", "words"),
    [
        ("vae", {"latent_channels": 8}, "in_channels is 16, and the vae's latents need 32"),
        ("text_encoder", {"hidden_size": 40}, "joint_attention_dim is 20, and the text encoder gives 40"),
        ("transformer", {"out_channels": 8}, "out_channels is 8, and the vae's latents need 16"),
    ],
)
def test_components_that_do_not_fit(component, entries, words, pipe, folder, tmp_path):
    path = folder / component / "config.json"
    whole = path.read_text()
    try:
        edit(path, **entries)
        with pytest.raises(UserError, match=words):
            load(folder)
    finally:
        path.write_text(whole)
