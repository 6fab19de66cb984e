"""From the tensors of one layer of a LoRA file to what is done to its weight and bias, by kind.

Sources: the arithmetic of peft 0.21 and LyCORIS 4.1. A weight is flattened to [rows, columns].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor

from tinydiff.io.lora import rotations
from tinydiff.io.lora.differences import Dense, Difference, Dora, LowRank, Oft, Replaced, Turned
from tinydiff.io.lora.scales import Config

Parts = Mapping[str, Tensor]
"""The tensors of a layer, by part (`lora.keys`)."""
Shape = tuple[int, ...]
Scale = Callable[[int], float]
"""Rank -> scale of a layer."""


@dataclass(frozen=True)
class Built:
    """What a layer of the file does.

    kind: in words. rank: None where it has none. changes: by "weight", "bias" and "modulation".
    """

    kind: str
    rank: int | None = None
    scale: float = 1.0
    changes: dict[str, Difference] = field(default_factory=dict)


REFUSED = {
    "a1": "GLoRA", "a2": "GLoRA", "b1": "GLoRA", "b2": "GLoRA", "boft_R": "PEFT's BOFT",
    "boft_s": "PEFT's BOFT", "oft_diag": "OFT with oft_diag", "scaled_oft": "OneTrainer's scaled OFT",
    "lokr_t1": "LoKr with lokr_t1",
}  # fmt: skip
"""Parts of kinds that are not supported -> the kind."""

_LORA = {"down", "up", "mid", "up_bias"}
_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}
_LOKR = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
_OF = {"LoRA": _LORA, "LoHa": _LOHA, "LoKr": _LOKR, "OFT": {"oft_blocks", "rescale", "oft_R"}}
"""Kind -> its parts."""
_FULL = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation", "w_norm": "weight", "b_norm": "bias"}
_EVERYWHERE = {"alpha", "dora_scale", "magnitude", "set_weight", "reshape_weight", *_FULL}
"""Parts that a layer of any kind may have."""


def build(
    parts: Parts,
    shapes: Mapping[str, Shape],
    scale: Scale,
    lokr_rank: int | None = None,
    config: Config = MappingProxyType({}),
) -> Built:
    """What a layer does to the tensors of these shapes.

    scale: of a rank. lokr_rank: of a LoKr of two full factors, where the file's configuration gives it one.
    config: PEFT's, as far as the file has it.
    ValueError in words that follow the name of the layer.
    """
    for part in parts:
        if part in REFUSED:
            raise ValueError(f"is of the kind {REFUSED[part]}, which is not supported")
    built = Built("full difference")
    weight = shapes.get("weight", ())
    if not weight and any(part not in ("alpha", *_FULL) for part in parts):
        raise ValueError("changes a weight, which the model's layer does not have")
    if _LORA & parts.keys():
        built = _fitting(lambda given: _lora(given, shapes, scale), parts, _LORA)
    elif _LOHA & parts.keys():
        built = _fitting(lambda given: _loha(given, weight, scale), parts, _LOHA)
    elif _LOKR & parts.keys():
        built = _fitting(lambda given: _lokr(given, weight, scale, lokr_rank), parts, _LOKR)
    elif "oft_blocks" in parts:
        built = _oft(parts, weight)
    elif "oft_R" in parts:
        turns = rotations.turns(parts["oft_R"], prod(weight[1:]), config)
        built = Built("OFT", None, 1.0, {"weight": Turned(turns)})
    if left := sorted(parts.keys() - _EVERYWHERE - _OF.get(built.kind, set())):
        raise ValueError(f"has {left[0]}, which does not belong to a layer of the kind {built.kind}")
    changes = dict(built.changes)
    for part, leaf in _FULL.items():
        if part in parts:
            changes[leaf] = _plus(changes.get(leaf), _full(parts[part], shapes, leaf))
    if "set_weight" in parts:
        _check(parts["set_weight"].numel() == prod(weight), "set_weight", parts["set_weight"], weight)
        changes["weight"] = Replaced(parts["set_weight"].reshape(weight))
        built = Built("replaced weight", changes=changes)
    if "reshape_weight" in parts and tuple(parts["reshape_weight"].int().tolist()) != weight:
        wide = tuple(parts["reshape_weight"].int().tolist())
        _check_inputs(wide, weight)
        raise ValueError(f"widens a weight to {wide}, and the model's is {weight}")
    magnitude, by_name = parts.get("magnitude"), parts.get("dora_scale")
    if magnitude is not None or by_name is not None:
        changes["weight"] = _dora(changes.get("weight"), magnitude, by_name, weight)
        built = Built(f"DoRA of {built.kind}" if built.kind != "LoRA" else "DoRA", built.rank, built.scale)
    if not changes:
        raise ValueError(f"has only {' and '.join(sorted(parts))}, which change nothing")
    return Built(built.kind, built.rank, built.scale, changes)


def _fitting(make: Callable[[Parts], Built], parts: Parts, names: set[str]) -> Built:
    """The layer, after its difference has been made of shapes alone. ValueError where they do not fit."""
    factors = {name: x for name, x in parts.items() if name in names}
    try:
        change = make({name: x.to("meta") for name, x in factors.items()}).changes["weight"]
        assert isinstance(change, LowRank | Dense), "these kinds are added"
        change.delta()
    except (RuntimeError, IndexError, TypeError) as error:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in factors.items())
        raise ValueError(f"has factors whose shapes do not fit each other: {shapes}") from error
    return make(factors)


def _rows(weight: Shape) -> int:
    return weight[0] if weight else 0


def _check(fits: bool, name: str, tensor: Tensor, weight: Shape) -> None:
    if not fits:
        raise ValueError(
            f"has {name} of shape {tuple(tensor.shape)}, which does not fit the model's {weight}"
        )


def _check_inputs(wide: Shape, weight: Shape) -> None:
    """Raises ValueError for a layer with the model's outputs and a multiple of its inputs."""
    inputs, own = prod(wide[1:]), prod(weight[1:])
    if wide[:1] == weight[:1] and inputs > own and inputs % own == 0:
        raise ValueError(
            f"reads {inputs} values where the model's layer reads {own}: this is a control LoRA, which needs "
            "a control image beside the latents, and the model takes none"
        )


def _need(parts: Parts, *names: str) -> tuple[Tensor, ...]:
    for name in names:
        if name not in parts:
            words = {"down": "lora_A (lora_down)", "up": "lora_B (lora_up)"}
            there = " and ".join(words.get(part, part) for part in names if part in parts)
            raise ValueError(f"has half a pair only: {there} without {words.get(name, name)}")
    return tuple(parts[name] for name in names)


def _plus(one: Difference | None, other: Dense) -> Difference:
    if one is None:
        return other
    assert isinstance(one, LowRank | Dense), "what comes before a full difference is added too"
    return Dense(lambda: one.delta() + other.delta().reshape(one.delta().shape))


def _full(tensor: Tensor, shapes: Mapping[str, Shape], leaf: str) -> Dense:
    if leaf not in shapes:
        raise ValueError(f"changes a {leaf}, which the model's layer does not have")
    _check(tensor.numel() == prod(shapes[leaf]), "a full difference", tensor, shapes[leaf])
    return Dense(lambda: tensor.reshape(shapes[leaf]))


def _lora(parts: Parts, shapes: Mapping[str, Shape], scale: Scale) -> Built:
    down, up = _need(parts, "down", "up")
    weight = shapes.get("weight", ())
    rank, factor = len(down), scale(len(down))
    if "mid" in parts:
        mid = parts["mid"]
        down = torch.einsum("pq...,qi->pi...", mid, down.flatten(1))
    a, b = down.flatten(1), up.flatten(1)
    _check_inputs((len(b), a.shape[1]), weight)
    _check(a.shape[1] == prod(weight[1:]), "lora_A (lora_down)", parts["down"], weight)
    _check(b.shape[0] == _rows(weight), "lora_B (lora_up)", up, weight)
    if b.shape[1] != len(a):
        raise ValueError(f"has factors of two ranks, {len(a)} and {b.shape[1]}")
    changes: dict[str, Difference] = {"weight": LowRank(a, b, factor)}
    if "up_bias" in parts:
        changes["bias"] = _full(factor * parts["up_bias"], shapes, "bias")
    return Built("LoRA", rank, factor, changes)


def _loha(parts: Parts, weight: Shape, scale: Scale) -> Built:
    w1a, w1b, w2a, w2b = _need(parts, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    if ("hada_t1" in parts) != ("hada_t2" in parts):
        _need(parts, "hada_t1", "hada_t2")
    rank, factor = len(w1b), scale(len(w1b))
    t1, t2 = parts.get("hada_t1"), parts.get("hada_t2")
    size = prod(weight)
    rows, columns = (
        (w1a.shape[0], w1b.shape[1]) if t1 is None else (w1a.shape[1], w1b.shape[1] * t1[0, 0].numel())
    )
    _check(rows * columns == size and rows == _rows(weight), "hada_w1_a", w1a, weight)

    def make() -> Tensor:
        return factor * (_factor(w1a, w1b, t1) * _factor(w2a, w2b, t2)).reshape(_rows(weight), -1)

    return Built("LoHa", rank, factor, {"weight": Dense(make)})


def _factor(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """a @ b, or its Tucker form for a convolution."""
    return a @ b if core is None else torch.einsum("ij...,jr,ip->pr...", core, b, a)


def _lokr(parts: Parts, weight: Shape, scale: Scale, rank: int | None) -> Built:
    """Two full factors have the scale 1 whatever alpha says, except in PEFT, which has a rank for them."""
    first, second = _half(parts, "lokr_w1"), _half(parts, "lokr_w2")
    rank = second.rank or first.rank or rank
    factor = 1.0 if rank is None else scale(rank)
    columns = weight[1] if len(weight) > 1 else 1
    fits = first.rows * second.rows == _rows(weight) and first.columns * second.columns == prod(weight[1:])
    _check(fits and columns % first.columns == 0, first.name, parts[first.name], weight)

    def make() -> Tensor:
        outer = first.make()[:, :, None]
        inner = second.make().reshape(second.rows, columns // first.columns, -1).contiguous()
        return factor * torch.kron(outer, inner).reshape(_rows(weight), -1)

    return Built("LoKr", rank, factor, {"weight": Dense(make)})


@dataclass(frozen=True)
class _Half:
    """One factor of a LoKr: in full, as a product, or with a core for a convolution."""

    name: str
    rows: int
    columns: int
    rank: int | None
    make: Callable[[], Tensor]


def _half(parts: Parts, name: str) -> _Half:
    if name in parts:
        whole = parts[name]
        return _Half(name, len(whole), whole[0].numel(), None, lambda: whole)
    a, b = _need(parts, f"{name}_a", f"{name}_b")
    core = parts.get(f"lokr_t{name[-1]}")
    if core is None:
        return _Half(f"{name}_a", len(a), b.shape[1], len(b), lambda: a @ b)
    return _Half(
        f"{name}_a", a.shape[1], b.shape[1] * core[0, 0].numel(), len(b), lambda: _factor(a, b, core)
    )


def _oft(parts: Parts, weight: Shape) -> Built:
    blocks = parts["oft_blocks"]
    if blocks.ndim != 3:
        raise ValueError("is of the kind BOFT, which is not supported")
    _check(
        blocks.shape[1] == blocks.shape[2] and len(blocks) * len(blocks[0]) == _rows(weight),
        "oft_blocks",
        blocks,
        weight,
    )
    q = blocks - blocks.transpose(1, 2)
    limit = float(parts["alpha"]) * _rows(weight) if "alpha" in parts else 0.0
    if limit > 0 and (norm := q.norm() + 1e-8) > limit:
        q = q * (limit / norm)
    one = torch.eye(blocks.shape[1], dtype=q.dtype)
    turns = (one + q) @ torch.linalg.inv(one - q)
    rescale = parts.get("rescale")
    if rescale is not None:
        _check(rescale.numel() == _rows(weight), "rescale", rescale, weight)
        rescale = rescale.reshape(-1)
    return Built("OFT", None, 1.0, {"weight": Oft(turns.transpose(1, 2), rescale)})


def _dora(change: Difference | None, magnitude: Tensor | None, by_name: Tensor | None, weight: Shape) -> Dora:
    """PEFT's lengths are those of rows.

    LyCORIS' are of rows or columns, as their shape tells; a square weight's lie along the dimension that is
    not one.
    """
    if not isinstance(change, LowRank | Dense):
        raise ValueError("has lengths of rows (DoRA) without a change")
    lengths = magnitude if magnitude is not None else by_name
    assert lengths is not None, "one of the two is there"
    by_column = magnitude is None and lengths.ndim > 1 and lengths.shape[0] != _rows(weight)
    wanted = weight[1] if by_column and len(weight) > 1 else _rows(weight)
    _check(lengths.numel() == wanted, "DoRA's lengths", lengths, weight)
    return Dora(change, lengths.reshape(-1), by_column)
