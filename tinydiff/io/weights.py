"""Safetensors in and out: memory-mapped, checked against the family's rows, cast while streaming to where the
weights shall live.

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
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinydiff.io import variants
from tinydiff.io.atomic import write_over
from tinydiff.io.hub import read_json
from tinydiff.parallel.plan import ALONE, SINGLE, Group, Plan, Row
from tinydiff.parallel.shards import Box, Held, gathered, holdings, local_rows, share
from tinydiff.records import UserError

log = logging.getLogger(__name__)

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types read as they are. Anything else (float8, integers) needs scales that a cast would silently drop."""

BUFFERS = ("position_ids", "rotary_emb.inv_freq", "num_batches_tracked")
"""Ends of keys that some files store and that are no weights."""

BUDGET = 8 * 2**20
"""Bytes cast before the mapping is closed: mapped pages count as resident memory until then."""

PASSED = 2**20
"""Bytes that ranks pass on at a time: what a collective has allocated stays with the allocator many times
over.
"""

Rename = Callable[[str], str | None]


class Stored(NamedTuple):
    """A tensor on disk: its file, the key there, its safetensors type name and its shape."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]


def load_weights(
    folder: Path,
    rows: Iterable[Row],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    rename: Rename | None = None,
    plan: Plan = SINGLE,
    together: Group = ALONE,
    blocks: Collection[str] = (),
    variant: str | None = None,
) -> dict[str, Tensor]:
    """What this rank holds of the weights named by `rows`, in `dtype` (rows marked float32 in float32) on
    `device`.

    directory: a component's directory, holding one safetensors file or shards with their index; or one
    safetensors file.
    rename: stored key to row name; None drops a key that is known and not needed, which is said in one line.
    plan: its axis "tp" divides the weights by the splits of the rows, its axis "shard" those below `blocks`,
    which come as packs.
    together: the ranks beside this one, on no axis of the plan, that hold the same. All ranks of these groups
    load at the same time.
    variant: the files to load, such as "fp16", where the directory has them; else the plain ones. On the CPU
    a tensor already in its type is not copied: it stays a private mapping of the file, where one rank alone
    holds all of it. All others are cast through a mapping of at most 8 MiB, so that peak memory is that of
    the weights in their final type. What ranks pass on to each other adds an amount that does not depend on
    the weights.
    Raises UserError if a file is broken, or naming the first five keys that are missing, unexpected or of
    another shape: on every rank the same, before anything is passed on. ValueError where the plan does not
    divide a row.
    """
    wanted = {row.name: row for row in rows}
    stored = _stored(folder, wanted, rename or (lambda key: key), variant)
    _check(folder, wanted, stored)
    held = list(holdings(wanted.values(), plan, blocks, together))
    on_cpu = torch.device(device).type == "cpu"
    mapped = [each for each in held if on_cpu and _as_stored(each, stored[each.row.name], dtype)]
    ready = _mapped({each.row.name: stored[each.row.name] for each in mapped})
    weights: dict[str, Tensor] = {}
    for row in local_rows(wanted.values(), plan, blocks):
        new = torch.empty if row.name in stored else torch.zeros  # a pack's padding is zero
        weights[row.name] = (
            ready[row.name] if row.name in ready else new(row.shape, dtype=_type(row, dtype), device=device)
        )
    _stream([each for each in held if each.row.name not in ready], stored, weights)
    return weights


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write one safetensors file that diffusers and transformers also read, replacing `path` whole."""
    from safetensors.torch import save_file

    write_over(
        path,
        lambda file: save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()}, file, {"format": "pt"}
        ),
    )


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
    return f"only {other!r}: weights are read from safetensors alone" if other else "no *.safetensors file"


def _stored(
    folder: Path, wanted: Mapping[str, Row], rename: Rename, variant: str | None
) -> dict[str, Stored]:
    """Row name to the tensor on disk, from the files' headers alone. Of a tied weight's keys its own name is
    preferred.
    """
    stored: dict[str, Stored] = {}
    unread = []
    for file in weight_files(folder, variant):
        with _opened(file) as opened:
            for key in opened.keys():  # noqa: SIM118 (a handle, not a dict)
                name = rename(key)
                if name is None:
                    unread.append(key)
                    continue
                piece = opened.get_slice(key)
                at = Stored(file, key, piece.get_dtype(), tuple(piece.get_shape()))
                if name in stored and not (name in wanted and wanted[name].tied):
                    raise UserError(
                        "model_path",
                        f"model_path: {name!r} is stored twice, in {str(stored[name].file)!r} and {str(file)!r}",
                    )
                if name not in stored or key.endswith(name):
                    stored[name] = at
    if unread := sorted(key for key in unread if not key.endswith(BUFFERS)):
        more = ", ..." if len(unread) > 3 else ""
        log.info(
            "%s: %d stored weights are not needed and not read (%s%s)",
            folder,
            len(unread),
            ", ".join(unread[:3]),
            more,
        )
    return stored


def _check(folder: Path, wanted: Mapping[str, Row], stored: Mapping[str, Stored]) -> None:
    missing = [name for name in wanted if name not in stored]
    unexpected = [at.key for name, at in stored.items() if name not in wanted]
    shared = [name for name in wanted if name in stored]
    shapes = [(name, stored[name].shape, wanted[name].shape) for name in shared]
    misshapen = [
        f"{name} is {list(has)} and should be {list(needs)}" for name, has, needs in shapes if has != needs
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    found = [
        f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for kind, names in kinds
        if names
    ]
    if found:
        raise UserError(
            "model_path",
            f"model_path: the weights in {str(folder)!r} do not fit the model's config: {'; '.join(found)}",
        )
    foreign = [
        f"{stored[name].key} is {stored[name].dtype}" for name in shared if stored[name].dtype not in FLOATS
    ]
    if foreign:
        more = f" and {len(foreign) - 1} more like it" if len(foreign) > 1 else ""
        raise UserError(
            "model_path",
            f"model_path: in {str(folder)!r} {foreign[0]}{more}; the types read are {', '.join(FLOATS)}",
        )


def _type(row: Row, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if row.float32 else dtype


def _as_stored(held: Held, at: Stored, dtype: torch.dtype) -> bool:
    """Whether a weight is held as it is in its file, whole and by one rank alone."""
    return (
        held.home == held.row.name
        and held.shape == at.shape
        and not held.alike
        and FLOATS[at.dtype] == _type(held.row, dtype)
    )


def _mapped(ready: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Tensors that are their own mapping of the file. A mapping lives as long as a tensor on it; writes stay
    private.
    """
    weights: dict[str, Tensor] = {}
    for file, names in _by_file(ready):
        opened = _opened(file)
        weights |= {name: opened.get_tensor(ready[name].key) for name in names}
    return weights


def _stream(held: Iterable[Held], stored: Mapping[str, Stored], weights: Mapping[str, Tensor]) -> None:
    """Fill `weights` from disk, casting, in the order of `held`: that of the rows, so that all ranks pass on
    in the same order.
    """
    read = _reader()
    for each in held:
        at, tensor = stored[each.row.name], each.of(weights)
        ranks = math.prod(group.size for group in each.alike)
        for box in each.boxes:
            for piece in _pieces(at, box, BUDGET if ranks == 1 else PASSED, ranks):
                if each.alike and at.shape:
                    _pass_on(tensor[piece.target], at, piece, read, each.alike)
                else:
                    tensor[piece.target].copy_(read(at, piece))


def _pass_on(
    target: Tensor, at: Stored, piece: Box, read: Callable[[Stored, Box], Tensor], alike: tuple[Group, ...]
) -> None:
    """Fill a piece that the ranks of these groups hold alike: each reads a share, and gets those of the
    others.
    """
    size = math.prod(group.size for group in alike)
    rank = 0
    for group in alike:
        rank = rank * group.size + group.rank
    dim = _dealt(at)
    target = target.movedim(dim, 0)
    width, start, count = share(len(target), size, rank)
    mine = target.new_zeros(width, *target.shape[1:])
    if count:
        mine[:count].copy_(read(at, piece.narrow(dim, start, count)).movedim(dim, 0))
    target.copy_(gathered(mine, *alike)[: len(target)])


def _reader() -> Callable[[Stored, Box], Tensor]:
    """Reads boxes of stored tensors. The file is mapped anew after `BUDGET` bytes, which lets go of the pages
    read so far.
    """
    file, opened, left = None, None, 0

    def read(at: Stored, box: Box) -> Tensor:
        nonlocal file, opened, left
        size = (box.shape[_dealt(at)] if box.shape else 1) * _row_bytes(at)
        if opened is None or at.file != file or size > left:
            file, opened, left = at.file, _opened(at.file), BUDGET
        left -= size
        return _cut(opened, at, box)

    return read


def _cut(opened: safe_open, at: Stored, box: Box) -> Tensor:
    """A box of a stored tensor, a view of the mapped file: what is not copied from it is not read."""
    return opened.get_tensor(at.key) if box.shape == at.shape else opened.get_slice(at.key)[box.source]


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
    return math.prod(at.shape[_dealt(at) + 1 :]) * FLOATS[at.dtype].itemsize


def _by_file(stored: Mapping[str, Stored]) -> Iterator[tuple[Path, list[str]]]:
    files: dict[Path, list[str]] = {}
    for name, at in stored.items():
        files.setdefault(at.file, []).append(name)
    yield from files.items()


def _opened(file: Path) -> safe_open:
    """The mapped file; its header is checked against its length, so that a truncated file is found here."""
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise UserError(
            "model_path", f"model_path: {str(file)!r} does not exist, though the index beside it names it"
        ) from None
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise UserError(
            "model_path", f"model_path: {str(file)!r} is truncated or not a safetensors file ({reason})"
        ) from error
