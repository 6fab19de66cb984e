"""ERNIE-Image against diffusers' own pipeline: the latents after every step and the image, from the same
start, in float64.

The reference's roundings that test_flux2_pipelines names are taken out. Two stay in, which tinydiff has as
well: times are embedded and the angles of positions computed in float32, so that both come in as float32
here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import (
    Ministral3Config,
    Ministral3ForCausalLM,
    Mistral3Config,
    Mistral3Model,
    PreTrainedTokenizerFast,
)

from tests import vocabularies
from tests.parity import close, draw, randomised
from tests.runtime import compare
from tests.runtime.folders import load, released
from tests.runtime.test_flux2_pipelines import LM, PIXTRAL, VAE, exact
from tests.runtime.test_pipelines import same_frames
from tinydiff.config import ModelOptions, Options, OutputOptions, SamplingOptions
from tinydiff.records import UserError
from tinydiff.runtime import blueprint, pipeline
from tinydiff.runtime.generate import admitted, read
from tinydiff.sampling.noise import noise

PROMPT, NEGATIVE, STEPS = "A red fox on the ice", "blurry and of another length", 3
SIZE = (4, 6)
TEXT = LM | {
    **{"model_type": "ministral3", "vocab_size": 300, "sliding_window": None, "tie_word_embeddings": True},
    "rope_parameters": {
        **{
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
        },
        **{"beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
    },
}
"""With a rope stretched as the released one's is. Queries grow from the 64th token on, in the released one
from the 16384th.
"""


def build(folder, shift=3.0, framed=True, enhanced=False):
    """The reference's pipeline in float64, saved in float32. framed: its tokenizer opens texts with BOS.
    enhanced: with a language model for longer prompts.
    """
    files = folder / "vocabulary"
    files.mkdir(parents=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        vocabularies.mistral(files, framed, model_max_length=2048)
    )
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=40, in_channels=16,
        out_channels=16, text_in_dim=12,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    text = Mistral3Model(Mistral3Config(text_config=TEXT, vision_config=PIXTRAL))
    networks = {
        "transformer": transformer,
        "vae": AutoencoderKLFlux2(**VAE, latent_channels=4),
        "text_encoder": text,
    }
    networks["vae"].bn.num_batches_tracked = None  # the counter of training is no weight
    if enhanced:
        networks["pe"] = Ministral3ForCausalLM(Ministral3Config(**TEXT))
    for seed, network in enumerate(networks.values()):
        randomised(network, seed)
        network.float()
    networks["vae"].bn.running_var.abs_().mul_(1e-4)  # so small that eps tells
    more = {"pe_tokenizer": tokenizer} if enhanced else {}
    pipe = ErnieImagePipeline(
        **networks, **more, tokenizer=tokenizer, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift)
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    for network in networks.values():
        network.double()
    for module in (transformer.time_proj, transformer.pos_embed):
        module.register_forward_pre_hook(
            lambda _, args: (torch.tensor(args[0].tolist(), dtype=torch.float32),)
        )
    return pipe


request_for = partial(
    compare.request_for, prompt=PROMPT, height=16 * SIZE[0], width=16 * SIZE[1], num_inference_steps=STEPS
)


CASES = {
    "guided": (3.0, True, {"negative_prompt": NEGATIVE}),
    "guided, nothing in the negative prompt": (3.0, True, {}),
    "guided, not even BOS in the negative prompt": (3.0, False, {}),
    "Turbo": (1.0, True, {"guidance_scale": 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_and_the_image_equal_diffusers(case, tmp_path):
    shift, framed, fields = CASES[case]
    pipe = build(tmp_path / "model", shift, framed)
    model = load(tmp_path / "model")
    request, start = request_for(model, **fields), draw(1, 16, *SIZE, seed=9)
    expected = []
    with exact(pipe):
        picture = pipe(
            PROMPT, request.text.negative_prompt, request.output.height, request.output.width, STEPS,
            request.guidance.scale, latents=start,
            callback_on_step_end=lambda pipe, i, t, kept: expected.append(kept["latents"]) or {},
            output_type="np",
        ).images  # fmt: skip
    conditioning = pipeline.condition(model, request)
    assert conditioning.stages[0].inputs.latents[0].size == (16, 1, *SIZE) and len(
        conditioning.stages[0].inputs.branches
    ) == 1 + (case != "Turbo")
    got = [
        conditioning.stages[0].inputs.latents[0].unpack(x)
        for x in pipeline.denoise(model, conditioning, 0, [start[:, :, None]])
    ]
    assert len(got) == len(expected) == STEPS
    for x, y in zip(got, expected, strict=True):
        close(x[:, :, 0], y)
    same_frames(pipeline.decode(model, request.output, got[-1]), [picture])


def test_the_statistics_are_read_as_the_pipeline_reads_them(tmp_path):
    build(tmp_path / "model")
    read = blueprint.read(ModelOptions(model_path=str(tmp_path / "model")))
    assert read.nets["vae"].config.batch_norm_eps == 1e-5
    other = blueprint.read(ModelOptions(model_path=str(released("black-forest-labs/FLUX.2-dev", tmp_path))))
    assert other.nets["vae"].config.batch_norm_eps == 1e-4


CHAT = "{% for turn in messages %}{{ bos_token }}[INST]{{ turn.content }}\nOutput:[/INST]{% endfor %}"
TOLD = {"do_sample": True, "top_k": 7, "repetition_penalty": 1.3}


@pytest.mark.parametrize(
    ("told", "as_file"), [({}, True), (TOLD, False)], ids=["as transformers", "as its own file says"]
)
def test_the_prompt_is_rewritten_as_by_the_reference(told, as_file, tmp_path):
    """In float32 on both sides, and the reference's draws from the start of ours; it draws from torch's
    global one.
    """
    pipe = build(tmp_path / "model", enhanced=True)
    pipe.pe_tokenizer.chat_template, pipe.pe_tokenizer.model_max_length = CHAT, 12
    pipe.pe_tokenizer.save_pretrained(tmp_path / "model" / "pe_tokenizer", save_jinja_files=as_file)
    pipe.pe.float()
    for name, value in told.items():
        setattr(pipe.pe.generation_config, name, value)
    pipe.pe.generation_config.save_pretrained(tmp_path / "model" / "pe")
    model = blueprint.load(blueprint.read(ModelOptions(model_path=str(tmp_path / "model"))))
    request = request_for(model, prompt=('a "red" fox, 雪',))
    torch.manual_seed(0)
    expected = pipe._enhance_prompt_with_pe(
        request.text.prompt, "cpu", width=request.output.width, height=request.output.height
    )
    made = pipeline.condition(model, request).stages[0].inputs
    assert made.revised == expected and len(expected) > 8
    shown = pipeline.parameters(model, request, made.revised)
    assert (shown["prompt"], shown["use_pe"], shown["revised_prompt"]) == (
        request.text.prompt,
        True,
        expected,
    )
    # What is read is the rewritten prompt; the negative one stays.
    same, plain = (
        pipeline.condition(model, request_for(model, prompt=(text,), use_pe=False)).stages[0].inputs
        for text in (expected, request.text.prompt)
    )
    assert plain.revised is None and len(made.branches) == 2
    assert all(torch.equal(a["text"], b["text"]) for a, b in zip(made.branches, same.branches, strict=True))
    assert not torch.equal(made.branches[1]["text"], made.branches[0]["text"])


def test_a_prompt_and_a_size_make_one_text_whatever_the_seed(tmp_path):
    pipe = build(tmp_path / "model", enhanced=True)
    pipe.pe_tokenizer.chat_template, pipe.pe_tokenizer.model_max_length = CHAT, 12
    pipe.pe_tokenizer.save_pretrained(tmp_path / "model" / "pe_tokenizer")
    model = load(tmp_path / "model")
    texts = [
        pipeline.condition(model, request_for(model, **asked)).stages[0].inputs.revised
        for asked in ({}, {"seed": (7,)}, {"width": 64})
    ]
    assert texts[0] == texts[1] != texts[2]


def test_rewriting_that_cannot_be(tmp_path):
    build(tmp_path / "model", enhanced=True)
    model = load(tmp_path / "model")
    with pytest.raises(UserError, match="pe_tokenizer has no chat template; --use-pe false"):
        pipeline.condition(model, request_for(model))
    pe = model.nets["pe"]
    model = replace(model, nets={**model.nets, "pe": replace(pe, generation={"min_p": 0.1})})
    model = replace(
        model,
        tokenizers={**model.tokenizers, "pe_tokenizer": replace(model.tokenizers["pe_tokenizer"], chat=str)},
    )
    with pytest.raises(UserError, match=r"min_p in pe/generation_config.json is 0.1; supported is None"):
        pipeline.condition(model, request_for(model))
    build(tmp_path / "plain")
    with pytest.raises(
        UserError, match=r"use_pe: .* has no language model that rewrites prompts \(component pe\)"
    ):
        request_for(load(tmp_path / "plain"), use_pe=True)
    assert not request_for(load(tmp_path / "plain"), use_pe=False).text.rewrite


def test_the_model_that_rewrites_is_not_loaded_where_it_is_not_asked(tmp_path):
    build(tmp_path / "model", enhanced=True)
    asked = Options(
        model=ModelOptions(model_path=str(tmp_path / "model")),
        output=OutputOptions(output_path=str(tmp_path)),
    )
    for use, nets in ((None, {"pe"}), (False, set())):
        options = replace(asked, sampling=SamplingOptions(prompt=("a",), use_pe=use))
        plan = read(options)
        [request] = admitted(options, plan).requests
        assert plan.nets.keys() - {
            "transformer",
            "vae",
            "text_encoder",
        } == nets and request.text.rewrite == bool(nets)


@pytest.mark.parametrize("name", ["ERNIE-Image", "ERNIE-Image-Turbo"])
def test_only_the_layers_that_are_read_are_planned(name, tmp_path):
    read = blueprint.read(ModelOptions(model_path=str(released(f"baidu/{name}", tmp_path))))
    text = read.nets["text_encoder"].config
    assert (text.layers, text.num_hidden_layers, read.row.name) == (25, 26, f"baidu/{name}")


def test_noise_is_what_the_reference_draws(tmp_path):
    build(tmp_path / "model")
    model = load(tmp_path / "model")
    made = pipeline.condition(model, request_for(model)).stages[0].inputs
    drawn = torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(7))
    assert torch.equal(noise(7, 0, (1, *made.latents[0].size))[0, :, :, 0], drawn)
    assert torch.equal(made.latents[0].unpack(made.latents[0].pack(drawn[:, :, None])), drawn[:, :, None])


def test_it_can_start_from_an_image(tmp_path):
    from PIL import Image

    build(tmp_path / "model")
    model, path = load(tmp_path / "model"), tmp_path / "given.png"
    Image.effect_noise((96, 64), 80).convert("RGB").save(path)
    request = request_for(model, image_path=(str(path),), strength=0.5)
    conditioning = pipeline.condition(model, request)
    [stage] = conditioning.stages
    assert stage.inputs.start.shape == (1, 24, 16) and stage.inputs.start.std() > 0.1
    assert len(list(pipeline.denoise(model, conditioning, 0))) == 2
