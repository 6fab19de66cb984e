from dataclasses import replace

import pytest
import torch

from tests.parity import close, draw
from tinydiff.ops.attention import BACKENDS, attend_with_log, attention
from tinydiff.parallel.plan import Group, Plan

ON_CPU = ("sdpa", "flash", "math")
PLAN = Plan(attention="math")


def _inputs(dtype=torch.float64, kv=11):
    return (
        draw(2, 7, 3, 8).to(dtype),
        draw(2, kv, 3, 8, seed=1).to(dtype),
        draw(2, kv, 3, 8, seed=2).to(dtype),
    )


def test_it_is_the_formula():
    q, k, v = _inputs()
    mask = draw(2, 1, 7, 11, seed=3)
    weights = torch.softmax(torch.einsum("blhd,bmhd->bhlm", q, k) * 0.3 + mask, -1)
    close(attention(PLAN, q, k, v, mask, 0.3), torch.einsum("bhlm,bmhd->blhd", weights, v), 1e-13)
    plain = torch.softmax(torch.einsum("blhd,bmhd->bhlm", q, k) / 8**0.5, -1)
    close(attention(PLAN, q, k, v), torch.einsum("bhlm,bmhd->blhd", plain, v), 1e-13)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_every_backend_of_the_cpu_equals_math(name, dtype, tolerance):
    q, k, v = _inputs(dtype)
    close(attention(replace(PLAN, attention=name), q, k, v), attention(PLAN, q, k, v), tolerance)


@pytest.mark.parametrize("name", ON_CPU)
def test_a_mask_and_a_scale_reach_every_backend(name):
    q, k, v = _inputs()
    mask = draw(2, 3, 7, 11, seed=3)
    close(
        attention(replace(PLAN, attention=name), q, k, v, mask, 1.0),
        attention(PLAN, q, k, v, mask, 1.0),
        1e-13,
    )


@pytest.mark.parametrize("name", sorted(set(BACKENDS) - set(ON_CPU)))
def test_a_backend_that_the_cpu_lacks_raises(name):
    with pytest.raises(RuntimeError, match=r"No (viable backend|available kernel)"):
        attention(replace(PLAN, attention=name), *_inputs(torch.float32))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_parts_of_the_keys_merge_by_their_logarithms(masked, dtype):
    q, k, v = _inputs(dtype)
    mask = draw(2, 1, 1, 11, seed=3) > -0.5 if masked else None
    parts = [slice(0, 4), slice(4, 5), slice(5, 11)]
    made = [
        attend_with_log(q, k[:, at], v[:, at], None if mask is None else mask[..., at], 0.3) for at in parts
    ]
    log = torch.stack([each for _, each in made]).logsumexp(0)
    merged = sum(y * (each - log).exp() for y, each in made)
    close(merged, attention(PLAN, q, k, v, mask, 0.3), 1e-12 if dtype == torch.float64 else 1e-5)
    assert (log.abs() > 1e-3).any() and log.dtype == dtype


def test_a_sequence_on_several_ranks_needs_to_know_its_padding():
    plan = replace(PLAN, groups=(("ulysses", Group("", 2, 0)),))
    with pytest.raises(ValueError, match="needs one index tensor of keys per rank of the ring, and has 0"):
        attention(plan, *_inputs())
