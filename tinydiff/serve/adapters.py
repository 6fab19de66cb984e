"""LoRA adapters of a running server: which are loaded, and how strong each is for a request that names none.

An adapter is read by the thread that asks for it and handed to the device's thread, which puts it beside the
weights before the next job. Requests name adapters; only an administrator, or the directory `--lora-dir`,
brings files.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tinydiff.records import UserError
from tinydiff.runtime import loras
from tinydiff.runtime.blueprint import Blueprint

MOST = 16
"""Adapters loaded at once; of more, the one that was used least recently and is not active leaves."""

NAME = re.compile(r"[\w.-]{1,100}")
"""What an adapter may be called."""


class Adapters:
    """The adapters of one server. For any thread."""

    def __init__(self, blueprint: Blueprint, directory: str | None = None) -> None:
        self._blueprint, self._directory = blueprint, None if directory is None else Path(directory)
        self._lock = threading.RLock()
        read = {each.name: loras.read(each, blueprint.nets) for each in blueprint.adapters}
        self._merged = {name: each for name, each in read.items() if self._is_merged(each)}
        chosen = tuple(each.chosen for each in self._merged.values())
        self.base = replace(blueprint, adapters=chosen, lora_mode="merge")
        """The model with the adapters that are in its weights for good."""
        self._loaded = {name: each for name, each in read.items() if name not in self._merged}
        both = {name: each.chosen for name, each in self._loaded.items() if not each.chosen.refines}
        self._active = {name: each.strength for name, each in both.items()}
        self._last = dict(self._active)
        self._now = tuple(self._loaded.values())
        if self._directory is not None and not self._directory.is_dir():
            raise UserError("lora_dir", f"lora_dir: {directory!r} is not a directory")

    def now(self) -> tuple[loras.Read, ...]:
        """The loaded adapters; the same tuple as long as they are the same."""
        return self._now

    def names(self) -> list[str]:
        """What a request may name."""
        with self._lock:
            return sorted({*self._loaded, *self._files()})

    def current_blueprint(self) -> Blueprint:
        """The model with the adapters that are loaded now."""
        return replace(self.base, adapters=(*self.base.adapters, *(each.chosen for each in self._now)))

    def strengths(self, asked: Mapping[str, float]) -> dict[str, float]:
        """How strong each loaded adapter is for a request that asks for `asked`.

        Adapters of the directory are loaded for it. Raises UserError for an unknown name.
        """
        with self._lock:
            for name in asked:
                if name in self._merged:
                    message = f"{name!r} is merged into the weights, so its strength is fixed"
                    raise UserError("loras", f"loras: {message}")
                if name not in self._loaded:
                    self._from_directory(name)
                self._loaded[name] = self._loaded.pop(name)  # used last
            strengths = asked or self._active
            return {name: strengths.get(name, 0.0) for name in self._loaded} if self._loaded else {}

    def add(self, name: str, path: str, target: str | None = None, alpha: float | None = None) -> None:
        """Load an adapter from a file, directory or hub id, in place of one of the same name.

        Raises UserError for one that does not fit.
        """
        if (foreign := self._blueprint.foreign) is not None:
            message = f"{foreign.library} loads adapters at the start; give them with --lora-path"
            raise UserError("lora_path", f"lora_path: {message}")
        file = loras.adapter_file(path)
        self._add(loras.Chosen(name, path, file, 1.0, target or "all", alpha))

    def _is_merged(self, read: loras.Read) -> bool:
        """Whether an adapter of the start goes into the weights: it shall, or it can do nothing else."""
        mode = self._blueprint.lora_mode
        return loras.only_merges(read.chosen, read.adapter, mode) or mode == "merge"

    def _add(self, chosen: loras.Chosen) -> None:
        if NAME.fullmatch(chosen.name) is None:
            message = f"{chosen.name[:80]!r} may have letters, digits, '.', '_' and '-', 100 at most"
            raise UserError("lora_nickname", f"lora_nickname: {message}")
        if chosen.name in self._merged:
            raise UserError("lora_nickname", f"lora_nickname: {chosen.name!r} is merged into the weights")
        read = loras.read(chosen, self._blueprint.nets)
        loras.only_merges(chosen, read.adapter)
        with self._lock:
            self._loaded.pop(chosen.name, None)
            self._loaded[chosen.name] = read
            idle = [name for name in self._loaded if name not in self._active and name != chosen.name]
            for name in idle[: max(0, len(self._loaded) - MOST)]:
                del self._loaded[name]
            self._now = tuple(self._loaded.values())

    def activate(self, strengths: Mapping[str, float]) -> None:
        """Give requests that name no adapter these. Raises UserError for one that is not loaded."""
        with self._lock:
            for name in strengths:
                if name not in self._loaded:
                    raise UserError("lora_nickname", f"lora_nickname: {loras.unknown(name, self.names())}")
            self._active = dict(strengths)
            self._last = self._active or self._last

    def merge(self, strength: float | None) -> None:
        """Activate the adapters that were active last, at another strength where one is given."""
        self.activate({name: own if strength is None else strength for name, own in self._last.items()})

    def listing(self) -> dict[str, object]:
        """Loaded and active adapters, in SGLang's words, and what a request may name."""
        with self._lock:
            active: dict[str, list[dict[str, object]]] = {}
            fixed = {name: each.chosen.strength for name, each in self._merged.items()}
            current_blueprint = self._merged | self._loaded
            for name, strength in (fixed | self._active).items():
                each, merged = current_blueprint[name], name in self._merged
                entry = {"nickname": name, "path": each.chosen.source, "merged": merged, "strength": strength}
                for component in each.adapter.targets:
                    active.setdefault(component, []).append(entry)
            loaded = [(name, each.chosen.source) for name, each in current_blueprint.items()]
            return {
                "loaded_adapters": [{"lora_nickname": name, "lora_path": source} for name, source in loaded],
                "active": active,
                "available": self.names(),
            }

    def _files(self) -> dict[str, Path]:
        if self._directory is None:
            return {}
        files = {path.stem: path for path in sorted(self._directory.glob("*.safetensors"))}
        return {name: path for name, path in files.items() if NAME.fullmatch(name)}

    def _from_directory(self, name: str) -> None:
        file = self._files().get(name)
        if file is None:
            raise UserError("loras", f"loras: {loras.unknown(name, self.names())}")
        self._add(loras.Chosen(name, file.name, file, 1.0, "all"))
