"""What a file of weights is, from its keys, shapes and metadata alone.

    shapes, metadata = io.archive.header(path)
    (found,) = recognise(shapes, metadata)      # several where one file holds several components
    record = RECORDS[found.class_name]
    config = config_from(found.class_name, found.entries)
    load_weights(path, record.spec(config), dtype, keys=found.keys(config))

A config that stands beside the file, or that of the released model, may take the place of `entries`: shapes
do not tell everything (the scale of latents, the base of a rotary embedding). `found.models` are the released
models with a component of these very shapes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from tinydiff.entries import Entries, typed
from tinydiff.keymap import KeyMap, Shape
from tinydiff.models import released
from tinydiff.models.classes import RECORDS
from tinydiff.models.family import Record, Role
from tinydiff.models.layouts import (
    autoencoders,
    encoders,
    flux,
    flux2,
    hunyuan,
    ltx2,
    ovis,
    same,
    sd3,
    wan,
    z_image,
)
from tinydiff.models.layouts.table import Layout, Sizes
from tinydiff.ops.network import Config
from tinydiff.records import UserError

LAYOUTS: tuple[Layout, ...] = (
    *flux.LAYOUTS,
    *flux2.LAYOUTS,
    *ovis.LAYOUTS,
    *sd3.LAYOUTS,
    *z_image.LAYOUTS,
    *same.LAYOUTS,
    *wan.LAYOUTS,
    *hunyuan.LAYOUTS,
    *ltx2.LAYOUTS,
    *autoencoders.LAYOUTS,
    *encoders.LAYOUTS,
)

log = logging.getLogger(__name__)
ROLES: tuple[Role, ...] = ("dit", "text_encoder", "image_encoder", "vae")
"""In the order in which components are told."""

PREFIXES = (
    *("model.diffusion_model.", "diffusion_model.", "net.", "first_stage_model.", "vae."),
    r"text_encoders\.[^.]+\.transformer\.",
    r"conditioner\.embedders\.\d+\.(?:transformer|model)\.",
    r"cond_stage_model\.(?:transformer|model)\.",
)
"""What may stand before all keys of a component, as regular expressions."""

REFUSED = {
    "Chroma": "distilled_guidance_layer",
    "LTX-Video": "adaln_single.emb.timestep_embedder",
    "Wan-VACE": "vace_patch_embedding",
    "Wan2.2-S2V": "casual_audio_encoder",
    "Wan2.2-Animate": "face_adapter",
    "Wan-Fun camera control": "control_adapter",
    "Wan-Fun control": "ref_conv",
    "Qwen-Image 2.1": "txt_in.text_norm",
    "Stable Diffusion 1, 2 or XL": "input_blocks.0.0",
}
"""Architectures that look like ours or are often met, and are not run here -> a name that tells them."""

NEWER = {"LTX-Video": "audio_adaln_single"}
"""One of these architectures -> a name that tells its newer kind, which is run: LTX-2."""

LORA = re.compile(
    r"[._](lora_(?:[AB]|down|up|mid|linear_layer)|lora[12]?\.(?:down|up)|lokr_w[12]|hada_w[12]"
    r"|oft_(?:blocks|R)"
    r"|boft_R|diff(?:_[bm])?$|dora_scale|set_weight)"
)
"""Parts of keys that only adapters have."""

QUANTISED = re.compile(
    r"(?:^|\.)(scaled_fp8|scale_weight|comfy_quant|weight_scale(?:_2)?|weight_global_scale|qweight"
    r"|wscales|SCB"
    r"|absmax|_weight_qdata|weight\._data|sign_mantissa)$"
)
"""Keys that stand beside quantised weights."""


@dataclass(frozen=True)
class Found:
    """A component in a file.

    role: what it is to a model. class_name: in `models.classes.RECORDS`; another class of the same record may
    stand in its place. layout: the layout's name. prefix: what stands before its keys. entries: config.json
    as far as the shapes tell. models: the released models that have a component of these shapes.
    """

    role: Role
    class_name: str
    layout: Layout
    prefix: str
    entries: Entries
    models: tuple[str, ...]

    def keys(self, config: object) -> KeyMap:
        """Where the rows of a network with this config stand in the file."""
        return self.layout.keys(config, self.prefix)


def recognise(
    shapes: Mapping[str, Shape], metadata: Mapping[str, str] | None = None, name: str = "the file"
) -> tuple[Found, ...]:
    """The components of a file, the denoiser first. name: the file's, for messages.

    Raises UserError for a file that has no weights, no known layout, or several possible ones.
    """
    _check_weights(shapes, metadata or {}, name)
    found: list[Found] = []
    left: list[str] = []
    for prefix, part in _components(shapes):
        why: list[str] = []
        fits = list(_fits(Sizes(part), prefix, why))
        if why and not fits:
            raise _refused(name, f"looks like {why[0]}")
        if len({each.class_name for each in fits}) > 1:
            names = " or ".join(f"a {each.class_name} ({each.layout.name} layout)" for each in fits)
            raise _refused(name, f"could be {names}; a directory with its config.json tells")
        found += fits[:1]
        if not fits:
            left += [prefix + key for key in part]
    if not found:
        known = ", ".join(dict.fromkeys(layout.class_name for layout in LAYOUTS))
        some = ", ".join(list(shapes)[:5])
        raise _refused(
            name, f"has a layout that is not known ({len(shapes)} keys: {some}, ...); known are {known}"
        )
    if left:
        log.info(
            "%s: %d weights of no component that is known are not read (%s, ...)", name, len(left), left[0]
        )
    return tuple(sorted(found, key=lambda each: ROLES.index(each.role)))


def key_maps(record: Record, config: object) -> tuple[KeyMap, ...]:
    """Where the rows of a network stand in files of each layout that holds it."""
    return tuple(dict.fromkeys(layout.keys(config) for layout in layouts_of(record)))


def layouts_of(record: Record) -> list[Layout]:
    """The layouts that hold such a network."""
    record = getattr(record, "plain", None) or record
    return [layout for layout in LAYOUTS if RECORDS[layout.class_name] is record]


def config_from(class_name: str, entries: Entries) -> Config:
    """The network's Config of entries of a config.json. ValueError where they make none."""
    record = RECORDS[class_name]
    if record.read is not None:
        return record.read(entries, class_name)
    return record.config(**typed(record.config, dict(entries)))


def _refused(name: str, why: str) -> UserError:
    return UserError("model_path", f"model_path: {name!r} {why}")


def _check_weights(shapes: Mapping[str, Shape], metadata: Mapping[str, str], name: str) -> None:
    if not shapes:
        raise _refused(name, "holds no tensors")
    adapters = [key for key in shapes if LORA.search(key)]
    if adapters or "ss_network_module" in metadata:
        layers = len({LORA.split(key)[0] for key in adapters})
        of = f"{layers} layer{'s' * (layers != 1)}"
        raise _refused(name, f"is a LoRA of {of}, not weights; --lora-path takes it")
    if beside := [key for key in shapes if QUANTISED.search(key)]:
        raise _refused(name, f"is quantised ({beside[0]}), which is not read; take the file in bf16 or fp16")

    def has(part: str) -> bool:
        return any(f".{part}." in f".{key}." for key in shapes)

    for other, sign in REFUSED.items():
        if has(sign) and not (other in NEWER and has(NEWER[other])):
            raise _refused(name, f"is of {other}, whose single files are not read")


def prefixes(shapes: Mapping[str, Shape]) -> list[str]:
    """What stands before the keys of each component in a file."""
    return [prefix for prefix, _ in _components(shapes)]


def _components(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, dict[str, Shape]]]:
    """(prefix, the tensors below it) of each component, and of what has no prefix."""
    pattern = re.compile("|".join(f"(?:{each})" for each in PREFIXES))
    parts: dict[str, dict[str, Shape]] = {}
    for key, shape in shapes.items():
        found = pattern.match(key)
        prefix = found[0] if found else ""
        parts.setdefault(prefix, {})[key.removeprefix(prefix)] = shape
    yield from parts.items()


def _fits(part: Sizes, prefix: str, why: list[str]) -> Iterator[Found]:
    """why: gets a sentence for each layout whose keys are there, and whose shapes make no network."""
    for layout in LAYOUTS:
        if all(map(part.has, layout.signs)) and not any(map(part.has, layout.lacks)):
            try:
                entries = layout.entries(part)
                config = config_from(layout.class_name, entries)
            except KeyError as error:
                why.append(f"a {layout.class_name}, but lacks {error}")
                continue
            except (LookupError, ValueError, TypeError, ArithmeticError) as error:
                why.append(f"a {layout.class_name}, but its shapes make no such network: {error}")
                continue
            models = tuple(_released(layout.class_name, entries, config))
            yield Found(RECORDS[layout.class_name].role, layout.class_name, layout, prefix, entries, models)


def _released(class_name: str, entries: Entries, config: object) -> Iterator[str]:
    """The released models with a component of these shapes, and of what else the file says it has.

    An output head that it has not may be tied or left out.
    """
    record = RECORDS[class_name]
    said = [name for name, value in entries.items() if value is True and name != "tie_word_embeddings"]
    wanted = _shapes(class_name, config)

    @cache
    def fits(component: tuple[str, str]) -> bool:
        other = config_from(component[0], fields[component])
        return all(getattr(other, name) for name in said) and _shapes(component[0], other) == wanted

    fields = {
        (kind, repr(each)): each for parts in released.COMPONENTS.values() for kind, each in parts.values()
    }
    for model, parts in released.COMPONENTS.items():
        if any(RECORDS[kind] is record and fits((kind, repr(each))) for kind, each in parts.values()):
            yield model


def _shapes(class_name: str, config: object) -> dict[str, Shape]:
    return {row.name: row.shape for row in RECORDS[class_name].spec(config)}
