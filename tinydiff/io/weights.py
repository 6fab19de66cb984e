"""Weights in and out: files are memory-mapped, and cast while streaming to where the weights shall live.
`io.weight_sources` says where in the files each row stands.

Of several ranks each reads only what it holds, and what several hold alike they read in shares and pass on to
each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tinydiff.io.archive import Archive, opened
from tinydiff.io.atomic import write_over
from tinydiff.io.floats import TYPES
from tinydiff.io.kept import Slice, whole
from tinydiff.io.weight_sources import Source, Stored, stored_type, weight_sources
from tinydiff.keymap import AS_IS, KeyMap, runs, stored_shapes, trimmed
from tinydiff.parallel.plan import ALONE, SINGLE, Group, Plan, Row
from tinydiff.parallel.shards import Box, LocalWeight, gather, local_rows, local_weights, shard_range

BUDGET = 8 * 2**20
"""Bytes cast before the mapping is closed: mapped pages count as resident memory until then."""

PASSED = 2**20
"""Bytes that ranks pass on at a time: what a collective has allocated stays with the allocator many times
over.
"""


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
    """What this rank holds of the weights named by `rows`, on `device`.

    Its type is `dtype`, and float32 for rows marked float32.

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
    sources = weight_sources(folder, wanted, keys, variant)
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
            ready[row.name] if row.name in ready else new(row.shape, dtype=stored_type(row, dtype), device=at)
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
    sources = weight_sources(folder, wanted, keys, variant)
    local = {
        each.row.name: each._replace(replicated_over=()) for each in local_weights(wanted.values(), plan)
    }

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        asked = [local[name] for name in names]
        mapped = [each for each in asked if _as_stored(each, sources[each.row.name], dtype)]
        weights = _mapped({each.row.name: sources[each.row.name] for each in mapped}, wanted)
        others = [each for each in asked if each.row.name not in weights]
        weights |= {
            each.row.name: torch.empty(each.shape, dtype=stored_type(each.row, dtype), device="cpu")
            for each in others
        }
        _stream(others, sources, weights)
        return {each.row.name: weights[each.row.name] for each in asked}

    return read


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
    """The whole weights of these rows as a file of the layout holds them.

    This is what `load_weights` reads with `keys`.
    """
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
        if head := match.line.interleaved:
            made = {
                key: x.unflatten(0, (-1, 2, head // 2)).transpose(1, 2).flatten(0, 2)
                for key, x in made.items()
            }
        stored |= {key: made[key].view(shape) for key, shape in shapes.items()}
    return stored


def _as_stored(held: LocalWeight, source: Source, dtype: torch.dtype) -> bool:
    """Whether a weight is held as it is in its file, whole, in one piece and by one rank alone."""
    return (
        held.tensor == held.row.name
        and held.shape == held.row.shape
        and not held.replicated_over
        and len(source.runs) == 1
        and not source.runs[0][1].transposed
        and not source.runs[0][1].interleaved
        and TYPES[source.runs[0][1].dtype] == stored_type(held.row, dtype)
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
    if at.interleaved:
        return _halves_apart(at.view(archive, at.key), at.interleaved, box.source)
    if at.view is whole and box.shape == at.shape:
        return archive.get_tensor(at.key).reshape(box.shape)
    return at.view(archive, at.key)[(slice(None),) * at.lead + box.source].reshape(box.shape)


def _halves_apart(stored: Slice, head: int, source: tuple[slice, ...]) -> Tensor:
    """A box of heads whose halves are stored in turns. Whole heads are read for it."""
    rows, *others = source
    first = rows.start // head * head
    heads = stored[(slice(first, -(-rows.stop // head) * head), *others)].unflatten(0, (-1, head // 2, 2))
    return heads.transpose(1, 2).flatten(0, 2)[rows.start - first : rows.stop - first]


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
