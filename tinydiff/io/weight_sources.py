"""Where each row of a network stands in the files of its weights, from their headers alone.

A key that is missing, unexpected or of another shape is told before anything is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from tinydiff.io import variants
from tinydiff.io.archive import opened
from tinydiff.io.floats import FLOATS, TYPES
from tinydiff.io.hub import read_json
from tinydiff.io.kept import View, codes, kept, scales, whole
from tinydiff.keymap import AS_IS, KeyMap, Match, Run, Shape, runs, stored_shapes, trimmed
from tinydiff.parallel.plan import WEIGHT_SCALE, Row, decoded_row, scale_name
from tinydiff.records import UserError

log = logging.getLogger(__name__)

BUFFERS = ("position_ids", "rotary_emb.inv_freq", "num_batches_tracked")
"""Ends of keys that some files store and that are no weights."""

_NAMES = {dtype: name for name, dtype in TYPES.items()}


class Stored(NamedTuple):
    """A tensor on disk: its file, the key there, its safetensors type name and its shape.

    lead: dimensions of length one before those of the shape. transposed: the shape is that of a matrix stored
    the other way round. interleaved: as of `keymap.Line`. view: what is read of it.
    """

    file: Path
    key: str
    dtype: str
    shape: Shape
    lead: int = 0
    transposed: bool = False
    interleaved: int = 0
    view: View = whole


class Source(NamedTuple):
    """Where a row stands: what it is made of, each run with the tensor that it lies in."""

    runs: tuple[tuple[Run, Stored], ...]


def weight_sources(
    folder: Path, wanted: Mapping[str, Row], keys: KeyMap, variant: str | None
) -> dict[str, Source]:
    """Where each row stands, from the files' headers alone. UserError where the files do not fit the rows.

    A weight that stays quantised and its scales are read from where the weight stands, in whatever type it is
    there.
    """
    whole_rows = {row.name: decoded_row(row) for row in wanted.values() if not _is_scale(row.name)}
    named = {decoded.name: decoded for decoded in whole_rows.values()}
    found = _whole_sources(folder, named, keys, variant)
    sources: dict[str, Source] = {}
    for name, decoded in whole_rows.items():
        row, source = wanted[name], found[decoded.name]
        if row.stored is None:
            sources[name] = source
            continue
        type_name = _NAMES[stored_type(row, torch.float32)]
        sources[name] = _viewed(source, type_name, row.shape, codes(row.stored))
        if beside := wanted.get(scale_name(decoded.name)):
            sources[beside.name] = _viewed(source, "F32", beside.shape, scales(row.stored))
    return sources


def check_weights(
    folder: Path, rows: Iterable[Row], keys: KeyMap = AS_IS, variant: str | None = None
) -> None:
    """Raises what `load_weights` would of these files, from their headers alone."""
    weight_sources(folder, {row.name: row for row in rows}, keys, variant)


def _is_scale(name: str) -> bool:
    return name.rpartition(".")[2] == WEIGHT_SCALE


def _viewed(source: Source, dtype: str, shape: Shape, view: View) -> Source:
    """The same rows of what a view gives of the stored tensors."""
    return Source(
        tuple(
            (run, at._replace(dtype=dtype, shape=(at.shape[0], *shape[1:]), view=view))
            for run, at in source.runs
        )
    )


def kept_kinds(
    folder: Path, rows: Iterable[Row], keys: KeyMap = AS_IS, variant: str | None = None
) -> dict[str, tuple[str, int]]:
    """Row -> (type as in `Row.stored`, scales of a row) of the matrices that can stay as the files have them.

    Raises what `load_weights` would.
    """
    archives = {file: opened(file) for file in weight_files(folder, variant)}
    if not any(hasattr(archive, "kept") for archive in archives.values()):
        return {}
    found: dict[str, tuple[str, int]] = {}
    for name, source in _whole_sources(folder, {row.name: row for row in rows}, keys, variant).items():
        kinds = {
            None if at.transposed or each is None else (each.stored, each.groups)
            for at, each in ((at, kept(archives[at.file], at.key)) for _, at in source.runs)
        }
        if len(kinds) == 1 and (kind := kinds.pop()) is not None:
            found[name] = kind
    return found


def _whole_sources(
    folder: Path, wanted: Mapping[str, Row], keys: KeyMap, variant: str | None
) -> dict[str, Source]:
    stored = _stored(folder, keys, variant)
    matches, unexpected = _matched(stored, wanted, keys)
    runs_of = {name: runs(match, wanted)[name] for name, match in matches.items()}
    missing = {
        key: None
        for name in wanted.keys() - matches.keys()
        for key in keys.of_row(name).keys
        if key not in stored
    }
    _check(
        folder,
        [key for name in wanted if name not in matches for key in keys.of_row(name).keys if key in missing],
        unexpected,
        matches,
        wanted,
        stored,
    )
    return {
        name: Source(tuple((run, _fitted(stored[run.key], matches[name])) for run in runs_of[name]))
        for name in wanted
    }


def _stored(folder: Path, keys: KeyMap, variant: str | None) -> dict[str, Stored]:
    """The component's tensors by their keys."""
    stored: dict[str, Stored] = {}
    for file in weight_files(folder, variant):
        archive = opened(file)
        for key in archive.keys():  # noqa: SIM118 (a handle, not a dict)
            if not key.startswith(keys.prefix):
                continue
            if key in stored:
                raise _twice(key, stored[key].file, file)
            piece = archive.get_slice(key)
            stored[key] = Stored(file, key, piece.get_dtype(), tuple(piece.get_shape()))
    return stored


def _twice(name: str, *files: Path) -> UserError:
    where = " and ".join(map(repr, map(str, files)))
    return UserError("model_path", f"model_path: {name!r} is stored twice, in {where}")


def _matched(
    stored: Mapping[str, Stored], wanted: Mapping[str, Row], keys: KeyMap
) -> tuple[dict[str, Match], list[str]]:
    """(row -> what it is read from, keys that are of no row).

    Of a tied weight's keys its own name is preferred.
    """
    matches: dict[str, Match] = {}
    unread, unexpected = [], []
    for key, at in stored.items():
        match = keys.of_key(key)
        assert match is not None  # the prefix is there
        if not match.rows:
            unread.append(key)
        elif not all(name in wanted for name in match.rows):
            if not key.endswith(BUFFERS):
                unexpected.append(key)
        elif all(each in stored for each in match.keys):
            for name in match.rows:
                other = matches.setdefault(name, match)
                if other.keys == match.keys:
                    continue
                if not wanted[name].tied:
                    raise _twice(name, stored[other.keys[0]].file, at.file)
                if key.endswith(name):
                    matches[name] = match
    if unread := sorted(key for key in unread if not key.endswith(BUFFERS)):
        more = ", ..." if len(unread) > 3 else ""
        where = stored[unread[0]].file.parent
        log.info(
            "%s: %d stored weights are not needed and not read (%s%s)",
            where,
            len(unread),
            ", ".join(unread[:3]),
            more,
        )
    return matches, unexpected


def _check(
    folder: Path,
    missing: list[str],
    unexpected: list[str],
    matches: Mapping[str, Match],
    wanted: Mapping[str, Row],
    stored: Mapping[str, Stored],
) -> None:
    needs = {key: shape for match in matches.values() for key, shape in stored_shapes(match, wanted).items()}
    misshapen = [
        f"{key} is {list(stored[key].shape)} and should be {list(shape)}"
        for key, shape in needs.items()
        if stored[key].shape != shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for kind, names in kinds
        if names
    ]
    if faults:
        raise UserError(
            "model_path",
            f"model_path: the weights in {str(folder)!r} do not fit the model's config: {'; '.join(faults)}",
        )
    foreign = [f"{key} is {stored[key].dtype}" for key in needs if stored[key].dtype not in FLOATS]
    if foreign:
        more = f" and {len(foreign) - 1} more like it" if len(foreign) > 1 else ""
        raise UserError(
            "model_path",
            f"model_path: in {str(folder)!r} {foreign[0]}{more}; the types read are {', '.join(FLOATS)}",
        )


def _fitted(at: Stored, match: Match) -> Stored:
    """A stored tensor in the dimensions of its rows."""
    shape = trimmed(at.shape, match.line)
    if match.line.transposed:
        return at._replace(shape=shape[::-1], transposed=True)
    return at._replace(shape=shape, lead=match.line.lead, interleaved=match.line.interleaved)


def stored_type(row: Row, dtype: torch.dtype) -> torch.dtype:
    """The type in which a weight is held in memory."""
    if row.stored_type is not None:
        return getattr(torch, row.stored_type)
    return torch.float32 if row.float32 else dtype


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component: its one file, or the shards that its index names.

    Where there are both, transformers takes the file and diffusers the shards, as each has its own names; an
    index whose shards are not there is stale and does not count beside a file.
    """
    if folder.is_file():
        return [folder]
    try:
        chosen = variants.choose((path.name for path in folder.iterdir()), variant)
    except ValueError as error:
        raise UserError("model_path", f"model_path: {str(folder)!r} {error}") from error
    except OSError:
        chosen = None
    if chosen is None:
        raise UserError("model_path", f"model_path: {str(folder)!r} has {_instead(folder)}")
    if variant is not None and chosen.variant != variant:
        log.info("%s has no variant %s; %s is read", folder, variant, chosen.variant or "the plain one")
    whole, index = folder / chosen.whole, folder / chosen.index
    if whole.is_file() and (chosen.stem != variants.STEMS[0] or not index.is_file()):
        return [whole]
    shards = _shards(index)
    return [whole] if whole.is_file() and not all(path.is_file() for path in shards) else shards


def _shards(index: Path) -> list[Path]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError("model_path", f"model_path: {str(index)!r} names no shards (weight_map)")
    return sorted({index.parent / str(name) for name in shards.values()})


def _instead(folder: Path) -> str:
    """What a directory without weights to load has."""
    if shards := sorted(folder.glob("*.safetensors")):
        return f"{shards[0].name!r} and no index of its shards (*.safetensors.index.json)"
    other = next(
        (
            path.name
            for ending in ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.gguf")
            for path in folder.glob(ending)
        ),
        None,
    )
    return (
        f"only {other!r}: of a directory safetensors are read; name the file itself"
        if other
        else "no *.safetensors file"
    )
