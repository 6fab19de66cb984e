import pytest
import torch

from tests.parity import close, draw
from tinydiff.ops.tiles import tiled
from tinydiff.parallel.strips import WHOLE


def _double(x, strip=WHOLE):
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def _halve(x, strip=WHOLE):
    return x.unflatten(-1, (-1, 2)).mean(-1).unflatten(-2, (-1, 2)).mean(-2)


@pytest.mark.parametrize("size", [(8, 8), (9, 14), (21, 5), (3, 30), (20, 20)])
@pytest.mark.parametrize(("fn", "scale"), [(_double, 2), (lambda x, strip=WHOLE: x + 0, 1)])
def test_a_function_of_single_pixels_is_not_changed_by_tiling(size, fn, scale):
    x = draw(2, 3, *size)
    close(tiled(fn, x, 8, scale), fn(x), 1e-14)


@pytest.mark.parametrize("size", [(16, 12), (40, 30), (10, 38)])
def test_outputs_may_be_smaller(size):
    x = draw(1, 2, *size)
    close(tiled(_halve, x, 16, 0.5), _halve(x), 1e-14)


def test_what_fits_is_done_at_once():
    seen = []
    tiled(lambda x, strip: seen.append(x.shape[-2:]) or x, draw(1, 8, 7), 8, 1)
    tiled(lambda x, strip: seen.append(x.shape[-2:]) or x, draw(1, 30, 70), None, 1)
    assert seen == [(8, 7), (30, 70)]


def test_no_tile_is_larger_than_its_side():
    seen = []
    tiled(lambda x, strip: seen.append(x.shape[-2:]) or x, draw(1, 20, 30), 8, 1)
    assert max(max(shape) for shape in seen) == 8 and len(seen) == 4 * 5  # a tile every 6


def test_neighbours_are_faded_into_each_other_linearly():
    """Tiles of constant value 0, 1: over the overlap of 2 the value rises from the one before to the one
    after.
    """
    values = iter((0.0, 1.0))
    y = tiled(lambda x, strip: torch.full_like(x, next(values)), torch.zeros(1, 1, 12), 8, 1)
    assert y[0, 0].tolist() == [0.0] * 6 + [0.0, 0.5] + [1.0] * 4
