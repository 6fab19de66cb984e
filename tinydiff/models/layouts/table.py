"""What a layout of files says.

It says which keys tell it, where the rows stand, and what the shapes say of the config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tinydiff.entries import Entries
from tinydiff.keymap import KeyMap, Line, Shape
from tinydiff.ops.network import Config


@dataclass(frozen=True)
class Sizes:
    """The shapes of a component's tensors by name, and questions to them."""

    shapes: Mapping[str, Shape]

    def __call__(self, name: str, dim: int = 0) -> int:
        """The size of a tensor along a dimension.

        LookupError where it is not there or has no such dimension.
        """
        return self.shapes[name][dim]

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name, or any below it."""
        return any(key == name or key.startswith(f"{name}.") for key in self.shapes)

    def count(self, name: str) -> int:
        """How many numbered parts stand below a name: the highest number and one.

        ValueError for more than there are tensors: such a number is not believed.
        """
        below = (
            key.removeprefix(f"{name}.").partition(".")[0]
            for key in self.shapes
            if key.startswith(f"{name}.")
        )
        count = 1 + max((int(number) for number in below if number.isdecimal()), default=-1)
        if count > len(self.shapes):
            raise ValueError(f"{name}.{count - 1} is there, and there are fewer weights than that")
        return count


@dataclass(frozen=True)
class Layout:
    """One way in which files hold a component.

    name: the layout's, for messages. class_name: of the component, in `models.classes`. signs: names that
    every such file has, of tensors or of what they stand below. lacks: names that none has. lines: config ->
    the key map's lines. entries: the stored shapes, without the prefix -> the entries of config.json that
    they tell.
    """

    name: str
    class_name: str
    signs: tuple[str, ...]
    lines: Callable[[Config], tuple[Line, ...]]
    entries: Callable[[Sizes], Entries]
    lacks: tuple[str, ...] = ()

    def keys(self, config: object, prefix: str = "") -> KeyMap:
        """Where the rows of a network with this config stand in a file, below a prefix of its keys."""
        return KeyMap(self.lines(config), prefix)


def by_rows(lines: tuple[Line, ...], entries: Callable[[Sizes], Entries]) -> Callable[[Sizes], Entries]:
    """The same question to stored names: the tensors that are one row each are asked under the row's name."""
    keys = KeyMap(lines)

    def ask(stored: Sizes) -> Entries:
        shapes: dict[str, Shape] = {}
        for key, shape in stored.shapes.items():
            match = keys.of_key(key)
            if match is not None:
                alone = len(match.keys) == len(match.rows) == 1
                shapes |= dict.fromkeys(match.rows, shape if alone else ())
        return entries(Sizes(shapes))

    return ask
