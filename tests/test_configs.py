"""The presets in configs/: each is short, parses, and says what the registry says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinydiff import config
from tinydiff.models.registry import MODELS, find

PRESETS = sorted((Path(__file__).parents[1] / "configs").glob("*"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset(path: Path):
    assert len(path.read_text().splitlines()) < 20
    made = config.parse(["--config", str(path)])
    assert len(made.sampling.prompt) == 1 and made.ignored == ()
    row = find(made.model.model_path)
    assert row is not None
    sampling = made.sampling
    assert made.refusals == ()
    if path.stem == "several-gpus":
        assert made.parallel == config.ParallelOptions(num_gpus=2, sp_degree=2, tp_size=1, vae_sp=True)
        return
    assert made.parallel == config.ParallelOptions()
    assert (sampling.height, sampling.width) == (row.height, row.width)
    if row.clip_frames > 1:
        assert (sampling.num_frames, sampling.fps) == (row.num_frames, row.fps)
    assert (sampling.num_inference_steps, sampling.guidance_scale, sampling.flow_shift) == (
        row.steps,
        row.guidance,
        row.flow_shift,
    )
    assert (sampling.guidance_scale_2, sampling.boundary_ratio) == (row.guidance_2, row.boundary_ratio)
    assert sampling.dmd_denoising_steps == row.dmd_timesteps


def test_every_model_has_a_preset():
    named = [config.parse(["--config", str(path)]).model.model_path for path in PRESETS]
    assert {row.name for row in MODELS} == set(named)
