"""Files of the server: outputs and input images of jobs, in one directory that servers may share.

A file's id is its name: 32 random hexadecimal digits, 16 digits that name its owner, and the extension of its
media type. So an id cannot be guessed, cannot lead out of the directory and is useless to another key, and no
list of files is needed. A file is complete or absent, even if the server is killed or the disk is full. No
torch here.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import shutil
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tinydiff.io.atomic import FULL, write_new, write_over
from tinydiff.records import UserError, brief
from tinydiff.serve.jobs import files_of

if TYPE_CHECKING:
    from tinydiff.serve.store import Store

MEDIA_TYPES = {
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp",
    ".gif": "image/gif", ".bmp": "image/bmp", ".avif": "image/avif", ".mp4": "video/mp4",
    ".mp3": "audio/mpeg", ".flac": "audio/flac", ".ogg": "audio/ogg",
    ".webm": "video/webm", ".wav": "audio/wav", ".zip": "application/zip", ".bin": "application/octet-stream",
}  # fmt: skip
"""Extension -> media type."""

NOTE = ".url"
"""Extension of a note with the URL to which a file moved."""

GRACE_S = 3600.0
"""A younger file may belong to a job that is not stored yet; an older one was left by a killed server."""

SECRET_BYTES = 32

_ID = re.compile(r"([0-9a-f]{32})([0-9a-f]{16})?(" + "|".join(map(re.escape, MEDIA_TYPES)) + ")")
"""Random digits, the owner's mark (none in files of earlier versions), extension."""
_HALF_WRITTEN = re.compile(r"\.[0-9a-f]{16}\.tmp")


def secret(state_dir: Path) -> bytes:
    """The key that signs URLs, shared by the servers of a state directory. The first one creates it.

    Only the user of the server can read its file. Raises UserError.
    """
    path = state_dir / "secret"
    with _plain_errors():
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            written = write_new(path, _write_secret)
            if written != path:  # another server was first
                written.unlink()
        found = path.read_bytes()
    if len(found) != SECRET_BYTES:
        raise UserError(
            "state_dir",
            f"state_dir: {str(path)!r} is not a valid secret; remove it to get a new one",
        )
    return found


def claim(folder: Path, secret: bytes) -> Path:
    """Create the directory, or check that it belongs to servers with this secret.

    Servers with another secret would remove files that none of their jobs names. Raises UserError where the
    directory cannot be written to or belongs to other servers.
    """
    field, mark = "output_path", hashlib.sha256(secret).hexdigest()
    note = folder / ".tinydiff-server"
    try:
        if (
            not note.exists()
            and (written := write_new(note, lambda temporary: temporary.write_text(mark, "utf-8"))) != note
        ):
            written.unlink()  # another server was first
        if note.read_text("utf-8") == mark:
            return folder
    except (OSError, UserError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        reason = (getattr(cause, "strerror", None) or str(error)).lower()
        raise UserError(field, f"{field}: cannot write to {brief(str(folder))} ({reason})") from error
    message = (
        f"{brief(str(folder))} has the files of a server with another state_dir; "
        "use another directory, or that state_dir"
    )
    raise UserError(field, f"{field}: {message}")


@dataclass(frozen=True)
class Files:
    """Files by id. Any thread of any server of the directory may call any method."""

    folder: Path
    secret: bytes = field(repr=False)
    """The key that signs URLs."""
    lifetime: float
    """Seconds for which a signed URL is valid by default."""
    limit_bytes: int
    """Limit for all files together; `sweep` removes the oldest beyond it."""

    def put(self, data: bytes | Path, media_type: str, name_hint: str = "", owner: str = "") -> str:
        """Keep bytes, or a finished file, which is moved here; returns the id.

        owner: fingerprint of the key that it belongs to, "" on a server without keys.
        name_hint: a name whose extension is used if the media type has it (.jpeg rather than .jpg).
        Raises UserError where the disk is full or cannot be written to, and then leaves no file behind;
        ValueError for a media type that is not in `MEDIA_TYPES`.
        """
        extensions = [extension for extension, known in MEDIA_TYPES.items() if known == media_type]
        if not extensions:
            raise ValueError(f"{media_type!r} is not one of {', '.join(sorted(set(MEDIA_TYPES.values())))}")
        hinted = Path(name_hint).suffix.lower()
        drawn = secrets.token_hex(16)
        name = drawn + self._mark(drawn, owner) + (hinted if hinted in extensions else extensions[0])

        def write(temporary: Path) -> None:
            if isinstance(data, Path):
                shutil.move(data, temporary)
            else:
                temporary.write_bytes(data)

        with _plain_errors():
            return write_new(self.folder / name, write).name

    def path(self, id: str) -> Path | None:
        """The path of a file; None if it is not here, for any string."""
        path = self.folder / id if _ID.fullmatch(id) else None
        return path if path is not None and path.is_file() else None

    def belongs(self, id: str, owner: str) -> bool:
        """Whether the file belongs to this owner, which its id tells even when the file is gone.

        A file of an earlier version belongs to a server without keys.
        """
        found = _ID.fullmatch(id)
        if found is None:
            return False
        drawn, mark = found[1], found[2]
        return not owner if mark is None else hmac.compare_digest(mark, self._mark(drawn, owner))

    def media_type(self, id: str) -> str:
        """The media type of a file, even of one that is gone. Raises KeyError for an invalid id."""
        found = _ID.fullmatch(id)
        if found is None:
            raise KeyError(id)
        return MEDIA_TYPES[found[3]]

    def delete(self, id: str) -> bool:
        """Remove a file or its note; whether there was one. A client that reads the file gets all of it."""
        if not _ID.fullmatch(id):
            return False
        return any([_removed(self.folder / id), _removed(self._note(id))])

    def moved(self, id: str, url: str) -> None:
        """Remove a file that is now at `url`, and keep a note for clients that have its old URL."""
        if not _ID.fullmatch(id):
            raise KeyError(id)
        with _plain_errors():
            write_over(self._note(id), lambda temporary: temporary.write_text(url, "utf-8"))
        _removed(self.folder / id)

    def elsewhere(self, id: str) -> str | None:
        """The URL to which a file moved; None if it did not."""
        with suppress(FileNotFoundError):
            return self._note(id).read_text("utf-8") if _ID.fullmatch(id) else None
        return None

    def url(self, id: str, base: str, seconds: float | None = None) -> str:
        """A signed URL below `base` (http://host:port), valid for `seconds`, by default `lifetime`."""
        expires = str(int(time.time() + (self.lifetime if seconds is None else seconds)))
        query = f"expires={expires}&signature={self._signature(id, expires)}"
        return f"{base.rstrip('/')}/v1/files/{id}/content?{query}"

    def verify(self, id: str, expires: str, signature: str) -> bool:
        """Whether these parts of a signed URL are valid. Takes the same time for every mistake."""
        return (
            hmac.compare_digest(self._signature(id, expires).encode(), signature.encode(errors="replace"))
            and int(expires) > time.time()
        )

    def sweep(self, store: Store, now: float) -> list[str]:
        """Remove what is too old or too much; returns the ids of the jobs that lost files.

        When a job's `expires_at` has come it goes with its files. While all files together are more than
        `limit_bytes`, the job that was done first loses its files and stays, without those outputs. Last go
        files that no job names, once older than `lifetime`, and half-written ones.
        Files go before rows, so what a killed sweep left is found by the next one, and two at once do no
        harm.
        """
        lost = []
        for job in store.expired(now):
            self._delete_all(files_of(job))
            store.delete(job.id)
            lost.append(job.id)
        # Measured anew each time: another server may be removing some too.
        while (
            sum(about.st_size for _, about in self._entries()) > self.limit_bytes
            and (job := store.oldest()) is not None
        ):
            self._delete_all(files_of(job))
            store.update_outputs(job.id, [output for output in job.outputs if output.url is not None])
            lost.append(job.id)
        self._sweep_nobodys(store, now)
        return lost

    def _sweep_nobodys(self, store: Store, now: float) -> None:
        ages = {path: now - about.st_mtime for path, about in self._entries()}
        for path in (
            path for path, age in ages.items() if age > GRACE_S and _HALF_WRITTEN.fullmatch(path.name)
        ):
            _removed(path)
        # Whose a file is tell only all the jobs together: they are asked when a file is older than those of
        # most jobs become.
        old = {
            path.name.removesuffix(NOTE) for path, age in ages.items() if age > max(self.lifetime, GRACE_S)
        }
        if found := {name for name in old if _ID.fullmatch(name)}:
            self._delete_all(found - {id for job in store.every() for id in files_of(job)})

    def _delete_all(self, ids: Iterable[str]) -> None:
        for id in ids:
            self.delete(id)

    def _entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        """All of the server's own that lies in the directory, which a user may have chosen; other servers may
        remove some meanwhile.
        """
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                if _ID.fullmatch(entry.name.removesuffix(NOTE)) or _HALF_WRITTEN.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        yield Path(entry.path), entry.stat()

    def _note(self, id: str) -> Path:
        return self.folder / (id + NOTE)

    def _mark(self, drawn: str, owner: str) -> str:
        return hmac.new(self.secret, f"owner\n{drawn}\n{owner}".encode(), hashlib.sha256).hexdigest()[:16]

    def _signature(self, id: str, expires: str) -> str:
        return hmac.new(self.secret, f"{id}\n{expires}".encode(errors="replace"), hashlib.sha256).hexdigest()


def _write_secret(path: Path) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(SECRET_BYTES))


def _removed(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _plain_errors() -> Generator[None]:
    """Raise an error of the system as one sentence, without the path, which clients should not see."""
    try:
        yield
    except (OSError, UserError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        reason = "the disk is full" if cause.errno in FULL else (cause.strerror or str(cause)).lower()
        raise UserError("state_dir", f"state_dir: the server cannot store files: {reason}") from error
