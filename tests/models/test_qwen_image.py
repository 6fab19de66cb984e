"""The Qwen-Image transformer against diffusers.QwenImageTransformer2DModel in float64, every parameter redrawn."""

from dataclasses import asdict
from unittest.mock import patch

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from tests.parity import Recording, close, doubles, draw, randomised, shapes
from tinydiff.models import qwen_image
from tinydiff.models.evaluate import predict
from tinydiff.ops.patch import patchify
from tinydiff.ops.weights import Weights, leaves
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
    "layers, the condition at timestep 0": (_configs(**asdict(LAYERED) | {"zero_cond_t": True}), [SMALL, TALL], 1),
}


def _reference(c):
    """The reference's tables come from torch.polar, which rounds float32 cosines otherwise than torch.cos does: one step, 6e-8."""
    with patch("torch.polar", lambda length, angle: torch.complex(length * angle.cos(), length * angle.sin())):
        return QwenImageTransformer2DModel(**{name: value for name, value in asdict(c).items() if name != "pooled_projection_dim"})


def _case(name):
    """Config, weights, the reference, its keyword arguments, and our tokens and inputs. Several sizes: `made` pictures, then references."""
    c, sizes, made = CASES[name]
    batch = 1 if c.zero_cond_t and c.use_additional_t_cond else 2  # the reference adds [2 B, D] and [B, D]
    reference = _reference(c)
    flat = randomised(reference, 1)
    tokens = torch.cat([patchify(draw(batch, c.out_channels, 1, *size, seed=i), (1, 2, 2)) for i, size in enumerate(sizes)], 1)
    text = draw(batch, 7, c.joint_attention_dim, seed=11)
    grids = [(1, height // 2, width // 2) for height, width in sizes]
    known = {"hidden_states": tokens, "encoder_hidden_states": text, "timestep": TIMES[:batch] / 1000, "img_shapes": [grids] * batch}
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
def test_equals_the_reference_and_reads_every_weight(name):
    c, flat, reference, known, tokens, inputs = _case(name)
    assert shapes(qwen_image.spec(c)) == shapes(flat)
    with doubles():
        expected = reference(**known).sample
    seen = Recording(flat)
    y = predict(qwen_image, c, PLAN, Weights(seen), tokens, TIMES[: len(tokens)], inputs)
    close(y, expected)
    assert seen.read == set(flat)


@pytest.mark.parametrize("name", CASES)
def test_hoisted_rows_equal_single_evaluations(name):
    """What the loop does: hoist once for all timesteps, then each step with its row."""
    c, flat, _, _, tokens, inputs = _case(name)
    w, times = Weights(flat), torch.tensor([999, 640, 1])
    request, steps = qwen_image.hoist(c, PLAN, w, inputs, times)
    assert {len(rows) for rows in steps.values()} == {3}
    for i, t in enumerate(times):
        step = {key: rows[i] for key, rows in steps.items()}
        shared = step | {key: request[key] for key in qwen_image.SHARED if key in request}
        x = qwen_image.pre(c, PLAN, w, tokens, Weights(request), step)
        for fn, at in qwen_image.blocks(c):  # plain dicts, as they cross the boundary of a compiled region
            x = fn(c, PLAN, Weights(leaves(flat, at)), x, Weights(leaves(request | step, at)), shared)
        y = qwen_image.post(c, PLAN, w, x, Weights(request), step)
        close(y, predict(qwen_image, c, PLAN, w, tokens, t[None], inputs), 1e-12)


def test_the_loop_reads_no_weight_of_a_modulation_nor_of_the_text_projection():
    c, flat, _, _, tokens, inputs = _case("reference images at timestep 0")
    request, steps = qwen_image.hoist(c, PLAN, Weights(flat), inputs, TIMES[:1])
    step = {key: rows[0] for key, rows in steps.items()}
    seen = Recording(flat)
    x = qwen_image.pre(c, PLAN, Weights(seen), tokens, Weights(request), step)
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


@pytest.mark.parametrize("name", CASES)
def test_a_block_returns_new_memory(name):
    c, flat, _, _, tokens, inputs = _case(name)
    w = Weights(flat)
    request, steps = qwen_image.hoist(c, PLAN, w, inputs, TIMES[:1])
    step = {key: rows[0] for key, rows in steps.items()}
    shared = step | {key: request[key] for key in qwen_image.SHARED if key in request}
    x = qwen_image.pre(c, PLAN, w, tokens, Weights(request), step)
    held = {t.untyped_storage().data_ptr() for t in (*x, *flat.values(), *request.values(), *steps.values())}
    before = [stream.clone() for stream in x]
    for fn, at in qwen_image.blocks(c):
        y = fn(c, PLAN, w / at, x, Weights(request | step) / at, shared)
        places = {stream.untyped_storage().data_ptr() for stream in y}
        assert len(places) == 2 and not places & held
    assert all(torch.equal(stream, old) for stream, old in zip(x, before, strict=True)), "a block wrote into its input"


@pytest.mark.parametrize("name", CASES)
def test_the_dims_name_the_dimensions_that_run_over_tokens(name):
    c, flat, _, _, tokens, inputs = _case(name)
    request, _ = qwen_image.hoist(c, PLAN, Weights(flat), inputs, TIMES)
    named = {key for key in request if not key.startswith("transformer_blocks.")}
    assert named <= qwen_image.TOKEN_DIMS.keys() | qwen_image.TEXT_DIMS.keys()
    assert set(qwen_image.SHARED) == (qwen_image.TOKEN_DIMS.keys() | qwen_image.TEXT_DIMS.keys()) - {"text"}
    for dims, length in ((qwen_image.TOKEN_DIMS, tokens.shape[1]), (qwen_image.TEXT_DIMS, 7)):
        for key in dims.keys() & request.keys():
            assert request[key].shape[dims[key]] == length


def test_padding_changes_nothing():
    """A short prompt alone, and the same beside a longer one, with its mask."""
    c, flat, _, _, tokens, inputs = _case("padded text")
    w = Weights(flat)
    alone = {"text": inputs["text"][:1, :4], "positions": inputs["positions"]}
    both = predict(qwen_image, c, PLAN, w, tokens, TIMES[:1], inputs)
    close(both[:1], predict(qwen_image, c, PLAN, w, tokens[:1], TIMES[:1], alone), 1e-12)
    request, _ = qwen_image.hoist(c, PLAN, w, alone, TIMES)
    assert "mask" not in request  # without padding no mask exists, and the fast kernels run


def test_one_text_serves_several_pictures():
    c, flat, _, _, tokens, inputs = _case("layers")
    w, one = Weights(flat), inputs | {"text": inputs["text"][:1], "kind": inputs["kind"][:1]}
    both = predict(qwen_image, c, PLAN, w, tokens, TIMES[:1], one)
    for b in range(2):
        close(both[b : b + 1], predict(qwen_image, c, PLAN, w, tokens[b : b + 1], TIMES[:1], one), 1e-12)


def test_bfloat16_is_as_exact_as_the_reference_in_bfloat16():
    """Rounded weights, tokens and timesteps on both sides: the distance to float64 is that of the reference, within a fifth."""
    c, flat, reference, known, tokens, inputs = _case("reference images at timestep 0")
    rounded = {name: tensor.bfloat16() for name, tensor in flat.items()}
    weights = Weights({name: tensor.double() for name, tensor in rounded.items()})
    known = {name: value.bfloat16() if isinstance(value, torch.Tensor) else value for name, value in known.items()}
    known["timestep"] = TIMES.bfloat16() / 1000
    exact = predict(qwen_image, c, PLAN, weights, known["hidden_states"].double(), known["timestep"].double() * 1000, inputs)
    ours = predict(qwen_image, c, PLAN, Weights(rounded), tokens, TIMES.float(), inputs)
    assert ours.dtype == torch.bfloat16
    theirs = reference.bfloat16()(**known).sample
    error, allowed = ((y.double() - exact).square().mean().sqrt() for y in (ours, theirs))
    assert error < 1.2 * allowed < 0.1


def test_float16_residuals_stay_finite():
    c, flat, _, _, tokens, inputs = _case("picture")
    half = {name: tensor.half() for name, tensor in flat.items()}
    request, steps = qwen_image.hoist(c, PLAN, Weights(half), inputs, TIMES[:1])
    step = {key: rows[0] for key, rows in steps.items()}
    x = qwen_image.pre(c, PLAN, Weights(half), tokens, Weights(request), step)
    at = "transformer_blocks.0"
    for name in ("txt_mod", "img_mod"):
        step[f"{at}.{name}"][:, 5] = 60000  # the feed-forward's gate
    for stream in qwen_image.block(c, PLAN, Weights(half) / at, x, Weights(request | step) / at, request):
        assert stream.isfinite().all() and stream.abs().max() == 65504


def test_positions():
    """Worked by hand: rows and columns from the middle, text beyond them all, Layered's last picture at -1."""
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
