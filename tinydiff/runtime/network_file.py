"""The file of a network that works on decoded frames: where it is, and its weights."""

from __future__ import annotations

from pathlib import Path

from tinydiff import paths
from tinydiff.io import archive, hub
from tinydiff.records import UserError, brief


def located(path: str, field: str, example: str, usual: str | None = None) -> Path:
    """The file that an option names: a file, or one of a hub repository as `id:file`.

    field: the option. example: such an `id:file`. usual: the file that a directory or a hub id alone stands
    for; None where neither may be given.
    """
    local = paths.path(path, field)
    kind = paths.kind(local)
    if usual is not None and kind == "directory":
        if paths.kind(local / usual) != "file":
            raise UserError(field, f"{field}: the directory {brief(path)} has no file {usual}")
        return local / usual
    alone = usual is not None and not kind and hub.HUB_ID.fullmatch(path)
    found = hub.file(f"{path}:{usual}" if alone else path, field)
    if found is None:
        raise UserError(
            field,
            f"{field}: {brief(path)} is not a file, and not a file of a hub repository, written as {example}",
        )
    return found


def opened(path: Path, field: str) -> archive.Archive:
    """The mapped file. Raises UserError for one that is cut short, or holds code."""
    try:
        return archive.opened(path)
    except UserError as error:
        raise UserError(field, f"{field}: {str(error).removeprefix('model_path: ')}") from None
