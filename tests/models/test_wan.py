"""Wan: what stays in float32, masks and texts, and configs that cannot be."""

from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.parity import draw
from tinydiff.models import wan
from tinydiff.parity.denoisers import DENOISERS

TINY = DENOISERS["Wan, text"].config


def test_the_spec_keeps_in_float32_what_the_reference_keeps():
    c = DENOISERS["Wan, a frame beside the noise and CLIP"].config
    kept = {
        row.name
        for row in wan.spec(c)
        if set(row.name.split(".")) & set(WanTransformer3DModel._keep_in_fp32_modules)
    }
    assert {row.name for row in wan.spec(c) if row.float32} == kept != set()


def test_mask_of_known_frames():
    """Against diffusers' prepare_latents: ones on the given frames, the first repeated four times, four
    frames to a latent one.
    """
    frames, height, width = 4, 2, 3
    for last in (False, True):
        mask = torch.ones(1, 1, 4 * frames - 3, height, width)
        mask[:, :, list(range(1, 4 * frames - 3 - last))] = 0
        mask = (
            torch.cat([mask[:, :, :1].repeat_interleave(4, 2), mask[:, :, 1:]], 2)
            .view(1, -1, 4, height, width)
            .transpose(1, 2)
        )
        assert torch.equal(wan.input_frames_mask((frames, height, width), last=last), mask)


def test_rows_of_padding_become_zero():
    hidden = draw(2, 4, 3)
    masked = wan.text_input(hidden, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]))
    assert (
        torch.equal(masked[1], hidden[1])
        and torch.equal(masked[0, :2], hidden[0, :2])
        and not masked[0, 2:].any()
    )


def test_another_query_norm_is_refused():
    with pytest.raises(ValueError, match=r"'rms_norm'.*'rms_norm_across_heads'"):
        replace(TINY, qk_norm="rms_norm")


@pytest.mark.parametrize(
    "text, clean",
    [
        ("  a \t red\n\n circle ", "a red circle"),
        ("&amp;lt;b&amp;gt; &amp;amp; &quot;x&quot;", '<b> & "x"'),
        ("âœ” fixed mojibake", "✔ fixed mojibake"),
        ("“curly” ﬁne", '"curly" fine'),
        ("", ""),
    ],
)
def test_prompt_clean(text, clean):
    assert wan.prompt_clean(text) == clean


def test_prompt_clean_is_the_reference():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean as reference

    for text in ("&amp;lt;", "âœ” No problems", "a\u00a0b\u3000c", "Größe ½ ﬁ"):
        assert wan.prompt_clean(text) == reference(text)
