"""The work of decoding a given image is bounded by what can be counted beforehand."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.serve.counting import counting
from tinydiff.records import UserError
from tinydiff.serve import unpack

MOST = 40e6
COMMENT = b"\xff\xfe\x00\x02"


def jpeg(size=(64, 48), **more) -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(out, "JPEG", **more)
    return out.getvalue()


def with_scans(data: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan comes so often that there are `count`."""
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * (count - unpack._segments(data).count(0xDA) + 1) + b"\xff\xd9"


def png(colour, mode) -> bytes:
    out = io.BytesIO()
    Image.new(mode, (8, 6), colour).save(out, "PNG")
    return out.getvalue()


def refused(data: bytes, most: float = MOST) -> str:
    with pytest.raises(UserError) as caught:
        unpack.pixels(data, "image", most)
    assert caught.value.field == "image"
    return str(caught.value)


@pytest.fixture
def unread(monkeypatch):
    """No image is decoded."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("was decoded"))


@pytest.mark.parametrize(
    "more", [{}, {"progressive": True}, {"progressive": True, "quality": 100, "subsampling": 0}]
)
def test_an_ordinary_jpeg_is_read_whatever_its_scans(more):
    data = jpeg((640, 480), **more)
    assert unpack.pixels(data, "image", 640 * 480).shape == (480, 640, 3)
    assert np.array_equal(unpack.pixels(data, "image", MOST), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("count", [65, 100, 400])
def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(unread, count):
    data = with_scans(jpeg(progressive=True), count)
    assert unpack._segments(data).count(0xDA) == count
    assert f"has {count} scans, too many for its size" in refused(data)


def test_scans_of_a_large_jpeg_count_by_its_pixels(unread):
    data = with_scans(jpeg((100, 100), progressive=True), 20)
    assert "has 20 scans" in refused(data, 12_000)


def test_scans_that_are_few_for_the_size_are_read():
    assert unpack.pixels(with_scans(jpeg((100, 100), progressive=True), 20), "image", 12_600).shape == (
        100,
        100,
        3,
    )


def test_a_thumbnail_inside_a_segment_is_no_scan():
    inner = jpeg((16, 16))
    segment = b"\xff\xec" + struct.pack(">H", len(inner) + 2) + inner
    data = jpeg()
    assert unpack._segments(data[:2] + segment * 20 + data[2:]).count(0xDA) == 1


def test_a_jpeg_of_many_segments_is_not_walked(unread):
    whole = jpeg()
    data = whole[:2] + COMMENT * 4_000_000 + whole[2:]
    with counting() as cost:
        assert "not a complete image" in refused(data)
    assert cost.calls < 8 * unpack.MOST_MARKERS and cost.bytes < 2**20


def test_some_hundred_segments_are_read():
    data = jpeg()
    assert unpack.pixels(data[:2] + COMMENT * 800 + data[2:], "image", MOST).shape == (48, 64, 3)


def test_the_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert unpack.pixels(jpeg((64, 48), exif=exif), "image", MOST).shape == (64, 48, 3)


@pytest.mark.parametrize(("alpha", "white"), [(0, 255), (255, None), (100, 155)])
def test_a_mask_of_openais_form_is_white_where_it_is_clear(alpha, white):
    image = unpack.pixels(png(colour=(10, 20, 30, alpha), mode="RGBA"), "mask", MOST, mask=True)
    assert image.shape == (6, 8, 3) and (image == (np.array([10, 20, 30]) if white is None else white)).all()


def test_alpha_is_kept_where_it_is_asked_for():
    data = png(colour=(10, 20, 30, 100), mode="RGBA")
    assert unpack.pixels(data, "image", MOST, with_alpha=True)[0, 0].tolist() == [10, 20, 30, 100]
    assert unpack.pixels(data, "image", MOST).shape == (6, 8, 3)


@pytest.mark.parametrize(
    "begins",
    [b"BM", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"\0\0\0\x1cftypavif", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"],
)
@pytest.mark.parametrize("rest", [b"", b"\0" * 5000, b"\xff" * 5000])
def test_what_only_begins_as_an_image_is_a_sentence(begins, rest):
    assert "is not a complete image" in refused(begins + rest)
