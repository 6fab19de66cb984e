"""What a file or directory holds, from headers and JSON files alone.

No weight is read, nothing is downloaded, and nothing is run.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from tinydiff import paths
from tinydiff.config import ModelOptions
from tinydiff.entries import is_array
from tinydiff.io import archive, headers, hub
from tinydiff.io.floats import FLOATS
from tinydiff.io.headers import Header
from tinydiff.io.weight_sources import check_weights, weight_files
from tinydiff.models import registry, released
from tinydiff.models.classes import RECORDS
from tinydiff.models.family import Record
from tinydiff.models.layouts.recognise import LORA, QUANTISED, Found, config_from, recognise
from tinydiff.records import UserError, nearest
from tinydiff.runtime import blueprint, quantisation
from tinydiff.runtime.adapter_facts import adapter_facts
from tinydiff.runtime.components import nearest_first
from tinydiff.runtime.net_plan import NetPlan

MOST = 200
"""Files of a directory that are looked at."""
NAMES = {"gguf": "GGUF", "pickle": "torch pickle", "safetensors": "safetensors"}
KINDS = {"gguf": "GGUF file", "pickle": "torch pickle", "safetensors": "safetensors file"}


@dataclass(frozen=True)
class Contents:
    """What a path holds. Facts that are not known or do not apply are None or empty.

    kind: in words, such as "model directory". format: of the weight files. layout: how their keys are named,
    after `prefix`. model_class: of model_index.json or of the component. role: of a component. models:
    released models that have it or that it looks like. precision: type -> bytes. quantised: the types in
    which quantised weights stay in memory. layers, ranks: of an adapter. parts: the components of a model, or
    the files of a directory. missing: what is needed and not there. problems: why it does not run, one
    sentence each.
    command: runs or uses it.
    """

    path: str
    kind: str
    format: str | None = None
    layout: str | None = None
    prefix: str = ""
    family: str | None = None
    model_class: str | None = None
    role: str | None = None
    models: tuple[str, ...] = ()
    files: int = 0
    tensors: int = 0
    bytes: int = 0
    precision: Mapping[str, int] = field(default_factory=dict[str, int])
    quantised: str | None = None
    layers: int = 0
    ranks: tuple[int, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    parts: tuple[Contents, ...] = ()
    missing: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    command: str | None = None


def contents(path_or_id: str) -> Contents:
    """What a file, a directory or a hub id in the download cache holds.

    Raises UserError where there is none.
    """
    if path_or_id == registry.SHIPPED:
        return _directory(blueprint.SHIPPED, path_or_id)
    path = paths.path(path_or_id, "path")
    kind = paths.kind(path)
    if kind == "file":
        return _file(path, path_or_id)
    if kind == "directory":
        return _directory(path, path_or_id)
    if kind:
        raise UserError(
            "path", f"path: {path_or_id!r} is a device or a pipe; it must be a file or a directory"
        )
    return _directory(_cached(path_or_id, path), path_or_id)


def _cached(hub_id: str, path: Path) -> Path:
    """The snapshot of a hub id in the download cache."""
    if not hub.HUB_ID.fullmatch(hub_id):
        siblings = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings)
        raise UserError("path", f"path: {hub_id!r} is not a file, a directory or a hub id{hint}")
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(cast(Any, huggingface_hub).snapshot_download(hub_id, local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        known = registry.find(hub_id)
        row = "" if known is None else f"; it is {known.name}, which `tinydiff generate` downloads"
        message = (
            f"{hub_id!r} is neither a local path nor downloaded, and this command downloads nothing{row}"
        )
        raise UserError("path", f"path: {message}") from None


# --- files


def _file(path: Path, shown: str) -> Contents:
    """One file of weights. Raises UserError where it is none."""
    try:
        header = headers.read(path)
    except UserError as error:  # a pickle without weights is described too, since the user asked about it
        return Contents(
            shown, KINDS["pickle"], NAMES["pickle"], files=1, problems=(_clause(error, str(path)),)
        )
    except ValueError as error:
        raise UserError("path", f"path: {shown!r} {error}") from error
    return _named(_counted(shown, header), header, path)


def _clause(error: UserError, path: str) -> str:
    """What an error says of a file, without its name, since it stands beside."""
    return str(error).removeprefix(f"{error.field}: ").removeprefix(f"{path!r} ")


def _counted(shown: str, header: Header) -> Contents:
    """The facts that every file has."""
    precision = Counter[str]()
    for tensor in header.tensors.values():
        precision[tensor.dtype] += tensor.bytes
    return Contents(
        shown,
        KINDS[header.format],
        NAMES[header.format],
        files=1,
        tensors=len(header.tensors),
        bytes=sum(precision.values()),
        precision=dict(precision.most_common()),
        metadata=_texts(header.metadata),
        missing=(f"the file's last {header.lacks} bytes: it is truncated",) if header.lacks else (),
    )


def _texts(metadata: Mapping[str, object]) -> dict[str, str]:
    """What a header says beside the tensors, each at most a line."""
    texts = {str(name): " ".join(str(value).split()) for name, value in metadata.items()}
    return {name: text if len(text) <= 200 else f"{text[:197]}..." for name, text in texts.items()}


def _named(counted: Contents, header: Header, path: Path) -> Contents:
    """With what the keys and shapes tell: an adapter, or components and the models that have them."""
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    if any(LORA.search(key) for key in shapes):
        return _adapter(counted, shapes)
    whole, why = _whole(header, path)
    try:
        found = recognise(whole, _texts(header.metadata), counted.path)
    except UserError as error:
        return replace(counted, problems=(*why, _clause(error, counted.path)))
    first, *others = found
    if not others:
        stays = None if why or header.lacks else _quantised(first, path)
        return _runnable(replace(_component(counted, first), problems=why, quantised=stays), found)
    parts = tuple(_component(Contents(each.prefix or "the rest", "component"), each) for each in found)
    kind = f"{counted.kind} of several components"
    whole = replace(
        counted, kind=kind, family=_family(first.models), models=first.models, parts=parts, problems=why
    )
    return _runnable(whole, found)


def _quantised(found: Found, path: Path) -> str | None:
    """The types in which quantised weights stay in memory; None where none does."""
    record, config = RECORDS[found.class_name], config_from(found.class_name, found.entries)
    kinds = quantisation.held(record, config, path, found.keys(config))
    return quantisation.named(stored for stored, _ in kinds.values())


def _runnable(counted: Contents, found: Sequence[Found]) -> Contents:
    """With the command that runs a file: as the model where it holds the denoiser, else as a component.

    What the model has beside is missing.
    """
    names = [
        name for name in nearest_first(found[0].models, Path(counted.path)) if name in released.COMPONENTS
    ]
    if not names or counted.problems or counted.missing:
        return counted
    [name, *_] = names
    here = [part for each in found if (part := _part_of(name, each)) is not None]
    if found[0].role != "dit":
        options = "".join(f" --{_dashed(part)}-path {shlex.quote(counted.path)}" for part in here)
        return replace(counted, command=_command(_row(name), name, options) if here else None)
    index = hub.index_of(released.REPOSITORIES[name]["model_index"], name)
    absent = [part for part in index.components if part not in (*here, "scheduler")]
    flags = ", ".join(f"--{_dashed(part)}-path" for part in absent)
    missing = (f"{', '.join(absent)}: taken from {name}, or from {flags}",) if absent else ()
    return replace(counted, missing=missing, command=_command(_row(name), counted.path))


def _part_of(model: str, found: Found) -> str | None:
    """The name that a released model has for a component of this class and these sizes."""
    for part, (class_name, entries) in released.COMPONENTS[model].items():
        alike = all(entries.get(field, value) == value for field, value in found.entries.items())
        if RECORDS.get(class_name) is RECORDS[found.class_name] and (alike or found.role != "text_encoder"):
            return part
    return None


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _adapter(counted: Contents, shapes: Mapping[str, tuple[int, ...]]) -> Contents:
    """A LoRA or another adapter, and the models whose layers it changes."""
    facts = adapter_facts(shapes)
    problems = ()
    if facts.strangers:
        some = ", ".join(facts.strangers[:5]) + (", ..." if len(facts.strangers) > 5 else "")
        whose = "the released models that it looks like" if facts.models else "a released model"
        problems = (f"{len(facts.strangers)} of its {facts.layers} layers are not those of {whose}: {some}",)
    return replace(
        counted,
        kind=" and ".join(facts.kinds) or "adapter",
        layout=facts.naming,
        family=_family(facts.models),
        models=facts.models,
        layers=facts.layers,
        ranks=facts.ranks,
        problems=problems,
        command=_command(_row(facts.models[0]), facts.models[0], f" --lora-path {shlex.quote(counted.path)}")
        if facts.models
        else None,
    )


def _row(name: str) -> registry.ReleasedModel:
    return next(row for row in registry.MODELS if row.name == name)


def _whole(header: Header, path: Path) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """(the shapes of a file's weights, decoded where they are quantised; why they are not read)."""
    stored = {key: each.shape for key, each in header.tensors.items() if not QUANTISED.search(key)}
    if header.lacks:
        return stored, ()
    try:
        opened = archive.opened(path)
        shapes = archive.shapes_of(opened)
    except UserError as error:
        return stored, (_clause(error, str(path)),)
    beside = next((key for key in shapes if QUANTISED.search(key)), None)
    if beside is not None:
        return stored, (
            f"its weights are quantised ({beside}), which is not read; take them in bf16 or fp16",
        )
    matrices = (key for key, shape in shapes.items() if len(shape) > 1)
    types = {opened.get_slice(key).get_dtype() for key in matrices} - FLOATS.keys()
    if not types:
        return shapes, ()
    return shapes, (f"its weights are {', '.join(sorted(types))}; the types read are {', '.join(FLOATS)}",)


def _component(counted: Contents, found: Found) -> Contents:
    return replace(
        counted,
        layout=found.layout.name,
        prefix=found.prefix,
        model_class=found.class_name,
        role=found.role,
        family=_family(found.models),
        models=found.models,
    )


def _family(models: tuple[str, ...]) -> str | None:
    families = {row.family for row in registry.MODELS if row.name in models}
    return " or ".join(sorted(families)) or None


# --- directories


def _directory(folder: Path, shown: str) -> Contents:
    if (folder / "model_index.json").is_file():
        return _model(folder, shown)
    if (folder / "config.json").is_file():
        return _part(folder, shown, _own_class(folder), "component directory")
    return _loose(folder, shown)


def _model(folder: Path, shown: str) -> Contents:
    """A model in diffusers layout. What keeps it from running is told as `generate` would."""
    index = hub.read_index(folder)
    parts = tuple(_part(folder / name, name, kind) for name, (_, kind) in index.components.items())
    problems: list[str] = []
    missing = [f"{part.path}: {what}" for part in parts for what in part.missing]
    row, stays = None, None
    try:
        read = blueprint.read(ModelOptions(model_path=str(folder)))
        row, stays = read.row, " and ".join(dict.fromkeys(read.quantised.values())) or None
        for name, net in read.nets.items():
            if not any(part.path == net.component.name and part.missing for part in parts):
                problems += _unfit(name, net)
    except UserError as error:
        problems.append(str(error))
    precision = Counter[str]()
    for part in parts:
        precision.update(part.precision)
    command = None if row is None or missing or problems else _command(row, shown)
    return Contents(
        shown,
        "model directory",
        format=next((part.format for part in parts if part.format), None),
        layout="diffusers",
        family=None if row is None else row.family,
        model_class=index.class_name,
        models=() if row is None else (row.name,),
        files=sum(part.files for part in parts),
        tensors=sum(part.tensors for part in parts),
        bytes=sum(part.bytes for part in parts),
        precision=dict(precision.most_common()),
        quantised=stays,
        parts=parts,
        missing=tuple(missing),
        problems=tuple(problems),
        command=command,
    )


def _unfit(name: str, net: NetPlan[Record]) -> Iterator[str]:
    """Why a component's weights would not load."""
    try:
        check_weights(net.component.place, net.family.spec(net.config), net.keys)
    except UserError as error:
        yield f"{name}: {_clause(error, '')}"


def _command(row: registry.ReleasedModel, shown: str, more: str = "") -> str:
    """The command that runs a model, with options that bring more to it."""
    image = " --image-path IMAGE" if row.images[0] else ""
    prompt = "" if row.captions else ' --prompt "..."'
    return f"tinydiff generate --model-path {shlex.quote(shown)}{more}{image}{prompt}"


def _own_class(folder: Path) -> str | None:
    """The class that a component's config.json names."""
    entries = hub.read_json(folder / "config.json")
    listed = entries.get("architectures")
    others: Sequence[object] = listed if is_array(listed) else ()
    named = [entries.get("_class_name"), *others]
    return next((name for name in named if isinstance(name, str)), None)


def _part(folder: Path, shown: str, class_name: str | None, kind: str = "component") -> Contents:
    """A component: its class, and its weights where it has any."""
    record = RECORDS.get(class_name or "")
    role = None if record is None else record.role
    known = Contents(shown, kind, model_class=class_name, role=role)
    if not folder.is_dir():
        return replace(known, missing=(f"its directory; --{shown.replace('_', '-')}-path takes another",))
    try:
        files = weight_files(folder)
    except UserError as error:
        why = f"weights: it {_clause(error, str(folder))}"
        return known if record is None else replace(known, missing=(why,))
    precision, tensors = Counter[str](), 0
    missing: list[str] = []
    if record is not None and not (folder / "config.json").is_file():
        missing.append("config.json")
    formats = set[str | None]()
    for file in files:
        if not file.is_file():
            missing.append(file.name)
            continue
        try:
            one = _counted(file.name, headers.read(file))
        except (ValueError, UserError) as error:
            missing.append(f"{file.name}: {error}")
            continue
        precision.update(one.precision)
        tensors += one.tensors
        formats.add(one.format)
        missing += [f"{file.name}: {what}" for what in one.missing]
    return replace(
        known,
        format=" and ".join(sorted(filter(None, formats))) or None,
        files=len(files),
        tensors=tensors,
        bytes=sum(precision.values()),
        precision=dict(precision.most_common()),
        missing=tuple(missing),
    )


WEIGHTS = (".safetensors", ".gguf", ".pth", ".pt", ".bin", ".ckpt")


def _loose(folder: Path, shown: str) -> Contents:
    """A directory of files without an index: each weight file by itself."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in WEIGHTS and path.is_file())
    if not files:
        raise UserError(
            "path", f"path: {shown!r} has no model_index.json, no config.json and no file of weights"
        )
    parts = tuple(_each(path, str(path.relative_to(folder))) for path in files[:MOST])
    more = (f"{len(files) - MOST} more files, which are not looked at",) if len(files) > MOST else ()
    return Contents(
        shown,
        "directory of weight files",
        files=len(files),
        tensors=sum(part.tensors for part in parts),
        bytes=sum(part.bytes for part in parts),
        parts=parts,
        problems=more,
    )


def _each(path: Path, shown: str) -> Contents:
    try:
        return _file(path, shown)
    except UserError as error:
        return Contents(shown, "file", problems=(_clause(error, shown),))
