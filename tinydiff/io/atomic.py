"""Files that appear whole or not at all: written under a hidden name, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path

from tinydiff.records import UserError

FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""Error numbers of a full disk, quota or file size limit."""

NO_LINKS = frozenset((errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK))
"""Error numbers of `os.link` on a file system without hard links."""


def write_new(path: Path, write: Callable[[Path], object]) -> Path:
    """Have `write(temporary)` make a file or directory, and give it a name that is free.

    The name is that of `path`, or the next free `name-1.extension`.

    Returns the name. Nothing is ever replaced, even if two processes want one name at once. After a failure
    nothing is left behind. A full disk or a refused directory is a UserError that names the file.
    """
    return _written(path, write, _claim)


def write_over(path: Path, write: Callable[[Path], object]) -> Path:
    """As `write_new`, but replaces an existing file atomically: readers see the old file or the new one."""
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
def plain_errors(path: Path) -> Generator[None]:
    """Turn an OSError while writing `path` into a UserError."""
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
    raise AssertionError("count() never ends")


def _take(temporary: Path, name: Path) -> None:
    """Rename `temporary` to a name that does not exist yet. Raises FileExistsError."""
    if temporary.is_dir():
        name.mkdir()  # the new empty directory is ours: the rename may replace it
        os.replace(temporary, name)
        return
    try:
        os.link(temporary, name)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, name)
