"""The released models that an adapter fits, found by the names and shapes of its layers alone.

Trainers name a layer by the model's own name or by the original one, with dots or underscores, after a
prefix. Underscored names cannot be split, so both spellings of every known layer are looked up.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

from tinydiff.io.lora.keys import parse
from tinydiff.keymap import Shape, stored_rows
from tinydiff.models import registry, released
from tinydiff.models.classes import RECORDS
from tinydiff.models.layouts.recognise import LAYOUTS, config_from
from tinydiff.runtime.components import SHIPPED

KINDS = {
    "LoRA": ("down", "up"),
    "LoKr": ("lokr_",),
    "LoHa": ("hada_",),
    "OFT": ("oft_",),
    "BOFT": ("boft_",),
    "DoRA": ("dora_scale", "magnitude"),
    "difference": ("diff",),
}
"""Kind -> the first letters of parts that only it has (`io.lora.keys`)."""

LOW = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
"""Parts whose first dimension is the rank."""


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter file is.

    kinds: in words. layers: how many are changed. ranks: all that occur. naming:
    whose names the layers have, None where they are of no known model. models: the released models that have
    most of the layers. strangers: layers that none of these models has.
    """

    kinds: tuple[str, ...]
    layers: int
    ranks: tuple[int, ...]
    naming: str | None
    models: tuple[str, ...]
    strangers: tuple[str, ...]


def adapter_facts(shapes: Mapping[str, Shape]) -> AdapterFacts:
    """The facts of an adapter's header."""
    layers: dict[tuple[str, int | None], dict[str, Shape]] = defaultdict(dict)
    for key, shape in shapes.items():
        if (read := parse(key)) is not None:
            layers[read.stem, read.encoder][read.part] = shape
    parts = {part for each in layers.values() for part in each}
    kinds = tuple(kind for kind, starts in KINDS.items() if any(part.startswith(starts) for part in parts))
    ranks = {shape[0] for each in layers.values() for part, shape in each.items() if shape and part in LOW}
    own = {stem: _ends(each) for (stem, encoder), each in layers.items() if encoder is None}
    naming, models, strangers = _models(own)
    return AdapterFacts(kinds, len(layers), tuple(sorted(ranks)), naming, models, strangers)


def _ends(parts: Mapping[str, Shape]) -> tuple[int | None, int | None]:
    """(outputs, inputs) of a layer, as far as a pair of low rank tells."""
    low, high = parts.get("down", ()), parts.get("up", ())
    return (high[0] if high else None), (prod(low[1:]) if low else None)


def _models(
    layers: Mapping[str, tuple[int | None, int | None]],
) -> tuple[str | None, tuple[str, ...], tuple[str, ...]]:
    """(naming, models, layers that they lack) of those that have most of the layers, and at least half.

    Where several architectures have all of them, as HunyuanVideo has FLUX.1's, the smallest is taken: an
    adapter mostly changes all blocks.
    """
    lacks = {
        each: tuple(
            name for name, ends in layers.items() if not _fits(each.layers.get(name.replace(".", "_")), ends)
        )
        for each in _layer_tables()
    }
    fewest = min(map(len, lacks.values()))
    if 2 * fewest > len(layers):
        return None, (), tuple(layers)
    best = min((each for each in lacks if len(lacks[each]) == fewest), key=lambda each: len(each.layers))
    matching = {
        model
        for each in lacks
        if (each.naming, each.class_name) == (best.naming, best.class_name) and len(lacks[each]) == fewest
        for model in each.models
    }
    return best.naming, tuple(model for model in _denoisers() if model in matching), lacks[best]


def _fits(shape: Shape | None, ends: tuple[int | None, int | None]) -> bool:
    return shape is not None and all(
        end in (None, size) for end, size in zip(ends, (shape[0], prod(shape[1:])), strict=True)
    )


@dataclass(frozen=True, eq=False)
class LayerTable:
    """A denoiser of released models, in the names of one layout.

    layers: underscored name of a layer -> its weight's shape.
    """

    naming: str
    class_name: str
    models: tuple[str, ...]
    layers: Mapping[str, Shape]


@cache
def _layer_tables() -> tuple[LayerTable, ...]:
    """The released denoisers, in each of their layouts."""
    return tuple(_tables())


def _denoisers() -> Mapping[str, tuple[str, Mapping[str, object]]]:
    """Model -> (class, entries of config.json) of its denoiser: the released ones, and the package's own."""
    own = json.loads((SHIPPED / "transformer" / "config.json").read_text())
    denoisers = {model: components["transformer"] for model, components in released.COMPONENTS.items()}
    return {**denoisers, registry.SHIPPED: (own.pop("_class_name"), own)}


def _tables() -> Iterator[LayerTable]:
    models_of: dict[tuple[str, str], list[str]] = defaultdict(list)
    entries: dict[tuple[str, str], Mapping[str, object]] = {}
    for model, (class_name, fields) in _denoisers().items():
        models_of[class_name, repr(fields)].append(model)
        entries[class_name, repr(fields)] = fields
    for (class_name, at), models in models_of.items():
        config = config_from(class_name, entries[class_name, at])
        rows = list(RECORDS[class_name].spec(config))
        for layout in LAYOUTS:
            if layout.class_name == class_name:
                stored = stored_rows(layout.keys(config), rows)
                names = {
                    key.removesuffix(".weight").replace(".", "_"): shape
                    for key, shape in stored.items()
                    if key.endswith(".weight")
                }
                yield LayerTable(layout.name, class_name, tuple(models), names)
