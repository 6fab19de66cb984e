"""The small images of a video: their sizes, and which frames they show."""

import io

import numpy
import pytest
from PIL import Image

from tinydiff.serve.outputs import spritesheet, thumbnail


def clip(count, height, width):
    """Frame k is grey of brightness 10 k."""
    return numpy.stack([numpy.full((height, width, 3), 10 * k, numpy.uint8) for k in range(count)])


def picture(data):
    opened = Image.open(io.BytesIO(data))
    assert opened.format == "WEBP"
    return numpy.asarray(opened.convert("RGB"))


@pytest.mark.parametrize(
    ("height", "width", "shown"), [(64, 96, (64, 96)), (720, 1280, (288, 512)), (1024, 512, (512, 256))]
)
def test_a_thumbnail_is_the_first_frame_no_longer_than_512(height, width, shown):
    made = picture(thumbnail(clip(2, height, width) + 50))
    assert made.shape == (*shown, 3)
    assert abs(int(made.mean()) - 50) <= 2


def test_a_sheet_shows_sixteen_frames_from_first_to_last():
    made = picture(spritesheet(clip(21, 32, 48)))
    assert made.shape == (4 * 32, 4 * 48, 3)
    shades = [int(made[32 * row + 16, 48 * column + 24].mean()) for row in range(4) for column in range(4)]
    wanted = [10 * round(20 * k / 15) for k in range(16)]
    assert [abs(a - b) <= 3 for a, b in zip(shades, wanted, strict=True)] == [True] * 16


def test_a_short_video_is_shown_frame_by_frame_and_filled_with_black():
    made = picture(spritesheet(clip(5, 32, 48) + 60))
    assert made.shape == (2 * 32, 3 * 48, 3)
    assert [int(made[48, 48 * column + 24].mean() > 30) for column in range(3)] == [1, 1, 0]


def test_a_large_video_has_small_tiles():
    assert picture(spritesheet(clip(4, 1280, 720))).shape == (2 * 256, 2 * 144, 3)


def test_one_frame_is_a_sheet_of_one():
    assert picture(spritesheet(clip(1, 32, 48))).shape == (32, 48, 3)


def test_a_sliver_keeps_a_pixel():
    assert picture(thumbnail(clip(1, 2, 4096))).shape == (1, 512, 3)
