import torch
import torch.nn.functional as F

from tests.parity import close, draw
from tinydiff.ops.embed import timestep_embedding
from tinydiff.ops.linear import linear, linear_sum
from tinydiff.ops.norm import layer_norm, modulate, rms_norm
from tinydiff.ops.weights import Weights, leaves
from tinydiff.parallel.plan import Plan


def test_norms_are_their_formulas():
    x, w = draw(2, 5, 8) + 3, Weights({"weight": draw(8, seed=1), "bias": draw(8, seed=2)})
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-3).sqrt()
    close(layer_norm(x, eps=1e-3), y, 1e-12)
    close(layer_norm(x, w, 1e-3), y * w["weight"] + w["bias"], 1e-12)
    close(
        modulate(x, draw(2, 1, 8, seed=3), draw(2, 1, 8, seed=4), 1e-3),
        y * (1 + draw(2, 1, 8, seed=4)) + draw(2, 1, 8, seed=3),
        1e-12,
    )
    close(rms_norm(x, w, 1e-3), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w["weight"], 1e-12)


def test_half_types_are_normalised_in_float32():
    x = (draw(2, 5, 64) * 40).bfloat16()
    w = Weights({"weight": draw(64, seed=1).bfloat16(), "bias": draw(64, seed=2).bfloat16()})
    full = Weights({name: tensor.float() for name, tensor in w.flat.items()})
    assert torch.equal(layer_norm(x, w), layer_norm(x.float(), full).bfloat16())
    close(rms_norm(x, w), rms_norm(x.float(), full).bfloat16(), 2e-2)
    shift, scale = draw(1, 1, 64, seed=3).float(), draw(1, 1, 64, seed=4).float()
    assert torch.equal(modulate(x, shift, scale), modulate(x.float(), shift, scale).bfloat16())


def test_the_embedding_has_cosines_first():
    t = torch.tensor([0.0, 1.0, 999.0])
    y = timestep_embedding(t, 6, dtype=torch.float64)
    angle = t.double()[:, None] * torch.tensor([1.0, 1e4 ** (-1 / 3), 1e4 ** (-2 / 3)], dtype=torch.float64)
    close(y, torch.cat([angle.cos(), angle.sin()], -1), 1e-12)
    assert (
        timestep_embedding(torch.tensor([[1, 2]]), 6).shape == (1, 2, 6)
        and timestep_embedding(t.long(), 6).dtype == torch.float32
    )


def test_linear_layers_and_views():
    flat = {
        "a.0.weight": draw(4, 3),
        "a.0.bias": draw(4, seed=1),
        "b.weight": draw(4, 3, seed=2),
        "a.01.weight": draw(1),
    }
    w, x = Weights(flat), draw(2, 3, seed=3)
    close(linear(x, w / "a" / 0), F.linear(x, flat["a.0.weight"], flat["a.0.bias"]), 1e-14)
    close(linear_sum(Plan(), x, w / "a" / 0), linear(x, w / "a" / 0), 1e-14)
    close(linear(x, w / "b"), F.linear(x, flat["b.weight"]), 0)
    assert "bias" in w / "a" / 0 and "bias" not in w / "b" and (w / "b").get("bias") is None
    assert (
        leaves(flat, "a.0").keys() == {"weight", "bias"} and leaves(flat, "a.0")["bias"] is flat["a.0.bias"]
    )
