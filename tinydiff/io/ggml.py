"""The block types of GGUF files: bytes of blocks -> float32 values.

A block holds 32 or 256 values of one row, with scales of their own. The order of the float32 operations is
that of the `gguf` package, so the values equal its own to the bit. Source: the GGUF specification, ggml.

Shape letters: N blocks, V values of a block, S scales of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Decode = Callable[[Tensor], Tensor]

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The values of a 4-bit code of IQ4_NL and IQ4_XS."""
FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the values of a 4-bit code of MXFP4 and NVFP4: sign, two bits of exponent, one of mantissa."""


class Block(NamedTuple):
    """A block type.

    values, bytes: of a block. decode: int32 [N, bytes], each a byte -> float32 [N, values].
    """

    values: int
    bytes: int
    decode: Decode


def _half(x: Tensor, at: int) -> Tensor:
    """The float16 in bytes `at` and `at + 1` of each block -> float32 [N, 1]."""
    return x[:, at : at + 2].to(torch.uint8).contiguous().view(torch.float16).float()


def _signed(x: Tensor) -> Tensor:
    """Bytes as signed integers."""
    return x - 256 * (x > 127).int()


def _bits(x: Tensor, width: int, group: int) -> Tensor:
    """Fields of `width` bits of bytes [N, K] -> [N, K * 8 / width].

    Of each `group` bytes come the lowest fields first, then the next ones.
    """
    shifts = torch.arange(0, 8, width, dtype=torch.int32)
    fields = (x.view(len(x), -1, 1, group) >> shifts[:, None]) & (2**width - 1)
    return fields.flatten(1)


def _nibbles(x: Tensor) -> Tensor:
    return _bits(x, 4, x.shape[1])


def _fifth_bits(x: Tensor) -> Tensor:
    """The bits of 4 bytes, lowest first -> [N, 32]."""
    return ((x[:, :, None] >> torch.arange(8, dtype=torch.int32)) & 1).flatten(1)


def _q4_0(x: Tensor) -> Tensor:
    return _half(x, 0) * (_nibbles(x[:, 2:]) - 8)


def _q4_1(x: Tensor) -> Tensor:
    return _half(x, 0) * _nibbles(x[:, 4:]) + _half(x, 2)


def _q5_0(x: Tensor) -> Tensor:
    return _half(x, 0) * ((_nibbles(x[:, 6:]) | _fifth_bits(x[:, 2:6]) << 4) - 16)


def _q5_1(x: Tensor) -> Tensor:
    return _half(x, 0) * (_nibbles(x[:, 8:]) | _fifth_bits(x[:, 4:8]) << 4) + _half(x, 2)


def _q8_0(x: Tensor) -> Tensor:
    return _half(x, 0) * _signed(x[:, 2:])


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
    code = _bits(codes, 2, 32) - ((_bits(high, 1, 32) ^ 1) << 2)
    return _scaled(_half(x, 108) * (six - 32), code)


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
    codes = (_bits(x[:, :128], 4, 64) | _bits(x[:, 128:192], 2, 32) << 4) - 32
    return _scaled(_half(x, 208) * _signed(x[:, 192:208]), codes)


def _table(values: tuple[int, ...], codes: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[codes]


def _iq4_nl(x: Tensor) -> Tensor:
    return _half(x, 0) * _table(IQ4, _nibbles(x[:, 2:]))


def _iq4_xs(x: Tensor) -> Tensor:
    high = x[:, 2:3] | x[:, 3:4] << 8
    six = _bits(x[:, 4:8], 4, 1) | ((high >> torch.arange(0, 16, 2, dtype=torch.int32)) & 3) << 4
    return _scaled(_half(x, 0) * (six - 32), _table(IQ4, _bits(x[:, 8:], 4, 16)))


def _mxfp4(x: Tensor) -> Tensor:
    half_power = torch.ldexp(torch.ones(len(x), 1), x[:, :1] - 128)
    return half_power * _table(FP4, _nibbles(x[:, 1:]))


BLOCKS = {
    "Q4_0": Block(32, 18, _q4_0),
    "Q4_1": Block(32, 20, _q4_1),
    "Q5_0": Block(32, 22, _q5_0),
    "Q5_1": Block(32, 24, _q5_1),
    "Q8_0": Block(32, 34, _q8_0),
    "Q2_K": Block(256, 84, _q2_k),
    "Q3_K": Block(256, 110, _q3_k),
    "Q4_K": Block(256, 144, _q4_k),
    "Q5_K": Block(256, 176, _q5_k),
    "Q6_K": Block(256, 210, _q6_k),
    "IQ4_NL": Block(32, 18, _iq4_nl),
    "IQ4_XS": Block(256, 136, _iq4_xs),
    "MXFP4": Block(32, 17, _mxfp4),
}
"""Name -> block type. Those that are left out are rare for diffusion models."""


def q8_0(data: Tensor) -> tuple[Tensor, Tensor]:
    """Decode blocks of Q8_0.

    Bytes uint8 [rows, bytes of a row] -> (codes int8 [rows, values], scales float32 [rows, blocks of a row]).
    """
    blocks = data.reshape(-1, BLOCKS["Q8_0"].bytes)
    codes = blocks[:, 2:].contiguous().view(torch.int8)
    return codes.view(len(data), -1), _half(blocks, 0).view(len(data), -1)


def decode(name: str, data: Tensor) -> Tensor:
    """Bytes uint8 [rows, bytes of a row] of a type -> float32 [rows, values of a row]."""
    block = BLOCKS[name]
    return block.decode(data.reshape(-1, block.bytes).int()).view(len(data), -1)
