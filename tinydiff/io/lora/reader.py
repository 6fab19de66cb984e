"""From a LoRA file to the differences of a model's weights."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tinydiff.io.lora import archive, kinds, scales
from tinydiff.io.lora.differences import Difference, joined
from tinydiff.io.lora.keys import Key, look, parse
from tinydiff.io.lora.names import Component, Site
from tinydiff.records import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapter:
    """A LoRA file, read for one model.

    layout: how the file names the layers, in words. targets: component -> name of a weight -> what is done to
    it. kinds: of its layers, the commonest first. ranks, scales: those that its layers have, from the least.
    unmatched: keys of the file that fit nothing of the model; only in lenient reading there are any. others:
    keys of components that were not asked for.
    """

    layout: str
    targets: Mapping[str, Mapping[str, Difference]]
    kinds: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    unmatched: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def summary(self) -> str:
        """What matched, in words."""
        where = ", ".join(f"{len(each)} weights of {name}" for name, each in self.targets.items())
        ranks = f", rank {_span(self.ranks)}" if self.ranks else ""
        return f"{' and '.join(self.kinds)} ({self.layout}): {where}{ranks}, scale {_span(self.scales)}"


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


Place = tuple[str, str]
"""(component, layer in underscores)."""


class Layer(NamedTuple):
    """A layer of the file in a component: its name, and by part its keys and tensors.

    layouts: how its keys are written.
    """

    stem: str
    layouts: list[str]
    keys: dict[str, str]
    parts: dict[str, Tensor]


class Piece(NamedTuple):
    """What a layer of the file does to some rows of a weight."""

    layer: str
    at: int
    size: int
    difference: Difference
    own: bool


def read_adapter(
    file: Path,
    components: Mapping[str, Component],
    alpha: float | None = None,
    lenient: bool = False,
    targets: Collection[str] | None = None,
) -> Adapter:
    """Read a LoRA file for a model's components, by name.

    alpha: of files that record none. lenient: keys that fit nothing are returned and not refused. targets:
    the components to change; None takes all that the file has. Raises UserError for a file that is broken or
    does not fit.
    """
    try:
        tensors, metadata = archive.read(file)
        recorded = scales.read(file, metadata, alpha)
        _check_numbers(tensors)
        layers, unmatched, others = _layers(tensors, components, targets)
        if unmatched and not (lenient and layers):
            raise ValueError(_misfit(unmatched, len(tensors)))
        if not layers:
            raise ValueError(f"changes nothing of {' and '.join(targets or components)}")
        return _adapter(layers, components, recorded, tuple(unmatched), tuple(others))
    except ValueError as error:
        raise UserError("lora_path", f"lora_path: {str(file)!r} {error}") from error


def _check_numbers(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            what = "a scale that is not a number" if key.endswith(".alpha") else "values that are not numbers"
            raise ValueError(f"has {what} in {key}")
        if not tensor.numel():
            raise ValueError(f"has no values in {key}")


def _adapter(
    layers: Mapping[Place, Layer],
    components: Mapping[str, Component],
    recorded: scales.Scales,
    unmatched: tuple[str, ...],
    others: tuple[str, ...],
) -> Adapter:
    found = {
        place: _build(place[0], layer, components[place[0]], recorded) for place, layer in layers.items()
    }
    built = [each for each, _ in found.values()]
    ranks = tuple(sorted({each.rank for each in built if each.rank is not None}))
    if recorded.own and len(ranks) > 1:
        raise ValueError(f"has one alpha in its metadata for layers of ranks {', '.join(map(str, ranks))}")
    targets = {
        name: _placed(component, {stem: each for (owner, stem), each in found.items() if owner == name})
        for name, component in components.items()
    }
    return Adapter(
        layout=Counter(name for layer in layers.values() for name in layer.layouts).most_common(1)[0][0],
        targets={name: each for name, each in targets.items() if each},
        kinds=tuple(kind for kind, _ in Counter(each.kind for each in built).most_common()),
        ranks=ranks,
        scales=tuple(sorted({each.scale for each in built})),
        unmatched=unmatched,
        others=others,
    )


def _misfit(keys: list[str], total: int) -> str:
    names = ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
    words = look(keys)
    looks = f"; they look like a LoRA for {words}" if words else ""
    return f"does not fit the model: {len(keys)} of {total} keys match no weight ({names}){looks}"


def _layers(
    tensors: Mapping[str, Tensor], components: Mapping[str, Component], targets: Collection[str] | None
) -> tuple[dict[Place, Layer], list[str], list[str]]:
    """(the layers of the file, keys that match nothing, keys of components that are no target)."""
    parsed = {name: parse(name) for name in tensors}
    second = any(key is not None and key.second for key in parsed.values())
    layers: dict[Place, Layer] = {}
    unmatched, others = [], []
    for name, key in parsed.items():
        owners = list(_owners(key, components, second)) if key else []
        wanted = [owner for owner in owners if targets is None or owner in targets]
        if key is None or not wanted:
            (others if owners else unmatched).append(name)
            continue
        for owner in wanted:
            place = (owner, key.stem.replace(".", "_"))
            layer = layers.setdefault(place, Layer(key.stem, [], {}, {}))
            if key.part in layer.keys:
                raise ValueError(f"says the same twice: {layer.keys[key.part]} and {name}")
            layer.keys[key.part] = name
            layer.parts[key.part] = tensors[name]
            layer.layouts.append(key.layout)
    return layers, unmatched, others


def _owners(key: Key, components: Mapping[str, Component], second: bool) -> Iterator[str]:
    """The components that a key is for.

    second: whether the file has keys of the second denoiser; without them, the keys are for both.
    """
    if key.encoder is None:
        owners = [
            name
            for name, component in components.items()
            if component.role == "dit"
            and (not second or (name == "transformer_2") == key.second)
            and component.find(key.stem)
        ]
        others = (name for name in components if not name.startswith(("transformer", "text_encoder")))
        yield from owners or (name for name in others if components[name].find(key.stem))
        return
    encoders = [name for name, component in components.items() if component.role == "text_encoder"]
    named = "text_encoder" if key.encoder == 1 else f"text_encoder_{key.encoder}"
    for name in sorted(encoders, key=lambda name: name != named):
        if components[name].find(key.stem):
            yield name
            return


def _build(
    name: str, layer: Layer, component: Component, recorded: scales.Scales
) -> tuple[kinds.Built, dict[str, Site]]:
    """What a layer does, and to what. ValueError naming the layer."""
    sites, stem = component.find(layer.stem), layer.stem
    own = scales.of_tensor(layer.parts["alpha"], stem) if "alpha" in layer.parts else None
    prefix = name.removesuffix("_2") if component.role == "dit" else name

    def scale(rank: int) -> float:
        if own is not None:
            return own / rank
        found = recorded.configured(prefix, stem, rank)
        return 1.0 if found is None else found

    try:
        shapes = {leaf: site.shape for leaf, site in sites.items()}
        lokr_rank = None if own is not None else recorded.rank(prefix, stem)
        built = kinds.build(layer.parts, shapes, scale, lokr_rank, recorded.config(prefix))
        if missing := next((leaf for leaf in built.changes if leaf not in sites), None):
            raise ValueError(f"changes a {missing}, which the model's layer does not have")
    except ValueError as error:
        raise ValueError(f"does not fit the model: {stem} {error}") from error
    return built, sites


def _placed(
    component: Component, built: Mapping[str, tuple[kinds.Built, dict[str, Site]]]
) -> dict[str, Difference]:
    """Name of a weight -> what the layers of the file do to it."""
    pieces: dict[str, list[Piece]] = {}
    for stem, (each, sites) in built.items():
        for leaf, difference in each.changes.items():
            for row, cuts in sites[leaf].runs.items():
                for run in cuts:
                    whole = len(sites[leaf].runs) == len(cuts) == 1 and run.at == 0
                    whole = whole and run.size == (sites[leaf].shape or (1,))[0]
                    try:
                        cut = difference if whole else difference.cut(run.at, run.size)
                    except ValueError as error:
                        raise ValueError(f"cannot be split: {stem} changes {row}, and {error}") from error
                    pieces.setdefault(row, []).append(Piece(stem, run.into, run.size, cut, sites[leaf].own))
    return {row: _joined(row, each, component) for row, each in pieces.items()}


def _joined(row: str, pieces: list[Piece], component: Component) -> Difference:
    """One difference of the pieces of a weight.

    Some files of Z-Image hold a layer twice, fused and split: then the split one counts.
    """
    if any(piece.own for piece in pieces) and not all(piece.own for piece in pieces):
        left = dict.fromkeys(piece.layer for piece in pieces if not piece.own)
        log.warning("LoRA: %s says what %s says again, which is not read", row, " and ".join(left))
        pieces = [piece for piece in pieces if piece.own]
    ends = sorted((piece.at, piece.at + piece.size, piece.layer) for piece in pieces)
    for (_, end, one), (start, _, other) in pairwise(ends):
        if start < end:
            raise ValueError(f"changes {row} twice, in {one} and in {other}")
    shape = component.rows[row].shape
    return joined([(piece.at, piece.size, piece.difference) for piece in pieces], shape[0] if shape else 1)
