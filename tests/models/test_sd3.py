"""Stable Diffusion 3: sizes and configs that cannot be."""

from dataclasses import replace

import pytest

from tinydiff.models import sd3
from tinydiff.parity.denoisers import DENOISERS

TINY = DENOISERS["SD3"].config


def test_an_image_larger_than_the_position_table_is_refused():
    with pytest.raises(ValueError, match=r"10 x 3 patches.*9 x 9"):
        sd3.positions(TINY, (1, 20, 6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'.*'rms_norm'"),
        (
            {"caption_projection_dim": 30},
            "caption_projection_dim is 30; it must be the width of the network, 32",
        ),
        (
            {"dual_attention_layers": (0, 3)},
            r"dual_attention_layers is \(0, 3\); the network has layers 0 to 2",
        ),
    ],
)
def test_what_is_not_implemented_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)
