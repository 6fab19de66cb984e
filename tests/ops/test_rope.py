import math

import torch

from tests.parity import close, draw
from tinydiff.ops.rope import grid_positions, rope_table, rotate_half, rotate_interleaved


def test_positions_run_in_row_major_order():
    assert grid_positions(2, 1, 3).tolist() == [
        [0, 0, 0],
        [0, 0, 1],
        [0, 0, 2],
        [1, 0, 0],
        [1, 0, 1],
        [1, 0, 2],
    ]


def test_a_table_holds_one_angle_per_pair_and_axis():
    positions = torch.tensor([[0, 0], [3, 5]])
    cos, sin = rope_table(positions, (4, 2), theta=100.0)
    angles = torch.tensor(
        [[0, 0, 0], [3, 3 * (1 / 10), 5]], dtype=torch.float64
    )  # 100 ** (0 / 4), 100 ** (2 / 4), 100 ** (0 / 2)
    assert torch.equal(cos, angles.cos()) and torch.equal(sin, angles.sin())


def test_angles_are_computed_in_the_type_asked_for():
    far = torch.tensor([[1023]])
    exact, rough = rope_table(far, (44,))[0], rope_table(far, (44,), dtype=torch.float32)[0]
    assert (exact.dtype, rough.dtype) == (torch.float64, torch.float32)
    assert exact[0, 3] == math.cos(1023 * (1 / 10000 ** (6 / 44)))
    assert 1e-8 < (exact - rough).abs().max() < 1e-3


def test_both_pairings_rotate_and_differ_by_a_permutation_of_channels():
    x, (cos, sin) = draw(2, 5, 3, 8), rope_table(torch.arange(5)[:, None], (8,))
    y = rotate_interleaved(x, cos, sin)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)[None, :, None]
    close(y, torch.view_as_real(turned).flatten(-2), 1e-14)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    close(rotate_half(x[..., order], cos, sin), y[..., order], 1e-14)
    assert torch.equal(y[:, 0], x[:, 0])


def test_products_depend_on_the_distance_alone():
    q, k, (cos, sin) = draw(1, 1, 1, 8), draw(1, 1, 1, 8, seed=1), rope_table(torch.arange(9)[:, None], (8,))
    dots = (rotate_interleaved(q, cos[2:3], sin[2:3]) * rotate_interleaved(k, cos[5:6], sin[5:6])).sum()
    later = (rotate_interleaved(q, cos[5:6], sin[5:6]) * rotate_interleaved(k, cos[8:9], sin[8:9])).sum()
    assert math.isclose(dots, later, rel_tol=1e-12)


def test_half_types_are_rotated_in_the_tables_type():
    x, (cos, sin) = draw(1, 4, 2, 8).bfloat16(), rope_table(torch.arange(4)[:, None], (8,))
    for rotate in (rotate_interleaved, rotate_half):
        assert torch.equal(
            rotate(x, cos.float(), sin.float()), rotate(x.float(), cos.float(), sin.float()).bfloat16()
        )
