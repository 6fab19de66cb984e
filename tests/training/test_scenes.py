"""The data set draws what it says, holds out what it says, and its captions say what is drawn."""

from dataclasses import replace
from random import Random

import pytest
import torch

from training import captions
from training.captions import caption, describe, full_caption, prompt
from training.scenes import (
    CANVAS,
    COLOURS,
    FRAMES,
    KEYS,
    MOTIONS,
    PALETTE,
    PLACES,
    SHAPES,
    SIZES,
    coverage,
    render,
    scenes,
    to_pixels,
)

VALUES = {
    "colour": COLOURS, "colour2": COLOURS, "background": COLOURS, "shape": SHAPES, "shape2": SHAPES,
    "size": SIZES, "place": tuple(PLACES), "motion": MOTIONS, "relation": ("left of", "above"),
}  # fmt: skip


def combination(scene):
    return tuple(getattr(scene, name) for name in KEYS[scene.kind])


@pytest.mark.parametrize("kind", KEYS)
def test_same_seed_same_scenes(kind):
    assert scenes(3, kind, 20) == scenes(3, kind, 20) != scenes(4, kind, 20)


@pytest.mark.parametrize("kind", KEYS)
def test_held_out_combinations_are_never_trained_on(kind):
    trained = {combination(scene) for scene in scenes(0, kind, 20_000)}
    kept = {combination(scene) for scene in scenes(0, kind, 4000, held_out=True)}
    assert not trained & kept
    everything = trained | kept
    assert 0.06 < len(kept) / len(everything) < 0.14
    for which, name in enumerate(KEYS[kind]):  # each word on its own is trained, and tested
        assert {words[which] for words in trained} == {words[which] for words in kept} == set(VALUES[name])


def test_the_rule_never_changes():
    """A model card says what was held out: these few pin the rule down."""
    kept = sorted({combination(scene) for scene in scenes(0, "clip", 2000, held_out=True)})
    assert kept[:4] == [
        ("black", "square", "down"),
        ("black", "triangle", "down"),
        ("black", "triangle", "grow"),
        ("blue", "circle", "shrink"),
    ]


@pytest.mark.parametrize("kind", KEYS)
def test_every_value_occurs(kind):
    batch = scenes(1, kind, 2000)
    for name in {name for scene in batch for name in scene.attributes}:
        assert {scene.attributes[name] for scene in batch if name in scene.attributes} == set(VALUES[name])
    assert all(scene.background not in (scene.colour, scene.colour2) for scene in batch)


def centres(scene):
    """Where a scene's shapes are; a moving one at the middle of its path."""
    (x, y, _), (last_x, last_y, _) = scene.start, scene.end
    return [((x + last_x) / 2, (y + last_y) / 2), *([scene.start2[:2]] if scene.start2 else [])]


@pytest.mark.parametrize("kind", KEYS)
def test_shapes_lie_on_corners_of_tokens(kind):
    batch = scenes(9, kind, 1500)
    assert {at for scene in batch for each in centres(scene) for at in each} == {32.0, 64.0, 96.0}
    for scene in batch:
        assert scene.place is None or centres(scene) == [PLACES[scene.place]]
    somewhere = {
        centres(scene)[0] for scene in batch if scene.place is None and scene.motion in ("grow", "shrink")
    }
    assert len(somewhere) == (9 if kind == "clip" else 0), "what is not named is anywhere on the grid"


def test_a_size_is_one_radius():
    found = {(scene.size, scene.start[2]) for kind in ("picture", "clip") for scene in scenes(10, kind, 500)}
    assert found == {("small", 20.0), ("large", 30.0)}
    assert {scene.end[2] for scene in scenes(10, "clip", 500) if scene.motion == "grow"} == {30.0}
    assert {radius for scene in scenes(10, "pair", 100) for radius in (scene.start[2], scene.start2[2])} == {
        20.0
    }


def test_a_moving_shape_goes_two_pixels_a_frame():
    steps = {
        "left": (-32, 0),
        "right": (32, 0),
        "up": (0, -32),
        "down": (0, 32),
        "grow": (0, 0),
        "shrink": (0, 0),
    }
    assert (FRAMES - 1) * 2 == 32
    for scene in scenes(11, "clip", 500):
        assert (scene.end[0] - scene.start[0], scene.end[1] - scene.start[1]) == steps[scene.motion]


@pytest.mark.parametrize(("kind", "frames"), [("picture", 1), ("pair", 1), ("clip", FRAMES)])
def test_render_shape_range_and_margin(kind, frames):
    batch = scenes(2, kind, 24)
    video = render(batch)
    assert video.shape == (24, 3, frames, CANVAS, CANVAS)
    assert video.dtype == torch.float32
    assert video.min() >= -1
    assert video.max() <= 1
    pixels = to_pixels(video)
    for scene, shown in zip(batch, pixels, strict=True):
        border = torch.cat([shown[:, 0], shown[:, -1], shown[:, :, 0], shown[:, :, -1]]).reshape(-1, 3)
        assert (border == torch.tensor(PALETTE[scene.background], dtype=torch.uint8)).all(), (
            scene
        )  # inside the canvas in every frame
        x, y, _ = scene.start
        if scene.shape != "ring":
            assert tuple(shown[0, int(y), int(x)].tolist()) == PALETTE[scene.colour]


def test_one_scene_draws_the_same_in_any_batch():
    batch = scenes(5, "pair", 6) + scenes(5, "picture", 6)
    together = render(batch)
    for i, scene in enumerate(batch):
        torch.testing.assert_close(render([scene]), together[i : i + 1], rtol=0, atol=1e-6)


def test_render_refuses_a_mixed_batch():
    with pytest.raises(ValueError, match="all images or all videos"):
        render(scenes(0, "picture", 1) + scenes(0, "clip", 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_soft_over_about_a_pixel(shape):
    """The covered area equals the shape's own area: the edges are neither hard nor blurred."""
    x, y, r = (torch.tensor(value, dtype=torch.float64) for value in (64.3, 63.6, 28.0))
    cover = coverage(shape, x, y, r)
    fine = coverage(shape, x * 4, y * 4, r * 4, side=4 * CANVAS)
    assert abs(cover.sum() - fine.sum() / 16) / cover.sum() < 0.01
    assert ((cover > 0) & (cover < 1)).sum() < 0.25 * (cover == 1).sum() + 200


WORDINGS = {
    "shape": captions.SHAPE_WORDS, "size": captions.SIZE_WORDS, "place": captions.PLACE_WORDS,
    "motion": captions.MOTION_WORDS, "relation": captions.RELATION_WORDS,
}  # fmt: skip


def says(text, name, value):
    if name in ("colour", "colour2", "background"):
        return value in text.split()
    if name == "place":
        return any(word in text for word in WORDINGS["place"][value] + captions.BRIEF_PLACE_WORDS[value])
    return any(word in text for word in WORDINGS[name.rstrip("2")][value])


@pytest.mark.parametrize("kind", KEYS)
def test_captions_name_what_they_claim_and_it_is_true(kind):
    rng = Random(0)
    for scene in scenes(7, kind, 1000):
        text, named = describe(scene, rng)
        bare = text.replace(",", "").replace(".", "")
        assert named.items() <= scene.attributes.items()
        assert all(says(bare, name, value) for name, value in named.items()), (text, named)
        colours = {value for name, value in named.items() if name in ("colour", "colour2", "background")}
        assert {word for word in bare.split() if word in COLOURS} == colours  # nothing else is named
        if kind == "picture" and "place" not in named:
            assert not any(
                word in bare.split()
                for word in ("left", "right", "top", "bottom", "middle", "centre", "center", "centered")
            )
        if "size" not in named:
            assert not any(word in bare.split() for words in captions.SIZE_WORDS.values() for word in words)


@pytest.mark.parametrize("kind", KEYS)
def test_captions_vary_and_leave_out(kind):
    rng = Random(0)
    batch = scenes(8, kind, 500)
    texts = [caption(scene, rng) for scene in batch]
    assert len(set(texts)) > 400
    named = [describe(scene, rng)[1] for scene in batch]
    for name in ("background", "size", "place", "colour"):
        has = [words for words, scene in zip(named, batch, strict=True) if name in scene.attributes]
        if has:
            assert 0 < sum(name in words for words in has) < len(has)
    for scene in batch:
        assert set(KEYS[kind]) <= set(prompt(scene, rng)[1])


def test_full_caption():
    clip = scenes(0, "clip", 1)[0]
    scene = replace(
        clip, colour="orange", shape="star", size="large", place="top", background="black", motion="left"
    )
    assert full_caption(scene) == "a large orange star at the top on a black background moving left"
    pair = replace(
        scenes(0, "pair", 1)[0], colour="red", shape="circle", relation="above", background="white"
    )
    pair = replace(pair, colour2="orange", shape2="ring")
    assert full_caption(pair) == "a red circle above an orange ring on a white background"
