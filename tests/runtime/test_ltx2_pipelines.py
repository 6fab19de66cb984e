"""LTX-2 and LTX-2.3 against diffusers' own pipelines: the latents of video and sound after every step, the
frames and the waveform, from the same start, in float64.

Beside the roundings of `compare`, timesteps of tokens stay float32 as those of images do, and rope tables
are made in float32, as ours are.
"""

from __future__ import annotations

from functools import partial, wraps
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import pipeline_ltx2, pipeline_ltx2_image2video
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from PIL import Image
from transformers import Gemma3TextConfig, Gemma3TextModel, Qwen2Tokenizer

from tests import vocabularies
from tests.parity import close
from tests.runtime import compare
from tests.runtime.compare import exact, same_frames, widened
from tests.runtime.folders import load, saved
from tinydiff.io import output
from tinydiff.models import registry
from tinydiff.models.registry import ReleasedModel
from tinydiff.records import UserError
from tinydiff.runtime import pipeline
from tinydiff.sampling import noise

PROMPT, NEGATIVE, STEPS, TOKENS = " A red circle and a star 日本 ", "blurry, left of", 3, 16
SIZE, FRAMES, FPS = (64, 96), 17, 24
ROW = ReleasedModel(
    "test/LTX-2", "ltx2", "LTX2Pipeline", 64, 96, 4, 4.0, 1, {}, num_frames=17, fps=24, text_tokens=TOKENS,
    size_multiple=32, frame_multiple=8, images=(0, 1), negative_prompt=NEGATIVE,
)  # fmt: skip
SCHEDULER = {
    "use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024,
    "max_image_seq_len": 4096, "shift_terminal": 0.1,
}  # fmt: skip
NEWER = {
    "transformer": {
        "gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True,
        "use_prompt_embeddings": False,
    },
    "connectors": {
        "video_gated_attn": True, "audio_gated_attn": True, "per_modality_projections": True,
        "video_hidden_dim": 40, "audio_hidden_dim": 28, "proj_bias": True,
        "video_connector_attention_head_dim": 20, "audio_connector_attention_head_dim": 14,
    },
}  # fmt: skip
"""What LTX-2.3 has otherwise."""


@pytest.fixture(scope="module", autouse=True)
def row():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "MODELS", (*registry.MODELS, ROW))
        yield


def build(folder, newer):
    """The reference's pipeline, saved to `folder`."""
    (folder / "words").mkdir(parents=True)
    tokenizer = Qwen2Tokenizer.from_pretrained(vocabularies.qwen(folder / "words"))
    text = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=28, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, sliding_window=8,
    )  # fmt: skip
    changes = NEWER if newer else {"transformer": {}, "connectors": {}}
    networks = {
        "transformer": LTX2VideoTransformer3DModel(
            **{
                "in_channels": 8, "out_channels": 8, "audio_in_channels": 8, "audio_out_channels": 8,
                "num_attention_heads": 2, "attention_head_dim": 20, "cross_attention_dim": 40,
                "audio_num_attention_heads": 2, "audio_attention_head_dim": 14,
                "audio_cross_attention_dim": 28, "caption_channels": 24, "num_layers": 2,
                "rope_type": "split",
            } | changes["transformer"]
        ),
        "vae": AutoencoderKLLTX2Video(
            latent_channels=8, block_out_channels=(8, 8, 16, 16), decoder_block_out_channels=(8, 16, 32),
            layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1), decoder_causal=False,
            spatial_compression_ratio=32, temporal_compression_ratio=8,
        ),
        "audio_vae": AutoencoderKLLTX2Audio(
            base_channels=8, latent_channels=2, mel_bins=16, num_res_blocks=1,
        ),
        "connectors": LTX2TextConnectors(
            **{
                "caption_channels": 24, "text_proj_in_factor": 4, "video_connector_num_attention_heads": 2,
                "video_connector_attention_head_dim": 12, "video_connector_num_layers": 1,
                "video_connector_num_learnable_registers": 4, "audio_connector_num_attention_heads": 2,
                "audio_connector_attention_head_dim": 12, "audio_connector_num_layers": 1,
                "audio_connector_num_learnable_registers": 8, "rope_type": "split",
            } | changes["connectors"]
        ),
        "vocoder": LTX2Vocoder(
            in_channels=32, hidden_channels=16, upsample_kernel_sizes=[7, 4], upsample_factors=[3, 2],
            resnet_kernel_sizes=[3], resnet_dilations=[[1, 3]],
        ),
        "text_encoder": Gemma3TextModel(text),
    }  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    pipe = saved(LTX2Pipeline, folder, networks, tokenizer=tokenizer, scheduler=scheduler)
    transformer, connectors = networks["transformer"], networks["connectors"]
    ropes = [transformer.rope, transformer.audio_rope]
    ropes += [transformer.cross_attn_rope, transformer.cross_attn_audio_rope]
    for rope in (*ropes, connectors.video_connector.rope, connectors.audio_connector.rope):
        rope.forward = as_ever(rope.forward)
    connectors.forward = with_usual_constants(connectors.forward)
    for name, module in transformer.named_modules():
        if name.endswith("time_proj"):
            module.forward = in_float32(module.forward)
    return pipe


def as_ever(forward):
    """The function outside `doubles`: tables stay float32."""

    def call(*args, **kwargs):
        with torch._C.DisableTorchFunction():
            return forward(*args, **kwargs)

    return call


def with_usual_constants(forward):
    """The function where torch makes constants in float32: the connectors add 1e-6 to a count of tokens."""

    def call(*args, **kwargs):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return forward(*args, **kwargs)
        finally:
            torch.set_default_dtype(before)

    return call


def copied(scheduler):
    """A second scheduler, for the sound, that steps with sigmas in float64, as the first does."""
    made = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    set_timesteps = made.set_timesteps

    @wraps(set_timesteps)
    def upcast(*args, **kwargs):
        with torch._C.DisableTorchFunction():
            set_timesteps(*args, **kwargs)
        made.sigmas = made.sigmas.double()

    made.set_timesteps = upcast
    return made


def in_float32(forward):
    return as_ever(lambda timesteps: forward(timesteps.to(torch.float32)))


@pytest.fixture(scope="module", params=["LTX-2", "LTX-2.3"])
def both(request, tmp_path_factory, row):
    folder = tmp_path_factory.mktemp("ltx2")
    pipe = build(folder, request.param == "LTX-2.3")
    return pipe, load(folder), request.param


request_for = partial(
    compare.request_for,
    prompt=PROMPT,
    num_frames=FRAMES,
    height=SIZE[0],
    width=SIZE[1],
    num_inference_steps=STEPS,
)


@pytest.mark.parametrize("case", ["text", "text without guidance", "a first frame"])
def test_equals_the_reference(both, monkeypatch, tmp_path, case):
    pipe, model, name = both
    scale = 1.0 if "without" in case else 4.0
    given, fields = {}, {}
    if case == "a first frame":
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8))
        picture.save(tmp_path / "first.png")
        fields, given = {"image_path": (str(tmp_path / "first.png"),)}, {"image": picture, "image_crf": 0}
        pipe = LTX2ImageToVideoPipeline(**pipe.components)
        pipe.set_progress_bar_config(disable=True)
    request = request_for(model, guidance_scale=scale, **fields)

    conditioning = pipeline.condition(model, request)
    inputs = conditioning.stages[0].inputs
    start = [x.double() for x in noise.drawn(5, [(1, *kind.size) for kind in inputs.latents])]
    tokens = [x[:, : sum(inputs.kinds)] for x in pipeline.denoise(model, conditioning, 0, start)]
    made = pipeline.finish(model, request, conditioning, tokens[-1])

    for module in (pipeline_ltx2, pipeline_ltx2_image2video):
        widened(monkeypatch, module)
        monkeypatch.setattr(module, "copy", SimpleNamespace(deepcopy=copied))
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: start[0 if len(shape) == 5 else 1])
    pipe._callback_tensor_inputs = [*pipe._callback_tensor_inputs, "audio_latents"]
    seen = []
    with exact(pipe):
        expected = pipe(
            prompt=PROMPT, negative_prompt=NEGATIVE, height=SIZE[0], width=SIZE[1], num_frames=FRAMES,
            frame_rate=float(FPS), num_inference_steps=STEPS, guidance_scale=scale, stg_scale=0.0,
            modality_scale=1.0, guidance_rescale=0.0, audio_guidance_scale=scale, audio_stg_scale=0.0,
            audio_modality_scale=1.0, audio_guidance_rescale=0.0, max_sequence_length=TOKENS,
            use_cross_timestep=name == "LTX-2.3", output_type="np",
            callback_on_step_end_tensor_inputs=["latents", "audio_latents"],
            callback_on_step_end=lambda pipe, i, t, kept: seen.append(kept) or {}, **given,
        )  # fmt: skip
    assert len(seen) == len(tokens) == STEPS
    for ours, theirs in zip(tokens, seen, strict=True):
        close(ours, torch.cat([theirs["latents"], theirs["audio_latents"]], 1))
    same_frames(made.frames, expected.frames)
    heard = torch.as_tensor(np.asarray(expected.audio))[0].double()
    assert made.sound.rate == 24000 and made.sound.samples.shape == tuple(heard.T.shape)
    assert (torch.from_numpy(made.sound.samples).T.double() - heard).abs().max() < 1e-6 < heard.std()


def test_the_sound_is_written_into_the_video(both, tmp_path):
    """What `generate` saves plays the frames and the sound from the same start."""
    _, model, _ = both
    request = request_for(model, guidance_scale=1.0)
    conditioning = pipeline.condition(model, request)
    *_, tokens = pipeline.denoise(model, conditioning, 3)
    made = pipeline.finish(model, request, conditioning, tokens)
    target = output.Target(tmp_path, "a", ".mp4")
    encoding = output.plan_encoding(target, FPS, "default", None, None)
    path = output.save(target, made.frames, encoding, sound=made.sound)
    with av.open(str(path)) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]


def test_frames_that_are_not_8k_and_1_and_sizes_that_are_no_multiple_of_32(both):
    _, model, _ = both
    with pytest.raises(UserError, match=r"num_frames: 16 is not 8k \+ 1, .* the nearest: 9 and 17"):
        request_for(model, num_frames=16)
    with pytest.raises(UserError, match=r"height: 48 is not a multiple of 32, .* the nearest: 32 and 64"):
        request_for(model, height=48)
