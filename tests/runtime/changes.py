"""Single changes to the JSON files of a directory, and what becomes of the directory with one: an image, or
one sentence.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinydiff.config import ModelOptions, NoProgress, SamplingOptions
from tinydiff.records import UserError
from tinydiff.runtime import blueprint, pipeline
from tinydiff.runtime.admit import admit

DROPPED = "(dropped)"
VALUES: tuple[Any, ...] = (
    DROPPED,
    None,
    -1,
    0,
    3,
    10**12,
    1.5,
    1e400,
    "text",
    "",
    True,
    False,
    [],
    [1, 2],
    ["a", None],
    {},
    {"a": {"b": 1}},
)
"""What an entry becomes; of a list or an object, also its parts."""
UNKNOWN = "an_unknown_field"


@dataclass(frozen=True)
class Change:
    """file: below the directory. path: keys and places from the file's object down to the entry."""

    file: str
    path: tuple[str | int, ...]
    value: Any

    def __str__(self) -> str:
        return f"{self.file}: {'.'.join(map(str, self.path))} = {self.value!r}"

    def applied(self, stored: Any) -> Any:
        """The file's contents with the change made."""
        made = copy.deepcopy(stored)
        at = made
        for key in self.path[:-1]:
            at = at[key]
        if self.value == DROPPED:
            del at[self.path[-1]]
        else:
            at[self.path[-1]] = self.value
        return made


def json_files(folder: Path) -> list[str]:
    """All but the vocabularies, and the tokenizers library's own file, in which it alone can judge."""
    left = ("vocab.json", "tokenizer.json", "vocabulary")
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*.json")))
    return [
        str(path)
        for path in found
        if not set(path.parts) & set(left) and "index" not in path.stem.split(".")[1:]
    ]


def changes(folder: Path) -> Iterator[Change]:
    """Every change of one entry, three levels deep, and a field that nobody knows in every object."""
    for file in json_files(folder):
        stored = json.loads((folder / file).read_text())
        for path, old in _entries(stored):
            for value in VALUES:
                if json.dumps(value) != json.dumps(old):
                    yield Change(file, path, value)
        for path in ((), *(path for path, old in _entries(stored) if isinstance(old, dict))):
            for value in (None, 1, [1], {"a": 1}):
                yield Change(file, (*path, UNKNOWN), value)


def _entries(stored: Any, before: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    items = (
        stored.items()
        if isinstance(stored, dict)
        else enumerate(stored[:2])
        if isinstance(stored, list)
        else ()
    )
    for key, value in items:
        yield (*before, key), value
        if len(before) < 2:
            yield from _entries(value, (*before, key))


@dataclass(frozen=True)
class Subject:
    """A directory to change, what is asked of it, and what it is unchanged."""

    folder: Path
    asked: SamplingOptions
    options: ModelOptions

    def outcome(self, change: Change) -> str | None:
        """None for an image, else the sentence. Any other error is the caller's to see."""
        path = self.folder / change.file
        before = path.read_text()
        path.write_text(json.dumps(change.applied(json.loads(before))))
        try:
            made(self)
        except UserError as error:
            return str(error)
        finally:
            path.write_text(before)
        return None


def made(subject: Subject) -> Any:
    """What is asked for, in one step."""
    read = blueprint.read(subject.options)
    [request] = admit(read, subject.asked)
    return pipeline.run(blueprint.load(read), request, NoProgress())


def subject(folder: Path, build: Callable[[Path], Any], asked: dict[str, Any], **options: Any) -> Subject:
    build(folder)
    return Subject(folder, SamplingOptions(**asked), ModelOptions(model_path=str(folder), **options))
