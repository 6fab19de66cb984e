"""The pieces of recipes that families share, against diffusers' and by their own laws."""

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from tests.parity import draw
from tinydiff.models.recipe import reference_tokens, shift_by_tokens


@pytest.mark.parametrize("tokens", [16, 256, 2176, 4096, 8160])
def test_the_shift_by_tokens_is_the_pipelines(tokens):
    assert shift_by_tokens(tokens, {}) == calculate_shift(tokens)
    said = {
        "base_image_seq_len": 128,
        "max_image_seq_len": 8192,
        "base_shift": 0.4,
        "max_shift": 0.9,
        "shift": 3.0,
    }
    assert (
        shift_by_tokens(tokens, said)
        == calculate_shift(tokens, 128, 8192, 0.4, 0.9)
        != calculate_shift(tokens)
    )


def test_references_stand_clean_behind_the_image():
    first, second = draw(1, 3, 4), draw(1, 2, 4, seed=1)
    given_tokens = reference_tokens(6, [first, second])
    assert (
        given_tokens is not None
        and given_tokens.tokens.shape == (1, 11, 4)
        and torch.equal(given_tokens.tokens[:, 6:], torch.cat([first, second], 1))
    )
    assert (
        given_tokens.denoised.shape == (1, 11, 1)
        and given_tokens.denoised[0, :, 0].tolist() == [True] * 6 + [False] * 5
    )
    assert reference_tokens(6, []) is None
