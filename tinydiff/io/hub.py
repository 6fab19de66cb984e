"""Where a model lies, and the JSON files that describe it.

It is a local directory, or a hub id that is brought to the cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tinydiff import paths
from tinydiff.entries import Entries, EntryDict
from tinydiff.entries import value as typed_value
from tinydiff.io import repositories
from tinydiff.io.variants import unchosen
from tinydiff.records import UserError, brief, nearest

OF_COMPONENT = ("*.json", "*.safetensors", "spiece.model", "tokenizer.model", "merges.txt")
"""What a component's directory is run from."""

WANTED = ("*.json", *(f"*/{name}" for name in OF_COMPONENT[1:]))
"""What a diffusers-layout directory is run from. Single-file weights at a repository's root are left out:
they would double the download.
"""

UNWANTED = (
    *("*onnx*", "*flax*", "*openvino*", "pe/*"),
    *("prompt_enhancer/*", "transformer_full/*", "diffusion_decoder/*"),
)
"""Of that, what is not run. So are weights of variants that are not loaded."""

SETTINGS: EntryDict = {
    "boundary_ratio": float | None,
    "expand_timesteps": bool | None,
    "is_distilled": bool | None,
}
"""The pipeline's own settings that are read, and their types."""

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Index:
    """A directory's `model_index.json`.

    class_name: the pipeline's class. components: name to (library, class); absent ones (`[null, null]`) are
    left out.
    options: the pipeline's own settings, such as `boundary_ratio` and `expand_timesteps`.
    """

    class_name: str
    components: dict[str, tuple[str, str]]
    options: EntryDict


def resolve(
    path_or_id: str | Path,
    revision: str | None = None,
    field: str = "model_path",
    weights: bool = True,
    variant: str | None = None,
    only: Collection[str] = (),
    also: Collection[str] = (),
) -> Path:
    """The local directory of a model.

    It is `path_or_id` itself if that is a directory, else the hub's snapshot of that id, downloaded if need
    be.

    revision: branch, tag or commit of a hub id. field: the option to name in errors. weights: false fetches
    JSON files alone. variant: of a component's weights these alone are fetched, where it has them. only: the
    components or files to fetch, where not all. also: patterns of files to fetch beside them. Works offline
    for what the cache holds. Raises UserError if there is no such directory or repository, or no network to
    fetch it.
    """
    path = paths.path(path_or_id, field)
    kind = paths.kind(path)
    if kind == "directory":
        if revision is not None:
            raise UserError(
                "revision",
                f"revision: {revision!r} is given, but {field} {str(path_or_id)!r} is a local "
                "directory, not a hub id",
            )
        return path
    if kind == "file":
        raise UserError(
            field, f"{field}: {str(path)!r} is a file; it must be a directory in diffusers layout or a hub id"
        )
    text = str(path_or_id)
    if not HUB_ID.fullmatch(text):
        siblings = (
            [
                entry.name
                for entry in path.parent.iterdir()
                if entry.is_dir() or entry.suffix == ".safetensors"
            ]
            if paths.kind(path.parent) == "directory"
            else []
        )
        hint = nearest(path.name, siblings)
        raise UserError(
            field,
            f"{field}: {text!r} is neither a file nor a directory here, nor a hub id such as "
            f"'Wan-AI/Wan2.2-TI2V-5B-Diffusers'{hint}",
        )
    at_root = () if field == "model_path" else ("*.safetensors",)  # where a component or an adapter lies
    wanted = [*WANTED, *at_root]
    wanted = wanted if weights else ["*.json"]
    if only:
        files = [name for name in only if Path(name).suffix]
        components = (name for name in only if name not in files)
        wanted = [
            "model_index.json",
            *files,
            *(f"{name}/{each}" for name in components for each in OF_COMPONENT),
        ]
    unwanted = [*UNWANTED, *(unchosen(repositories.listing(text, revision), variant) if weights else ())]
    return repositories.fetched(text, [*wanted, *also], revision, field, unwanted)


def file(text: str | Path, field: str) -> Path | None:
    """The file that `text` names, or None.

    `text` is a path, or a hub id and a file in its repository as `id:file`, which is downloaded if need be.
    Raises UserError where the repository has no such file.
    """
    path = paths.path(text, field)
    if paths.kind(path) == "file":
        return path
    hub_id, colon, name = str(text).partition(":")
    if paths.kind(path) or not (colon and name and HUB_ID.fullmatch(hub_id)):
        return None
    found = repositories.fetched(hub_id, [name], field=field) / name
    if not found.is_file():
        raise UserError(field, f"{field}: {hub_id!r} has no file {brief(name)}")
    return found


def read_index(folder: Path) -> Index:
    """Read `model_index.json`. Raises UserError when it is missing or is not one."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise UserError(
            "model_path",
            f"model_path: {str(folder)!r} has no model_index.json, so it is not a model in diffusers layout",
        )
    return index_of(read_json(path), str(path))


def index_of(entries: Entries, where: str) -> Index:
    """What the entries of a model_index.json say. where: its path, for messages. Raises UserError."""
    if not entries.get("_class_name") or not isinstance(entries["_class_name"], str):
        raise UserError("model_path", f"model_path: {where!r} names no pipeline class (_class_name)")
    pairs = {name: value for name, value in entries.items() if isinstance(value, list) and len(value) == 2}
    components = {name: (str(pair[0]), str(pair[1])) for name, pair in pairs.items() if pair[1] is not None}
    options = {
        name: value for name, value in entries.items() if name not in pairs and not name.startswith("_")
    }
    try:
        options |= {
            name: typed_value(name, kind, options[name]) for name, kind in SETTINGS.items() if name in options
        }
    except ValueError as error:
        raise UserError("model_path", f"{where}: {error}") from error
    return Index(entries["_class_name"], components, options)


def read_json(path: Path) -> EntryDict:
    """Read a JSON object; the bare `Infinity` and `NaN` that some released configs hold are accepted.

    Raises UserError otherwise.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError("model_path", f"model_path: {str(path)!r} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError("model_path", f"model_path: {str(path)!r} is not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(
            "model_path",
            f"model_path: {str(path)!r} holds a JSON {type(value).__name__} and should hold an object",
        )
    return value
