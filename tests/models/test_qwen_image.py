"""The Qwen-Image transformer against diffusers.QwenImageTransformer2DModel in float64, every parameter
redrawn.
"""

from dataclasses import asdict
from unittest.mock import patch

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from tests.parity import Recording, close, doubles, draw, randomised, shapes, tracked, unread
from tinydiff.models import qwen_image
from tinydiff.models.evaluate import predict
from tinydiff.ops.network import Network
from tinydiff.ops.patch import patchify
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan

PLAN = Plan()
TINY = qwen_image.Config(
    in_channels=16,
    out_channels=4,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    axes_dims_rope=(4, 6, 6),
)
TIMES = torch.tensor([999, 37], dtype=torch.float64)


def _configs(**changes):
    return qwen_image.Config(**asdict(TINY) | changes)


ODD, WIDE, TALL, SMALL = (6, 10), (4, 14), (8, 2), (2, 6)  # latents: patch grids 3 x 5, 2 x 7, 4 x 1, 1 x 3
LAYERED = _configs(use_additional_t_cond=True, use_layer3d_rope=True)
CASES = {
    "picture": (TINY, [ODD], 1),
    "padded text": (TINY, [ODD], 1),
    "reference images": (TINY, [ODD, WIDE, TALL], 1),
    "reference images at timestep 0": (_configs(zero_cond_t=True), [ODD, WIDE, TALL], 1),
    "layers": (LAYERED, [ODD, ODD, ODD, WIDE], 3),
    "more layers than rows": (LAYERED, [SMALL, SMALL, SMALL, SMALL], 3),
    "layers, the condition at timestep 0": (
        _configs(**asdict(LAYERED) | {"zero_cond_t": True}),
        [SMALL, TALL],
        1,
    ),
}


def _reference(c):
    """The reference's tables come from torch.polar, which rounds float32 cosines otherwise than torch.cos
    does: one step, 6e-8.
    """
    with patch(
        "torch.polar", lambda length, angle: torch.complex(length * angle.cos(), length * angle.sin())
    ):
        return QwenImageTransformer2DModel(
            **{name: value for name, value in asdict(c).items() if name != "pooled_projection_dim"}
        )


def _case(name):
    """Config, weights, the reference, its keyword arguments, and our tokens and inputs. Several sizes: `made`
    images, then references.
    """
    c, sizes, made = CASES[name]
    batch = 1 if c.zero_cond_t and c.use_additional_t_cond else 2  # the reference adds [2 B, D] and [B, D]
    reference = _reference(c)
    flat = randomised(reference, 1)
    tokens = torch.cat(
        [patchify(draw(batch, c.out_channels, 1, *size, seed=i), (1, 2, 2)) for i, size in enumerate(sizes)],
        1,
    )
    text = draw(batch, 7, c.joint_attention_dim, seed=11)
    grids = [(1, height // 2, width // 2) for height, width in sizes]
    known = {
        "hidden_states": tokens,
        "encoder_hidden_states": text,
        "timestep": TIMES[:batch] / 1000,
        "img_shapes": [grids] * batch,
    }
    inputs = {"text": text, "positions": qwen_image.positions(c, sizes)}
    if name == "padded text":
        inputs["mask"] = known["encoder_hidden_states_mask"] = torch.tensor([[1] * 4 + [0] * 3, [1] * 7])
    if len(sizes) > 1:
        pictures = torch.cat([torch.full((height * width,), i) for i, (_, height, width) in enumerate(grids)])
        inputs["frozen"] = (pictures >= made)[None, :, None]
    if c.use_additional_t_cond:
        inputs["kind"] = known["additional_t_cond"] = torch.tensor([1, 0])[:batch]
    return c, flat, reference, known, tokens, inputs


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_and_uses_every_weight_that_counts(name):
    c, flat, reference, known, tokens, inputs = _case(name)
    assert shapes(qwen_image.spec(c)) == shapes(flat)
    with doubles():
        expected = reference(**known).sample
    weights = tracked(flat)
    with torch.enable_grad():
        y = predict(
            Network(qwen_image.FAMILY, c, dtype=torch.float64), weights, tokens, TIMES[: len(tokens)], inputs
        )
    close(y, expected)
    last = f"transformer_blocks.{c.num_layers - 1}"  # nothing reads the text that leaves the last block
    unused = {f"{last}.{layer}" for layer in ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")}
    assert {name.rsplit(".", 1)[0] for name in unread(y, weights)} == unused


def test_the_loop_reads_no_weight_of_a_modulation_nor_of_the_text_projection():
    c, flat, _, _, tokens, inputs = _case("reference images at timestep 0")
    request, steps = qwen_image.hoist(c, PLAN, Weights(flat, dtype=torch.float64), inputs, TIMES[:1])
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
    c, flat, _, _, tokens, inputs = _case("padded text")
    alone = {"text": inputs["text"][:1, :4], "positions": inputs["positions"]}
    both = predict(Network(qwen_image.FAMILY, c, dtype=torch.float64), flat, tokens, TIMES[:1], inputs)
    close(
        both[:1],
        predict(Network(qwen_image.FAMILY, c, dtype=torch.float64), flat, tokens[:1], TIMES[:1], alone),
        1e-12,
    )
    request, _ = qwen_image.hoist(c, PLAN, Weights(flat, dtype=torch.float64), alone, TIMES)
    assert "mask" not in request  # without padding no mask exists, and the fast kernels run


def test_one_text_serves_several_images():
    c, flat, _, _, tokens, inputs = _case("layers")
    one = inputs | {"text": inputs["text"][:1], "kind": inputs["kind"][:1]}
    both = predict(Network(qwen_image.FAMILY, c, dtype=torch.float64), flat, tokens, TIMES[:1], one)
    for b in range(2):
        close(
            both[b : b + 1],
            predict(
                Network(qwen_image.FAMILY, c, dtype=torch.float64), flat, tokens[b : b + 1], TIMES[:1], one
            ),
            1e-12,
        )


def test_bfloat16_is_as_exact_as_the_reference_in_bfloat16():
    """Rounded weights, tokens and timesteps on both sides: the distance to float64 is that of the reference,
    within a fifth.
    """
    c, flat, reference, known, tokens, inputs = _case("reference images at timestep 0")
    rounded = {name: tensor.bfloat16() for name, tensor in flat.items()}
    weights = {name: tensor.double() for name, tensor in rounded.items()}
    known = {
        name: value.bfloat16() if isinstance(value, torch.Tensor) else value for name, value in known.items()
    }
    known["timestep"] = TIMES.bfloat16() / 1000
    exact = predict(
        Network(qwen_image.FAMILY, c, dtype=torch.float64),
        weights,
        known["hidden_states"].double(),
        known["timestep"].double() * 1000,
        inputs,
    )
    ours = predict(
        Network(qwen_image.FAMILY, c, dtype=torch.bfloat16), rounded, tokens, TIMES.float(), inputs
    )
    assert ours.dtype == torch.bfloat16
    theirs = reference.bfloat16()(**known).sample
    error, allowed = ((y.double() - exact).square().mean().sqrt() for y in (ours, theirs))
    assert error < 1.2 * allowed < 0.1


def test_float16_residuals_stay_finite():
    c, flat, _, _, tokens, inputs = _case("picture")
    half = {name: tensor.half() for name, tensor in flat.items()}
    request, steps = qwen_image.hoist(c, PLAN, Weights(half, dtype=torch.float16), inputs, TIMES[:1])
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
    layers = qwen_image.positions(LAYERED, [(2, 2)] * 5 + [(2, 4)])
    assert layers[:, 0].tolist() == [0, 1, 2, 3, 4, -1, -1]
    assert qwen_image.text_positions(LAYERED, layers, 1).tolist() == [[5, 5, 5]]


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
        _configs(**changes)
