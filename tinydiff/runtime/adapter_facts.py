"""The released models that an adapter fits, found by the names and shapes of its layers alone.

Trainers name a layer by the model's own name or by the original one, with dots or underscores, after a
prefix. Underscored names cannot be split, so both spellings of every known layer are looked up.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

from tinydiff.keymap import Shape, stored_rows
from tinydiff.models import released
from tinydiff.models.classes import RECORDS
from tinydiff.models.layouts.recognise import LAYOUTS, config_from

PREFIX = re.compile(
    r"(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer(?:_2)?\.|unet\."
    r"|lora_unet__?|lora_transformer_|lycoris_|oft_unet_)+"
)
"""What trainers write before the name of a denoiser's layer."""

TEXT = re.compile(r"(?:base_model\.model\.)?(?:lora_te\d?_|text_encoders?(?:_\d)?\.)")
"""What stands before the name of a text encoder's layer."""

PART = re.compile(
    r"[._](?P<part>lora_(?:A|B|down|up|mid|magnitude_vector)(?:\.\w+?)?|lora\d?\.(?:down|up)"
    r"|lora_linear_layer\.(?:down|up)|lokr_\w+|hada_\w+|oft_\w+|boft_\w+|dora_scale|diff(?:_[bm])?|set_weight|alpha)"
    r"(?:\.weight|\.bias)?$"
)
"""The end of a key, which says what of a layer's change it is."""

KINDS = {
    "LoKr": "lokr_",
    "LoHa": "hada_",
    "OFT": "oft_",
    "BOFT": "boft_",
    "DoRA": "dora_scale",
    "difference": "diff",
}
"""Kind -> the first letters of parts that only it has."""

LOW = (
    *("lora_A", "lora_down", "lora.down", "lora1.down", "lora2.down", "lora_linear_layer.down"),
    *("hada_w1_b", "lokr_w1_b", "lokr_w2_b"),
)
"""Parts whose first dimension is the rank."""


@dataclass(frozen=True)
class AdapterFacts:
    """kinds: in words. layers: how many are changed. ranks: all that occur. naming: whose names the layers
    have, None where they are of no known model. models: the released models that have most of the layers.
    strangers: layers that none of these models has.
    """

    kinds: tuple[str, ...]
    layers: int
    ranks: tuple[int, ...]
    naming: str | None
    models: tuple[str, ...]
    strangers: tuple[str, ...]


def adapter_facts(shapes: Mapping[str, Shape]) -> AdapterFacts:
    """The facts of an adapter's header."""
    layers: dict[str, dict[str, Shape]] = defaultdict(dict)
    for key, shape in shapes.items():
        if match := PART.search(key):
            layers[key[: match.start()]][match["part"]] = shape
    parts = {part for each in layers.values() for part in each}
    kinds = [kind for kind, start in KINDS.items() if any(part.startswith(start) for part in parts)]
    if any(part.startswith("lora") for part in parts):
        kinds.insert(0, "LoRA")
    ranks = {
        shape[0] for each in layers.values() for part, shape in each.items() if shape and part.startswith(LOW)
    }
    own = {name: _ends(each) for name, each in layers.items() if not TEXT.match(name)}
    naming, models, strangers = _models(own)
    return AdapterFacts(tuple(kinds), len(layers), tuple(sorted(ranks)), naming, models, strangers)


def _ends(parts: Mapping[str, Shape]) -> tuple[int | None, int | None]:
    """(outputs, inputs) of a layer, as far as a pair of low rank tells."""
    low = next(
        (s for part, s in parts.items() if re.match(r"lora(_A|_down|\d?\.down|_linear_layer\.down)", part)),
        (),
    )
    high = next(
        (s for part, s in parts.items() if re.match(r"lora(_B|_up|\d?\.up|_linear_layer\.up)", part)), ()
    )
    return (high[0] if high else None), (prod(low[1:]) if low else None)


def _models(
    layers: Mapping[str, tuple[int | None, int | None]],
) -> tuple[str | None, tuple[str, ...], tuple[str, ...]]:
    """(naming, models, layers that they lack) of those that have most of the layers, and at least half."""
    best: tuple[int, str | None, tuple[str, ...], tuple[str, ...]] = (0, None, (), ())
    for naming, models, known in _known():
        lacks = tuple(name for name, ends in layers.items() if not _fits(known.get(_bare(name)), ends))
        has = len(layers) - len(lacks)
        if has > best[0]:
            best = has, naming, models, lacks
        elif has and has == best[0] and naming == best[1]:
            either = {*best[2], *models}
            best = has, naming, tuple(name for name in released.COMPONENTS if name in either), lacks
    return best[1:] if 2 * best[0] >= len(layers) else (None, (), tuple(layers))


def _bare(name: str) -> str:
    match = PREFIX.match(name)
    return name[match.end() if match else 0 :].replace(".", "_")


def _fits(shape: Shape | None, ends: tuple[int | None, int | None]) -> bool:
    return shape is not None and all(
        end in (None, size) for end, size in zip(ends, (shape[0], prod(shape[1:])), strict=True)
    )


@cache
def _known() -> tuple[tuple[str, tuple[str, ...], Mapping[str, Shape]], ...]:
    """(naming, models, underscored name of a layer -> its weight's shape) of each released denoiser."""
    return tuple(_tables())


def _tables() -> Iterator[tuple[str, tuple[str, ...], Mapping[str, Shape]]]:
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    entries: dict[tuple[str, str], Mapping[str, object]] = {}
    for model, components in released.COMPONENTS.items():
        class_name, fields = components["transformer"]
        alike[class_name, repr(fields)].append(model)
        entries[class_name, repr(fields)] = fields
    for (class_name, at), models in alike.items():
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
                yield layout.name, tuple(models), names
