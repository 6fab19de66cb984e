"""From a folder to a model in memory: what the folder holds is read and checked first, then its weights are streamed in.

A `Blueprint` costs only the reading of a few JSON files, so that a request is refused before gigabytes are moved.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
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
from tinydiff.ops.attention import BACKENDS, attention
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
    heads: Callable[[Any], tuple[int, bool]] | None = None
    """Config -> (width of a head, whether attention has a bias); None where the attention kernel is not a choice."""


def _rename_wan(key: str) -> str | None:
    """Released Wan files may carry a norm that nothing reads, and FastWan's the gates of sparse attention, which full attention has not."""
    return None if key.endswith(("norm_added_q.weight", "to_gate_compress.weight", "to_gate_compress.bias")) else key


_T5 = Kind(t5, "text_encoder", False, heads=lambda c: (c.d_kv, True))
_CLIP = Kind(clip_vision, "image_encoder", False, clip_vision.row_name, lambda c: (c.hidden_size // c.num_attention_heads, False))

NETS = {
    "WanTransformer3DModel": Kind(wan, "dit", True, _rename_wan, lambda c: (c.attention_head_dim, False)),
    "AutoencoderKLWan": Kind(wan_vae, "vae", True),
    **dict.fromkeys(("UMT5EncoderModel", "T5EncoderModel"), _T5),
    **dict.fromkeys(("CLIPVisionModel", "CLIPVisionModelWithProjection"), _CLIP),
}
"""Component class -> how it is run."""

FILES = ("scheduler", "tokenizer", "image_processor")
"""Components without weights. The third only says what CLIP's own preprocessing is."""


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
    nets: Mapping[str, NetPlan]
    tokenizer: Path
    scheduler: Mapping[str, Any]
    """`scheduler_config.json`."""
    options: Mapping[str, Any]
    """The pipeline's own settings in `model_index.json`."""
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
    """Read and check what `options` name, everything but the weights. Raises UserError."""
    folder = hub.resolve(SHIPPED if options.model_path == registry.SHIPPED else options.model_path, options.revision)
    index = hub.read_index(folder)
    places = {name: folder / name for name in index.components}
    for name in options.component_paths:
        _known("component_paths", name, [name for name in places if name != "image_processor"])
        places[name] = hub.resolve(options.component_paths[name], field=f"{name}_path")
    row, named = _row(index, places, options)
    kinds = _kinds(index, options)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    nets = {}
    for name, kind in kinds.items():
        config = config_from(kind, places[name] / "config.json")
        dtype = _dtype(name, kind, options, device)
        nets[name] = NetPlan(name, kind, places[name], config, dtype, _plan(name, kind, config, dtype, options, device))
    _check_fit(row, index, nets)
    scheduler = hub.read_json(places["scheduler"] / "scheduler_config.json")
    compiled, tiling = options.enable_torch_compile, bool(options.vae_tiling)
    if compiled:
        _check_compiler()
    return Blueprint(row, named, nets, places["tokenizer"], scheduler, index.options, device, compiled, tiling)


def load(blueprint: Blueprint) -> Model:
    """Stream the weights of every network to the device and type that the blueprint says. Raises UserError for broken files."""
    tokenizer = load_tokenizer(blueprint.tokenizer)
    nets = {}
    for name, net in blueprint.nets.items():
        log.debug("loading %s as %s", name, net.dtype)
        rows = net.kind.module.spec(net.config)
        weights = load_weights(net.folder, rows, net.dtype, blueprint.device, net.kind.rename)
        nets[name] = Net(net.kind.module, net.config, net.plan, weights, net.dtype)
    return Model(blueprint, nets, tokenizer)


def _row(index: hub.Index, places: Mapping[str, Path], options: ModelOptions) -> tuple[ReleasedModel, bool]:
    """(the released model whose defaults hold, whether it was found by name)."""
    entries = hub.read_json(places["transformer"] / "config.json") if "transformer" in places else {}
    name = options.model_id or options.model_path
    row = registry.match(index.class_name, index.options, entries, name)
    if options.model_id is not None and (wanted := registry.named(options.model_id)) is not row:
        message = f"model_id: {wanted.name} is a {wanted.pipeline}, and {options.model_path!r} is a {index.class_name}"
        raise UserError("model_id", message)
    return row, row is registry.find(name)


def _kinds(index: hub.Index, options: ModelOptions) -> dict[str, Kind]:
    """How each component with weights is run, once every option that speaks of a component is known to find it."""
    kinds = {}
    for name, (_, class_name) in index.components.items():
        if name not in FILES:
            if class_name not in NETS:
                message = f"component {name!r} has the class {class_name}, which is not supported; known are {', '.join(NETS)}"
                raise UserError("model_path", f"model_path: {message}")
            kinds[name] = NETS[class_name]
    for name in options.component_precisions:
        _known("component_precisions", name, kinds)
    for name in options.component_attention_backends:
        _known("component_attention_backends", name, [name for name, kind in kinds.items() if kind.heads is not None])
    encoders = [name for name, kind in kinds.items() if kind.role == "text_encoder"]
    if len(given := options.text_encoder_precisions) > len(encoders):
        raise UserError("text_encoder_precisions", f"text_encoder_precisions: {len(given)} are given; text encoders: {len(encoders)}")
    if options.image_encoder_precision is not None and "image_encoder" not in kinds:
        raise UserError("image_encoder_precision", "image_encoder_precision: the model has no image encoder")
    return kinds


def _known(field: str, name: str, names: Collection[str]) -> None:
    if name not in names:
        raise UserError(field, f"{field}: {name!r} is not one of {', '.join(names)}{nearest(name, names)}")


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


def _plan(name: str, kind: Kind, config: Any, dtype: torch.dtype, options: ModelOptions, device: torch.device) -> Plan:
    """A component's plan. `attention_backend` is the denoiser's; encoders, whose attention is masked, let torch choose unless named."""
    named, general = options.component_attention_backends, options.attention_backend if kind.role == "dit" else "sdpa"
    backend = named.get(name, named.get(name.removesuffix("_2"), general))  # a second component follows the first, as in SGLang
    if kind.heads is not None and not _attends(backend, *kind.heads(config), dtype, device):
        can = ", ".join(other for other in BACKENDS if _attends(other, *kind.heads(config), dtype, device))
        field = "component_attention_backends" if name in named else "attention_backend"
        where = f"the {name} in {PRECISIONS.get(dtype, dtype)} on this machine ({device.type})"
        raise UserError(field, f"{field}: {backend!r} cannot run {where}; what can: {can}")
    return Plan(attention=backend)


def _check_compiler() -> None:
    from tinydiff.sampling.compile import has_compiler  # pulls in the compiler: only those who compile pay for it

    if not has_compiler():
        message = "compiling needs a C++ compiler, and none is found; install g++ or leave the option out"
        raise UserError("enable_torch_compile", f"enable_torch_compile: {message}")


def _attends(backend: str, width: int, biased: bool, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel serves heads of this width and type here. Torch alone knows, so it is tried."""
    x = torch.zeros(1, 16, 1, width, dtype=dtype, device=device)
    bias = torch.zeros(1, 1, 16, 16, dtype=dtype, device=device) if biased else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of each reason before it raises
        try:
            attention(Plan(attention=backend), x, x, x, bias)
        except RuntimeError:
            return False
    return True


def _check_fit(row: ReleasedModel, index: hub.Index, nets: Mapping[str, NetPlan]) -> None:
    """The components that a request needs are there, and agree where they meet."""
    image = "transformer" in nets and nets["transformer"].config.image_dim is not None
    needed = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler", *(("image_encoder",) if image else ()))
    if absent := [name for name in needed if name not in index.components]:
        raise UserError("model_path", f"model_path: model_index.json names no {absent[0]}, which this {index.class_name} needs")
    net, vae, text = (nets[name].config for name in ("transformer", "vae", "text_encoder"))
    meetings = {
        "in_channels": (2 * vae.z_dim + 4 if row.image == "required" else vae.z_dim, "the vae's latents need"),
        "out_channels": (vae.z_dim, "the vae's latents need"),
        "text_dim": (text.d_model, "the text encoder gives"),
    }
    if image:
        meetings["image_dim"] = (nets["image_encoder"].config.hidden_size, "the image encoder gives")
    for field, (value, why) in meetings.items():
        if getattr(net, field) != value:
            message = f"the components do not fit each other: the transformer's {field} is {getattr(net, field)}, and {why} {value}"
            raise UserError("model_path", f"model_path: {message}")
    if "transformer_2" in nets:  # both experts run in one loop
        first, second = nets["transformer"], nets["transformer_2"]
        if first.config != second.config:
            raise UserError("model_path", "model_path: transformer and transformer_2 must have one config, but for the weights")
        if first.plan != second.plan:
            field = "component_attention_backends"
            raise UserError(field, f"{field}: transformer and transformer_2 run in one loop and need the same")
