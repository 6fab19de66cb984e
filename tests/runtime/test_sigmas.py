"""Noise levels that a request lists: what is refused. Their schedule is compared in the pipelines' tests."""

import pytest

from tests.runtime.test_admit import FAST, T2V, refused, released, request


@pytest.mark.parametrize(
    ("name", "fields", "field", "words"),
    [
        (FAST, {"sigmas": (1.0, 0.5)}, "sigmas", "is distilled for timesteps; give dmd_denoising_steps"),
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
