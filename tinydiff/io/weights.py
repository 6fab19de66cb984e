"""Weights in and out: files are memory-mapped, checked against the family's rows, and cast while streaming to
where the weights shall live. A key map says where in the files each row stands.

Of several ranks each reads only what it holds, and what several hold alike they read in shares and pass on to
each other.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tinydiff.io import variants
from tinydiff.io.archive import Archive, opened
from tinydiff.io.atomic import write_over
from tinydiff.io.eight_bits import View, codes, held, scales, whole
from tinydiff.io.floats import FLOATS, TYPES
from tinydiff.io.hub import read_json
from tinydiff.keymap import AS_IS, KeyMap, Match, Run, Shape, runs, stored_shapes, trimmed
from tinydiff.parallel.plan import ALONE, SINGLE, WEIGHT_SCALE, Group, Plan, Row
from tinydiff.parallel.shards import Box, LocalWeight, gather, local_rows, local_weights, shard_range
from tinydiff.records import UserError

log = logging.getLogger(__name__)

BUFFERS = ("position_ids", "rotary_emb.inv_freq", "num_batches_tracked")
"""Ends of keys that some files store and that are no weights."""

BUDGET = 8 * 2**20
"""Bytes cast before the mapping is closed: mapped pages count as resident memory until then."""

PASSED = 2**20
"""Bytes that ranks pass on at a time: what a collective has allocated stays with the allocator many times
over.
"""

_NAMES = {dtype: name for name, dtype in TYPES.items()}


class Stored(NamedTuple):
    """A tensor on disk: its file, the key there, its safetensors type name and its shape.

    lead: dimensions of length one before those of the shape. transposed: the shape is that of a matrix stored
    the other way round. view: what is read of it.
    """

    file: Path
    key: str
    dtype: str
    shape: Shape
    lead: int = 0
    transposed: bool = False
    view: View = whole


class Source(NamedTuple):
    """Where a row stands: what it is made of, each run with the tensor that it lies in."""

    runs: tuple[tuple[Run, Stored], ...]


def load_weights(
    folder: Path,
    rows: Iterable[Row],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    keys: KeyMap = AS_IS,
    plan: Plan = SINGLE,
    replicas: Group = ALONE,
    blocks: Collection[str] = (),
    variant: str | None = None,
    left: Collection[str] = (),
) -> dict[str, Tensor]:
    """What this rank holds of the weights named by `rows`, in `dtype` (rows marked float32 in float32) on
    `device`.

    folder: a component's directory, holding one safetensors file or shards with their index; or one file.
    keys: where each row stands. What it knows and does not read is said in one line.
    plan: its axis "tp" divides the weights by the splits of the rows, its axis "shard" those below `blocks`,
    which come as packs.
    replicas: the ranks beside this one, on no axis of the plan, that hold the same. All ranks of these groups
    load at the same time.
    variant: the files to load, such as "fp16", where the directory has them; else the plain ones. On the CPU
    a tensor already in its type is not copied: it stays a private mapping of the file, where one rank alone
    holds all of it. All others are cast through a mapping of at most 8 MiB, so that peak memory is that of
    the weights in their final type. What ranks pass on to each other adds an amount that does not depend on
    the weights. left: names of weights that stay in their files (see `unread`); they come as meta tensors.
    Raises UserError if a file is broken, or naming the first five keys that are missing, unexpected or of
    another shape: on every rank the same, before anything is passed on. ValueError where the plan does not
    divide a row.
    """
    wanted = {row.name: row for row in rows}
    sources = _sources(folder, wanted, keys, variant)
    local = list(local_weights(wanted.values(), plan, blocks, replicas))
    on_cpu = torch.device(device).type == "cpu"
    mapped = [
        each
        for each in local
        if on_cpu and each.row.name not in left and _as_stored(each, sources[each.row.name], dtype)
    ]
    ready = _mapped({each.row.name: sources[each.row.name] for each in mapped}, wanted)
    weights: dict[str, Tensor] = {}
    for row in local_rows(wanted.values(), plan, blocks):
        new = torch.empty if row.name in sources else torch.zeros  # a pack's padding is zero
        at = "meta" if row.name in left else device
        weights[row.name] = (
            ready[row.name] if row.name in ready else new(row.shape, dtype=_type(row, dtype), device=at)
        )
    there = {*ready, *left}
    _stream([each for each in local if each.row.name not in there], sources, weights)
    return weights


def unread(
    folder: Path,
    rows: Iterable[Row],
    dtype: torch.dtype,
    keys: KeyMap = AS_IS,
    plan: Plan = SINGLE,
    variant: str | None = None,
) -> Callable[[Iterable[str]], dict[str, Tensor]]:
    """Names of rows -> these weights as `load_weights` gives them on the CPU, read anew at every call.

    A tensor already in its type is a mapping of its own, whose pages are let go with the tensor. A rank reads
    by itself what it holds.
    """
    wanted = {row.name: row for row in rows}
    sources = _sources(folder, wanted, keys, variant)
    local = {
        each.row.name: each._replace(replicated_over=()) for each in local_weights(wanted.values(), plan)
    }

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        asked = [local[name] for name in names]
        mapped = [each for each in asked if _as_stored(each, sources[each.row.name], dtype)]
        weights = _mapped({each.row.name: sources[each.row.name] for each in mapped}, wanted)
        others = [each for each in asked if each.row.name not in weights]
        weights |= {
            each.row.name: torch.empty(each.shape, dtype=_type(each.row, dtype), device="cpu")
            for each in others
        }
        _stream(others, sources, weights)
        return {each.row.name: weights[each.row.name] for each in asked}

    return read


def check_weights(
    folder: Path, rows: Iterable[Row], keys: KeyMap = AS_IS, variant: str | None = None
) -> None:
    """Raises what `load_weights` would of these files, from their headers alone."""
    _sources(folder, {row.name: row for row in rows}, keys, variant)


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write one safetensors file that diffusers and transformers also read, replacing `path` whole."""
    from safetensors.torch import save_file

    write_over(
        path,
        lambda file: save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()}, file, {"format": "pt"}
        ),
    )


def exported(weights: Mapping[str, Tensor], rows: Iterable[Row], keys: KeyMap) -> dict[str, Tensor]:
    """The whole weights of these rows as a file of the layout holds them: what `load_weights` reads with
    `keys`."""
    wanted = {row.name: row for row in rows}
    stored: dict[str, Tensor] = {}
    for name in wanted:
        match = keys.of_row(name)
        if match.keys[0] in stored:
            continue
        shapes = stored_shapes(match, wanted)
        made = {key: weights[name].new_empty(trimmed(shape, match.line)) for key, shape in shapes.items()}
        for row, parts in runs(match, wanted).items():
            for run in parts:
                target = made[run.key].T if match.line.transposed else made[run.key]
                if target.shape:
                    target[run.at : run.at + run.size] = weights[row][run.into : run.into + run.size]
                else:
                    target.copy_(weights[row])
        stored |= {key: made[key].view(shape) for key, shape in shapes.items()}
    return stored


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


def _sources(folder: Path, wanted: Mapping[str, Row], keys: KeyMap, variant: str | None) -> dict[str, Source]:
    """Where each row stands, from the files' headers alone. UserError where the files do not fit the rows.

    A weight of 8 bits and its scales are read from where the weight stands, in whatever type it is there.
    """
    sources = _whole_sources(
        folder, {name: row for name, row in wanted.items() if not _is_scale(name)}, keys, variant
    )
    for name, row in wanted.items():
        if row.stored is not None:
            weight, beside = sources[name], wanted[_scale_of(name)]
            sources[name] = _viewed(weight, _NAMES[_type(row, torch.float32)], row.shape, codes(row.stored))
            sources[beside.name] = _viewed(weight, "F32", beside.shape, scales(row.stored))
    return sources


def _is_scale(name: str) -> bool:
    return name.rpartition(".")[2] == WEIGHT_SCALE


def _scale_of(name: str) -> str:
    return f"{name.removesuffix('weight')}{WEIGHT_SCALE}"


def _viewed(source: Source, dtype: str, shape: Shape, view: View) -> Source:
    """The same rows of what a view gives of the stored tensors."""
    return Source(
        tuple(
            (run, at._replace(dtype=dtype, shape=(at.shape[0], *shape[1:]), view=view))
            for run, at in source.runs
        )
    )


def eight_bits(
    folder: Path, rows: Iterable[Row], keys: KeyMap = AS_IS, variant: str | None = None
) -> dict[str, tuple[str, int]]:
    """Row -> (type by torch's name, scales of a row) of the matrices that the files hold in 8 bits and that
    can stay so. Raises what `load_weights` would.
    """
    archives = {file: opened(file) for file in weight_files(folder, variant)}
    if not any(hasattr(archive, "eight_bits") for archive in archives.values()):
        return {}
    found: dict[str, tuple[str, int]] = {}
    for name, source in _whole_sources(folder, {row.name: row for row in rows}, keys, variant).items():
        kinds = {
            None if at.transposed or each is None else (each.stored, each.groups)
            for at, each in ((at, held(archives[at.file], at.key)) for _, at in source.runs)
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
    return at._replace(shape=shape, lead=match.line.lead)


def _type(row: Row, dtype: torch.dtype) -> torch.dtype:
    if row.stored is not None:
        return getattr(torch, row.stored)
    return torch.float32 if row.float32 else dtype


def _as_stored(held: LocalWeight, source: Source, dtype: torch.dtype) -> bool:
    """Whether a weight is held as it is in its file, whole, in one piece and by one rank alone."""
    return (
        held.tensor == held.row.name
        and held.shape == held.row.shape
        and not held.replicated_over
        and len(source.runs) == 1
        and not source.runs[0][1].transposed
        and TYPES[source.runs[0][1].dtype] == _type(held.row, dtype)
    )


def _mapped(ready: Mapping[str, Source], rows: Mapping[str, Row]) -> dict[str, Tensor]:
    """Tensors that are their own mapping of the file.

    A mapping lives as long as a tensor on it; writes stay private.
    """
    archives: dict[Path, Archive] = {}
    weights: dict[str, Tensor] = {}
    for name, source in ready.items():
        run, at = source.runs[0]
        archive = archives.get(at.file) or archives.setdefault(at.file, opened(at.file))
        whole = Box((run.at, *(0,) * (len(at.shape) - 1)), (0,) * len(at.shape), rows[name].shape)
        weights[name] = _cut(archive, at, whole)
    return weights


def _stream(
    held: Iterable[LocalWeight], sources: Mapping[str, Source], weights: Mapping[str, Tensor]
) -> None:
    """Fill `weights` from disk, casting, in the order of `held`: that of the rows, so that all ranks pass on
    in the same order.
    """
    read = _reader()
    for each in held:
        tensor = each.of(weights)
        ranks = math.prod(group.size for group in each.replicated_over)
        for at, box in _boxes(each, sources[each.row.name]):
            for piece in _pieces(at, box, BUDGET if ranks == 1 else PASSED, ranks):
                if each.replicated_over and at.shape:
                    _pass_on(tensor[piece.target], at, piece, read, each.replicated_over)
                else:
                    tensor[piece.target].copy_(read(at, piece))


def _boxes(held: LocalWeight, source: Source) -> Iterator[tuple[Stored, Box]]:
    """What this rank reads for a weight: the boxes it holds, counted in the tensors on disk that they lie
    in."""
    for box in held.boxes:
        for run, at in source.runs:
            if not box.shape:
                yield at, box
                continue
            low, high = (
                max(box.global_start[0], run.into),
                min(box.global_start[0] + box.shape[0], run.into + run.size),
            )
            if low < high:
                part = box.narrow(0, low - box.global_start[0], high - low)
                yield at, part._replace(global_start=(low - run.into + run.at, *part.global_start[1:]))


def _pass_on(
    target: Tensor,
    at: Stored,
    piece: Box,
    read: Callable[[Stored, Box], Tensor],
    replicated_over: tuple[Group, ...],
) -> None:
    """Fill a piece that the ranks of these groups hold alike: each reads a share, and gets those of the
    others.
    """
    size = math.prod(group.size for group in replicated_over)
    rank = 0
    for group in replicated_over:
        rank = rank * group.size + group.rank
    dim = _dealt(at)
    target = target.movedim(dim, 0)
    width, start, count = shard_range(len(target), size, rank)
    mine = target.new_zeros(width, *target.shape[1:])
    if count:
        mine[:count].copy_(read(at, piece.narrow(dim, start, count)).movedim(dim, 0))
    target.copy_(gather(mine, *replicated_over)[: len(target)])


def _reader() -> Callable[[Stored, Box], Tensor]:
    """Reads boxes of stored tensors.

    The file is mapped anew after `BUDGET` bytes, which lets go of the pages read so far.
    """
    file, archive, left = None, None, 0

    def read(at: Stored, box: Box) -> Tensor:
        nonlocal file, archive, left
        size = (box.shape[_dealt(at)] if box.shape else 1) * _row_bytes(at)
        if archive is None or at.file != file or size > left:
            file, archive, left = at.file, opened(at.file), BUDGET
        left -= size
        return _cut(archive, at, box)

    return read


def _cut(archive: Archive, at: Stored, box: Box) -> Tensor:
    """A box of a stored tensor, a view of the mapped file: what is not copied from it is not read."""
    if at.transposed:
        return archive.get_tensor(at.key).T[box.source]
    if at.view is whole and box.shape == at.shape:
        return archive.get_tensor(at.key).reshape(box.shape)
    return at.view(archive, at.key)[(slice(None),) * at.lead + box.source].reshape(box.shape)


def _pieces(at: Stored, box: Box, size: int, ranks: int = 1) -> Iterator[Box]:
    """Cut a box so that the stored rows it lies in, all of which its mapping may show, take about `size`
    bytes at most.

    A piece has as many rows for each of the ranks that share it, and one at least, so that none reads for the
    others.
    """
    if not at.shape:
        yield box
        return
    dim, step = _dealt(at), max(1, size // max(1, _row_bytes(at)) // ranks) * ranks
    for start in range(0, box.shape[dim], step):
        yield box.narrow(dim, start, min(step, box.shape[dim] - start))


def _dealt(at: Stored) -> int:
    """The dimension a stored tensor is cut along: the first of more than one entry, so that pieces are whole
    in the file.
    """
    return next((dim for dim, size in enumerate(at.shape) if size > 1), 0)


def _row_bytes(at: Stored) -> int:
    """Bytes of a stored tensor per entry of that dimension."""
    return math.prod(at.shape[_dealt(at) + 1 :]) * TYPES[at.dtype].itemsize
