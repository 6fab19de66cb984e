"""Given images: what is taken, and what is said of the rest."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import pytest
from PIL import Image, ImageFile

from tinydiff.records import UserError
from tinydiff.serve import unpack
from tinydiff.serve.admission import received
from tinydiff.serve.options import ServeOptions

LIMITS = ServeOptions(max_body=1.0, max_input_pixels=10_000)


def picture(format: str = "PNG", size: tuple[int, int] = (8, 6), **more) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, format, **more)
    return out.getvalue()


def animation(format: str) -> bytes:
    return picture(format, save_all=True, append_images=[Image.new("RGB", (8, 6), "blue")])


def uri(data: bytes, head: str = "data:image/png;base64,") -> str:
    return head + base64.b64encode(data).decode()


def read(source, allow_urls: bool = False, **more) -> bytes:
    data = received(source, "image", allow_urls, LIMITS, **more)
    assert unpack.pixels(data, "image", LIMITS.max_input_pixels).dtype == "uint8"
    return data


def kind(data: bytes) -> str:
    return unpack.media_type(data, "image")


def refused(source, allow_urls: bool = False, **more) -> str:
    with pytest.raises(UserError) as caught:
        read(source, allow_urls, **more)
    assert caught.value.field == "image" and str(caught.value).startswith("image: ")
    return str(caught.value)


# --- bytes and data URIs ---


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_an_image_is_taken_as_it_is(format):
    data = picture(format)
    assert read(data) == data and kind(data) == f"image/{format.lower()}"


@pytest.mark.skipif(
    "AVIF" not in Image.SAVE and not Image.init() and "AVIF" not in Image.SAVE,
    reason="this Pillow writes no AVIF",
)
def test_avif_is_taken():
    data = picture("AVIF")
    assert read(data) == data and kind(data) == "image/avif"


def test_a_phones_jpeg_with_data_behind_it_is_one_image():
    data = picture("MPO", save_all=True, append_images=[Image.new("RGB", (4, 3))])
    assert read(data) == data and kind(data) == "image/jpeg"


@pytest.mark.parametrize(
    "source",
    [
        uri(picture()),
        uri(picture(), "data:text/html;base64,"),
        uri(picture(), "data:;base64,"),
        uri(picture(), "DATA:image/png;charset=x;BASE64,"),
        "  " + uri(picture()).replace("+", "%2B").replace("=", "%3D") + "\n",
        uri(picture()).rstrip("="),
        uri(picture()).replace("+", "-").replace("/", "_").replace("data:image_png", "data:image/png"),
        "data:image/png;base64,\n" + "\n".join(base64.encodebytes(picture()).decode().splitlines()),
    ],
)
def test_a_data_uri_is_its_bytes(source):
    assert read(source) == picture()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("data:image/png;base64,####", "invalid base64"),
        ("data:image/png;base64,é", "invalid base64"),
        ("data:image/png,abc", "is not in base64"),
        ("data:image/png;base64", "is not in base64"),
        ("data:image/png;base64,", "is empty"),
        (b"", "is empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a complete image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not a complete image"),
        (picture()[:-30], "not a complete image"),
        (picture("JPEG", (90, 90))[:-200], "not a complete image"),
        (picture()[:20], "not a complete image"),
        (picture("TIFF"), "not a complete image"),
        (base64.b64encode(picture()).decode(), "put data:image/png;base64, before it"),
        (base64.b64encode(picture("JPEG")).decode(), "put data:image/png;base64, before it"),
        (base64.b64encode(bytes(300)).decode(), "put data:image/png;base64, before it"),
        ("/etc/passwd", "files on the server's disk are not read"),
        ("picture.png", "files on the server's disk are not read"),
        ("~/image.png", "files on the server's disk are not read"),
        ("C:\\image.png", "files on the server's disk are not read"),
        ("file:///etc/passwd", "files on the server's disk are not read"),
        ("FILE:/etc/passwd", "files on the server's disk are not read"),
        ("gopher://93.184.215.14/", "files on the server's disk are not read"),
        ("ftp://93.184.215.14/a.png", "files on the server's disk are not read"),
        ("//93.184.215.14/a.png", "files on the server's disk are not read"),
        ("", "files on the server's disk are not read"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("allow_urls", [False, True])
def test_what_is_no_image_is_said_in_one_sentence(source, said, allow_urls):
    message = refused(source, allow_urls)
    assert said in message and "\n" not in message and len(message) < 250


def test_the_servers_own_image_is_not_read(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(picture())
    assert "files on the server's disk are not read" in refused(str(path), True)


def test_the_bytes_decide_not_the_kind():
    assert kind(read(uri(picture("WEBP"), "data:image/png;base64,"))) == "image/webp"


def test_pixels_are_counted_before_they_are_unpacked(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("was unpacked"))
    bomb = bytearray(picture())
    bomb[16:24] = struct.pack(">II", 9000, 9000)  # the size in a PNG's header, and then the checksum of that
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    assert "has 9000x9000 pixels; at most 10,000 are allowed" in refused(bytes(bomb))


def test_pillows_own_limit_is_a_sentence_too(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert "too many pixels" in refused(picture())


def test_the_most_pixels_are_taken():
    assert read(picture(size=(100, 100)))
    assert "has 101x100 pixels" in refused(picture(size=(101, 100)))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_refused(format):
    assert "is an animation" in refused(animation(format))


@pytest.mark.parametrize(
    "source", [bytes(1_000_001), uri(bytes(1_000_001)), "data:;base64," + "A" * 7_000_000]
)
def test_too_many_bytes(source):
    assert "larger than 1 MB" in refused(source)


# --- addresses ---


def test_urls_are_fetched_only_where_that_is_allowed():
    asked = []

    def get(url, field, most, seconds):
        asked.append((url, field, most))
        return picture()

    assert "--allow-url-inputs" in refused("http://images.example/a.png", False, get=get) and asked == []
    assert read("HTTP://images.example/a.png", True, get=get) == picture()
    assert asked == [("HTTP://images.example/a.png", "image", 1_000_000)]


@pytest.mark.parametrize(
    ("data", "said"), [(b"<html>", "not a complete image"), (animation("GIF"), "is an animation")]
)
def test_what_is_fetched_is_checked_as_any_image(data, said):
    assert said in refused("http://images.example/a.png", True, get=lambda *_: data)


def test_private_addresses_are_not_fetched_for_real():
    assert (
        refused("http://127.0.0.1/a.png", True)
        == "image: 'http://127.0.0.1/a.png' is not on the public internet"
    )
