"""The effective parameters of a request, as they stand beside its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from tinydiff.entries import EntryDict
from tinydiff.records import Request
from tinydiff.runtime import loras, postprocess
from tinydiff.runtime.blueprint import PRECISIONS, WRITER, Model
from tinydiff.version import __version__


def parameters(
    model: Model, request: Request, revised: str | None = None, warnings: Sequence[str] = ()
) -> EntryDict:
    """Every effective parameter of a request but the seed, and what of it had no effect. JSON-able. revised:
    the prompt as a language model wrote it."""
    text, guidance, schedule, output = request.text, request.guidance, request.schedule, request.output
    entries: EntryDict = {
        "model": model.blueprint.row.name,
        "prompt": text.prompt,
        **({"negative_prompt": text.negative_prompt} if guidance.on else {}),
        "height": output.height,
        "width": output.width,
        "num_frames": output.num_frames,
        "fps": output.fps,
        "num_inference_steps": schedule.steps,
        "guidance_scale": guidance.scale,
    }
    if model.blueprint.row.sound:
        entries["audio"] = output.sound
    if guidance.terms is not None:
        entries |= asdict(guidance.terms)
    if WRITER in model.nets:
        entries["use_pe"] = text.rewrite
    if revised is not None:
        entries["revised_prompt"] = revised
    if model.blueprint.row.guidance_form == "offset":
        entries |= {"guidance_scale": guidance.scale - 1, "cfg_normalization": guidance.normalization}
    if guidance.embedded is not None:
        entries |= {"guidance_scale": guidance.embedded, "true_cfg_scale": guidance.scale}
    if schedule.boundary_ratio is not None:
        entries |= {"guidance_scale_2": guidance.scale_2, "boundary_ratio": schedule.boundary_ratio}
    if schedule.sigmas:
        entries["sigmas"] = list(schedule.sigmas)
    if schedule.dmd_timesteps:
        entries["dmd_denoising_steps"] = list(schedule.dmd_timesteps)
    if schedule.flow_shift is not None:
        entries["flow_shift"] = schedule.flow_shift
    if output.length is not None:
        entries["video_frames"] = output.length
    if output.layers:
        entries["layers"] = output.layers
    entries["given_images"] = len(request.images.originals)
    if request.images.start:
        entries |= {"strength": schedule.strength, "masked": request.images.mask is not None}
    entries |= postprocess.parameters(output)
    if strengths := loras.strengths(model.adapters, request.loras):
        entries["loras"] = strengths
    if (refinement := request.refinement) is not None:
        entries["refine_sigmas"] = list(refinement.sigmas)
        second = loras.refining(model.adapters, request.loras, refinement.loras)
        if strengths := loras.strengths(model.adapters, second):
            entries["refine_loras"] = strengths
    if (cache := request.step_cache) is not None:
        settings = {
            "Fn": cache.first_blocks,
            "warmup": cache.warmup,
            "rdt": cache.threshold,
            "mc": cache.most,
        }
        entries |= {"enable_cache_dit": True, "cache_dit_params": settings}
    if request.notes:
        entries["notes"] = dict(request.notes)
    if warnings:
        entries["warnings"] = list(warnings)
    entries["precision"] = {name: PRECISIONS[net.dtype] for name, net in model.nets.items()}
    return entries | {"tinydiff": __version__, "torch": torch.__version__}
