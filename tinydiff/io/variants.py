"""Which of a directory's files hold its weights.

They are whole or in shards with an index, plain or a variant such as fp16.

Names are those that diffusers and transformers write: `model.safetensors`, `model.fp16.safetensors`, shards
such as `model.fp16-00001-of-00002.safetensors` (of old `model-00001-of-00002.fp16.safetensors`) and their
index `model.safetensors.index.fp16.json`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from tinydiff.records import nearest

STEMS = ("diffusion_pytorch_model", "model")
"""The usual names of a component's weights, first those of diffusers, then those of transformers: preferred
to others beside them.
"""

_WEIGHTS = re.compile(r"(.+?)(?:\.([A-Za-z]\w*))?(-\d+-of-\d+)?(?:\.([A-Za-z]\w*))?\.safetensors")
_INDEX = re.compile(r"(.+?)\.safetensors\.index(?:\.([A-Za-z]\w*))?\.json")


class Set(NamedTuple):
    """Files that hold the weights once. variant: None is the plain one."""

    stem: str
    variant: str | None

    @property
    def whole(self) -> str:
        """The name of the one file, where it is one."""
        return f"{self.stem}{self._part}.safetensors"

    @property
    def index(self) -> str:
        """The name of the shards' index, where there are shards."""
        return f"{self.stem}.safetensors.index{self._part}.json"

    @property
    def _part(self) -> str:
        return "" if self.variant is None else f".{self.variant}"


def belongs(name: str) -> Set | None:
    """The set that a file belongs to, None where it holds no weights."""
    if match := _INDEX.fullmatch(name):
        return Set(match[1], match[2])
    if match := _WEIGHTS.fullmatch(name):
        return Set(match[1], match[2] or match[4])
    return None


def choose(names: Iterable[str], variant: str | None = None) -> Set | None:
    """The set to load of a directory with these files, None where there is none.

    The asked variant; else the plain set; else the only one. Raises ValueError where nothing tells which.
    """
    files = [name for name in names if (found := belongs(name)) and name in (found.whole, found.index)]
    sets = sorted(
        {found for name in files if (found := belongs(name))},
        key=lambda each: (each.stem, each.variant or ""),
    )
    stems = [each.stem for each in sets]
    stem = next((usual for usual in STEMS if usual in stems), None)
    if stem is None and len(set(stems)) > 1:
        raise ValueError(
            f"holds {', '.join(map(repr, sorted(files)))} and no way to tell which to load; keep one"
        )
    there = {each.variant: each for each in sets if stem in (None, each.stem)}
    if len(there) > 1 and None not in there and variant not in there:
        variants = [str(each) for each in there]
        hint = "" if variant is None else nearest(variant, variants)
        raise ValueError(
            f"holds the variants {' and '.join(variants)}, and nothing says which to load; "
            f"--variant chooses{hint}"
        )
    return there.get(variant, there.get(None, next(iter(there.values()), None)))


def has(folder: Path, variant: str) -> bool:
    """Whether a component's directory holds weights of a variant."""
    return folder.is_dir() and any(
        (found := belongs(path.name)) and found.variant == variant for path in folder.iterdir()
    )


def unchosen(paths: Collection[str], variant: str | None = None) -> list[str]:
    """A repository's weight files that are not loaded, and need not be downloaded."""
    folders: dict[str, list[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, []).append(name)
    left = []
    for folder, names in folders.items():
        try:
            chosen = choose(names, variant)
        except ValueError:
            continue
        others = [name for name in names if belongs(name) not in (None, chosen)]
        left += [f"{folder}/{name}" if folder else name for name in others]
    return left
