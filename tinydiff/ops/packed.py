"""Weights whose values lie in blocks: the bytes of blocks -> float32 values.

A block holds 16 to 256 values of one row, most with scales of their own. Those of GGUF are as in its files,
and the order of the float32 operations is that of the `gguf` package, so the values equal its own to the bit.
NF4, FP4 and NVFP4 stand in blocks of our own, since their files keep codes and scales apart. Source: the GGUF
specification, ggml, bitsandbytes.

All is arithmetic on tensors of bytes, which fuses where it is compiled, and runs on GPUs without float8.

Shape letters: N blocks, V values of a block, S scales of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tinydiff.parallel.plan import PACKED

Decode = Callable[[Tensor], Tensor]
"""Blocks uint8 [N, bytes] -> float32 [N, V]."""

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The values of a 4-bit code of IQ4_NL and IQ4_XS."""
FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
"""The values of a 4-bit code of MXFP4 and NVFP4: sign, two bits of exponent, one of mantissa."""
# fmt: off
BITSANDBYTES = {
    "NF4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
        1.0,
    ),
    "FP4": (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204,
        0.25, 0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5,
        -0.1666666716337204, -0.25,
    ),
}
# fmt: on
"""Type of bitsandbytes -> the values of a 4-bit code."""


def _half(x: Tensor, at: int) -> Tensor:
    """The float16 in bytes `at` and `at + 1` of each block -> float32 [N, 1]."""
    return _joined(x, at, 2).to(torch.int16).view(torch.float16).float()


def _joined(x: Tensor, at: int, size: int) -> Tensor:
    """The integer in `size` bytes from `at` on, the lowest first -> int32 [N, 1]."""
    y = x[:, at : at + 1].int()
    for i in range(1, size):
        y = y | x[:, at + i : at + i + 1].int() << 8 * i
    return y


def _bits(x: Tensor, width: int, group: int) -> Tensor:
    """Fields of `width` bits of bytes [N, K] -> uint8 [N, K * 8 / width].

    Of each `group` bytes come the lowest fields first, then the next ones.
    """
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=x.device)
    fields = (x.view(len(x), -1, 1, group) >> shifts[:, None]) & (2**width - 1)
    return fields.flatten(1)


def _nibbles(x: Tensor) -> Tensor:
    return _bits(x, 4, x.shape[1])


def _fifth_bits(x: Tensor) -> Tensor:
    """The bits of 4 bytes, lowest first -> [N, 32]."""
    return ((x[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=x.device)) & 1).flatten(1)


def _q4_0(x: Tensor) -> Tensor:
    return _half(x, 0) * (_nibbles(x[:, 2:]).view(torch.int8) - 8)


def _q4_1(x: Tensor) -> Tensor:
    return _half(x, 0) * _nibbles(x[:, 4:]) + _half(x, 2)


def _q5_0(x: Tensor) -> Tensor:
    codes = _nibbles(x[:, 6:]) | _fifth_bits(x[:, 2:6]) << 4
    return _half(x, 0) * (codes.view(torch.int8) - 16)


def _q5_1(x: Tensor) -> Tensor:
    return _half(x, 0) * (_nibbles(x[:, 8:]) | _fifth_bits(x[:, 4:8]) << 4) + _half(x, 2)


def _q8_0(x: Tensor) -> Tensor:
    return _half(x, 0) * x[:, 2:].view(torch.int8)


def _scaled(scales: Tensor, codes: Tensor, low: Tensor | None = None) -> Tensor:
    """scales [N, S] times codes [N, V], each for V / S values, less low [N, S]."""
    y = scales[:, :, None] * codes.view(len(codes), scales.shape[1], -1)
    return (y if low is None else y - low[:, :, None]).flatten(1)


def _q2_k(x: Tensor) -> Tensor:
    scales, d, low = x[:, :16], _half(x, 80), _half(x, 82)
    return _scaled(d * (scales & 15), _bits(x[:, 16:80], 2, 32), low * (scales >> 4))


def _q3_k(x: Tensor) -> Tensor:
    high, codes, scales = x[:, :32], x[:, 32:96], x[:, 96:108]
    six = _bits(scales[:, :8], 4, 8) | _bits(scales[:, 8:], 2, 4) << 4
    code = _bits(codes, 2, 32).view(torch.int8) - ((_bits(high, 1, 32) ^ 1) << 2).view(torch.int8)
    return _scaled(_half(x, 108) * (six.view(torch.int8) - 32), code)


def _six_bit_pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minima of 6 bits in 12 bytes."""
    scale, low, both = x.view(len(x), 3, 4).unbind(1)
    return (
        torch.cat([scale & 63, (both & 15) | ((scale >> 2) & 48)], 1),
        torch.cat([low & 63, (both >> 4) | ((low >> 2) & 48)], 1),
    )


def _q4_k(x: Tensor) -> Tensor:
    scale, low = _six_bit_pairs(x[:, 4:16])
    return _scaled(_half(x, 0) * scale, _bits(x[:, 16:], 4, 32), _half(x, 2) * low)


def _q5_k(x: Tensor) -> Tensor:
    scale, low = _six_bit_pairs(x[:, 4:16])
    codes = _bits(x[:, 48:], 4, 32) | _bits(x[:, 16:48], 1, 32) << 4
    return _scaled(_half(x, 0) * scale, codes, _half(x, 2) * low)


def _q6_k(x: Tensor) -> Tensor:
    codes = (_bits(x[:, :128], 4, 64) | _bits(x[:, 128:192], 2, 32) << 4).view(torch.int8) - 32
    return _scaled(_half(x, 208) * x[:, 192:208].view(torch.int8), codes)


def _table(values: tuple[float, ...], codes: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=codes.device)[codes.int()]


def _iq4_nl(x: Tensor) -> Tensor:
    return _half(x, 0) * _table(IQ4, _nibbles(x[:, 2:]))


def _iq4_xs(x: Tensor) -> Tensor:
    shifts = torch.arange(0, 16, 2, dtype=torch.int32, device=x.device)
    six = _bits(x[:, 4:8], 4, 1) | ((_joined(x, 2, 2) >> shifts) & 3) << 4
    return _scaled(_half(x, 0) * (six - 32), _table(IQ4, _bits(x[:, 8:], 4, 16)))


def _mxfp4(x: Tensor) -> Tensor:
    half_power = torch.ldexp(torch.ones(len(x), 1, device=x.device), x[:, :1].int() - 128)
    return half_power * (2 * _table(FP4, _nibbles(x[:, 1:])))


def _neighbours(x: Tensor, high_first: bool) -> Tensor:
    """The two halves of each byte beside each other, uint8 [N, K] -> [N, 2 K]."""
    low, high = x & 15, x >> 4
    return torch.stack([high, low] if high_first else [low, high], 2).flatten(1)


def _bitsandbytes(values: tuple[float, ...]) -> Decode:
    """The largest absolute value in float32, then codes, the first in the high half of a byte."""
    return lambda x: _table(values, _neighbours(x[:, 4:], True)) * _joined(x, 0, 4).view(torch.float32)


def _e4m3(x: Tensor) -> Tensor:
    """Bytes of float8_e4m3fn as float32: as halves, with two bits less of exponent than of float16."""
    half = (x.int() & 128) << 8 | (x.int() & 127) << 7
    return half.to(torch.int16).view(torch.float16).float() * 256


def _nvfp4(x: Tensor, scale: Tensor) -> Tensor:
    """A scale of 8 bits, then codes, the first in the low half of a byte. scale: of each block, [N, 1]."""
    return _table(FP4, _neighbours(x[:, 1:], False)) * (_e4m3(x[:, :1]) * scale)


DECODE: dict[str, Decode] = {
    **{"Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0},
    **{"Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k},
    **{"IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4},
    **{name: _bitsandbytes(values) for name, values in BITSANDBYTES.items()},
}


def decode(stored: str, rows: Tensor, scale: Tensor | None = None) -> Tensor:
    """Bytes uint8 [O, bytes of a row] of a type of `PACKED` -> float32 [O, values of a row].

    scale: float32 [O, 1] of those types that have one for each row.
    """
    blocks = rows.reshape(-1, PACKED[stored][1])
    if scale is None:
        return DECODE[stored](blocks).view(len(rows), -1)
    each = scale.expand(-1, len(blocks) // len(rows)).reshape(-1, 1)
    return _nvfp4(blocks, each).view(len(rows), -1)
