"""A whole model on every layout: the same noise, and the same image, as on one rank."""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import pytest

from tests.parallel.pool import on_ranks
from tinydiff import config
from tinydiff.config import NoProgress
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.ranks import make_ranks
from tinydiff.records import UserError
from tinydiff.runtime import blueprint, pipeline
from tinydiff.runtime.admit import admit
from tinydiff.sampling import noise

pytestmark = pytest.mark.slow

LAYOUTS = {  # the shipped model has 5 heads: tp cannot divide it
    "cfg": Layout(cfg=2),
    "ulysses, rows of the autoencoder": Layout(ulysses=2, vae=True),
    "ring": Layout(ring=2),
    "full sharding, encoders": Layout(ulysses=2, fsdp=True, encoders=True),
    "ulysses on 4": Layout(ulysses=4),
    "ring x ulysses, rows of the autoencoder": Layout(ring=2, ulysses=2, vae=True),
    "cfg x ulysses, encoders": Layout(cfg=2, ulysses=2, encoders=True),
    "cfg x ring, full sharding": Layout(cfg=2, ring=2, fsdp=True),
}
PROMPT = {"prompt": "a large red circle on a white background", "num_inference_steps": 4, "seed": 7}


def made(layout=None, **fields):
    """(hash of the noise, frames) of one request."""
    model = blueprint.load(
        blueprint.read(config.options({}).model), make_ranks(layout, 60) if layout else None
    )
    [request] = admit(model.blueprint, config.options(PROMPT | fields).sampling)
    table, [stage] = (
        pipeline.solver_table(model.blueprint, request),
        pipeline.condition(model, request).stages,
    )
    [start], _ = noise.latents(7, stage.sizes, table)
    return hashlib.sha256(start.numpy().tobytes()).hexdigest(), pipeline.run(
        model, request, NoProgress()
    ).frames[0]


@cache
def alone(**fields):
    return made(**fields)


def clips(layout):
    return made(layout, num_frames=9, image_path=_first_frame())


def _first_frame():
    from tests.sources import ROOT

    return str(next((ROOT / "docs" / "media").glob("*.png")))


def same(frames, expected):
    """Equal pixels but where rounding to 8 bits ties: at most one in a thousand, by one level."""
    apart = np.abs(frames.astype(int) - expected.astype(int))
    assert frames.shape == expected.shape and expected.std() > 10
    assert apart.max() <= 1 and (apart > 0).mean() <= 1e-3


@pytest.mark.parametrize("case", LAYOUTS)
def test_every_rank_ends_with_the_image_of_one(case):
    wanted, frames = alone()
    for drawn, got in on_ranks(LAYOUTS[case].size, made, LAYOUTS[case]):
        assert drawn == wanted
        same(got, frames)


def test_a_video_from_a_first_frame_too():
    wanted, frames = clips(None)
    for drawn, got in on_ranks(4, clips, Layout(ring=2, ulysses=2, vae=True)):
        assert drawn == wanted
        same(got, frames)


def unguided():
    try:
        made(Layout(cfg=2), guidance_scale=1.0)
    except UserError as error:
        return str(error)


def test_branches_on_ranks_of_their_own_need_guidance():
    for said in on_ranks(2, unguided):
        assert (
            said is not None and said.startswith("guidance_scale: 1 runs") and "cfg_parallel_size 1" in said
        )
