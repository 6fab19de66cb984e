"""From options to files: what `tinydiff generate` runs, and what the library's `load` and `generate` are made of."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from tinydiff.config import Options, OutputOptions, Progress
from tinydiff.io import output
from tinydiff.records import Request, Result
from tinydiff.runtime import blueprint, pipeline
from tinydiff.runtime.admit import admit


def generate(options: Options, progress: Progress) -> list[Result]:
    """Load the model, make everything asked for and write it. One result per prompt. Raises UserError before anything is made."""
    started = time.perf_counter()
    plan = blueprint.read(options.model)
    requests = admit(plan, options.sampling, clip=output.names_a_clip(options.output.output_file_name))
    destinations = [_destination(options.output, request) for request in requests]
    progress.on_stage("load")
    model = blueprint.load(plan)
    seconds = {"load": time.perf_counter() - started}
    results = []
    for request, destination in zip(requests, destinations, strict=True):
        result = pipeline.run(model, request, progress)
        seconds |= result.seconds
        if options.output.save_output:
            progress.on_stage("save")
            before = time.perf_counter()
            result = replace(result, paths=_save(*destination, request, result))
            seconds["save"] = time.perf_counter() - before
        if not options.output.return_frames:
            result = replace(result, frames=(), latents=())  # written, or not wanted: many prompts shall fit into memory
        results.append(replace(result, seconds=seconds))
        seconds = {}
    return results


def _destination(options: OutputOptions, request: Request) -> tuple[output.Target, output.Encoding]:
    """Where and how the request's outputs are written, checked before they are made."""
    target = output.plan_target(
        options.output_path,
        options.output_file_name,
        clip=request.num_frames > 1,
        opacity=request.layers > 0,
        prompt=request.prompt,
        seed=request.seeds[0],
    )
    encoding = output.plan_encoding(target, request.fps, options.output_quality, options.output_compression, options.x264_preset)
    if options.save_output:
        output.check_writable(target.folder)
    return target, encoding


def _save(target: output.Target, encoding: output.Encoding, request: Request, result: Result) -> tuple[Path, ...]:
    """One file an output; layers are a file each, numbered on through all outputs, or a folder."""
    files = []
    for frames, seed in zip(result.frames, result.seeds, strict=True):
        told = {**result.parameters, "seed": seed}
        if request.layers and target.ending != output.FRAMES:
            files += [(layer[None], {**told, "layer": i}) for i, layer in enumerate(frames)]
        else:
            files.append((frames, told))
    return tuple(output.save(target, frames, encoding, told, i, len(files)) for i, (frames, told) in enumerate(files))
