"""ERNIE-Image: texts of a batch, and configs that cannot be."""

from dataclasses import replace

import pytest
import torch

from tests.models.tiny import tiny
from tests.parity import close
from tinydiff.parity.denoisers import DENOISERS


def test_each_text_of_a_batch_is_as_if_alone():
    both = tiny("ERNIE-Image")
    text, mask, tokens = both.asked.inputs["text"], both.asked.inputs["mask"], both.asked.tokens
    together = both.predict()
    for i, length in enumerate(mask.sum(1).tolist()):
        asked = both.asked._replace(tokens=tokens[i : i + 1])
        alone = both._replace(asked=asked).predict(text=text[i : i + 1, :length], mask=torch.ones(1, length))
        close(together[i : i + 1], alone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 2}, r"patch_size is 2; .*\(1\)"),
        ({"qk_layernorm": False}, "qk_layernorm is false"),
        ({"text_in_dim": 32}, r"text_in_dim is hidden_size \(32\)"),
        ({"rope_axes_dim": (4, 6, 8)}, r"rope_axes_dim is \(4, 6, 8\); .* 16"),
        ({"rope_axes_dim": (5, 5, 6)}, r"rope_axes_dim is \(5, 5, 6\)"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(DENOISERS["ERNIE-Image"].config, **changes)
