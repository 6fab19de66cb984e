"""From options to files: what `tinydiff generate` runs, and what the library's `load` and `generate` use."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy

from tinydiff.config import Options, OutputOptions, Progress, SamplingOptions
from tinydiff.entries import Entries
from tinydiff.io import output
from tinydiff.parallel.ranks import Ranks, replica_numbers, to_first
from tinydiff.records import Frames, Request, Result, Sound
from tinydiff.runtime import backends, fit, step_down
from tinydiff.runtime import blueprint as blueprints
from tinydiff.runtime.blueprint import Blueprint, Model
from tinydiff.runtime.torch_state import default_torch_state

log = logging.getLogger(__name__)
Destination = tuple[output.Target, output.Encoding]


@dataclass(frozen=True)
class ReplicaJob:
    """What a replica generates at once: outputs of a prompt from number `first` on.

    They are a request of their own. of: all outputs of the prompt.
    """

    prompt: int
    first: int
    of: int
    request: Request


@dataclass(frozen=True)
class Work:
    """What is made and where it goes: admitted once, by one process."""

    requests: tuple[Request, ...]
    destinations: tuple[Destination, ...]


def read(options: Options) -> Blueprint:
    """The model without what this generation does not use. Raises UserError."""
    plan = backends.read(options.model)
    if options.sampling.use_pe is not False:
        return plan
    return replace(plan, nets={name: net for name, net in plan.nets.items() if name != blueprints.WRITER})


def admitted(options: Options, plan: Blueprint) -> Work:
    """What the model shall make and where that goes, checked. Reads given images. Raises UserError."""
    named = output.names_video(options.output.output_file_name)
    requests = backends.of(plan).admit(plan, options.sampling, as_video=named)
    return Work(tuple(requests), tuple(_destination(options.output, request) for request in requests))


@default_torch_state()
def generate(options: Options, progress: Progress) -> list[Result]:
    """Load the model, make everything asked for and write it.

    One result per prompt. Raises UserError before anything is made.
    """
    started = time.perf_counter()
    plan = read(options)
    return generate_admitted(options, plan, admitted(options, plan), progress, started=started)


@default_torch_state()
def generate_admitted(
    options: Options,
    plan: Blueprint,
    work: Work,
    progress: Progress,
    ranks: Ranks | None = None,
    started: float | None = None,
) -> list[Result]:
    """Load the model, make what was admitted and write it.

    ranks: this process among several that all call this with the same work. Replicas then share the outputs,
    the first rank of each writes its files, and rank 0 returns the results, the others none.
    started: when the clock of loading began.
    """
    started = time.perf_counter() if started is None else started
    requests, destinations = work.requests, work.destinations
    progress.on_stage("load")
    merges = _may_merge(options.sampling)
    model = backends.of(plan).load(plan, ranks, merge_adapters=merges, requests=requests)
    loaded = {"load": time.perf_counter() - started}
    jobs, numbers, writes = (
        _replica_jobs(requests, 1 if ranks is None else ranks.layout.dp),
        range(len(requests)),
        True,
    )
    if ranks is not None:
        numbers, writes = replica_numbers(ranks, len(jobs)), ranks.leads
    found = dict[int, Result]()
    for n in numbers:
        job, destination = jobs[n], destinations[jobs[n].prompt]
        make = partial(
            _run_job,
            job=job,
            destination=destination,
            options=options.output,
            progress=progress,
            writes=writes,
        )
        found[n] = step_down.run(model, job.request, make, alone=ranks is None)
    if ranks is None and (told_peak := fit.compared(model.blueprint, requests)) is not None:
        log.info("%s", told_peak)
    if ranks is not None:
        told = to_first(ranks.groups["world"], found if writes else {})
        found = {n: result for share in told for n, result in share.items()}
        if not found:
            return []
    results = [
        _merge_results([found[n] for n, job in enumerate(jobs) if job.prompt == prompt])
        for prompt in range(len(requests))
    ]
    return [replace(results[0], seconds=loaded | dict(results[0].seconds)), *results[1:]]


def _may_merge(sampling: SamplingOptions) -> bool:
    """Whether every loop of a request has the adapters at one strength."""
    return not (sampling.loras or sampling.refine_loras)


def _replica_jobs(requests: Sequence[Request], replicas: int) -> list[ReplicaJob]:
    """Whole requests for one replica, single outputs for several."""
    if replicas == 1:
        return [ReplicaJob(i, 0, len(request.seeds), request) for i, request in enumerate(requests)]
    each = [(i, k, request) for i, request in enumerate(requests) for k in range(len(request.seeds))]
    return [
        ReplicaJob(i, k, len(request.seeds), replace(request, seeds=request.seeds[k : k + 1]))
        for i, k, request in each
    ]


def _run_job(
    model: Model,
    job: ReplicaJob,
    destination: Destination,
    options: OutputOptions,
    progress: Progress,
    writes: bool,
) -> Result:
    """Run a job, and write its files if this rank writes.

    What is written is kept only where it is asked for, so that many prompts fit into memory.
    """

    def save(
        index: int, frames: numpy.ndarray | Frames, sound: Sound | None, parameters: Entries
    ) -> list[Path]:
        paths = _save(*destination, job, index, frames, sound, parameters)
        beside = [output.save_sound(paths[0], sound)] if options.save_audio and sound is not None else []
        return paths + beside

    saves, keep = options.save_output and writes, options.return_frames and writes
    return backends.of(model.blueprint).run(model, job.request, progress, save if saves else None, keep)


def _merge_results(parts: Sequence[Result]) -> Result:
    """The result of a prompt from the results of its jobs, in order.

    The seconds are those of all replicas together.
    """
    if len(parts) == 1:
        return parts[0]
    names = ("frames", "latents", "sounds", "seeds", "step_seconds", "paths")
    joined = {name: tuple(each for part in parts for each in getattr(part, name)) for name in names}
    seconds = {stage: sum(part.seconds[stage] for part in parts) for stage in parts[0].seconds}
    return replace(parts[0], seconds=seconds, **joined)


def _destination(options: OutputOptions, request: Request) -> Destination:
    """Where and how the outputs of a request are written, checked before they are generated."""
    target = output.plan_target(
        options.output_path,
        options.output_file_name,
        video=request.output.num_frames > 1,
        with_alpha=request.output.layers > 0,
        prompt=request.text.prompt,
        seed=request.seeds[0],
    )
    encoding = output.plan_encoding(
        target,
        request.output.saved_fps,
        options.output_quality,
        options.output_compression,
        options.x264_preset,
    )
    if options.save_audio:
        output.check_sound(request.output.num_frames > 1, request.output.sound)
    if options.save_output:
        output.check_size(target, *request.output.saved_size)
        output.check_writable(target.directory, target.path(len(request.seeds) - 1, len(request.seeds)).name)
    return target, encoding


def _save(
    target: output.Target,
    encoding: output.Encoding,
    job: ReplicaJob,
    index: int,
    frames: numpy.ndarray | Frames,
    sound: Sound | None,
    parameters: Entries,
) -> list[Path]:
    """Write output `index` of a job.

    Layers are numbered through all outputs, one file each, or in one directory.
    """
    told = {**parameters, "seed": job.request.seeds[index]}
    number = job.first + index
    if not job.request.output.layers or target.extension == output.FRAMES:
        return [output.save(target, frames, encoding, told, number, job.of, sound)]
    first, count = number * len(frames), job.of * len(frames)
    return [
        output.save(target, layer[None], encoding, {**told, "layer": i}, first + i, count)
        for i, layer in enumerate(frames)
    ]
