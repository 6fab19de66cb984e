"""Decoding image files of any mode, depth and colour space to 8-bit sRGB.

Shapes: arrays are [H, W] or [H, W, C].
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

SAMPLE_SCALES = {"L;2": 85, "L;4": 17}
"""Pillow's raw mode -> its factor for the samples of a grey image, which the transparent level lacks."""

INTEGERS = ("PNG", "PPM")
"""Formats whose images in Pillow's mode "I" have 16 bits."""

WHITE_IS_ZERO = (262, 0)
"""TIFF's tag of the photometric interpretation, and its value for "0 is white"."""

SRGB = (0.45455, 0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
"""sRGB as PNG writes it: gamma, and x and y of white, red, green and blue."""

PLAIN = {"1": "L", "La": "LA", "PA": "RGBA", "RGBa": "RGBA", "RGBX": "RGB", "YCbCr": "RGB", "HSV": "RGB"}
"""Pillow's mode -> the grey or RGB mode with the same content."""

PROFILED = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}
"""Colour space of a profile -> Pillow's mode of the images that it describes."""


class NoWhiteLevel(ValueError):
    """The values of an image do not show which one is white. The message ends a sentence about the image."""


def srgb(opened: ImageFile.ImageFile, with_alpha: bool, name: str) -> NDArray[np.uint8]:
    """The pixels of an opened image file, upright, as uint8 sRGB [H, W, 3] on white, or [H, W, 4] with alpha.

    An embedded colour profile is applied; one that is broken or describes another kind of image is ignored
    with a warning. name: the file's name in messages. Raises NoWhiteLevel.
    """
    raw, profile = _raw_mode(opened), opened.info.get("icc_profile")
    if not profile and _other_space(opened.info):
        log.warning("%s: its gamma or primaries (PNG's gAMA, cHRM) are not sRGB's and are ignored", name)
    inverted = getattr(opened, "tag_v2", {}).get(WHITE_IS_ZERO[0]) == WHITE_IS_ZERO[1]
    form = opened.format or ""
    image = _plain(ImageOps.exif_transpose(opened), raw, form, inverted)
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colour = image.convert(image.mode.removesuffix("A")) if alpha else image
    colour = _from_profile(colour, profile, name) if profile else _unprofiled(colour)
    if alpha is None:
        return np.asarray(colour.convert("RGBA") if with_alpha else colour)
    colour.putalpha(alpha)
    if with_alpha:
        return np.asarray(colour)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB"))


def _other_space(info: Mapping[Any, Any]) -> bool:
    """Whether the gamma and primaries of a PNG without a profile differ from sRGB's."""
    if "srgb" in info:
        return False
    numbers = (info.get("gamma", SRGB[0]), *info.get("chromaticity", SRGB[1:]))
    return any(abs(number - standard) > 0.01 for number, standard in zip(numbers, SRGB, strict=True))


def _raw_mode(opened: ImageFile.ImageFile) -> str:
    """Pillow's raw mode of the file's samples, known only before they are read; "" if there is none."""
    args: Any = opened.tile[0][3] if opened.tile else ""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _plain(image: Image.Image, raw: str, form: str, inverted: bool) -> Image.Image:
    """The image in mode L, LA, RGB, RGBA, CMYK or LAB, with 8 bits a sample."""
    if image.mode == "P" or (form != "PNG" and image.mode in ("1", "L", "RGB")):
        grey = "L" if image.mode in ("1", "L") else "RGB"
        return image.convert("RGBA" if image.has_transparency_data else grey)
    samples, key = np.asarray(image), image.info.get("transparency")
    opaque = None if key is None else _differs(samples, key, raw)
    if image.mode == "F":
        image = _from_unit(samples, inverted)
    elif image.mode.startswith("I"):
        image = _from_integers(samples, image.mode, raw, form, inverted)
    image = image.convert(PLAIN[image.mode]) if image.mode in PLAIN else image
    if opaque is not None:
        image.putalpha(Image.fromarray(opaque * np.uint8(255)))
    return image


def _differs(samples: NDArray[Any], key: Any, raw: str) -> NDArray[np.bool_]:
    """Where an image differs from its one transparent colour, [H, W]."""
    if raw == "RGB;16B":  # Pillow keeps 8 bits of the samples, but 16 of the transparent colour
        key = tuple(level >> 8 for level in key)
    elif raw in SAMPLE_SCALES:
        key *= SAMPLE_SCALES[raw]
    elif samples.dtype == np.bool_:
        key = bool(key)
    return (samples != key) if samples.ndim == 2 else (samples != np.array(key)).any(-1)


def _from_unit(samples: NDArray[Any], inverted: bool) -> Image.Image:
    """Floating-point grey from 0 to 1 as 8 bits."""
    least, most = samples.min(), samples.max()
    if not (least >= 0 and most <= 1):  # nor where there is a NaN
        allowed = "a floating-point image goes from 0 (black) to 1 (white)"
        raise NoWhiteLevel(f"has values from {least:g} to {most:g}; {allowed}")
    return Image.fromarray(np.rint((1 - samples if inverted else samples) * 255).astype(np.uint8))


def _from_integers(samples: NDArray[Any], mode: str, raw: str, form: str, inverted: bool) -> Image.Image:
    """The upper 8 bits of 16-bit grey, or of 12-bit grey in a TIFF. Wider integers have no standard white."""
    if mode == "I" and form not in INTEGERS:
        raise NoWhiteLevel("has signed or 32-bit integers, which have no standard white; use 8 or 16 bits")
    upper = (samples >> (4 if raw == "I;12" else 8)).astype(np.uint8)
    return Image.fromarray(255 - upper if inverted else upper)


def _unprofiled(image: Image.Image) -> Image.Image:
    if image.mode != "LAB":
        return image.convert("RGB")
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    return _converted(image, lab)


def _from_profile(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    """An L, RGB, CMYK or LAB image with an ICC profile, as RGB in sRGB."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = cast(Any, opened.profile).xcolor_space.strip()
        if (image.mode, space) == ("L", "RGB"):  # every RGB space contains grey
            image = image.convert("RGB")
        if PROFILED.get(space) != image.mode:
            raise ValueError(f"describes {space} and the image is {image.mode}")
        converted = _converted(image, opened)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        log.warning("%s: its colour profile cannot be used (%s) and is ignored", name, error)
        return _unprofiled(image)
    if image.mode in ("L", "RGB"):
        original = image.convert("RGB")
        moved = np.abs(np.asarray(converted).astype(np.int16) - np.asarray(original)).max()
        if moved <= 1:  # the profile is sRGB itself: differences are rounding
            return original
    return converted


def _converted(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    return ImageCms.ImageCmsTransform(profile, target, image.mode, "RGB").apply(image)
