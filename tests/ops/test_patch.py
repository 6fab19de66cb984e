import pytest
import torch
import torch.nn.functional as F

from tests.parity import close, draw
from tinydiff.ops.patch import patchify, unpatchify


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3), (1, 1, 1)])
def test_tokens_and_back(patch):
    x = draw(2, 3, 4, 6, 12)
    tokens = patchify(x, patch)
    assert tokens.shape == (
        2,
        x[0, 0].numel() // (patch[0] * patch[1] * patch[2]),
        3 * patch[0] * patch[1] * patch[2],
    )
    assert torch.equal(unpatchify(tokens, patch, (4, 6, 12)), x)


def test_the_channel_is_outermost_in_a_token_and_the_grid_row_major():
    x = torch.arange(2 * 2 * 4 * 6).view(1, 2, 2, 4, 6)
    token = patchify(x, (1, 2, 2))[0, 1 * 6 + 1 * 3 + 2]  # frame 1, row 1, column 2 of a 2 x 2 x 3 grid
    assert token.tolist() == x[0, :, 1, 2:4, 4:6].flatten().tolist()


def test_a_product_with_tokens_is_the_strided_convolution():
    x, kernel = draw(2, 3, 4, 6, 4), draw(5, 3, 2, 3, 2, seed=1)
    close(
        F.linear(patchify(x, (2, 3, 2)), kernel.flatten(1)),
        F.conv3d(x, kernel, stride=(2, 3, 2)).flatten(2).mT,
        1e-12,
    )


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(Exception, match="divide"):
        patchify(draw(1, 1, 1, 3, 4), (1, 2, 2))
