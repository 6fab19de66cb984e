"""The Wan transformer against diffusers.WanTransformer3DModel in float64, every parameter redrawn."""

from dataclasses import asdict

import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.parity import close, doubles, draw, randomised, shapes, tracked, unread
from tinydiff.models import wan
from tinydiff.models.evaluate import predict
from tinydiff.ops.network import Network
from tinydiff.ops.patch import patchify, unpatchify
from tinydiff.parallel.plan import Plan

PLAN = Plan()
TINY = wan.Config(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_dim=20,
    freq_dim=8,
    ffn_dim=40,
    num_layers=2,
)
SIZE = (3, 6, 10)  # latents: a patch grid of 3 x 3 x 5
TIMES = torch.tensor([999, 37])


def _configs(**changes):
    return wan.Config(**asdict(TINY) | changes)


# The reference tells CLIP's tokens from the text by a text length of 512 written into its code.
CASES = {
    "text": (TINY, 7),
    "thick patches": (_configs(patch_size=(3, 2, 1), in_channels=3, out_channels=5), 7),
    "no cross-attention norm": (_configs(cross_attn_norm=False), 7),
    "image beside latents": (_configs(in_channels=12), 7),
    "image with CLIP": (_configs(in_channels=12, image_dim=24, added_kv_proj_dim=32), 512),
    "first and last image with CLIP": (
        _configs(in_channels=12, image_dim=24, added_kv_proj_dim=32, pos_embed_seq_len=18),
        512,
    ),
    "given first frame": (TINY, 7),
}


def _case(name):
    """Config, weights, the reference, its keyword arguments, and our tokens and inputs."""
    c, length = CASES[name]
    reference = WanTransformer3DModel(**asdict(c))
    flat = randomised(reference, 1)
    x, text = (
        draw(2, 12 if c.in_channels == 12 else c.in_channels, *SIZE, seed=2),
        draw(2, length, c.text_dim, seed=3),
    )
    known = {"hidden_states": x, "timestep": TIMES, "encoder_hidden_states": text}
    inputs = {"text": text, "positions": wan.positions(c, SIZE)}
    tokens = patchify(x[:, : 4 if c.in_channels == 12 else c.in_channels], c.patch_size)
    if c.in_channels == 12:
        inputs["concat"] = patchify(x[:, 4:], c.patch_size)
    if c.image_dim is not None:
        images = 2 if c.pos_embed_seq_len else 1
        inputs["image"] = known["encoder_hidden_states_image"] = draw(2 * images, 9, c.image_dim, seed=4)
    if name == "given first frame":
        given = torch.zeros(1, 1, *SIZE, dtype=torch.bool)
        given[:, :, 0] = True
        frame = draw(2, c.in_channels, *SIZE, seed=5)
        known["hidden_states"] = torch.where(given, frame, x)
        inputs["frozen"] = patchify(given, (1, 2, 2))[..., :1]
        tokens = patchify(known["hidden_states"], c.patch_size)
        known["timestep"] = torch.where(inputs["frozen"][..., 0], 0, TIMES[:, None])
    return c, flat, reference, known, tokens, inputs


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_and_reads_every_weight(name):
    c, flat, reference, known, tokens, inputs = _case(name)
    assert shapes(wan.spec(c)) == shapes(flat)
    with doubles():
        expected = reference(**known).sample
    weights = tracked(flat)
    with torch.enable_grad():
        y = predict(Network(wan.FAMILY, c, dtype=torch.float64), weights, tokens, TIMES, inputs)
    close(unpatchify(y, c.patch_size, SIZE), expected)
    assert unread(y, weights) == []


def test_bfloat16_is_as_exact_as_the_reference_in_bfloat16():
    """Rounded weights, float32 where the spec says so: the distance to float64 is that of the reference,
    within a fifth.
    """
    c, flat, reference, known, tokens, inputs = _case("given first frame")
    types = {row.name: torch.float32 if row.float32 else torch.bfloat16 for row in wan.spec(c)}
    rounded = {name: tensor.to(types[name]) for name, tensor in flat.items()}
    exact = predict(
        Network(wan.FAMILY, c, dtype=torch.float64),
        {name: t.double() for name, t in rounded.items()},
        tokens,
        TIMES,
        inputs,
    )
    ours = predict(Network(wan.FAMILY, c, dtype=torch.bfloat16), rounded, tokens.bfloat16(), TIMES, inputs)
    assert ours.dtype == torch.bfloat16
    for name, parameter in reference.named_parameters():
        parameter.data = rounded[name]
    theirs = reference(
        known["hidden_states"].bfloat16(), known["timestep"], known["encoder_hidden_states"].bfloat16()
    ).sample
    error, allowed = (
        (y.double() - exact).square().mean().sqrt() for y in (ours, patchify(theirs, c.patch_size))
    )
    assert error < 1.2 * allowed < 0.1


def test_the_spec_keeps_in_float32_what_the_reference_keeps():
    c = CASES["first and last image with CLIP"][0]
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
        _configs(qk_norm="rms_norm")


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
