"""Small ICC profiles, put together from their tags."""

from __future__ import annotations

import struct
from itertools import product

SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))
"""XYZ of red, green and blue under D50."""
D50 = (0.9642, 1.0, 0.8249)


def rgb(primaries, curve=SRGB_CURVE) -> bytes:
    trc = parametric(curve)
    tags = {f"{name}XYZ": xyz(values) for name, values in zip("rgb", primaries, strict=True)}
    return profile("RGB ", "XYZ ", tags | {f"{name}TRC": trc for name in "rgb"})


def grey(gamma: float) -> bytes:
    return profile("GRAY", "XYZ ", {"kTRC": b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))})


def cmyk() -> bytes:
    """Inks that print in grey: cyan to L* 50, black to L* 0, magenta and yellow nothing."""
    straight = bytes(range(256))
    grid = b"".join(
        bytes((round(255 * (1 - c / 2) * (1 - k)), 128, 128)) for c, _, _, k in product((0, 1), repeat=4)
    )
    unit = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + unit + straight * 4 + grid + straight * 3
    return profile("CMYK", "Lab ", {"A2B0": table}, "prtr")


def profile(space: str, connection: str, tags: dict[str, bytes], kind: str = "mntr") -> bytes:
    tags = {
        "desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78),
        "wtpt": xyz(D50),
        "cprt": b"text\0\0\0\0none\0",
    } | tags
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name.encode() + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = start + len(body)
    head = struct.pack(
        ">I4sI4s4s4s", size, b"none", 0x04000000, kind.encode(), space.encode(), connection.encode()
    )
    head += (
        struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">3i", *map(fixed, D50))
    )
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def fixed(value: float) -> int:
    return round(value * 65536)


def xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *map(fixed, values))


def parametric(values) -> bytes:
    return b"para\0\0\0\0" + struct.pack(">Hxx5i", 3, *map(fixed, values))
