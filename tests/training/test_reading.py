"""The reader against images whose content is known: the renderer's own, sharp, blurred and noisy, and wrong
ones.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training.reading import components, judge, read
from training.scenes import KEYS, render, scenes, to_pixels


@pytest.mark.parametrize(("kind", "count"), [("picture", 60), ("pair", 40), ("clip", 24)])
@pytest.mark.parametrize("softened", [False, True])
def test_reads_what_was_drawn(kind, count, softened):
    batch = scenes(21, kind, count)
    wrong = []
    for scene in batch:
        video = render([scene])
        if softened:
            video = soften(video)
        verdict = judge(scene.attributes, to_pixels(video)[0])
        assert set(verdict) == set(scene.attributes)
        if not all(verdict.values()):
            wrong.append((scene.attributes, verdict))
    assert len(wrong) <= count // 100, wrong


def soften(video):
    """A 3 x 3 blur, a slight shift of the colours and noise, as a decoder might add."""
    frames = video[0].transpose(0, 1)
    frames = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, 1)
    frames = 0.95 * frames + 0.03 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    return frames.transpose(0, 1)[None]


@pytest.mark.parametrize("kind", KEYS)
def test_denies_what_was_not_drawn(kind):
    """Each attribute changed on its own is the one that is judged wrong."""
    for scene in scenes(22, kind, 8):
        frames = to_pixels(render([scene]))[0]
        for name, value in scene.attributes.items():
            if name == "relation":
                continue
            verdict = judge({**scene.attributes, name: OTHER[name](value)}, frames)
            assert [key for key, right in verdict.items() if not right] == [name], (scene.attributes, name)


OTHER = {
    **{
        name: lambda value: "red" if value != "red" else "blue"
        for name in ("colour", "colour2", "background")
    },
    **{name: lambda value: "star" if value != "star" else "ring" for name in ("shape", "shape2")},
    "size": lambda value: "small" if value == "large" else "large",
    "place": lambda value: "top" if value != "top" else "left",
    "motion": lambda value: "grow" if value != "grow" else "up",
}


def test_a_pair_the_other_way_round_is_wrong():
    for scene in scenes(23, "pair", 8):
        swapped = replace(scene, start=scene.start2, end=scene.start2, start2=scene.start)
        verdict = judge(scene.attributes, to_pixels(render([swapped]))[0])
        assert not all(verdict.values())
        other = {**scene.attributes, "relation": "above" if scene.relation == "left of" else "left of"}
        assert not judge(other, to_pixels(render([scene]))[0])["relation"]


def test_only_what_is_named_is_judged():
    scene = scenes(24, "picture", 1)[0]
    assert judge({"colour": scene.colour}, to_pixels(render([scene]))[0]) == {"colour": True}


def test_a_missing_or_a_second_shape_is_wrong():
    pair = next(scene for scene in scenes(25, "pair", 50) if scene.colour == "red")
    assert judge({"colour": "red", "background": pair.background}, to_pixels(render([pair]))[0]) == {
        "colour": False,
        "background": True,
    }
    empty = np.full((1, 128, 128, 3), 245, dtype=np.uint8)
    assert judge({"shape": "star", "background": "white"}, empty) == {"shape": False, "background": True}


def test_muddy_colours_and_blobs_have_no_name():
    frame = np.full((128, 128, 3), 128, dtype=np.uint8)
    frame[40:60, 30:100] = 245  # a bar, none of the five shapes
    reading = read(frame)
    assert reading.background is None
    assert [(blob.colour, blob.shape) for blob in reading.blobs] == [("white", None)]


def test_a_shape_that_stays_has_no_motion():
    scene = scenes(26, "clip", 1)[0]
    still = to_pixels(render([replace(scene, end=scene.start)]))[0]
    assert judge({"motion": scene.motion}, still) == {"motion": False}


def test_another_resolution_reads_the_same():
    for scene in scenes(27, "picture", 10):
        doubled = F.interpolate(
            render([scene])[0].transpose(0, 1), scale_factor=2, mode="bilinear"
        ).transpose(0, 1)[None]
        assert all(judge(scene.attributes, to_pixels(doubled)[0]).values())


def test_components():
    mask = np.array(
        [
            [1, 0, 1, 0, 0],
            [1, 0, 1, 0, 1],
            [1, 1, 1, 0, 0],
            [0, 0, 0, 1, 0],
            [0, 0, 0, 0, 0],
            [1, 1, 0, 0, 1],
        ],
        dtype=bool,
    )
    labels, count = components(mask)
    assert count == 4
    assert (labels > 0).tolist() == mask.tolist()
    assert (
        len({labels[0, 0], labels[0, 2], labels[2, 1], labels[3, 3]}) == 1
    )  # a U, and a corner that touches
    assert len({labels[0, 0], labels[1, 4], labels[5, 0], labels[5, 4]}) == 4
