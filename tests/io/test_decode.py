"""Every mode, depth and colour space of a given image comes out as the sRGB that it means."""

from __future__ import annotations

import io
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.io import profiles
from tinydiff.io.images import encode_image, read_image
from tinydiff.records import UserError


@pytest.fixture
def read(tmp_path):
    """A function: a file's bytes, or a Pillow image and how it is saved -> its pixels."""

    def reader(image: bytes | Image.Image, form: str = "PNG", with_alpha: bool = False, **options) -> list:
        if isinstance(image, bytes):
            (tmp_path / "a").write_bytes(image)
        else:
            image.save(tmp_path / "a", form, **options)
        return read_image(tmp_path / "a", with_alpha=with_alpha).tolist()

    return reader


def png(depth: int, kind: int, rows: list[bytes], **chunks: bytes) -> bytes:
    """A PNG from its packed rows; kind: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA. chunks: before
    the pixels.
    """
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    head = struct.pack(">IIBBBBB", 8 * len(rows[0]) // (depth * channels), len(rows), depth, kind, 0, 0, 0)
    parts = [
        ("IHDR", head),
        *chunks.items(),
        ("IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))),
        ("IEND", b""),
    ]
    body = [
        struct.pack(">I", len(data))
        + name.encode()
        + data
        + struct.pack(">I", zlib.crc32(name.encode() + data))
        for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def grey(*levels: int) -> list:
    return [[[level] * 3 for level in levels]]


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


# -- depth


def test_float_tiff_from_0_to_1(read):
    levels = np.array([[0, 0.2, 0.5, 1]], dtype=np.float32)
    assert read(Image.fromarray(levels), "TIFF") == grey(0, 51, 128, 255)
    assert read(Image.fromarray(levels), "TIFF", with_alpha=True)[0][1] == [51, 51, 51, 255]


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ([0.0, 255.0], "from 0 to 255"),
        ([-0.5, 1.0], "from -0.5 to 1"),
        ([0.5, float("nan")], "nan"),
        ([0.5, float("inf")], "to inf"),
    ],
)
def test_float_beyond_0_to_1_is_refused(read, levels, words):
    with pytest.raises(
        UserError, match=rf"has values .*{words}.*floating-point image goes from 0 \(black\) to 1 \(white\)"
    ) as caught:
        read(Image.fromarray(np.array([levels], dtype=np.float32)), "TIFF")
    assert caught.value.field == "image_path" and "\n" not in str(caught.value)


@pytest.mark.parametrize("top", [1, 255, 65535, 2**31 - 1])
def test_integers_without_an_agreed_white_are_refused(read, top):
    with pytest.raises(UserError, match=r"signed or 32-bit integers.*use 8 or 16 bits"):
        read(Image.fromarray(np.array([[0, top]], dtype=np.int32)), "TIFF")


def test_grey_of_16_bits(read, tmp_path):
    levels = np.array([[0, 100 * 257, 65535]], dtype=np.uint16)
    deep = Image.fromarray(levels)
    assert read(deep) == read(deep, "TIFF") == grey(0, 100, 255)
    assert read(b"P5 3 1 65535\n" + words(0, 100 * 257, 65535)) == grey(0, 100, 255)
    assert read(b"P5 3 1 1023\n" + words(0, 511, 1023)) == grey(0, 127, 255)
    big_endian = Image.frombytes("I;16B", (3, 1), levels.astype(">u2").tobytes())
    assert read(big_endian, "TIFF") == grey(0, 100, 255)


def test_white_is_zero(read):
    """Of 16 bits and of 32-bit floating point, which Pillow leaves as they are."""
    for code, bits, pixels in ((1, 16, struct.pack("<HH", 0, 65535)), (3, 32, struct.pack("<ff", 0, 1))):
        entries = {256: 2, 257: 1, 258: bits, 259: 1, 262: 0, 273: 8, 278: 1, 279: len(pixels), 339: code}
        tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
        tiff = (
            b"II*\0"
            + struct.pack("<I", 8 + len(pixels))
            + pixels
            + struct.pack("<H", len(entries))
            + tags
            + bytes(4)
        )
        assert read(tiff) == grey(255, 0)


def test_rgb_of_16_bits(read):
    red, clear = words(200 * 257, 60 * 257, 50 * 257), words(10 * 257, 20 * 257, 30 * 257)
    assert read(png(16, 2, [red + clear])) == [[[200, 60, 50], [10, 20, 30]]]
    assert read(png(16, 2, [red + clear], tRNS=clear)) == [[[200, 60, 50], [255, 255, 255]]]
    alpha = red + words(65535) + clear + words(0)
    assert read(png(16, 6, [alpha])) == [[[200, 60, 50], [255, 255, 255]]]
    assert read(png(16, 6, [alpha]), with_alpha=True) == [[[200, 60, 50, 255], [10, 20, 30, 0]]]


# -- transparency


@pytest.mark.parametrize(
    ("depth", "row", "clear", "levels"),
    [
        (
            16,
            words(256, 257, 65535),
            words(257),
            [(1, 255), (1, 0), (255, 255)],
        ),  # of two levels that are 1 in 8 bits one is clear
        (16, words(0, 51 * 257, 65535), words(65535), [(0, 255), (51, 255), (255, 0)]),
        (8, bytes((0, 51, 255)), words(51), [(0, 255), (51, 0), (255, 255)]),
        (4, b"\x03\xf0", words(3), [(0, 255), (51, 0), (255, 255), (0, 255)]),
        (2, b"\x1b", words(3), [(0, 255), (85, 255), (170, 255), (255, 0)]),
        (1, b"\x50", words(1), [(0, 255), (255, 0), (0, 255), (255, 0), *[(0, 255)] * 4]),
        (1, b"\x50", words(0), [(0, 0), (255, 255), (0, 0), (255, 255), *[(0, 0)] * 4]),
    ],
)
def test_the_transparent_level_of_a_grey_png(read, depth, row, clear, levels):
    data = png(depth, 0, [row], tRNS=clear)
    assert read(data, with_alpha=True) == [[[level, level, level, alpha] for level, alpha in levels]]
    assert read(data) == grey(*(level if alpha else 255 for level, alpha in levels))


def test_grey_with_alpha(read):
    assert read(png(8, 4, [bytes((51, 255, 51, 0))]), with_alpha=True) == [
        [[51, 51, 51, 255], [51, 51, 51, 0]]
    ]
    assert read(png(16, 4, [words(51 * 257, 65535, 51 * 257, 0)])) == grey(51, 255)
    palette = Image.new("PA", (1, 1), (0, 128))
    palette.putpalette([200, 0, 0])
    assert read(palette, "TIFF")[0][0] == [227, 127, 127]


def test_palettes(read):
    colours, rows = bytes((200, 60, 50, 10, 20, 30, 1, 2, 3)), [bytes((0, 1, 2))]
    assert read(png(8, 3, rows, PLTE=colours)) == [[[200, 60, 50], [10, 20, 30], [1, 2, 3]]]
    several = png(8, 3, rows, PLTE=colours, tRNS=bytes((255, 0, 51)))
    assert read(several, with_alpha=True) == [[[200, 60, 50, 255], [10, 20, 30, 0], [1, 2, 3, 51]]]
    assert read(several)[0][:2] == [[200, 60, 50], [255, 255, 255]]
    one = png(8, 3, rows, PLTE=colours, tRNS=bytes((255, 0)))
    assert read(one, with_alpha=True) == [[[200, 60, 50, 255], [10, 20, 30, 0], [1, 2, 3, 255]]]
    assert read(png(1, 3, [b"\x40"], PLTE=colours, tRNS=bytes((0,))), with_alpha=True)[0][:2] == [
        [200, 60, 50, 0],
        [10, 20, 30, 255],
    ]


def test_one_bit(read):
    bits = Image.fromarray(np.array([[True, False]]))
    for form in ("PNG", "TIFF", "BMP", "PPM"):
        assert read(bits, form) == grey(255, 0)


def test_the_first_of_a_gif_keeps_its_transparency(read):
    first = Image.new("P", (2, 1), 1)
    first.putpalette([9, 9, 9, 200, 60, 50])
    first.putpixel((0, 0), 0)
    assert read(first, "GIF", transparency=0, with_alpha=True)[0] == [[9, 9, 9, 0], [200, 60, 50, 255]]


# -- colour

P3 = profiles.rgb(profiles.P3)


def test_display_p3_is_converted(read):
    stored, meant = (185, 71, 58), [200, 60, 50]
    for form in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        assert read(Image.new("RGB", (2, 2), stored), form, icc_profile=P3, **options)[0][0] == meant
    assert (
        np.abs(
            np.array(read(Image.new("RGB", (8, 8), stored), "JPEG", quality=100, icc_profile=P3)) - meant
        ).max()
        <= 3
    )
    assert read(Image.new("RGB", (2, 2), (*stored,)).quantize(4), icc_profile=P3)[0][0] == meant
    assert (
        read(png(16, 2, [words(*(257 * level for level in stored))], iCCP=b"P3\0\0" + zlib.compress(P3)))[0][
            0
        ]
        == meant
    )


def test_a_profile_leaves_alpha_alone(read):
    layer = Image.new("RGBA", (1, 1), (185, 71, 58, 51))
    assert read(layer, icc_profile=P3, with_alpha=True)[0][0] == [200, 60, 50, 51]
    assert read(layer, icc_profile=P3)[0][0] == [244, 216, 214]


def test_srgbs_own_profile_moves_nothing(read):
    pixels = np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (own, profiles.rgb(profiles.SRGB)):
        assert read(Image.fromarray(pixels), icc_profile=profile) == pixels.tolist()


def test_grey_cmyk_and_lab(read):
    assert read(Image.new("L", (1, 1), 100), icc_profile=profiles.grey(1.0)) == grey(168)
    assert read(Image.new("L", (1, 1), 100), icc_profile=P3) == grey(100)  # grey is a colour of any RGB space
    assert read(Image.new("LA", (1, 1), (100, 51)), icc_profile=profiles.grey(1.0), with_alpha=True) == [
        [[168, 168, 168, 51]]
    ]
    inks = {(0, 0, 0, 0): 255, (255, 0, 0, 0): 119, (0, 255, 255, 0): 255, (0, 0, 0, 255): 0}
    for ink, level in inks.items():
        assert read(Image.new("CMYK", (1, 1), ink), "TIFF", icc_profile=profiles.cmyk()) == grey(level)
        shot = read(Image.new("CMYK", (8, 8), ink), "JPEG", quality=100, icc_profile=profiles.cmyk())
        assert np.abs(np.array(shot) - level).max() <= 2
    assert read(Image.new("CMYK", (1, 1), (255, 0, 0, 0)), "TIFF") == [[[0, 255, 255]]]
    assert np.abs(np.array(read(Image.new("LAB", (1, 1), (255, 128, 128)), "TIFF")) - 255).max() <= 1


@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        (b"broken", "cannot open profile"),
        (P3[:200], "cannot"),
        (profiles.grey(1.0), "describes GRAY and the image is RGB"),
        (profiles.cmyk(), "describes CMYK and the image is RGB"),
        (profiles.profile("RGB ", "XYZ ", {}), "cannot build transform"),
    ],
)
def test_a_profile_that_cannot_be_used_is_ignored_with_a_warning(read, caplog, profile, reason):
    with caplog.at_level(logging.WARNING):
        assert read(Image.new("RGB", (1, 1), (185, 71, 58)), icc_profile=profile) == [[[185, 71, 58]]]
    [record] = caplog.records
    assert (
        record.message.startswith("image_path: '")
        and reason in record.message
        and "is ignored" in record.message
    )


def test_gamma_and_primaries_that_are_not_srgbs_are_reported(read, caplog):
    pixel, gamma = [bytes((200, 60, 50))], struct.pack(">I", 45455)
    srgb = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    p3 = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
    linear = struct.pack(">I", 100000)
    for chunks in ({}, {"gAMA": gamma}, {"gAMA": gamma, "cHRM": srgb}, {"sRGB": b"\0", "gAMA": linear}):
        assert read(png(8, 2, pixel, **chunks)) == [[[200, 60, 50]]] and caplog.records == []
    for chunks in ({"gAMA": linear}, {"cHRM": p3}):
        assert read(png(8, 2, pixel, **chunks)) == [[[200, 60, 50]]]
        assert "are not sRGB's" in caplog.records[-1].message
    assert len(caplog.records) == 2


def test_a_profile_and_an_orientation(read):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (2, 1), (185, 71, 58))
    image.putpixel((0, 0), (0, 0, 0))
    assert read(image, icc_profile=P3, exif=exif) == [[[0, 0, 0]], [[200, 60, 50]]]
    deep = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    assert read(deep, exif=exif) == [[[0] * 3], [[255] * 3]]


# -- what is not read


def test_programs_are_not_run(read):
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, "EPS")
    with pytest.raises(UserError, match="is not an image that can be read"):
        read(out.getvalue())


def test_files_changed_at_random_are_read_or_are_one_sentence(read):
    """Decoders fail in many ways; each is one sentence."""
    rng, made = np.random.default_rng(5), []
    whole = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM", "TGA", "JPEG2000", "AVIF"):
        out = io.BytesIO()
        options = {} if form in ("GIF", "BMP", "ICO", "PPM", "TGA", "JPEG2000") else {"icc_profile": P3}
        whole.save(out, form, **options)
        for _ in range(40):
            data = bytearray(out.getvalue())
            for _ in range(rng.integers(1, 5)):
                data[rng.integers(len(data))] = rng.integers(256)
            data = data[: rng.integers(1, len(data))] if rng.integers(4) == 0 else data
            try:
                made.append(np.array(read(bytes(data))).ndim == 3)
            except UserError as error:
                made.append("\n" not in str(error))
    assert len(made) == 440 and all(made)


def test_what_is_written_is_read_back(read):
    pixels = np.random.default_rng(6).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    assert read(encode_image(pixels, ".png"), with_alpha=True) == pixels.tolist()
