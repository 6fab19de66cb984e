"""Contact sheets have the images where they belong and a caption beneath each."""

import numpy as np
import pytest
from PIL import Image

from training.sheet import contact_sheet, filmstrip


def test_contact_sheet_places_images_and_captions():
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    sheet = np.asarray(
        contact_sheet(
            images, ["one", "two", "a caption that is far too long for one line under one image"], columns=2
        )
    )
    height, width = sheet.shape[0] // 2, sheet.shape[1] // 2
    for i, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        cell = sheet[i // 2 * height : (i // 2 + 1) * height, i % 2 * width : (i % 2 + 1) * width]
        assert tuple(cell[80, 80]) == colour
        assert (cell[170:] < 100).all(axis=-1).any()  # black letters
    assert (sheet[height:, width:] == 255).all()


def test_contact_sheet_wants_a_caption_for_each():
    with pytest.raises(ValueError, match="1 images but 2 captions"):
        contact_sheet([Image.new("RGB", (8, 8))], ["a", "b"], columns=1)


def test_filmstrip_shows_the_first_and_the_last_frame():
    frames = [Image.new("RGB", (10, 10), (i * 10, 0, 0)) for i in range(17)]
    strip = filmstrip(frames)
    assert strip.size == (24, 24)
    assert [strip.getpixel(at) for at in ((5, 5), (20, 5), (5, 20), (20, 20))] == [
        (0, 0, 0),
        (50, 0, 0),
        (110, 0, 0),
        (160, 0, 0),
    ]
