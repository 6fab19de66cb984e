"""FLUX.2 against diffusers' own pipelines: the latents after every step and the image, from the same start,
in float64.

Five roundings of the reference are taken out, so that what is left is exact. It steps with sigmas kept in
float32: they are upcast unchanged, and tinydiff's tables hold the same digits. It makes constants in torch's
default type: that is float64 here. It turns images into float32 numbers: they are brought to the multiples
of 1/255 that they stand for. It embeds times and guidance in float32, as tinydiff does: both are float32 here
before they are embedded. It keeps the language models' rope tables in float32, as tinydiff does.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from functools import partial, wraps
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests import vocabularies
from tests.parity import close, doubles, draw, randomised
from tests.runtime import compare
from tests.runtime.folders import edit, load, released
from tests.runtime.test_pipelines import same_frames
from tinydiff.config import ModelOptions, SamplingOptions
from tinydiff.io.images import resize
from tinydiff.models import flux2
from tinydiff.models.autoencoders import flux2_tiny
from tinydiff.ops.patch import patchify, unpatchify
from tinydiff.records import UserError
from tinydiff.runtime import blueprint, pipeline
from tinydiff.runtime.admit import admit
from tinydiff.sampling.noise import noise

PROMPT, NEGATIVE, STEPS = "A red fox {on} the [IMG]ice, 4 pm", "blurry", 3
SIZE = (4, 6)
SHAPES = ((80, 130), (100, 64))
"""Heights and widths of two given images, no multiples of 16."""

LM = {
    **{"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 31},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
}
PIXTRAL = {
    **{
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    },
    **{"image_size": 28, "patch_size": 14},
}
TRANSFORMER = {
    **{
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
    },
    **{"joint_attention_dim": 36, "timestep_guidance_channels": 8, "axes_dims_rope": (4, 4, 4, 4)},
}
VAE = {
    **{"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2, "patch_size": (2, 2)},
    **{"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
}
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking "
    "%}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% set tag = 'SYSTEM_PROMPT' if m.role == 'system' else 'INST' %}"
    "[{{ tag }}]{{ m.content[0].text }}[/{{ tag }}]{% endfor %}"
)
"""What the templates of Qwen3 and Mistral Small 3.2 make of the pipelines' messages."""


def klein(folder, distilled, depth=28, channels=16):
    files = folder / "vocabulary"
    files.mkdir(parents=True)
    tokenizer = Qwen2TokenizerFast.from_pretrained(vocabularies.qwen(files), chat_template=QWEN_TEMPLATE)
    text = Qwen3ForCausalLM(Qwen3Config(**LM | {"num_hidden_layers": depth}, vocab_size=len(tokenizer)))
    return saved(folder, Flux2KleinPipeline, tokenizer, text, False, channels, is_distilled=distilled)


def dev(folder, framed=True):
    files = folder / "vocabulary"
    files.mkdir(parents=True)
    # The processor of the released model needs torchvision; it hands texts to its tokenizer, which has the
    # same method.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        vocabularies.mistral(files, framed), chat_template=MISTRAL_TEMPLATE, padding_side="left"
    )
    text = {"model_type": "mistral", **LM, "vocab_size": 300, "sliding_window": None}
    text = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=PIXTRAL))
    pipe = saved(folder, Flux2Pipeline, tokenizer, text, True)
    edit(folder / "model_index.json", tokenizer=["transformers", "PixtralProcessor"])
    return pipe


def saved(folder, run_by, tokenizer, text, guided, channels=16, **options):
    """The reference's pipeline in float64, saved in float32 to `directory`. Every parameter is redrawn, at
    values that float32 holds.
    """
    transformer = Flux2Transformer2DModel(**TRANSFORMER | {"in_channels": channels}, guidance_embeds=guided)
    networks = {"transformer": transformer, "vae": vae(channels), "text_encoder": text}
    for seed, network in enumerate(networks.values()):
        randomised(network, seed)
        network.float()
    networks["vae"].bn.running_var.abs_().add_(0.1)
    pipe = run_by(
        **networks,
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        **options,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    for network in networks.values():
        network.double()
    embed = networks["transformer"].time_guidance_embed.time_proj
    embed.register_forward_pre_hook(lambda _, args: (torch.tensor(args[0].tolist(), dtype=torch.float32),))
    return pipe


def vae(channels):
    reference = AutoencoderKLFlux2(**VAE, latent_channels=channels // 4)
    reference.bn.num_batches_tracked = None  # the counter of training is no weight
    return reference


@contextmanager
def exact(pipe):
    """The reference without its own roundings."""
    set_timesteps, preprocess = pipe.scheduler.set_timesteps, pipe.image_processor.preprocess

    @wraps(set_timesteps)  # the pipelines look at what it takes
    def upcast(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        pipe.scheduler.sigmas = pipe.scheduler.sigmas.double()

    def whole(*args, **kwargs):
        return ((preprocess(*args, **kwargs).double() + 1) * 127.5).round() / 127.5 - 1

    pipe.scheduler.set_timesteps, pipe.image_processor.preprocess = upcast, whole
    torch.set_default_dtype(torch.float64)
    try:
        with doubles():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(len(SHAPES))]
    for seed, (path, shape) in enumerate(zip(paths, SHAPES, strict=True)):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)).save(path)
    return [str(path) for path in paths]


request_for = partial(
    compare.request_for, prompt=PROMPT, height=16 * SIZE[0], width=16 * SIZE[1], num_inference_steps=STEPS
)


def theirs(pipe, request, start, **given):
    """(tokens after each step, image) of the reference."""
    tokens = []
    given |= {
        "prompt": PROMPT,
        "height": request.output.height,
        "width": request.output.width,
        "num_inference_steps": STEPS,
        "latents": start,
    }
    if request.images.originals:
        given["image"] = [Image.fromarray(image) for image in request.images.originals]
    with exact(pipe):
        if request.guidance.on:
            given["negative_prompt_embeds"], _ = pipe.encode_prompt(request.text.negative_prompt)
        keep = {"callback_on_step_end": lambda pipe, i, t, kept: tokens.append(kept["latents"]) or {}}
        made = pipe(**given, **keep, output_type="np").images
    return tokens, made


def ours(model, request, start):
    """(tokens after each step, image)."""
    conditioning = pipeline.condition(model, request)
    assert conditioning.stages[0].inputs.latents[0].size == (start.shape[1], 1, *start.shape[2:])
    tokens = list(pipeline.denoise(model, conditioning, 0, [start[:, :, None]]))
    return tokens, pipeline.decode(
        model, request.output, conditioning.stages[0].inputs.latents[0].unpack(tokens[-1])
    )


def same(pipe, model, request, **given):
    start = draw(1, 16, *SIZE, seed=9)
    expected, picture = theirs(pipe, request, start, **given)
    got, made = ours(model, request, start)
    assert len(got) == len(expected) == STEPS
    compare.same_steps(got, expected)
    same_frames(made, [picture])


KLEIN = {
    "distilled": (True, 0, {}),
    "base": (False, 0, {"negative_prompt": NEGATIVE}),
    "base without guidance": (False, 0, {"guidance_scale": 1.0}),
    "distilled with references": (True, 2, {}),
    "base with a reference": (False, 1, {}),
}


@pytest.mark.parametrize("case", KLEIN)
def test_klein_equals_diffusers(case, tmp_path, pictures):
    distilled, count, fields = KLEIN[case]
    pipe = klein(tmp_path / "model", distilled)
    # Found by shape alone, the directory takes the defaults of the first klein, which is distilled.
    model = load(
        tmp_path / "model", model_id=f"black-forest-labs/FLUX.2-klein-{'' if distilled else 'base-'}4B"
    )
    request = request_for(model, image_path=tuple(pictures[:count]), **fields)
    assert request.guidance.on == (case in ("base", "base with a reference"))
    same(pipe, model, request, guidance_scale=request.guidance.scale)


@pytest.mark.parametrize(("count", "scale", "framed"), [(0, 4.0, True), (2, 2.5, False)])
def test_dev_equals_diffusers(count, scale, framed, tmp_path, pictures):
    """The chat opens with BOS once, whether the tokenizer adds one to other texts or not."""
    pipe, model = dev(tmp_path / "model", framed), load(tmp_path / "model")
    request = request_for(model, image_path=tuple(pictures[:count]), guidance_scale=scale)
    assert not request.guidance.on and request.guidance.embedded == scale
    same(pipe, model, request, guidance_scale=scale)


def test_sigmas_are_those_of_diffusers(tmp_path):
    """Listed noise levels take the place of the grid; the shift by the size of the image still applies."""
    pipe, model = dev(tmp_path / "model"), load(tmp_path / "model")
    sigmas = (1.0, 0.6509, 0.1108)[:STEPS]
    request = request_for(model, num_inference_steps=None, sigmas=sigmas, guidance_scale=2.5)
    assert request.schedule.steps == len(sigmas)
    same(pipe, model, request, guidance_scale=2.5, sigmas=np.array(sigmas))


def test_a_prompt_that_is_too_long_is_cut_as_by_the_reference(tmp_path, caplog):
    pipe, model = klein(tmp_path / "model", True), load(tmp_path / "model")
    long = PROMPT * 40
    request = request_for(model, prompt=(long,))
    text = pipeline.condition(model, request).stages[0].inputs.branches[0]["text"]
    with doubles():
        expected, _ = pipe.encode_prompt(long)
    close(text, expected)
    assert text.shape[1] == 512 and "tokens were cut, the model reads 512" in caplog.text


@pytest.mark.parametrize("depth", [27, 40])
def test_the_states_read_do_not_depend_on_the_depth(depth, tmp_path, pictures):
    """Of 27 layers the last state read is the one that is normalised."""
    pipe = klein(tmp_path / "model", True, depth)
    model = load(tmp_path / "model")
    text = model.nets["text_encoder"]
    assert text.config.layers == 27 and {
        int(name.split(".")[1]) for name in text.weights if "layers" in name
    } == set(range(27))
    same(pipe, model, request_for(model), guidance_scale=1.0)


def test_a_language_model_without_the_states_is_refused(tmp_path):
    klein(tmp_path / "model", True, depth=26)
    with pytest.raises(
        UserError,
        match="text_encoder has 26 layers, and Flux2KleinPipeline reads its hidden states 9, 18, 27",
    ):
        load(tmp_path / "model")


def test_noise_is_what_the_reference_draws(tmp_path):
    pipe = klein(tmp_path / "model", True)
    generator = torch.Generator().manual_seed(7)
    drawn, _ = pipe.prepare_latents(1, 4, 64, 96, torch.float32, "cpu", generator)
    made = (
        pipeline.condition(load(tmp_path / "model"), request_for(load(tmp_path / "model"))).stages[0].inputs
    )
    assert torch.equal(made.latents[0].pack(noise(7, 0, (1, *made.latents[0].size))[0]), drawn)


# --- given images ---


@pytest.mark.parametrize("shape", [(64, 64), (100, 71), (1200, 1024), (1024, 1025), (64, 512), (3000, 2011)])
def test_an_input_image_is_seen_as_by_the_reference(shape, tmp_path):
    image, processor = (
        np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8),
        Flux2ImageProcessor(vae_scale_factor=16),
    )
    picture = processor.check_image_input(Image.fromarray(image))
    if shape[0] * shape[1] > 1024 * 1024:
        picture = processor._resize_to_target_area(picture, 1024 * 1024)
    width, height = (side // 16 * 16 for side in picture.size)
    expected = processor._resize_and_crop(picture, width, height)
    seen = []
    parts = SimpleNamespace(nets={"vae": SimpleNamespace(config=SimpleNamespace(scale_factor_spatial=16))},
    resize=resize,
                            pixels=seen.extend, encode=lambda _: None)  # fmt: skip
    flux2.reference(parts, image)
    assert flux2.reference_size(*shape, 16) == (height, width) and np.array_equal(
        seen[0], np.asarray(expected)
    )


@pytest.mark.parametrize("name", ["FLUX.2-klein-4B", "FLUX.2-dev"])
def test_the_output_has_the_first_images_size(name, tmp_path, pictures):
    read = blueprint.read(ModelOptions(model_path=str(released(f"black-forest-labs/{name}", tmp_path))))
    [request] = admit(read, SamplingOptions(prompt=("a",), image_path=tuple(pictures)))
    assert (request.output.height, request.output.width) == (80, 128)
    [request] = admit(read, SamplingOptions(prompt=("a",), image_path=tuple(pictures), height=512))
    assert (request.output.height, request.output.width) == (512, 128)


@pytest.mark.parametrize("shape", [(63, 100), (64, 520)])
def test_an_image_that_cannot_be_given_is_refused(shape, tmp_path):
    path = tmp_path / "odd.png"
    Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(path)
    read = blueprint.read(ModelOptions(model_path=str(released("black-forest-labs/FLUX.2-dev", tmp_path))))
    with pytest.raises(
        UserError,
        match=rf"image_path: an image is {shape[1]} x {shape[0]} pixels; FLUX.2 takes sides of at least 64",
    ):
        admit(read, SamplingOptions(prompt=("a",), image_path=(str(path),)))


# --- what a directory is, and what does not fit ---


def test_a_directory_of_unknown_name_is_known_by_its_index_and_shape(tmp_path):
    for i, name in enumerate(("dev", "klein-4B", "klein-base-4B", "klein-9B", "klein-base-9B")):
        folder = released(f"black-forest-labs/FLUX.2-{name}", tmp_path / "a").rename(tmp_path / f"mine-{i}")
        assert (
            blueprint.read(ModelOptions(model_path=str(folder))).row.name
            == f"black-forest-labs/FLUX.2-{name}"
        )


def test_a_distilled_model_takes_no_guidance(tmp_path):
    read = blueprint.read(
        ModelOptions(model_path=str(released("black-forest-labs/FLUX.2-klein-4B", tmp_path)))
    )
    assert not admit(read, SamplingOptions(prompt=("a",), guidance_scale=1.0))[0].guidance.on
    with pytest.raises(
        UserError,
        match=r"guidance_scale: 4.0 is not supported; .*klein-4B is distilled",
    ):
        admit(read, SamplingOptions(prompt=("a",), guidance_scale=4.0))


TINY_AE = {
    **{"encoder_block_out_channels": (6,) * 4, "decoder_block_out_channels": (5,) * 4},
    **{"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)},
}


def tiny_autoencoder(folder, channels):
    """A directory as fal/FLUX.2-Tiny-AutoEncoder is one."""
    c = flux2_tiny.Config(**TINY_AE, latent_channels=channels)
    weights = {
        row.name: (draw(*row.shape, seed=i) / max(1, row.numel / row.shape[0]) ** 0.5)
        for i, row in enumerate(flux2_tiny.spec(c))
    }
    folder.mkdir()
    save_file(
        {name: x.float() for name, x in weights.items()}, folder / "diffusion_pytorch_model.safetensors"
    )
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "Flux2TinyAutoEncoder", "latent_channels": channels, **TINY_AE})
    )
    return {"component_paths": {"vae": str(folder)}}


def test_the_tiny_autoencoder_takes_the_others_place(tmp_path, pictures):
    """Its latents are the denoiser's own: the loop is the same, the images are coded by its functions
    alone.
    """
    klein(tmp_path / "model", True, channels=32)
    usual, model = (
        load(tmp_path / "model"),
        load(tmp_path / "model", **tiny_autoencoder(tmp_path / "tiny", 32)),
    )
    net, request = model.nets["vae"], request_for(model, image_path=tuple(pictures[:1]))
    given = (
        torch.tensor(request.images.originals[0][:, 1:129]).double().permute(2, 0, 1)[None, :, None] / 127.5
        - 1
    )
    known = pipeline.condition(model, request).stages[0].inputs.given_tokens
    close(known.tokens[:, 24:], patchify(net.family.encode(net.config, net.w, given), (1, 1, 1)))

    request, start = request_for(model), draw(1, 32, *SIZE, seed=9)
    (tokens, picture), (expected, _) = ours(model, request, start), ours(usual, request, start)
    close(tokens[-1], expected[-1], 1e-13)
    frames = net.family.decode(net.config, net.w, unpatchify(tokens[-1], (1, 1, 1), (1, *SIZE)))
    same_frames(picture, frames.permute(0, 2, 3, 4, 1) / 2 + 0.5)


@pytest.mark.parametrize(
    ("channels", "sentence"),
    [
        (64, "the transformer's in_channels is 32, and the vae's latents need 64"),
        (48, "latent_channels is 48; it must divide by 32"),
    ],
)
def test_an_autoencoder_of_other_channels_is_refused(channels, sentence, tmp_path):
    klein(tmp_path / "model", True, channels=32)
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps({"_class_name": "Flux2TinyAutoEncoder", "latent_channels": channels, **TINY_AE})
    )
    with pytest.raises(UserError) as caught:
        load(tmp_path / "model", component_paths={"vae": str(path)})
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_an_autoencoder_with_other_weights_is_refused_by_key(tmp_path):
    klein(tmp_path / "model", True, channels=32)
    options = tiny_autoencoder(tmp_path / "tiny", 32)
    save_file(
        {"extra_encoder.weight": torch.zeros(1)}, tmp_path / "tiny" / "diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(
        UserError, match=r"extra_encoder\.weight is \[1\] and should be \[32, 8, 4, 4\]"
    ) as caught:
        load(tmp_path / "model", **options)
    assert "\n" not in str(caught.value)


def test_a_component_of_another_kind_cannot_stand_in(tmp_path):
    klein(tmp_path / "model", True)
    with pytest.raises(
        UserError, match=r"vae_path: '.*transformer' is a Flux2Transformer2DModel, which cannot stand in"
    ):
        load(tmp_path / "model", component_paths={"vae": str(tmp_path / "model" / "transformer")})
