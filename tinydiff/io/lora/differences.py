"""What an adapter does to one weight, by kind.

All kinds give the weight itself at strength 0 and the adapter's full effect at strength 1. Rows are those of
the weight flattened to [rows, columns]: `cut` takes some of them, which is how a layer that is fused in the
file becomes several weights of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


class Difference(Protocol):
    """What an adapter does to one weight."""

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """The changed weight, in the weight's type; computed in at least float32."""
        ...

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """(a [R, I], b [O, R]) whose product b @ a is the difference at strength 1, or None."""
        ...

    def cut(self, at: int, size: int) -> Difference:
        """What is done to `size` rows from `at` on. ValueError where these rows depend on others."""
        ...


@dataclass(frozen=True)
class LowRank:
    """W + strength * scale * b @ a; a [R, I] and b [O, R], the weight flattened to [O, I]."""

    a: Tensor
    b: Tensor
    scale: float

    def delta(self) -> Tensor:
        """What is added at strength 1, [O, I]."""
        return self.scale * (self.b @ self.a)

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = self.a.to(weight.device, wide), self.b.to(weight.device, wide)
        return (weight.to(wide) + (strength * self.scale) * (b @ a).view(weight.shape)).to(weight.dtype)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b * self.scale

    def cut(self, at: int, size: int) -> LowRank:
        return replace(self, b=self.b[at : at + size])


@dataclass(frozen=True)
class Dense:
    """W + strength * make(): a difference as large as the weight, made when it is needed."""

    make: Callable[[], Tensor]
    """The difference of the stored tensor, of which `rows` are this weight's."""
    rows: tuple[int, int] | None = None
    """First row and count; None takes all."""

    def delta(self) -> Tensor:
        """What is added at strength 1."""
        made = self.make()
        return made if self.rows is None else made[self.rows[0] : sum(self.rows)]

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = self.delta().to(weight.device, wide).reshape(weight.shape)
        return (weight.to(wide) + strength * delta).to(weight.dtype)

    def low_rank(self) -> None:
        return None

    def cut(self, at: int, size: int) -> Dense:
        first = 0 if self.rows is None else self.rows[0]
        return replace(self, rows=(first + at, size))


@dataclass(frozen=True)
class Replaced:
    """The weight of the file in place of the model's; between them at other strengths than 1."""

    new: Tensor

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        return _towards(weight, strength, lambda old: self.new.to(old).reshape(old.shape))

    def low_rank(self) -> None:
        return None

    def cut(self, at: int, size: int) -> Replaced:
        return Replaced(self.new[at : at + size])


@dataclass(frozen=True)
class Dora:
    """A changed weight whose rows, or columns, get the lengths that the file has (DoRA).

    magnitude: [O], or [I] with by_column.
    """

    change: LowRank | Dense
    magnitude: Tensor
    by_column: bool = False

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        return _towards(weight, strength, self._scaled)

    def _scaled(self, weight: Tensor) -> Tensor:
        changed = self.change.apply(weight, 1.0)
        length = _squares(changed, 1 if self.by_column else 0).sqrt()
        return changed * (self.magnitude.to(weight).view(length.shape) / length)

    def low_rank(self) -> None:
        return None

    def cut(self, at: int, size: int) -> Dora | DoraPart:
        change = self.change.cut(at, size)
        return DoraPart(change, self) if self.by_column else Dora(change, self.magnitude[at : at + size])


@dataclass(frozen=True)
class DoraPart:
    """Some rows of a layer whose columns get the lengths that the file has.

    A column runs through all parts of the layer, so `measured` must have seen all of them before `apply`.
    length: of each column of the changed layer.
    """

    change: LowRank | Dense
    layer: Dora
    length: Tensor | None = None

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        return _towards(weight, strength, self._scaled)

    def _scaled(self, weight: Tensor) -> Tensor:
        assert self.length is not None, "the columns of the whole layer are measured first"
        magnitude = self.layer.magnitude.to(weight).view(self.length.shape)
        return self.change.apply(weight, 1.0) * (magnitude / self.length.to(weight))

    def low_rank(self) -> None:
        return None

    def cut(self, at: int, size: int) -> DoraPart:
        return replace(self, change=self.change.cut(at, size))


def measured(
    differences: Mapping[str, Difference], weights: Callable[[Collection[str]], Iterable[tuple[str, Tensor]]]
) -> Mapping[str, Difference]:
    """The differences of a network, with the lengths of columns that run through several weights.

    weights: names -> these weights, one at a time.
    """
    parts = {name: part for name, part in differences.items() if isinstance(part, DoraPart)}
    squares: dict[int, Tensor] = {}
    for name, weight in weights(parts):
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        found = _squares(parts[name].change.apply(wide, 1.0), 1)
        layer = id(parts[name].layer)
        squares[layer] = squares[layer] + found if layer in squares else found
    done = {name: replace(part, length=squares[id(part.layer)].sqrt()) for name, part in parts.items()}
    return {**differences, **done}


def _squares(weight: Tensor, kept: int) -> Tensor:
    """The sums of squares of rows (0) or columns (1), in the weight's dimensions."""
    return weight.square().sum(dim=[dim for dim in range(weight.ndim) if dim != kept], keepdim=True)


@dataclass(frozen=True)
class Oft:
    """Blocks of rows, each turned by a matrix, then each row multiplied (OFT).

    turns: [blocks, B, B], applied from the left. rescale: [O].
    """

    turns: Tensor
    rescale: Tensor | None = None

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        return _towards(weight, strength, self._turned)

    def _turned(self, weight: Tensor) -> Tensor:
        blocks, side, _ = self.turns.shape
        turned = self.turns.to(weight) @ weight.reshape(blocks, side, -1)
        flat = turned.reshape(blocks * side, -1)
        if self.rescale is not None:
            flat = self.rescale.to(weight)[:, None] * flat
        return flat.view(weight.shape)

    def low_rank(self) -> None:
        return None

    def cut(self, at: int, size: int) -> Oft:
        side = self.turns.shape[1]
        if at % side or size % side:
            raise ValueError(f"its blocks of {side} rows (OFT) reach over the parts of the fused layer")
        rescale = None if self.rescale is None else self.rescale[at : at + size]
        return Oft(self.turns[at // side : (at + size) // side], rescale)


@dataclass(frozen=True)
class Turned:
    """Blocks of columns, each turned by a matrix: W = W @ turn^T (PEFT's OFT).

    turns: [blocks, B, B].
    """

    turns: Tensor

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        return _towards(weight, strength, self._turned)

    def _turned(self, weight: Tensor) -> Tensor:
        blocks, side, _ = self.turns.shape
        columns = weight.reshape(len(weight), blocks, side)
        return torch.einsum("obi,bji->obj", columns, self.turns.to(weight)).reshape(weight.shape)

    def low_rank(self) -> None:
        return None

    def cut(self, at: int, size: int) -> Turned:
        return self  # every row is turned alike


@dataclass(frozen=True)
class Rows:
    """Another difference for each range of rows: (first row, count, difference). The others stay."""

    parts: tuple[tuple[int, int, Difference], ...]

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        changed = weight.clone()
        for at, size, part in self.parts:
            changed[at : at + size] = part.apply(weight[at : at + size], strength)
        return changed

    def low_rank(self) -> None:
        return None

    def cut(self, at: int, size: int) -> Rows:
        kept = []
        for start, count, part in self.parts:
            low, high = max(at, start), min(at + size, start + count)
            if low < high:
                kept.append((low - at, high - low, part.cut(low - start, high - low)))
        return Rows(tuple(kept))


def joined(parts: list[tuple[int, int, Difference]], rows: int) -> Difference:
    """One difference of a weight with so many rows, from those of ranges of its rows.

    ValueError where columns cannot be measured.
    """
    parts = sorted(parts, key=lambda part: part[0])
    if len(parts) == 1 and parts[0][:2] == (0, rows):
        return parts[0][2]
    if any(isinstance(part, DoraPart) for _, _, part in parts):
        raise ValueError("changes columns (DoRA) of a layer that has only some rows of a weight")
    pairs = [(at, size, part) for at, size, part in parts if isinstance(part, LowRank)]
    return _stacked(pairs, rows) if len(pairs) == len(parts) else Rows(tuple(parts))


def _stacked(parts: list[tuple[int, int, LowRank]], rows: int) -> LowRank:
    """The factors a one below the other, each once, and b where its rows and its a are."""
    factors: list[Tensor] = []
    for _, _, part in parts:
        if not any(part.a is a for a in factors):
            factors.append(part.a)
    starts = [sum(map(len, factors[:i])) for i in range(len(factors))]
    b = parts[0][2].b.new_zeros(rows, sum(map(len, factors)))
    for at, size, part in parts:
        start = next(starts[i] for i, a in enumerate(factors) if a is part.a)
        b[at : at + size, start : start + len(part.a)] = part.scale * part.b
    return LowRank(torch.cat(factors), b, 1.0)


def _towards(weight: Tensor, strength: float, target: Callable[[Tensor], Tensor]) -> Tensor:
    """From the weight towards what it becomes at strength 1."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return (wide + strength * (target(wide) - wide)).to(weight.dtype)
