"""Qwen-Image: layers, padding, what the loop reads, float16, and configs that cannot be."""

from dataclasses import replace

import pytest
import torch

from tests.models.tiny import tiny
from tests.parity import Recording, close
from tinydiff.models import qwen_image
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan
from tinydiff.parity.asked import TIME
from tinydiff.parity.denoisers import DENOISERS, qwen

PLAN = Plan()
TINY = DENOISERS["Qwen-Image"].config
LAYERED = DENOISERS["Qwen-Image, layers"]
TALL, SMALL = (8, 2), (2, 6)  # latents: patch grids 4 x 1 and 1 x 3


def test_more_layers_than_an_image_has_rows():
    both = tiny(replace(LAYERED, ask=qwen(SMALL, SMALL, SMALL, SMALL, denoised=3)))
    close(both.predict(), both.expected())


def test_layers_whose_condition_is_at_timestep_0():
    """Of one image: with several the reference adds tensors of 2 B and of B rows."""
    config = replace(LAYERED.config, zero_cond_t=True)
    both = tiny(replace(LAYERED, config=config, ask=qwen(SMALL, TALL)))
    asked = both.asked
    alone = asked._replace(
        tokens=asked.tokens[1:],
        inputs={name: x[1:] if len(x) == 2 else x for name, x in asked.inputs.items()},
        reference_inputs={name: x[1:] for name, x in asked.reference_inputs.items()},
    )
    both = both._replace(asked=alone)
    close(both.predict(), both.expected())


def test_the_loop_reads_no_weight_of_a_modulation_nor_of_the_text_projection():
    both = tiny("Qwen-Image, references at timestep 0")
    c, flat, tokens, inputs = both.network.config, both.flat, both.asked.tokens, both.asked.inputs
    request, steps = qwen_image.hoist(c, PLAN, Weights(flat, dtype=torch.float64), inputs, TIME)
    seen, step = Recording(flat), {key: rows[0] for key, rows in steps.items()}
    x = qwen_image.pre(c, PLAN, Weights(seen, dtype=torch.float64), tokens, Weights(request), step)
    for fn, at in qwen_image.blocks(c):
        x = fn(c, PLAN, Weights(seen) / at, x, Weights(request | step) / at, step | request)
    qwen_image.post(c, PLAN, Weights(seen), x, Weights(request), step)
    left = set(flat) - seen.read
    assert {name.rsplit(".", 1)[0] for name in left} == {
        "norm_out.linear",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "txt_in",
        "txt_norm",
        *(f"transformer_blocks.{i}.{stream}_mod.1" for i in range(c.num_layers) for stream in ("img", "txt")),
    }


def test_padding_changes_nothing():
    """A short prompt alone, and the same beside a longer one, with its mask."""
    both = tiny("Qwen-Image")
    text, mask = both.asked.inputs["text"], both.asked.inputs["mask"]
    length = int(mask[0].sum())
    inputs = {"text": text[:1, :length], "positions": both.asked.inputs["positions"]}
    alone = both._replace(asked=both.asked._replace(tokens=both.asked.tokens[:1], inputs=inputs))
    close(both.predict()[:1], alone.predict(), 1e-12)
    w = Weights(both.flat, dtype=torch.float64)
    request, _ = qwen_image.hoist(TINY, PLAN, w, inputs, TIME)
    assert "mask" not in request  # without padding no mask exists, and the fast kernels run


def test_float16_residuals_stay_finite():
    both = tiny("Qwen-Image")
    c, flat, tokens, inputs = both.network.config, both.flat, both.asked.tokens, both.asked.inputs
    half = {name: tensor.half() for name, tensor in flat.items()}
    request, steps = qwen_image.hoist(c, PLAN, Weights(half, dtype=torch.float16), inputs, TIME)
    step = {key: rows[0] for key, rows in steps.items()}
    x = qwen_image.pre(c, PLAN, Weights(half, dtype=torch.float16), tokens, Weights(request), step)
    at = "transformer_blocks.0"
    for name in ("txt_mod", "img_mod"):
        step[f"{at}.{name}"][:, 5] = 60000  # the feed-forward's gate
    for stream in qwen_image.block(
        c, PLAN, Weights(half, dtype=torch.float16) / at, x, Weights(request | step) / at, request
    ):
        assert stream.isfinite().all() and stream.abs().max() == 65504


def test_positions():
    """Worked by hand: rows and columns from the middle, text beyond them all, Layered's last image at -1."""
    at = qwen_image.positions(TINY, [(6, 4), (2, 10)])
    assert at[:6].tolist() == [[0, -2, -1], [0, -2, 0], [0, -1, -1], [0, -1, 0], [0, 0, -1], [0, 0, 0]]
    assert at[6:].tolist() == [[1, -1, column] for column in (-3, -2, -1, 0, 1)]
    assert qwen_image.text_positions(TINY, at, 2).tolist() == [[2, 2, 2], [3, 3, 3]]
    layers = qwen_image.positions(LAYERED.config, [(2, 2)] * 5 + [(2, 4)])
    assert layers[:, 0].tolist() == [0, 1, 2, 3, 4, -1, -1]
    assert qwen_image.text_positions(LAYERED.config, layers, 1).tolist() == [[5, 5, 5]]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"guidance_embeds": True}, "guidance_embeds is true"),
        ({"in_channels": 64}, "in_channels is 64.*16"),
        ({"axes_dims_rope": (4, 6, 8)}, r"axes_dims_rope is \(4, 6, 8\).*16"),
        ({"axes_dims_rope": (4, 5, 7)}, r"axes_dims_rope is \(4, 5, 7\).*even"),
    ],
)
def test_what_the_code_does_not_implement_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(TINY, **changes)
