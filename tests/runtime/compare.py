"""The two sides of a pipeline test: diffusers' pipeline without its own roundings, and tinydiff's hops, from
one start.

Three roundings of the reference are taken out, so that what is left is exact. It steps with sigmas kept in
float32: they are upcast unchanged, and tinydiff's tables hold the same digits. It makes constants in torch's
default type: that is float64 here. It turns images into float32 numbers: they are brought to the multiples
of 1/255 that they stand for. Timesteps stay float32 on both sides.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from tests.parity import close, doubles
from tinydiff.config import SamplingOptions
from tinydiff.runtime import pipeline
from tinydiff.runtime.admit import admit


@contextmanager
def exact(pipe):
    """The reference without its own roundings."""
    processor = pipe.video_processor if hasattr(pipe, "video_processor") else pipe.image_processor
    set_timesteps, preprocess = pipe.scheduler.set_timesteps, processor.preprocess

    @wraps(set_timesteps)  # pipelines read its signature
    def upcast(*args, **kwargs):
        with torch._C.DisableTorchFunction():  # the table is made as ever
            set_timesteps(*args, **kwargs)
        pipe.scheduler.sigmas = pipe.scheduler.sigmas.double()

    def whole(*args, **kwargs):
        return ((preprocess(*args, **kwargs).double() + 1) * 127.5).round() / 127.5 - 1

    pipe.scheduler.set_timesteps, processor.preprocess = upcast, whole
    torch.set_default_dtype(torch.float64)
    try:
        with doubles():
            yield
    finally:
        pipe.scheduler.set_timesteps, processor.preprocess = set_timesteps, preprocess
        torch.set_default_dtype(torch.float32)


def recorded(pipe, **given):
    """(latents [1, C, H, W] after each step, images [1, height, width, 3] between 0 and 1) of the
    reference.
    """
    steps = []
    with exact(pipe):
        made = pipe(
            **given,
            output_type="np",
            callback_on_step_end=lambda pipe, i, t, kept: steps.append(kept["latents"]) or {},
        )
    return steps, made.images


def starting_from(monkeypatch, module, noise):
    """Let a pipeline's module draw `noise`, and code images as the middle of their distribution, as
    tinydiff does, not as a sample.
    """

    def draw(shape, **_):
        assert tuple(shape) == noise.shape
        return noise

    monkeypatch.setattr(module, "randn_tensor", draw)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def widened(monkeypatch, module):
    """Let a pipeline's module, which insists on float32, mean float64 by it."""
    monkeypatch.setattr(module, "torch", SimpleNamespace(**vars(torch) | {"float32": torch.float64}))


def ours(model, request, start):
    """(latents after each step, frames)."""
    conditioning = pipeline.condition(model, request)
    assert conditioning.stages[0].inputs.latents[0].size == tuple(start.shape[1:])
    latents = [
        conditioning.stages[0].inputs.latents[0].unpack(x)
        for x in pipeline.denoise(model, conditioning, 0, [start])
    ]
    return latents, pipeline.decode(model, request.output, latents[-1])


def request_for(model, **fields):
    """The admitted request of these options; each pipeline's tests fix its prompt, size and steps."""
    prompt = fields["prompt"]
    asked = fields | {"prompt": (prompt,) if isinstance(prompt, str) else prompt}
    [request] = admit(model.blueprint, SamplingOptions(**asked))
    return request


def same_steps(got, expected):
    """Latents after every step, ours and the reference's."""
    for ours, theirs in zip(got, expected, strict=True):
        close(ours, theirs)


def same_frames(frames, video):
    """uint8 frames against the reference's [0, 1]: equal but for ties in rounding, and no plain colour."""
    expected = (np.asarray(video[0]) * 255).round()
    assert frames.shape == expected.shape and expected.std() > 10
    difference = np.abs(frames - expected)
    assert difference.max() <= 1 and (difference > 0).sum() <= max(1, difference.size // 1000)
