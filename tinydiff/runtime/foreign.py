"""A model that a pipeline of another library runs: what is known of it before its weights are loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinydiff.config import ModelOptions
from tinydiff.entries import Entries
from tinydiff.runtime.loras import Chosen

Untyped = Any
"""An object of another library, which has no types here."""


@dataclass(frozen=True)
class Foreign:
    """A pipeline class and the directory of a model that it runs.

    arguments: what a call takes and its default, which is None where the pipeline decides. needed: those that
    have no default. open: whether it takes further arguments. precisions: component -> fp32, fp16 or bf16.
    """

    library: str
    version: str
    pipeline: Untyped
    directory: Path
    options: ModelOptions
    arguments: Entries
    needed: Collection[str]
    open: bool
    precisions: Mapping[str, str]
    adapters: tuple[Chosen, ...] = ()
    output: str | None = None
    """The value that a call is to return, of a pipeline of blocks that can return several."""

    @property
    def class_name(self) -> str:
        return self.pipeline.__name__

    def strengths(self, asked: Mapping[str, float]) -> dict[str, float]:
        """How strong each adapter is for a request that asks for `asked`."""
        if not asked:
            return {each.name: each.strength for each in self.adapters}
        return {each.name: asked.get(each.name, 0.0) for each in self.adapters}
