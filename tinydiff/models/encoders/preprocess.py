"""An encoder's image preprocessing, from a directory's preprocessor files to fields of its Config.

Source: transformers' CLIPImageProcessorPil, SiglipImageProcessorPil and Qwen2VLImageProcessorPil, whose
defaults these are. A value that is not supported is an error.
"""

from __future__ import annotations

from collections.abc import Mapping

from tinydiff.entries import Entries, EntryDict, is_object, value

ALWAYS = {
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
}
"""Steps that always run. null in a file means the default, which is the same."""

RGB = tuple[float, float, float]


def clip(entries: Entries, image_size: int) -> EntryDict:
    """Fields of `clip_vision.Config`. image_size: the tower's input side in pixels.

    Raises ValueError, one sentence.
    """
    fields = _shared(entries)
    edge = _edges(entries, ("shortest_edge",)).get("shortest_edge")
    if edge is not None:
        fields["shortest_edge"] = edge
    crop = entries.get("crop_size")
    sides: list[object] = [crop, crop]
    if is_object(crop):
        sides = [crop.get(name) for name in ("height", "width")]
    if crop is not None and sides != [image_size, image_size]:
        raise ValueError(
            f"crop_size is {crop!r}; it must be image_size of the image encoder, {image_size}, both ways"
        )
    if fields.get("shortest_edge", image_size) < image_size:
        raise ValueError(
            f"size is {entries['size']!r}; its shortest_edge must be at least the {image_size} pixels that "
            "are cut out"
        )
    return fields


def siglip(entries: Entries, image_size: int) -> EntryDict:
    """Fields of `siglip_vision.Config`. image_size: the tower's input side in pixels.

    Raises ValueError, one sentence.
    """
    sides = _edges(entries, ("height", "width"))
    if sides and set(sides.values()) != {image_size}:
        raise ValueError(
            f"size is {entries['size']!r}; both must be image_size of the image encoder, {image_size}"
        )
    return _shared(entries, ALWAYS | {"do_center_crop": False})


def qwen(entries: Entries, shape: Mapping[str, int]) -> EntryDict:
    """Fields of `qwen_vision.Config`. Raises ValueError, one sentence.

    shape: the tower's patch_size, temporal_patch_size and merge_size.
    """
    for name, wanted in shape.items():
        if entries.get(name, wanted) != wanted:
            raise ValueError(f"{name} is {entries[name]!r}, and that of the vision tower is {wanted}")
    edges = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
    stored = _edges(entries, ("shortest_edge", "longest_edge"))
    for bound, edge in zip(edges, ("shortest_edge", "longest_edge"), strict=True):
        pixels = entries.get(bound) if entries.get(bound) is not None else stored.get(edge)
        if pixels is not None:
            edges[bound] = value(bound, int, pixels)
    if edges["min_pixels"] > edges["max_pixels"]:
        raise ValueError(
            f"min_pixels is {edges['min_pixels']}; it must be at most max_pixels, {edges['max_pixels']}"
        )
    return _shared(entries) | edges


def _shared(entries: Entries, steps: Mapping[str, bool] = ALWAYS) -> EntryDict:
    """The fields that all encoders have. steps: whether each step runs."""
    for name, always in steps.items():
        if entries.get(name) not in (None, always):
            raise ValueError(f"{name} is {entries[name]!r}; only {always} is supported")
    factor = entries.get("rescale_factor")
    if factor is not None and abs(value("rescale_factor", float, factor) * 255 - 1) > 1e-6:
        raise ValueError(f"rescale_factor is {factor!r}; only 1/255 is supported")
    kinds = {"image_mean": RGB, "image_std": RGB, "resample": int}
    stored = {name: kind for name, kind in kinds.items() if entries.get(name) is not None}
    return {name: value(name, kind, entries[name]) for name, kind in stored.items()}


def _edges(entries: Entries, names: tuple[str, ...]) -> dict[str, int]:
    """The named entries of `size`, which older files give as one number."""
    size = entries.get("size")
    if isinstance(size, int) and not isinstance(size, bool):
        size = {names[0]: size}
    if size is None:
        return {}
    if not isinstance(size, Mapping) or not set(names) <= size.keys():
        raise ValueError(f"size is {size!r}; it must be an object with {' and '.join(names)}")
    return {name: value(f"size.{name}", int, size[name]) for name in names}
