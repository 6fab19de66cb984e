"""What runs a model: our own networks, or another library's pipeline. Both are one record of functions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from tinydiff import entries
from tinydiff.config import ModelOptions, SamplingOptions
from tinydiff.entries import EntryDict
from tinydiff.io import hub
from tinydiff.models import registry
from tinydiff.models.classes import RECORDS
from tinydiff.parallel.ranks import Ranks
from tinydiff.records import Request, Result, UserError, brief
from tinydiff.runtime import admit as admission
from tinydiff.runtime import blueprint as blueprints
from tinydiff.runtime import continuous, diffusers_backend, fit, foreign_requests, foreign_run, pipeline
from tinydiff.runtime import parameters as effective
from tinydiff.runtime.background import Background
from tinydiff.runtime.blueprint import Blueprint, Model
from tinydiff.runtime.preview import fit_colours

log = logging.getLogger(__name__)

DIFFUSERS_ONLY = (
    *("pipeline_class_name", "diffusers_attention_backend", "cache_dit_config"),
    "diffusers_quantization_config",
)
"""Model options that only a pipeline of diffusers has."""


@dataclass(frozen=True)
class Backend:
    """Functions with the signatures of the native ones.

    admit, load, run: for one command. condition, make_slot, finish, make_loop and fit_colours: for a server,
    whose loop runs slots step by step; `finish` gives an output and its effective parameters.
    """

    admit: Callable[..., list[Request]]
    load: Callable[..., Model]
    run: Callable[..., Result]
    condition: Callable[[Model, Request], Any]
    make_slot: Callable[..., Any]
    finish: Callable[[Model, Request, Any], tuple[pipeline.Made, EntryDict]]
    make_loop: Callable[[int, bool], Any]
    fit_colours: Callable[[Model], Any]


def _admit(blueprint: Blueprint, sampling: SamplingOptions, *rest: Any, **more: Any) -> list[Request]:
    if sampling.diffusers_kwargs:
        message = f"{blueprint.row.name} runs on tinydiff's own code; give --backend diffusers as well"
        raise UserError("diffusers_kwargs", f"diffusers_kwargs: {message}")
    return admission.admit(blueprint, sampling, *rest, **more)


def _finish(model: Model, request: Request, slot: Any) -> tuple[pipeline.Made, EntryDict]:
    conditioning, tokens = slot.conditioning, slot.to_image_tokens(slot.denoising.state.x)
    output = pipeline.finish(model, request, slot.inputs, tokens)
    return output, effective.parameters(model, request, conditioning.revised, conditioning.warnings)


def _make_loop(most: int, beside: bool) -> continuous.Continuous:
    """most: outputs that share the loop at most. beside: whether graphs compile while images run eagerly."""
    return continuous.Continuous(max_batch=most, background=Background(beside))


def _load(
    blueprint: Blueprint,
    ranks: Ranks | None = None,
    merge_adapters: bool = False,
    requests: Sequence[Request] = (),
) -> Model:
    """Decide where each component lives, and load. requests: what will be asked for; none where unknown."""
    alone = ranks is None or ranks.layout.size == ranks.layout.dp
    free = fit.free_bytes(blueprint.device) if alone else None
    return blueprints.load(fit.fitted(blueprint, requests, free), ranks, merge_adapters)


NATIVE = Backend(
    _admit,
    _load,
    pipeline.run,
    pipeline.condition,
    continuous.make_slot,
    _finish,
    _make_loop,
    fit_colours,
)
DIFFUSERS = Backend(
    foreign_requests.admit,
    diffusers_backend.load,
    foreign_run.run,
    foreign_run.condition,
    foreign_run.make_slot,
    foreign_run.finish,
    lambda most, beside: foreign_run.OneByOne(max_batch=most),
    lambda model: None,
)


def of(blueprint: Blueprint) -> Backend:
    """What runs this model."""
    return NATIVE if blueprint.foreign is None else DIFFUSERS


def read(options: ModelOptions) -> Blueprint:
    """The model that the options name, for the backend that they name. Raises UserError.

    `auto` is our own code where it has the model's classes, else diffusers, which a line says.
    """
    if options.backend == "diffusers":
        return diffusers_backend.read(options)
    try:
        native = blueprints.read(options)
    except UserError as error:
        missing = _missing(options) if error.field == "model_path" else None
        if missing is None or options.backend != "auto":
            raise
        if not diffusers_backend.installed():
            raise UserError(error.field, f"{error}; {diffusers_backend.INSTALL}") from error
        log.warning("diffusers runs %s: tinydiff has no code for %s", options.model_path, missing)
        return diffusers_backend.read(replace(options, backend="diffusers"))
    for entry in fields(ModelOptions):
        name, value = entry.name, getattr(options, entry.name)
        if name in DIFFUSERS_ONLY and value:
            message = f"{brief(value)} has an effect with --backend diffusers only"
            raise UserError(name, f"{name}: {message}")
    return native


def _missing(options: ModelOptions) -> str | None:
    """The class of a model that our own code lacks; None where it lacks none, or the model cannot be read."""
    try:
        directory = hub.resolve(options.model_path, options.revision, weights=False)
        if (directory / diffusers_backend.MODULAR).is_file():
            return "modular blocks"
        index = hub.read_json(directory / "model_index.json")
    except UserError:
        return None
    named = index.get("_class_name")
    pipeline = str(named[-1]) if entries.is_array(named) and named else named
    if isinstance(pipeline, str) and pipeline not in {row.pipeline for row in registry.MODELS}:
        return pipeline
    listed = diffusers_backend.components_of(index).items()
    absent = [
        (name, each) for name, (_, each) in listed if name not in blueprints.FILES and each not in RECORDS
    ]
    return f"{absent[0][1]} (its {absent[0][0]})" if absent else None
