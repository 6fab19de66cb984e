"""Files that appear whole or not at all: written beside under a hidden name, flushed to disk, then given
their own name.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path

from tinydiff.records import UserError

FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""What the system answers when a disk, a quota or a file size limit is full."""

NO_LINKS = frozenset((errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK))
"""What a file system without hard links answers to `os.link`."""


def write_new(path: Path, write: Callable[[Path], object]) -> Path:
    """Have `write(temporary)` make a file or a directory and name it `path`, or the next free
    `name-1.extension`.
    Returns the name taken.

    Never replaces anything, also when two processes want one name at once. If anything fails nothing is left
    behind; a full disk or a refused directory is a UserError naming the file.
    """
    return _written(path, write, _claim)


def write_over(path: Path, write: Callable[[Path], object]) -> Path:
    """As `write_new`, but takes the place of an existing file in one step: readers see the old file or the
    new one, whole.
    """
    return _written(path, write, _replace)


def _written(path: Path, write: Callable[[Path], object], name: Callable[[Path, Path], Path]) -> Path:
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with plain_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            _flush(temporary)
            return name(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write `path` into one sentence."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in FULL else (error.strerror or str(error)).lower()
        raise UserError("output_path", f"output_path: cannot write {str(path)!r}: {reason}") from error


def _flush(path: Path) -> None:
    for file in (p for p in chain([path], path.rglob("*")) if p.is_file()):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def _replace(temporary: Path, path: Path) -> Path:
    os.replace(temporary, path)
    return path


def _claim(temporary: Path, path: Path) -> Path:
    stem, extension = (path.name, "") if temporary.is_dir() else (path.stem, path.suffix)
    for name in chain([path], (path.with_name(f"{stem}-{number}{extension}") for number in count(1))):
        try:
            _take(temporary, name)
            return name
        except FileExistsError:
            continue
    raise AssertionError("the numbers never end")


def _take(temporary: Path, name: Path) -> None:
    """Give `temporary` a name that nothing has yet, else FileExistsError."""
    if temporary.is_dir():
        name.mkdir()  # the empty directory is ours alone: the rename may replace it
        os.replace(temporary, name)
        return
    try:
        os.link(temporary, name)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, name)
