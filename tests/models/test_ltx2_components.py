"""LTX-2's connectors, autoencoders and vocoders against diffusers in float64, every parameter redrawn."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLLTX2Video

from tests.parity import close, doubles, draw, randomised, tracked, unread
from tinydiff.models import vocoder
from tinydiff.models.autoencoders import ltx2_audio, ltx2_video
from tinydiff.models.encoders import ltx2_connectors
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan
from tinydiff.parity import ltx2_components
from tinydiff.parity.reference import BOUND, built, prepared, stages


@pytest.mark.parametrize("name", ltx2_components.COMPONENTS)
def test_equals_the_reference(name):
    found = stages(ltx2_components.COMPONENTS[name][1]())
    assert len(found) > 1
    assert [stage for stage in found if not stage.error <= BOUND] == []


@pytest.mark.parametrize("name", ltx2_components.COMPONENTS)
def test_reads_every_weight(name):
    case = ltx2_components.COMPONENTS[name][1]()
    weights = tracked(prepared(case)[1])
    with torch.enable_grad():
        made = [values.flatten() for _, values in case.ours(Weights(weights, dtype=torch.float64))]
        left = unread(torch.cat(made), weights)
    assert left == []


def test_tiles_equal_the_references_tiles():
    c = ltx2_components._VIDEO
    net = built(AutoencoderKLLTX2Video, c)
    flat = randomised(net, 1)
    z = draw(1, c.z_dim, 2, 3, 5)
    mean, std = (flat[name].view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    w = Weights(flat, dtype=torch.float64)
    # A tile of 128 pixels is four latents, of which three are new.
    net.enable_tiling(128, 128, tile_sample_stride_height=96, tile_sample_stride_width=96)
    with torch.no_grad(), doubles():
        expected = net.decode(z * std + mean).sample.clamp(-1, 1)
    close(ltx2_video.decode(c, w, z, tile=128), expected)
    assert not torch.equal(ltx2_video.decode(c, w, z), expected)


def test_a_prompt_needs_a_multiple_of_the_registers():
    c = ltx2_components._CONNECTORS
    states, mask = draw(1, 6, c.caption_channels, c.text_proj_in_factor), torch.ones(1, 6)
    flat = {row.name: torch.zeros(row.shape, dtype=torch.float64) for row in ltx2_connectors.spec(c)}
    with pytest.raises(
        ValueError, match=r"the prompt has 6 tokens; their number must be a multiple of .*, 4"
    ):
        ltx2_connectors.encode(c, Plan(), Weights(flat, dtype=torch.float64), states, mask)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (ltx2_components._VIDEO, {"timestep_conditioning": True}, "timestep_conditioning is True; LTX-2"),
        (ltx2_components._VIDEO, {"downsample_type": ("conv",) * 4}, "downsample_type has 'conv'; known are"),
        (
            ltx2_components._VIDEO,
            {"upsample_factor": (2, 2)},
            "upsample_factor has 2 entries; it must have 3",
        ),
        (ltx2_components._AUDIO, {"causality_axis": "width"}, "causality_axis is 'width'; LTX-2"),
        (
            ltx2_components._AUDIO,
            {"base_channels": 32},
            "base_channels is 32; the statistics of latents need 16",
        ),
        (ltx2_components._CONNECTORS23, {"video_hidden_dim": 8}, "video_hidden_dim is 8; .* is 32 wide"),
        (ltx2_components._VOCODER.generator, {"act_fn": "snake"}, "act_fn is 'snake' with antialias False"),
    ],
)
def test_what_is_not_implemented_is_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_a_vocoder_reads_either_class():
    entries = {"hidden_channels": 64, "output_sampling_rate": 24000}
    plain = vocoder.read(entries, "LTX2Vocoder")
    assert (plain.generator.hidden_channels, plain.extension, plain.sampling_rate) == (64, None, 24000)
    wide = vocoder.read({"bwe_hidden_channels": 32}, vocoder.BWE)
    assert wide.extension is not None and wide.extension.hidden_channels == 32
    assert (wide.generator.hidden_channels, wide.sampling_rate) == (1536, 48000)
    with pytest.raises(ValueError, match="a LTX2Vocoder has no field bwe_hidden_channels"):
        vocoder.read({"bwe_hidden_channels": 32}, "LTX2Vocoder")
    with pytest.raises(ValueError, match="has no field hidden"):
        vocoder.read({"hidden": 3}, vocoder.BWE)


def test_a_waveform_is_as_long_as_its_windows():
    """LTX-2: 160 samples a window at 16 kHz, then 24 or 48 kHz."""
    c = vocoder.read({}, vocoder.BWE)
    assert vocoder.samples(c, 100) == 48000
    assert vocoder.samples(vocoder.Config(), 100) == 24000
    assert ltx2_audio.Config().latents_per_second == 25
