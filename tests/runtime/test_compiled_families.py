"""Every image family's own blocks in the compiled loop: equal to eager, one graph for all that a request may
vary.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import pytest
import torch

from tests.parity import draw
from tests.runtime import s2v
from tinydiff.models import (
    ernie,
    flux,
    flux2,
    hunyuan_video,
    hunyuan_video15,
    ltx2,
    ovis,
    qwen_image,
    sd3,
    wan_s2v,
    wan_s2v_recipe,
    z_image,
)
from tinydiff.models.family import Denoiser
from tinydiff.ops.network import Network
from tinydiff.sampling import guidance, loop, solvers
from tinydiff.sampling.compile import compiled_denoise, graph_breaks, graph_count

SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
_STACK = {
    "num_layers": 1,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "in_channels": 16,
    "joint_attention_dim": 20,
}
_SINGLE = {"num_single_layers": 1, "axes_dims_rope": (4, 4, 4)}
# family, config, values of a token, width of the text
FAMILIES: dict[str, tuple[Denoiser, Any, int, int]] = {
    "flux": (flux.FAMILY, flux.Config(**_STACK | _SINGLE, pooled_projection_dim=8, guidance_embeds=True), 16,
    20),
    "ovis": (ovis.FAMILY, ovis.Config(**_STACK | _SINGLE, out_channels=16), 16, 20),
    "flux2": (flux2.FAMILY, flux2.Config(**_STACK | _SINGLE | {"axes_dims_rope": (2, 4, 4, 2)},
    guidance_embeds=False), 16, 20),
    "qwen_image": (qwen_image.FAMILY, qwen_image.Config(**_STACK, out_channels=4, axes_dims_rope=(4, 4, 4)),
    16, 20),
    "sd3": (sd3.FAMILY, sd3.Config(**_STACK | {"in_channels": 4, "num_layers": 2}, out_channels=4,
    caption_projection_dim=24, pooled_projection_dim=8,
                            pos_embed_max_size=12, qk_norm="rms_norm", dual_attention_layers=(0,)), 16, 20),
    "z_image": (z_image.FAMILY, z_image.Config(dim=24, n_layers=1, n_refiner_layers=1, n_heads=2,
    n_kv_heads=2, cap_feat_dim=20,
                                               in_channels=4, axes_dims=(4, 4, 4)), 16, 20),
    "ernie": (ernie.FAMILY, ernie.Config(hidden_size=24, num_attention_heads=2, num_layers=1,
    ffn_hidden_size=40, in_channels=16,
                                  out_channels=16, text_in_dim=20, rope_axes_dim=(4, 4, 4)), 16, 20),
    "hunyuan_video": (hunyuan_video.FAMILY, hunyuan_video.Config(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_single_layers=1, text_embed_dim=20, pooled_projection_dim=8, rope_axes_dim=(4, 4, 4)), 16, 20),
    "hunyuan_video15": (hunyuan_video15.FAMILY, hunyuan_video15.Config(
        in_channels=33, out_channels=16, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        text_embed_dim=20, text_embed_2_dim=8, image_embed_dim=6, rope_axes_dim=(4, 4, 4), use_meanflow=True),
        16, 20),
}  # fmt: skip

DISTILLED = ("flux2", "hunyuan_video")
"""Families that are asked without guidance, as their released models are: two branches are twice the tracing,
and those of the other families show them.
"""


def weights(family: Denoiser, config: Any) -> dict[str, torch.Tensor]:
    """Random weights by the spec's rows: near 1 for norms, small for all else."""
    flat = {}
    for seed, row in enumerate(family.spec(config)):
        noise = draw(*row.shape, seed=seed).float()
        one = len(row.shape) == 1 and row.name.endswith("weight")
        flat[row.name] = 1 + 0.2 * noise if one else noise / max(1, prod(row.shape[1:])) ** 0.5
    return flat


def inputs(name: str, config: Any, height: int, width: int, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the family's hoist takes for an image of height x width tokens."""
    latents = (1, 2 * height, 2 * width)
    given = {"text": text}
    if name == "qwen_image":
        return given | {"positions": qwen_image.positions(config, [latents[1:]])}
    if name in ("flux", "sd3", "hunyuan_video"):
        given["pooled"] = text.mean(1)[:, :8]
    if name in ("flux", "hunyuan_video"):
        given["guidance"] = torch.tensor([3.5])
    if name in ("flux", "ovis"):
        return given | {"positions": {"flux": flux, "ovis": ovis}[name].positions(latents)}
    if name == "hunyuan_video":
        return given | {"positions": hunyuan_video.positions(config, latents)}
    if name == "hunyuan_video15":
        given |= {"glyphs": text[:, :2, :8], "image": draw(1, 5, 6).float()}
        given["concat"] = draw(1, height * width, 17).float()
        return given | {"positions": hunyuan_video15.positions(config, (1, height, width))}
    if name in ("flux2", "ernie"):
        return given | {"positions": {"flux2": flux2, "ernie": ernie}[name].positions((1, height, width))}
    if name == "z_image":
        return given | {
            "positions": z_image.positions(config, latents),
            "real": z_image.real(config, latents),
        }
    return given | {"positions": sd3.positions(config, latents)}


def run(
    name: str,
    denoise: loop.Denoise,
    size: tuple[int, int],
    lengths: Sequence[int],
    steps: int,
    scale: float,
) -> torch.Tensor:
    """The last tokens of a request with a prompt of each length: with two it is guided."""
    family, config, packed, text_width = FAMILIES[name]
    height, width = size
    rows = solvers.with_guidance(solvers.from_scheduler_config(SCHEDULER, steps), scale)
    texts = [draw(1, length, text_width, seed=length + i).float() for i, length in enumerate(lengths)]
    branches = [inputs(name, config, height, width, text) for text in texts]
    network = loop.hoist(Network(family, config), weights(family, config), branches, rows)
    tokens = height * width + (z_image.pad_tokens(height * width) if name == "z_image" else 0)
    return list(loop.run(denoise, rows, draw(1, tokens, packed, seed=steps).float(), lambda _: network))[-1].x


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert want.isfinite().all() and want.std() > 0.1
    assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max().item())


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(
    "name", ["flux", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "flux")]
)
def test_one_graph_serves_sizes_prompt_lengths_steps_and_scales(name: str):
    """Counted on the graphs that Dynamo traces and guards, over more requests than Inductor is
    given below.
    """
    family, config, *_ = FAMILIES[name]
    branches = 1 if name in DISTILLED else 2
    kind = guidance.none if name in DISTILLED else guidance.classifier_free
    eager, fast = (make(Network(family, config), kind) for make in (loop.eager_denoise, compiled_denoise))
    before, broken = graph_count(), graph_breaks()
    # In the first request all lengths are equal, in the second both prompts are of one length, then all
    # differ.
    for size, lengths, steps, scale in (
        ((2, 2), (4, 4), 4, 3.0),
        ((3, 5), (7, 7), 3, 1.5),
        ((6, 4), (33, 3), 5, 4.0),
    ):
        got, want = (run(name, denoise, size, lengths[:branches], steps, scale) for denoise in (fast, eager))
        same(got, want)
        assert (graph_count(), graph_breaks()) == (before + 1, broken)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_inductor_makes_the_same():
    """FLUX.1 has blocks of two streams and of one. The shipped model has cross-attention and guidance."""
    name = "flux"
    family, config, *_ = FAMILIES[name]
    eager, fast = (
        make(Network(family, config), guidance.none) for make in (loop.eager_denoise, compiled_denoise)
    )
    before, broken = graph_count(), graph_breaks()
    for request in (((2, 2), (4,), 4, 3.0), ((6, 4), (33,), 5, 4.0)):
        same(run(name, fast, *request), run(name, eager, *request))
    assert (graph_count(), graph_breaks()) == (before + 1, broken)


LTX2 = ltx2.Config(
    num_layers=1, num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
    audio_in_channels=16, audio_out_channels=16, audio_num_attention_heads=2, audio_attention_head_dim=6,
    cross_attention_dim=24, audio_cross_attention_dim=12, caption_channels=20,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_one_graph_serves_videos_with_sound_of_all_lengths():
    """LTX-2's prompts have one length: registers fill them up."""
    family, prompts = ltx2.FAMILY, [draw(1, 7, 20, seed=i).float() for i in range(2)]
    eager, fast = (
        make(Network(family, LTX2), guidance.classifier_free)
        for make in (loop.eager_denoise, compiled_denoise)
    )
    before, broken = graph_count(), graph_breaks()
    for size, sound, steps, scale in (((1, 2, 2), 4, 4, 3.0), ((2, 3, 5), 7, 3, 1.5), ((3, 6, 4), 9, 5, 4.0)):
        rows = solvers.with_guidance(solvers.from_scheduler_config(SCHEDULER, steps), scale)
        places = {
            "positions": ltx2.positions(LTX2, size, 24.0),
            "audio_positions": ltx2.audio_positions(LTX2, sound),
        }
        branches = [{"text": text, "audio_text": text, **places} for text in prompts]
        network = loop.hoist(Network(family, LTX2), weights(family, LTX2), branches, rows)
        noise = draw(1, prod(size) + sound, 16, seed=steps).float()
        runs = [loop.run(denoise, rows, noise, lambda _, made=network: made) for denoise in (fast, eager)]
        same(*(list(run)[-1].x for run in runs))
        assert (graph_count(), graph_breaks()) == (before + 1, broken)


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_one_graph_serves_all_segments_of_a_video_and_all_its_sizes():
    """Of speech to video: only later segments have past frames. Another length of segments compiles again."""
    family, c = wan_s2v.FAMILY, s2v.CONFIG
    eager, fast = (
        make(Network(family, c), guidance.classifier_free) for make in (loop.eager_denoise, compiled_denoise)
    )
    before, broken = graph_count(), graph_breaks()
    for size, past, steps, scale in (((2, 4, 4), 0, 4, 3.0), ((2, 6, 8), 3, 3, 1.5), ((2, 8, 6), 2, 5, 4.0)):
        rows = solvers.with_guidance(solvers.from_scheduler_config(SCHEDULER, steps), scale)
        places = wan_s2v_recipe.layout(c, size, past > 0)
        shared = places | {"reference": draw(1, size[1] * size[2] // 4, 4 * c.in_dim, seed=1).float()}
        if past:
            shared["motion"] = draw(1, c.in_dim, past, *size[1:], seed=2).float()
        sound = draw(1, c.audio_states, c.audio_dim, c.motion_frames + 4 * size[0], seed=3).float()
        branches = [
            shared | {"text": draw(1, 9, c.text_dim, seed=seed).float(), "audio": sound * (1 - seed)}
            for seed in range(2)
        ]
        network = loop.hoist(Network(family, c), weights(family, c), branches, rows)
        noise = draw(1, len(places["positions"]), 4 * c.in_dim, seed=steps).float()
        runs = [loop.run(denoise, rows, noise, lambda _, made=network: made) for denoise in (fast, eager)]
        same(*(list(run)[-1].x for run in runs))
        assert (graph_count(), graph_breaks()) == (before + 1, broken)
