"""Components of a model as values: what each is called, what its JSON files say, where its weights lie.

A source is a directory in diffusers layout, or what is known of a released model; either gives a
`Checkpoint`. From here on no function asks a directory what a model is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinydiff.entries import Entries
from tinydiff.io.hub import Index, index_of, read_index, read_json
from tinydiff.keymap import KeyMap
from tinydiff.records import UserError

JSON_FILES = (
    *("config.json", "generation_config.json", "scheduler_config.json"),
    *("preprocessor_config.json", "processor_config.json", "guider_config.json"),
)
"""The JSON files of a component that are read. A tokenizer reads its own."""


@dataclass(frozen=True)
class Component:
    """One component of a model.

    json: name of a file -> its entries, of `JSON_FILES` those that are there. files: the directory or the
    file that holds weights or a tokenizer; None where only the JSON is known. keys: where the rows of a
    network with this config stand in the files, unless under the class's own names. option: what the user
    gave to name it.
    """

    name: str
    library: str
    class_name: str
    json: Mapping[str, Entries] = field(default_factory=dict)
    files: Path | None = None
    keys: Callable[[Any], KeyMap] | None = None
    option: str = "model_path"

    def entries(self, file: str = "config.json") -> Entries:
        """The entries of a JSON file. Raises UserError where there is none."""
        if file not in self.json:
            raise UserError(self.option, f"{self.option}: {self.where(file)!r} does not exist")
        return self.json[file]

    def where(self, file: str = "config.json") -> str:
        """A JSON file's path, for messages."""
        return str((self.files or Path(self.name)) / file)

    @property
    def flag(self) -> str:
        """The option that takes this component from elsewhere."""
        return f"--{self.name.replace('_', '-')}-path"

    @property
    def place(self) -> Path:
        """Where its files are. Raises UserError where they are nowhere."""
        if self.files is None:
            raise UserError(
                self.option, f"{self.option}: there are no files of {self.name}; {self.flag} names them"
            )
        return self.files


@dataclass(frozen=True)
class Checkpoint:
    """A model's components before anything large is read.

    name: what the user calls it. class_name: the pipeline's. options: the pipeline's own settings.
    """

    name: str
    class_name: str
    options: Entries
    components: Mapping[str, Component]


def from_directory(directory: Path, name: str) -> Checkpoint:
    """The model in a directory in diffusers layout. Raises UserError where it is none."""
    index = read_index(directory)
    return _checkpoint(
        name,
        index,
        {part: component(part, directory / part, *pair) for part, pair in index.components.items()},
    )


def from_released(name: str, files: Entries) -> Checkpoint:
    """A released model of which only the JSON files are here; see `models.released`."""
    index = index_of(files["model_index"], name)
    json = {part: {"config.json": entries["config"]} for part, entries in files["components"].items()}
    json["scheduler"] = {"scheduler_config.json": files["scheduler"]}
    parts = {part: Component(part, *pair, json.get(part, {})) for part, pair in index.components.items()}
    return _checkpoint(name, index, parts)


def component(name: str, place: Path, library: str, class_name: str, option: str = "model_path") -> Component:
    """A component in a directory of its own."""
    json = {file: read_json(place / file) for file in JSON_FILES if (place / file).is_file()}
    return Component(name, library, class_name, json, place, option=option)


def _checkpoint(name: str, index: Index, components: Mapping[str, Component]) -> Checkpoint:
    return Checkpoint(name, index.class_name, index.options, components)
