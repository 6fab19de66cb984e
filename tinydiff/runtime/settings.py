"""Guidance, experts and shift of a request.

This says which value counts: the requested one, the directory's, or the one recommended for the release.

A requested value counts first, then the directory's own files. A recommendation for a release counts only
where the directory is that release, by name, and its file is as released. docs/differences.md has the rules
as a table.
"""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from typing import NamedTuple

from tinydiff import entries
from tinydiff.config import SamplingOptions
from tinydiff.records import Guidance, GuidanceTerms, UserError
from tinydiff.runtime.blueprint import WRITER, Blueprint
from tinydiff.sampling.solvers import SHIFT_NAMES

log = logging.getLogger(__name__)


class Settings(NamedTuple):
    """Fields of a `Request`, and `notes`: field -> where its value came from, or why it has no effect."""

    guidance_scale: float
    terms: GuidanceTerms | None
    embedded_guidance: float | None
    guidance_scale_2: float | None
    boundary_ratio: float | None
    negative_prompt: str
    flow_shift: float | None
    use_pe: bool
    notes: dict[str, str]


def settle(blueprint: Blueprint, sampling: SamplingOptions) -> Settings:
    """Decide the settings. Raises UserError for values that contradict each other or the model."""
    notes: dict[str, str] = {}
    guidance, embedded = guidance_of(blueprint, sampling, notes)
    terms = _terms(blueprint, sampling, guidance)
    second, boundary = _experts(blueprint, sampling, guidance, notes)
    negative, standard = sampling.negative_prompt, blueprint.row.negative_prompt
    guided = Guidance(guidance, terms=terms).on
    if negative and not guided:
        _ignored(notes, "negative_prompt", "guidance is off")
    elif negative is None and standard and guided:
        notes["negative_prompt"] = f"the standard one of {blueprint.row.name}; diffusers has none"
    text = (standard if negative is None else negative) or ""
    shift, writes = _shift(blueprint, sampling, notes), WRITER in blueprint.nets
    if sampling.use_pe and not writes:
        raise UserError(
            "use_pe",
            f"use_pe: {blueprint.row.name} has no language model that rewrites prompts (component {WRITER})",
        )
    return Settings(
        guidance,
        terms,
        embedded,
        second,
        boundary,
        text,
        shift,
        writes and sampling.use_pe is not False,
        notes,
    )


def guidance_of(
    blueprint: Blueprint, sampling: SamplingOptions, notes: dict[str, str] | None = None
) -> tuple[float, float | None]:
    """The (classifier-free scale, embedded scale) of guidance.

    The first is off at 1. The second is an input of the network; None for a network without one.
    """
    row, asked, true = blueprint.row, sampling.guidance_scale, sampling.true_cfg_scale
    if row.guidance_form in ("embedded", "true"):
        embedded = row.guidance_form == "embedded"
        if embedded and sampling.negative_prompt and (true or 1.0) <= 1:
            raise UserError(
                "negative_prompt",
                f"negative_prompt: {row.name} reads a negative prompt only with true_cfg_scale above 1",
            )
        if not embedded and (asked or 1.0) != 1:
            _ignored(
                notes,
                "guidance_scale",
                f"{row.name} is told none; true_cfg_scale with a negative prompt guides it",
            )
        if (true or 1.0) > 1 and sampling.negative_prompt is None:
            _ignored(notes, "true_cfg_scale", "no negative prompt is given (an empty one is one)")
            true = None
        return max(1.0, true or 1.0), (row.guidance if asked is None else asked) if embedded else None
    if true is not None and asked is not None:
        raise UserError(
            "true_cfg_scale",
            f"true_cfg_scale: {row.name} has one guidance, which guidance_scale also sets; give one of them",
        )
    if blueprint.options.get("is_distilled"):
        for name, value in (("guidance_scale", asked), ("true_cfg_scale", true)):
            if (value or 1.0) > 1:
                raise UserError(
                    name,
                    f"{name}: {value} is not supported; {row.name} is distilled (guidance 1)",
                )
        return 1.0, None
    scale = next((value for value in (asked, true) if value is not None), row.guidance)
    return max(1.0, scale + 1 if row.guidance_form == "offset" else scale), None


def _terms(blueprint: Blueprint, sampling: SamplingOptions, scale: float) -> GuidanceTerms | None:
    """Terms of guidance beside its scale; None where they are all off.

    Where the request turns guidance off, as distilled models want it, the model's own terms are off too, and
    those that are asked for count.
    """
    row, off = blueprint.row, GuidanceTerms(audio_guidance_scale=scale)
    asked = {each.name: getattr(sampling, each.name) for each in fields(GuidanceTerms)}
    asked = {name: value for name, value in asked.items() if value not in (None, ())}
    if row.terms is None:
        if strange := [name for name, value in asked.items() if value != getattr(GuidanceTerms(), name)]:
            message = f"{row.name} has no such guidance; it guides video and sound together"
            raise UserError(strange[0], f"{strange[0]}: {message}, as LTX-2 does")
        return None
    unguided = scale <= 1 and (sampling.guidance_scale, sampling.true_cfg_scale) != (None, None)
    own = row.terms
    if own.audio_guidance_scale == row.guidance:  # one scale of both, so that of the request is one too
        own = replace(own, audio_guidance_scale=scale)
    terms = replace(off if unguided else own, **asked)
    net, blocks = blueprint.denoiser, terms.spatio_temporal_guidance_blocks
    count, name = len(net.family.blocks(net.config)), "spatio_temporal_guidance_blocks"
    if max(terms.stg_scale, terms.audio_stg_scale) > 0 and not blocks:
        blocks = row.terms.spatio_temporal_guidance_blocks
        terms = replace(terms, **{name: blocks})
    if wrong := [block for block in blocks if block >= count]:
        raise UserError(name, f"{name}: {wrong[0]} is no block; {row.name} has {count}, from 0 on")
    return None if replace(terms, **{name: ()}) == off else terms


def _ignored(notes: dict[str, str] | None, field: str, why: str) -> None:
    """Note and log that the requested value of `field` has no effect, as in diffusers."""
    if notes is not None:
        notes[field] = f"without effect: {why}"
        log.warning("%s has no effect: %s", field, why)


def _experts(
    blueprint: Blueprint, sampling: SamplingOptions, guidance: float, notes: dict[str, str]
) -> tuple[float | None, float | None]:
    """(guidance scale of the second expert, boundary) of a model with two experts, else (None, None).

    As in diffusers, the first expert's scale decides for both whether guidance is on. If it is, the second
    scale may be any number.
    """
    row = blueprint.row
    try:
        stored = entries.value("boundary_ratio", float | None, blueprint.options.get("boundary_ratio"))
    except ValueError as error:
        raise UserError("model_path", f"model_path: {error} (model_index.json)") from error
    if "transformer_2" not in blueprint.nets:
        for name in ("guidance_scale_2", "boundary_ratio"):
            if getattr(sampling, name) is not None:
                raise UserError(
                    name, f"{name}: {row.name} has only one expert, so there is no boundary to set"
                )
        if stored is not None:
            message = (
                f"model_index.json gives boundary_ratio {stored}, where a second expert takes over, "
                "and names no transformer_2"
            )
            raise UserError("model_path", f"model_path: {message}")
        return None, None
    boundary = stored if sampling.boundary_ratio is None else sampling.boundary_ratio
    if boundary is None:
        message = (
            f"{row.name} has two experts and model_index.json names no boundary; give one between 0 "
            "and 1 (0 runs the first alone)"
        )
        raise UserError("boundary_ratio", f"boundary_ratio: {message}")
    if sampling.boundary_ratio is None and boundary != row.boundary_ratio:
        notes["boundary_ratio"] = f"from model_index.json; {row.name} is released with {row.boundary_ratio:g}"
    second = sampling.guidance_scale_2
    if guidance <= 1:
        if (second or 1.0) != 1:
            _ignored(notes, "guidance_scale_2", "guidance_scale turns guidance off for both experts")
        return 1.0, boundary
    if second is None:
        second = guidance if sampling.guidance_scale is not None or row.guidance_2 is None else row.guidance_2
    return second, boundary


def _shift(blueprint: Blueprint, sampling: SamplingOptions, notes: dict[str, str]) -> float | None:
    """The shift of the schedule; None leaves it to the scheduler's file."""
    row, scheduler = blueprint.row, blueprint.scheduler
    if sampling.flow_shift is not None:
        return sampling.flow_shift
    if row.flow_shift is None:
        return None
    field = SHIFT_NAMES.get(str(scheduler.get("_class_name")), "shift")
    stored = 1.0 if scheduler.get(field) is None else scheduler[field]
    if row.solver == "dmd":  # FastVideo has the schedule of its distilled models in its code
        if stored != row.flow_shift:
            notes["flow_shift"] = (
                f"what {row.name} is distilled for; the scheduler's file, which says {stored}, is not read"
            )
        return row.flow_shift
    if not isinstance(stored, int | float):
        return None  # the scheduler's own fields are checked with it
    if blueprint.named and field == "flow_shift" and stored == row.stored_shift:
        if stored != row.flow_shift:
            notes["flow_shift"] = f"recommended for {row.name}; its scheduler's file says {stored:g}"
        return row.flow_shift
    if stored != row.flow_shift:
        notes["flow_shift"] = f"from the scheduler's file; {row.flow_shift:g} is recommended for {row.name}"
    return stored
