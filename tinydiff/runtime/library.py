"""What a library user calls: the same options as the command line, no files written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields as fields_of
from typing import Any

from tinydiff import config
from tinydiff.records import Result, UserError, nearest
from tinydiff.runtime import blueprint, pipeline
from tinydiff.runtime.admit import admit
from tinydiff.runtime.blueprint import Model


class Quiet:
    """A progress display that shows nothing."""

    def on_stage(self, name: str) -> None:
        pass

    def on_step(self, done: int, total: int) -> None:
        pass


def load(model_path: str | None, options: Mapping[str, Any]) -> Model:
    """See `tinydiff.load`."""
    given = dict(options) if model_path is None else {**options, "model_path": model_path}
    _only(given, config.ModelOptions)
    return blueprint.load(blueprint.read(config.options(given).model))


def generate(model: Model, prompt: str, fields: Mapping[str, Any], progress: config.Progress | None = None) -> Result:
    """See `tinydiff.generate`."""
    if not isinstance(prompt, str):
        raise UserError("prompt", f"prompt: takes one text, not a {type(prompt).__name__}; call once for each prompt")
    _only(fields, config.SamplingOptions)
    sampling = config.options({**fields, "prompt": prompt}).sampling
    [request] = admit(model.blueprint, sampling)
    return pipeline.run(model, request, progress or Quiet())


def _only(given: Mapping[str, Any], record: type) -> None:
    names = {field.name for field in fields_of(record)}
    for name in given:
        if name not in names:
            raise UserError(name, f"{name}: no such option here; known are {', '.join(sorted(names))}{nearest(name, names)}")
