"""ncnn's pair of files: the layers in a text (.param), their weights in a binary (.bin).

Source: the layout in ncnn's documentation. The text begins with a magic number and two counts; each further
line is `type name inputs outputs input-names... output-names... key=value...`. Weights follow one another in
the order of the layers. A convolution's weight begins with four bytes that tell its type; its bias and the
slopes of a PReLU are plain float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from tinydiff.records import UserError, brief

MAGIC = "7767517"
FLOAT16, FLOAT32 = b"\x47\x6b\x30\x01", b"\0\0\0\0"
"""The first bytes of a weight in float16 and in float32."""
WEIGHTLESS = frozenset(("Input", "Split", "Concat", "Eltwise", "BinaryOp", "Interp", "PixelShuffle"))
LONGEST = 2**20
"""Bytes of a text that is read; the published ones have a tenth of it."""


class Layer(NamedTuple):
    """A layer with weights. weight: [O, I, kh, kw] of a convolution, [O] of a PReLU. bias: [O] or None."""

    kind: str
    name: str
    weight: Tensor
    bias: Tensor | None


class _Line(NamedTuple):
    kind: str
    name: str
    inputs: list[str]
    outputs: list[str]
    fields: dict[int, str]


def layers(param: Path) -> Iterator[Layer]:
    """The layers with weights, in order, all in float32. Raises UserError for what is no such pair.

    param: the .param file; the .bin file lies beside it under the same name.
    """
    binary = param.with_suffix(".bin")
    try:
        if param.stat().st_size > LONGEST:
            raise _wrong(param, "is longer than the text of a network is")
        lines, data = _lines(param), binary.read_bytes()
    except OSError as error:
        raise _wrong(param, f"cannot be read with the .bin beside it: {error.strerror}") from None
    at = 0

    def take(count: int, kind: type[numpy.generic]) -> Tensor:
        nonlocal at
        size = count * numpy.dtype(kind).itemsize
        if count < 0 or at + size > len(data):
            raise _wrong(binary, "is cut short")
        values = torch.from_numpy(numpy.frombuffer(data, kind, count, at).astype(numpy.float32))
        at += size
        return values

    for line in lines:
        if line.kind in WEIGHTLESS:
            continue
        width = _integer(param, line, 0)
        if line.kind == "PReLU":
            yield Layer(line.kind, line.name, take(width, numpy.float32), None)
            continue
        if line.kind != "Convolution":
            raise _wrong(param, f"has a layer of the kind {brief(line.kind)}, which is not read")
        side, count = _integer(param, line, 1), _integer(param, line, 6)
        if not (width > 0 and side > 0 and count % (width * side * side) == 0):
            raise _wrong(param, f"gives the layer {brief(line.name)} {count} weights, which do not divide")
        tag, at = data[at : at + 4], at + 4
        if tag not in (FLOAT16, FLOAT32):
            raise _wrong(binary, f"has weights of an unknown type in the layer {brief(line.name)}")
        weight = take(count, numpy.float16 if tag == FLOAT16 else numpy.float32)
        at += -at % 4
        bias = take(width, numpy.float32) if line.fields.get(5) == "1" else None
        yield Layer(line.kind, line.name, weight.unflatten(0, (width, -1, side, side)), bias)
    if at != len(data):
        raise _wrong(binary, f"has {len(data) - at} bytes more than its layers need")


def _lines(param: Path) -> list[_Line]:
    magic, *rest = param.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    if magic.strip() != MAGIC:
        raise _wrong(param, f"does not begin with {MAGIC}, as ncnn's texts do")
    return [_line(param, line) for line in rest[1:] if line.strip()]


def _line(param: Path, line: str) -> _Line:
    try:
        kind, name, inputs, outputs, *words = line.split()
        first, second = int(inputs), int(inputs) + int(outputs)
        fields = dict(word.split("=", 1) for word in words[second:])
        return _Line(kind, name, words[:first], words[first:second], {int(k): v for k, v in fields.items()})
    except ValueError:
        raise _wrong(param, f"has the line {brief(line.strip())}, which is none of ncnn's") from None


def _integer(param: Path, line: _Line, field: int) -> int:
    text = line.fields.get(field, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise _wrong(param, f"gives the layer {brief(line.name)} no number {field}")
    return int(text)


def _wrong(path: Path, why: str) -> UserError:
    return UserError("upscaling_model_path", f"upscaling_model_path: {str(path)!r} {why}")
