"""The real Wan network as Dynamo traces it, and the whole shipped model by Inductor.

Both are equal to eager, with one graph for all that a request may vary.
"""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from diffusers import WanTransformer3DModel

import tinydiff
from tests.parity import draw, randomised
from tests.runtime.folders import TRANSFORMER
from tinydiff.models import wan
from tinydiff.ops.network import Network
from tinydiff.sampling import guidance, loop, solvers
from tinydiff.sampling.compile import compiled_denoise, graph_breaks, graph_count

CONFIG = wan.Config(**TRANSFORMER)
NETWORK = Network(wan.FAMILY, CONFIG)
TEXT_TOKENS = 24
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}


def weights(seed):
    state = randomised(WanTransformer3DModel(**asdict(CONFIG)), seed)
    return {name: tensor.float() for name, tensor in state.items()}


def text(length, seed):
    """What the text encoder hands over for a prompt and an empty negative one: padding is zero."""
    hidden, mask = draw(2, TEXT_TOKENS, CONFIG.text_dim, seed=seed).float(), torch.zeros(2, TEXT_TOKENS)
    mask[0, :length] = mask[1, :1] = 1
    return wan.text_input(hidden, mask)


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_one_graph_serves_every_request_and_both_experts():
    """Sizes, step counts, prompt lengths, guidance scales, seeds; in one piece and in chunks; the second
    expert in the first's graph.
    """
    run = {make: make(NETWORK, guidance.classifier_free) for make in (loop.eager_denoise, compiled_denoise)}
    experts = [weights(1), weights(2)]
    before, broken = graph_count(), graph_breaks()
    for size, steps, length, scale, seed, chunk in (
        ((1, 4, 6), 6, 5, 4.0, 1, None),  # as many tokens as steps: the two lengths must not be taken for one
        ((3, 6, 4), 3, 24, 2.0, 2, 1),
        ((2, 4, 8), 7, 11, 1.5, 1, 2),
    ):
        rows = solvers.from_scheduler_config(SCHEDULER, steps)
        rows = solvers.with_experts(solvers.with_guidance(rows, scale), 0.8, scale / 2)
        assert len(solvers.segments(rows)) == 2
        inputs = [
            {"text": each[None], "positions": wan.positions(CONFIG, size)} for each in text(length, seed)
        ]
        ready = [loop.hoist(NETWORK, flat, inputs, rows) for flat in experts]
        x = draw(1, len(inputs[0]["positions"]), 16, seed=seed).float()
        want, whole, chunked = (
            list(loop.run(run[make], rows, x, ready.__getitem__, chunk=pieces))[-1].x
            for make, pieces in (
                (loop.eager_denoise, None),
                (compiled_denoise, None),
                (compiled_denoise, chunk),
            )
        )
        assert want.isfinite().all() and want.std() > 0.1
        for got in (whole, chunked):
            assert (got - want).abs().max() <= 1e-5 * max(1, want.abs().max().item())
        assert graph_count() - before == 1
    assert graph_breaks() == broken


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_the_shipped_model_compiles_at_its_first_image_only():
    torch.compiler.reset()  # another test of this process may have compiled the same model
    fast, eager = tinydiff.load(enable_torch_compile=True), tinydiff.load()
    before, broken = graph_count(), graph_breaks()
    for prompt, fields in (
        ("a red circle", {"num_inference_steps": 3, "seed": 1}),
        (
            "a small green star at the top left of a white background",
            {"num_inference_steps": 5, "height": 64, "width": 96, "seed": 2},
        ),
        (
            "a ring, moving right",
            {"num_inference_steps": 4, "num_frames": 17, "height": 64, "width": 64, "guidance_scale": 2.5},
        ),
        ("", {"num_inference_steps": 1, "num_frames": 5, "height": 32, "width": 64, "guidance_scale": 7.0}),
    ):
        got, want = (tinydiff.generate(model, prompt, **fields) for model in (fast, eager))
        [a], [b] = got.latents, want.latents
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max().item())
        assert abs(got.frames[0].astype(int) - want.frames[0]).max() <= 1
        assert graph_count() - before == 1
    assert graph_breaks() == broken
