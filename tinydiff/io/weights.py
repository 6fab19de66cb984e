"""Safetensors in and out: memory-mapped, checked against the family's rows, cast while streaming to where the weights shall live."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinydiff.io.atomic import write_over
from tinydiff.io.hub import read_json
from tinydiff.parallel.plan import Row
from tinydiff.records import UserError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types read as they are. Anything else (float8, integers) needs scales that a cast would silently drop."""

STEMS = ("diffusion_pytorch_model", "model")
"""The usual names of a component's weights: preferred where a folder also holds variants (`model.fp16.safetensors`)."""

BUDGET = 8 * 2**20
"""Bytes cast before the mapping is closed: mapped pages count as resident memory until then."""

Rename = Callable[[str], str | None]


class Stored(NamedTuple):
    """A tensor on disk: its file, the key there, its safetensors type name and its shape."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]


def load_weights(
    folder: Path, rows: Iterable[Row], dtype: torch.dtype, device: torch.device | str = "cpu", rename: Rename | None = None
) -> dict[str, Tensor]:
    """Weights named by `rows`, in `dtype` (rows marked float32 in float32) on `device`.

    folder: a component's folder, holding one safetensors file or shards with their index; or one safetensors file.
    rename: stored key to row name; None drops a key that is known and not needed.
    On the CPU a tensor already in its type is not copied: it stays a private mapping of the file. All others are cast through a
    mapping of at most 8 MiB, so that peak memory is that of the weights in their final type.
    Raises UserError if a file is broken, or naming the first five keys that are missing, unexpected or of another shape.
    """
    wanted = {row.name: row for row in rows}
    stored = _stored(folder, rename or (lambda key: key))
    _check(folder, wanted, stored)
    types = {name: torch.float32 if wanted[name].float32 else dtype for name in stored}
    on_cpu = torch.device(device).type == "cpu"
    ready = {name for name, at in stored.items() if on_cpu and FLOATS[at.dtype] == types[name]}
    weights = _mapped({name: stored[name] for name in ready})
    for name, at in stored.items():
        if name not in ready:
            weights[name] = torch.empty(at.shape, dtype=types[name], device=device)
    _stream({name: stored[name] for name in stored if name not in ready}, weights)
    return {name: weights[name] for name in wanted if name in weights}


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write one safetensors file that diffusers and transformers also read, replacing `path` whole."""
    from safetensors.torch import save_file

    write_over(path, lambda file: save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file, {"format": "pt"}))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component: the shards its index names, or its one file."""
    if folder.is_file():
        return [folder]
    indices = _preferred(sorted(folder.glob("*.safetensors.index.json")))
    if len(indices) == 1:
        shards = read_json(indices[0]).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UserError("model_path", f"model_path: {str(indices[0])!r} names no shards (weight_map)")
        return sorted({folder / str(name) for name in shards.values()})
    files = _preferred(sorted(folder.glob("*.safetensors")))
    if len(files) == 1:
        return files
    if files or indices:
        names = ", ".join(repr(path.name) for path in indices or files)
        raise UserError("model_path", f"model_path: {str(folder)!r} holds {names} and no way to tell which to load; keep one")
    other = next((path.name for ending in ("*.bin", "*.pth", "*.pt", "*.ckpt") for path in folder.glob(ending)), None)
    found = f"only {other!r}: weights are read from safetensors alone" if other else "no *.safetensors file"
    raise UserError("model_path", f"model_path: {str(folder)!r} has {found}")


def _preferred(paths: list[Path]) -> list[Path]:
    return [path for stem in STEMS for path in paths if path.name.split(".safetensors")[0] == stem][:1] or paths


def _stored(folder: Path, rename: Rename) -> dict[str, Stored]:
    """Row name to the tensor on disk, from the files' headers alone."""
    stored: dict[str, Stored] = {}
    for file in weight_files(folder):
        with _opened(file) as opened:
            for key in opened.keys():  # noqa: SIM118 (a handle, not a dict)
                name = rename(key)
                if name is None:
                    continue
                piece = opened.get_slice(key)
                if name in stored:
                    raise UserError("model_path", f"model_path: {name!r} is stored twice, in {str(stored[name].file)!r} and {str(file)!r}")
                stored[name] = Stored(file, key, piece.get_dtype(), tuple(piece.get_shape()))
    return stored


def _check(folder: Path, wanted: Mapping[str, Row], stored: Mapping[str, Stored]) -> None:
    missing = [name for name, row in wanted.items() if name not in stored and not row.optional]
    unexpected = [at.key for name, at in stored.items() if name not in wanted]
    shared = [name for name in wanted if name in stored]
    shapes = [(name, stored[name].shape, wanted[name].shape) for name in shared]
    misshapen = [f"{name} is {list(has)} and should be {list(needs)}" for name, has, needs in shapes if has != needs]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    found = [f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" for kind, names in kinds if names]
    if found:
        raise UserError("model_path", f"model_path: the weights in {str(folder)!r} do not fit the model's config: {'; '.join(found)}")
    foreign = [f"{stored[name].key} is {stored[name].dtype}" for name in shared if stored[name].dtype not in FLOATS]
    if foreign:
        more = f" and {len(foreign) - 1} more like it" if len(foreign) > 1 else ""
        raise UserError("model_path", f"model_path: in {str(folder)!r} {foreign[0]}{more}; the types read are {', '.join(FLOATS)}")


def _mapped(ready: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Tensors that are their own mapping of the file. A mapping lives as long as a tensor on it; writes stay private."""
    weights: dict[str, Tensor] = {}
    for file, names in _by_file(ready):
        with _opened(file) as opened:
            weights |= {name: opened.get_tensor(ready[name].key) for name in names}
    return weights


def _stream(stored: Mapping[str, Stored], weights: Mapping[str, Tensor]) -> None:
    """Fill `weights` from disk, casting. Each file is mapped anew after `BUDGET` bytes, which lets go of the pages read so far."""
    for file, names in _by_file(stored):
        batch: list[tuple[str, slice | None]] = []
        size = 0
        for name in names:
            for rows, bytes_ in _pieces(stored[name]):
                batch.append((name, rows))
                size += bytes_
                if size >= BUDGET:
                    _copy(file, batch, stored, weights)
                    batch, size = [], 0
        _copy(file, batch, stored, weights)


def _copy(file: Path, batch: Sequence[tuple[str, slice | None]], stored: Mapping[str, Stored], weights: Mapping[str, Tensor]) -> None:
    with _opened(file) as opened:
        for name, rows in batch:
            key = stored[name].key
            source = opened.get_tensor(key) if rows is None else opened.get_slice(key)[rows]
            (weights[name] if rows is None else weights[name][rows]).copy_(source)


def _pieces(at: Stored) -> Iterator[tuple[slice | None, int]]:
    """Cut a tensor along its first dimension into pieces of at most about `BUDGET` bytes, each with its size."""
    size = math.prod(at.shape) * FLOATS[at.dtype].itemsize
    if size <= BUDGET:
        yield None, size
        return
    row = size // at.shape[0]
    step = max(1, BUDGET // row)
    for start in range(0, at.shape[0], step):
        yield slice(start, start + step), step * row


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
        raise UserError("model_path", f"model_path: {str(file)!r} does not exist, though the index beside it names it") from None
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise UserError("model_path", f"model_path: {str(file)!r} is truncated or not a safetensors file ({reason})") from error
