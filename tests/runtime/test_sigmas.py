"""Noise levels that a request lists: what is refused. Their schedule is compared in the pipelines' tests."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.runtime.test_admit import FAST, T2V, refused, released, request
from tinydiff.config import ModelOptions, SamplingOptions
from tinydiff.runtime import blueprint, pipeline
from tinydiff.runtime.admit import admit


@pytest.mark.parametrize(
    ("name", "fields", "field", "words"),
    [
        (
            FAST,
            {"sigmas": (1.0, 0.5)},
            "sigmas",
            "is distilled for fixed timesteps; give dmd_denoising_steps",
        ),
        (T2V, {"sigmas": (0.5, 0.5)}, "sigmas", "0.5 follows 0.5; each must be below the one before"),
        (
            T2V,
            {"sigmas": (1.0, 0.5), "num_inference_steps": 3},
            "num_inference_steps",
            "3 does not fit the 2 sigmas given; leave it out",
        ),
        (T2V, {"loras": {"style": 1.0}}, "loras", "'style' is no adapter of this model; none is loaded"),
    ],
)
def test_requests_that_the_model_cannot_serve(name, fields, field, words, tmp_path):
    refused(field, words, request, released(name, tmp_path), **fields)


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("name", ["Qwen/Qwen-Image", "black-forest-labs/FLUX.1-dev"])
def test_a_fixed_shift_in_place_of_one_by_size(name, steps, tmp_path):
    """The schedule of distilled models: the reference's, with base and maximum at one shift and no end of its
    own.
    """
    plan = blueprint.read(ModelOptions(model_path=str(released(name, tmp_path))))
    [asked] = admit(plan, SamplingOptions(prompt=("a",), num_inference_steps=steps, flow_shift=3.0))
    ends = {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
    theirs = FlowMatchEulerDiscreteScheduler.from_config({**plan.scheduler, **ends})
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=math.log(3))
    assert torch.allclose(
        pipeline.solver_table(plan, asked).timesteps.float(), theirs.timesteps, rtol=1e-6, atol=0
    )
