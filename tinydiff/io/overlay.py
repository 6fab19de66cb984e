"""Models whose repository is not in diffusers layout, brought into it by an overlay.

An overlay is a directory in diffusers layout with `_overlay/overlay_manifest.json`: it has the JSON files,
and its manifest says which files of the source repository go where. Both are put together once, in a
directory of the cache: small files are copied, large ones linked. That directory is used again until its
sources change. A manifest is not trusted: it writes nothing outside that directory, and its code runs only on
request.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from filelock import FileLock

from tinydiff import environment, paths
from tinydiff.entries import Entries
from tinydiff.io import hub, repositories
from tinydiff.records import UserError

log = logging.getLogger(__name__)

MANIFEST = "_overlay/overlay_manifest.json"
RECORD = ".tinydiff_overlay.json"
"""Says in a materialised directory what it was made of."""

COPIED = 64 * 2**20
"""Bytes of a file up to which it is copied and not linked, so that an edit does not reach the source."""

BUILT_IN: Mapping[str, str] = {
    "Wan-AI/Wan2.2-S2V-14B": str(Path(__file__).parent / "overlays/Wan2.2-S2V-14B")
}
"""Source repository -> its overlay, a directory of this package or a hub id."""

FIELDS = (
    *("source_model_id", "source_revision", "required_source_files", "source_allow_patterns"),
    *("file_mappings", "custom_materializer", "materializer_version"),
)
KINDS = ("file", "tree", "glob")


@dataclass(frozen=True)
class Mapped:
    """One entry of a manifest's `file_mappings`.

    kind: `file` puts the file `source` at `target`, `tree` all files below the directory `source` below
    `target`, `glob` those that the pattern `source` matches into the directory `target`.
    """

    kind: str
    source: str
    target: str


@dataclass(frozen=True)
class Overlay:
    """An overlay and the model that it is laid over.

    name: what the user calls it. directory: the overlay's. source: a hub id or a directory. revision: of the
    source. code: the manifest's own Python file, which puts together what mappings cannot.
    """

    name: str
    directory: Path
    source: str
    revision: str | None = None
    required: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    mappings: tuple[Mapped, ...] = ()
    code: str | None = None
    manifest: Entries = field(default_factory=dict)


def named(model: str, revision: str | None = None) -> Overlay | None:
    """The overlay of a model, or None.

    model: a hub id, or a directory of that name.
    """
    known = {**BUILT_IN, **environment.overlay_registry()}
    path = paths.path(model, "model_path")
    local = paths.kind(path) == "directory"
    if local and ((path / MANIFEST).is_file() or (path / "model_index.json").is_file()):
        return None
    source = next((name for name in known if _is_copy_of(path, name)), None) if local else model
    if source not in known:
        return None
    if local:
        hub.resolve(path, revision)  # a directory has no revisions
    entry = _entry(source, known[source])
    overlay = hub.resolve(entry["overlay_repo_id"], entry.get("overlay_revision"), also=("_overlay/*",))
    if not (overlay / MANIFEST).is_file():  # the overlay is a whole model
        return Overlay(model, overlay, "")
    own = None if local else revision or entry.get("source_revision")
    return read(overlay, model, str(path) if local else source, own)


def of_directory(directory: Path, model: str) -> Overlay | None:
    """The overlay that a directory is; None where it has no manifest."""
    return read(directory, model) if (directory / MANIFEST).is_file() else None


def read(directory: Path, model: str, source: str | None = None, revision: str | None = None) -> Overlay:
    """The overlay in a directory. source, revision: take the place of the manifest's. Raises UserError."""
    entries = hub.read_json(directory / MANIFEST)
    subject = f"model_path: the manifest of the overlay {str(directory)!r}"
    if unread := [name for name in entries if name not in FIELDS]:
        log.info("%s: fields that are not read: %s", directory / MANIFEST, ", ".join(unread))

    def text(name: str) -> str | None:
        value = entries.get(name)
        if value is not None and not isinstance(value, str):
            raise UserError("model_path", f"{subject}: {name} is {value!r} and must be a string")
        return value

    def texts(name: str) -> tuple[str, ...]:
        values = entries.get(name) or []
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise UserError("model_path", f"{subject}: {name} is {values!r} and must be a list of strings")
        return tuple(_within(value, f"{subject}: {name}") for value in values)

    source = source or text("source_model_id")
    if not source:
        raise UserError("model_path", f"{subject} names no source_model_id")
    mappings = entries.get("file_mappings") or []
    if not isinstance(mappings, list):
        raise UserError("model_path", f"{subject}: file_mappings is {mappings!r} and must be a list")
    code = text("custom_materializer")
    return Overlay(
        model,
        directory,
        source,
        revision or text("source_revision"),
        texts("required_source_files"),
        texts("source_allow_patterns"),
        tuple(_mapping(each, subject) for each in mappings),
        None if code is None else _within(code, f"{subject}: custom_materializer"),
        entries,
    )


def materialised(overlay: Overlay, trusted: bool = False) -> Path:
    """The directory in diffusers layout that an overlay and its source make, built unless it is there.

    trusted: whether the overlay's own code may run. One process builds, others wait for it. Raises UserError.
    """
    if not overlay.source:
        return overlay.directory
    if overlay.code is not None and not trusted:
        message = (
            f"the overlay {str(overlay.directory)!r} runs its own code ({overlay.code}) to put "
            f"{overlay.name!r} together; read it, and give --trust-remote-code to allow it"
        )
        raise UserError("trust_remote_code", f"trust_remote_code: {message}")
    made_of = _made_of(overlay)
    own = overlay.source if hub.HUB_ID.fullmatch(overlay.source) else Path(overlay.source).name
    name = f"{re.sub(r'[^A-Za-z0-9.-]+', '__', own)[-60:]}-{_digest(made_of)[:16]}"
    place = environment.cache_root() / "materialized_models" / name
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            if not _usable(place):
                _build(overlay, place)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError("model_path", f"model_path: cannot build {str(place)!r}: {reason}") from error
    return place


def _entry(model: str, value: object) -> Mapping[str, str]:
    """A registry entry: an overlay's id, or an object that also has revisions."""
    entry = {"overlay_repo_id": value} if isinstance(value, str) else value
    names = ("overlay_repo_id", "overlay_revision", "source_revision")
    if (
        not isinstance(entry, Mapping)
        or not isinstance(entry.get("overlay_repo_id"), str)
        or not all(name in names and isinstance(each, str | None) for name, each in entry.items())
    ):
        message = (
            f"the entry of {model!r} is {value!r}; it must be a hub id or directory, or an object of "
            f"{', '.join(names)}"
        )
        raise UserError("model_path", f"model_path: overlay registry: {message}")
    return entry


def _is_copy_of(path: Path, hub_id: str) -> bool:
    """Whether a directory's path says that it is a copy of a hub repository."""
    return path.name == hub_id.rpartition("/")[2] or f"models--{hub_id.replace('/', '--')}" in path.parts


def _mapping(entry: object, subject: str) -> Mapped:
    if not isinstance(entry, Mapping):
        raise UserError("model_path", f"{subject}: file_mappings has {entry!r}, which must be an object")
    kind, source = entry.get("type", "file"), entry.get("src")
    target = entry.get("dst_dir", entry.get("dst"))
    if kind not in KINDS or not isinstance(source, str) or not isinstance(target, str):
        message = (
            f"file_mappings has {dict(entry)!r}; it needs type ({', '.join(KINDS)}), src, and dst or dst_dir"
        )
        raise UserError("model_path", f"{subject}: {message}")
    if kind == "file" and "dst_dir" in entry:
        target = f"{target}/{PurePosixPath(source).name}"
    return Mapped(kind, _within(source, f"{subject}: src"), _within(target, f"{subject}: dst"))


def _within(path: str, subject: str) -> str:
    """A path below the directory that it is relative to. Raises UserError for any other."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or "\0" in path or ":" in parts[0] or ".." in parts:
        raise UserError("model_path", f"{subject} is {path!r}, which is not a path inside the model")
    return str(PurePosixPath(path))


def _made_of(overlay: Overlay) -> list[object]:
    """What a materialised directory depends on, as far as it can be known without the source's files."""
    files = [
        [
            name,
            hashlib.sha256(file.read_bytes()).hexdigest() if file.stat().st_size < COPIED else _stamp(file),
        ]
        for name, file in _files(overlay.directory)
    ]
    return [overlay.source, overlay.revision, files]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _stamp(file: Path) -> list[int]:
    """What changes when a file does."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _usable(place: Path) -> bool:
    """Whether a directory is whole, and what it was made of has not changed since."""
    try:
        record = json.loads((place / RECORD).read_text())
        whole = all((place / name).stat().st_size == size for name, size in record["files"].items())
        sources = {Path(name): stamp for name, stamp in record["sources"].items()}
        return whole and all(_stamp(file) == stamp for file, stamp in sources.items() if file.exists())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(overlay: Overlay, place: Path) -> None:
    """Put a model together under another name, and rename it. What a killed process left is removed."""
    source = _source(overlay)
    new, old = (place.with_name(f"{place.name}.{state}") for state in ("tmp", "old"))
    for left in (new, old):
        _remove(left)
    try:
        new.mkdir()
        files = {name: file for name, file in _files(overlay.directory) if not name.startswith("_overlay/")}
        for target, file in _mapped(overlay, source):
            if target in files or target == RECORD:
                message = f"a second file is to be {target!r}"
                raise UserError("model_path", f"model_path: overlay of {overlay.name!r}: {message}")
            files[target] = file
        for target, file in files.items():
            _put(file.resolve(), new / target)
        if overlay.code is not None:
            _run(overlay, source, new)
        record = {
            "files": {name: file.stat().st_size for name, file in _files(new, inside=False)},
            "sources": {str(file): _stamp(file) for file in files.values()},
        }
        (new / RECORD).write_text(json.dumps(record, indent=1))
        if place.exists():
            place.rename(old)
        new.rename(place)
    finally:
        for left in (new, old):
            _remove(left)


def _remove(place: Path) -> None:
    if place.is_symlink() or place.is_file():
        place.unlink()
    elif place.exists():
        shutil.rmtree(place)


def _source(overlay: Overlay) -> Path:
    """The directory of the original files, of which no others are fetched. UserError where one is missing."""
    wanted = overlay.patterns or tuple(
        dict.fromkeys(
            (
                *overlay.required,
                *(f"{each.source}/*" if each.kind == "tree" else each.source for each in overlay.mappings),
            )
        )
    )
    place = paths.path(overlay.source, "model_path")
    local = paths.kind(place) == "directory"
    source = place if local else repositories.fetched(overlay.source, wanted, overlay.revision)
    files = (each.source for each in overlay.mappings if each.kind == "file")
    for name in (*overlay.required, *files):
        if not (source / name).is_file():
            message = (
                f"{overlay.source!r} has no file {name!r}, which the overlay {str(overlay.directory)!r} needs"
            )
            raise UserError("model_path", f"model_path: {message}")
    return source


def _mapped(overlay: Overlay, source: Path) -> Iterator[tuple[str, Path]]:
    """(path in the model, file) of all mappings."""
    for each in overlay.mappings:
        if each.kind == "file":
            yield each.target, source / each.source
            continue
        found = list(_below(each, source))
        if not found:
            message = (
                f"the overlay {str(overlay.directory)!r} needs {each.source!r}, which "
                f"{overlay.source!r} has not"
            )
            raise UserError("model_path", f"model_path: {message}")
        yield from found


def _below(mapping: Mapped, source: Path) -> Iterator[tuple[str, Path]]:
    for name, file in _files(source, inside=False):
        if mapping.kind == "glob" and fnmatchcase(name, mapping.source):
            yield f"{mapping.target}/{file.name}", file
        elif mapping.kind == "tree" and name.startswith(f"{mapping.source}/"):
            yield f"{mapping.target}/{name.removeprefix(f'{mapping.source}/')}", file


def _files(directory: Path, inside: bool = True) -> Iterator[tuple[str, Path]]:
    """(path below the directory, file) of all its files. Links to directories are not followed.

    inside: whether a link must lead to a file of the directory, or of the hub's cache of its repository.
    """
    top = directory.parent.parent if directory.parent.name == "snapshots" else directory
    for folder, folders, names in os.walk(directory):
        folders.sort()
        for file in (Path(folder) / name for name in sorted(names)):
            if inside and not file.resolve().is_relative_to(top.resolve()):
                message = f"{str(file)!r} of the overlay is a link that leads out of it"
                raise UserError("model_path", f"model_path: {message}")
            if file.is_file():
                yield file.relative_to(directory).as_posix(), file


def _put(file: Path, target: Path) -> None:
    """A copy of a small file; of a large one a hard link, else a symbolic one, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.stat().st_size >= COPIED:
        for link in (os.link, os.symlink):
            try:
                return link(file, target)
            except OSError:  # another disk, or a file system without such links
                continue
    shutil.copyfile(file, target)


def _run(overlay: Overlay, source: Path, output: Path) -> None:
    """Run the overlay's own `materialize(overlay_dir, source_dir, output_dir, manifest)`."""
    assert overlay.code is not None
    places = (overlay.directory / "_overlay" / overlay.code, overlay.directory / overlay.code)
    file = next((place for place in places if place.is_file()), None)
    spec = file and importlib.util.spec_from_file_location("tinydiff_overlay_code", file)
    if spec is None or spec.loader is None:
        message = (
            f"the overlay {str(overlay.directory)!r} has no Python file {overlay.code!r} "
            "(custom_materializer)"
        )
        raise UserError("model_path", f"model_path: {message}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        module.materialize(str(overlay.directory), str(source), str(output), dict(overlay.manifest))
    except Exception as error:  # it is anyone's code
        message = (
            f"the code of the overlay {str(overlay.directory)!r} failed: {type(error).__name__}: {error}"
        )
        raise UserError("model_path", f"model_path: {message}") from error
