"""LTX-2: positions, and configs that are not implemented."""

from dataclasses import asdict

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel

from tinydiff.models import ltx2
from tinydiff.parity.denoisers import DENOISERS


def test_positions_are_the_middles_of_tokens_in_seconds_and_pixels():
    """The first latent frame holds one frame of the video, the next eight; sound has 25 latents a second."""
    c = ltx2.Config()
    places = ltx2.positions(c, (2, 1, 2), fps=4.0)
    assert places.tolist() == [[0.125, 16, 16], [0.125, 16, 48], [1.25, 16, 16], [1.25, 16, 48]]
    assert ltx2.audio_positions(c, 3)[:, 0].tolist() == pytest.approx([0.005, 0.03, 0.07])


def test_positions_are_the_references():
    module = LTX2VideoTransformer3DModel(**asdict(DENOISERS["LTX-2"].config))
    video = module.rope.prepare_video_coords(1, 3, 2, 5, "cpu", fps=23.976)
    sound = module.audio_rope.prepare_audio_coords(1, 11, "cpu")
    c = ltx2.Config()
    assert torch.equal(ltx2.positions(c, (3, 2, 5), 23.976), video[0].mean(-1).T)
    assert torch.equal(ltx2.audio_positions(c, 11), sound[0].mean(-1).T)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 2}, "patch_size is 2; LTX-2 to LTX-2.5 run with 1"),
        ({"audio_num_attention_heads": 16}, "audio_num_attention_heads is 16; .* run with 32"),
        ({"cross_attn_mod": True}, "cross_attn_mod is True; .* run with False"),
        ({"rope_type": "half"}, "rope_type is 'half'; it must be one of interleaved, split"),
    ],
)
def test_what_is_not_implemented_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ltx2.Config(**changes)
