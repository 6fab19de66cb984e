"""The models of a server: from `--model-path`, or `--models`, to blueprints and their adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

from tinydiff.config import ModelOptions
from tinydiff.records import UserError, brief
from tinydiff.runtime import backends, fit
from tinydiff.serve.adapters import Adapters
from tinydiff.serve.options import ServeOptions
from tinydiff.serve.service import ServedModel

OF_ONE = (
    *("model_path", "model_id", "revision", "pipeline_class_name"),
    *("component_paths", "component_weights_paths", "component_quantizations"),
    *("lora_path", "lora_nickname", "lora_scale", "lora_weight_name", "lora_target", "lora_alpha"),
    "distilled_lora_path",
)
"""Model options that are about one model; the others hold for all."""


def read(options: ModelOptions, server: ServeOptions) -> tuple[ServedModel, ...]:
    """The models that a server is asked for, the default one first. Raises UserError."""
    if not server.models:
        return (_model(server.served_model_name or options.model_path, options, server),)
    _refuse(options, server)
    named = dict(_named(server))
    return tuple(_model(name, replace(options, model_path=path), server) for name, path in named.items())


def told(models: Sequence[ServedModel]) -> Iterator[str]:
    """One line for each of several models: which others fit on the device beside it. Of one there is none.

    For a server that has loaded nothing yet.
    """
    if len(models) > 1:
        free = fit.room(models[0].blueprint.device)
        yield from fit.together({model.name: model.adapters.base for model in models}, free)


def _model(name: str, options: ModelOptions, server: ServeOptions) -> ServedModel:
    plan = backends.read(options)
    if plan.foreign is not None and server.lora_dir is not None:
        message = f"{plan.foreign.library} loads adapters at the start; give them with --lora-path"
        raise UserError("lora_dir", f"lora_dir: {message}")
    return ServedModel(name, plan, Adapters(plan, server.lora_dir))


def _refuse(options: ModelOptions, server: ServeOptions) -> None:
    """Raise UserError for an option about one model."""
    if server.served_model_name is not None:
        message = f"{brief(server.served_model_name)} names one model; with --models write NAME=MODEL"
        raise UserError("served_model_name", f"served_model_name: {message}")
    default = ModelOptions()
    for entry in fields(ModelOptions):
        name, value = entry.name, getattr(options, entry.name)
        if name in OF_ONE and value != getattr(default, name):
            message = f"{brief(value)} is about one model, so it cannot be given with --models"
            raise UserError(name, f"{name}: {message}")


def _named(server: ServeOptions) -> Iterator[tuple[str, str]]:
    """(name, directory or hub id) of each entry of --models. Raises UserError."""
    seen = set[str]()
    for entry in (part.strip() for word in server.models for part in word.split(",")):
        name, equals, path = entry.partition("=")
        name, path = name.strip(), path.strip() if equals else entry
        if not (name and path and name.isprintable()):
            message = f"{brief(entry)} is not a directory, a hub id or NAME=MODEL"
            raise UserError("models", f"models: {message}, such as draft=black-forest-labs/FLUX.1-schnell")
        if name in seen:
            raise UserError(
                "models", f"models: {brief(name)} is given twice; write NAME=MODEL with two names"
            )
        seen.add(name)
        yield name, path
