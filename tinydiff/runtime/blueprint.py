"""From a folder to a model in memory: what the folder holds is read and checked first, then its weights are streamed in.

A `Blueprint` costs only the reading of a few JSON files, so that a request is refused before gigabytes are moved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tinydiff.config import ModelOptions
from tinydiff.io import hub
from tinydiff.io.tokenizer import Tokenizer, load_tokenizer
from tinydiff.io.weights import load_weights
from tinydiff.models import registry, wan
from tinydiff.models.autoencoders import wan as wan_vae
from tinydiff.models.encoders import clip_vision, t5
from tinydiff.models.registry import ReleasedModel
from tinydiff.parallel.plan import Plan
from tinydiff.records import UserError, nearest

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent.parent / "shapes"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Kind:
    """How a component class of model_index.json is run. strict: every field of its config.json must be known."""

    module: ModuleType
    role: str
    strict: bool
    rename: Callable[[str], str | None] | None = None


def _rename_wan(key: str) -> str | None:
    """Released Wan files may carry a norm that nothing reads, and FastWan's the gates of sparse attention, which full attention has not."""
    return None if key.endswith(("norm_added_q.weight", "to_gate_compress.weight", "to_gate_compress.bias")) else key


NETS = {
    "WanTransformer3DModel": Kind(wan, "dit", True, _rename_wan),
    "AutoencoderKLWan": Kind(wan_vae, "vae", True),
    "UMT5EncoderModel": Kind(t5, "text_encoder", False),
    "T5EncoderModel": Kind(t5, "text_encoder", False),
    "CLIPVisionModel": Kind(clip_vision, "image_encoder", False, clip_vision.row_name),
    "CLIPVisionModelWithProjection": Kind(clip_vision, "image_encoder", False, clip_vision.row_name),
}


@dataclass(frozen=True)
class NetPlan:
    """One network before its weights are there."""

    name: str
    kind: Kind
    folder: Path
    config: Any
    dtype: torch.dtype
    plan: Plan


@dataclass(frozen=True)
class Blueprint:
    """A model before its weights are there."""

    row: ReleasedModel
    named: bool
    """Whether the row was found by name; if only by shape, the folder's own scheduler settings hold."""
    folder: Path
    nets: Mapping[str, NetPlan]
    scheduler: Mapping[str, Any]
    options: Mapping[str, Any]
    device: torch.device
    compiled: bool
    tiling: bool


@dataclass(frozen=True)
class Net:
    """One network, ready: its functions are in `module`, its numbers in `weights`."""

    module: ModuleType
    config: Any
    plan: Plan
    weights: dict[str, Tensor]
    dtype: torch.dtype


@dataclass(frozen=True)
class Model:
    """A model in memory, fit to answer any number of requests."""

    blueprint: Blueprint
    nets: Mapping[str, Net]
    tokenizer: Tokenizer


def config_from(kind: Kind, path: Path) -> Any:
    """The network's `Config` from its config.json. Raises UserError for a field whose meaning is unknown, or a value out of range."""
    entries = {name: value for name, value in hub.read_json(path).items() if not name.startswith("_")}
    known = {f.name for f in fields(kind.module.Config)}
    if kind.strict and (unknown := sorted(entries.keys() - known)):
        raise UserError("model_path", f"{path}: field {unknown[0]!r} is not known to {kind.module.__name__}{nearest(unknown[0], known)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in entries.items() if name in known}
    try:
        return kind.module.Config(**values)
    except (ValueError, TypeError) as error:
        raise UserError("model_path", f"{path}: {error}") from error


def read(options: ModelOptions) -> Blueprint:
    """Read and check what `options` name, everything but the weights."""
    shipped = options.model_path == registry.SHIPPED
    folder = SHIPPED if shipped else hub.resolve(options.model_path, options.revision)
    index = hub.read_index(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _check_names(index, options)

    nets = {}
    for name, (_, class_name) in index.components.items():
        if name in ("scheduler", "tokenizer", "image_processor"):
            continue
        kind = NETS.get(class_name)
        if kind is None:
            raise UserError("model_path", f"model_path: component {name!r} is a {class_name}, which is not supported; known are {', '.join(NETS)}")
        at = hub.resolve(options.component_paths[name], field=f"{name}_path") if name in options.component_paths else folder / name
        config = config_from(kind, at / "config.json")
        backend = options.component_attention_backends.get(name, options.attention_backend)
        nets[name] = NetPlan(name, kind, at, config, _dtype(name, kind, options, device), Plan(attention=backend))

    entries = hub.read_json(nets["transformer"].folder / "config.json") if "transformer" in nets else {}
    name = options.model_id or options.model_path
    row = registry.match(index.class_name, index.options, entries, name)
    named = registry.find(name) is not None
    scheduler = hub.read_json(folder / "scheduler" / "scheduler_config.json")
    tiling = bool(options.vae_tiling)
    return Blueprint(row, named, folder, nets, scheduler, index.options, device, options.enable_torch_compile, tiling)


def load(blueprint: Blueprint) -> Model:
    """Stream the weights of every network to the device and type that the blueprint says."""
    nets = {}
    for name, net in blueprint.nets.items():
        log.debug("loading %s as %s", name, PRECISIONS[net.dtype])
        rows = net.kind.module.spec(net.config)
        weights = load_weights(net.folder, rows, net.dtype, blueprint.device, net.kind.rename)
        nets[name] = Net(net.kind.module, net.config, net.plan, weights, net.dtype)
    return Model(blueprint, nets, load_tokenizer(blueprint.folder / "tokenizer"))


def _check_names(index: hub.Index, options: ModelOptions) -> None:
    """Options that name a component must name one that the model has."""
    given: Iterable[tuple[str, str]] = (
        *((f"{name}_path", name) for name in options.component_paths),
        *(("component_attention_backends", name) for name in options.component_attention_backends),
        *(("component_precisions", name) for name in options.component_precisions),
    )
    for field, name in given:
        if name not in index.components:
            hint = nearest(name, index.components)
            raise UserError(field, f"{field}: the model has no component {name!r}; it has {', '.join(index.components)}{hint}")


def _dtype(name: str, kind: Kind, options: ModelOptions, device: torch.device) -> torch.dtype:
    """A component's type: the option for it, else that for its role, else float32 on the CPU and for autoencoders, bfloat16 elsewhere."""
    encoders = options.text_encoder_precisions
    place = int(name.rpartition("_")[2]) - 1 if name.rpartition("_")[2].isdigit() else 0
    by_role = {
        "dit": options.dit_precision,
        "vae": options.vae_precision,
        "image_encoder": options.image_encoder_precision,
        "text_encoder": encoders[place] if place < len(encoders) else None,
    }
    asked = options.component_precisions.get(name) or by_role[kind.role]
    if asked is not None:
        return DTYPES[asked]
    return torch.float32 if device.type == "cpu" or kind.role in ("vae", "image_encoder") else torch.bfloat16


def with_nets(model: Model, **nets: Net) -> Model:
    """The model with some of its networks replaced."""
    return replace(model, nets={**model.nets, **nets})
