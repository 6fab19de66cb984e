"""The stages from an admitted request to frames.

Each is a function of the value before it; nothing is kept between requests.

Shape letters: B batch, T text tokens, L latent tokens, P values of a packed latent token, C channels, F
latent frames, H and W latent size.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, cast

import numpy
import torch
from torch import Tensor

from tinydiff.config import Progress
from tinydiff.models.family import Denoiser
from tinydiff.models.recipe import Context, LoopInputs, Net, Stage, as_frames, token_count
from tinydiff.ops import store as stores
from tinydiff.ops.host import of_array
from tinydiff.ops.network import RESIDENT, Network
from tinydiff.parallel import sequence
from tinydiff.parallel.plan import Plan
from tinydiff.records import Guidance, InputImages, Output, Request, Result, Sound, UserError
from tinydiff.runtime import autoencoding, loras, postprocess, step_caches
from tinydiff.runtime.blueprint import PRECISIONS, Blueprint, Model
from tinydiff.runtime.clock import Clock
from tinydiff.runtime.context import make_context
from tinydiff.runtime.parameters import parameters
from tinydiff.sampling import guidance, loop, noise, sigmas, solvers, step_cache
from tinydiff.sampling.solvers import Table

log = logging.getLogger(__name__)

FEATHER = 8
"""Half the width in pixels of the seam around an inpainted area. One latent covers as many pixels."""


class PreparedStage(NamedTuple):
    """The inputs of one stage's loop, without noise."""

    stage: Stage
    table: Table
    experts: Callable[[int], loop.Hoisted]
    """Index -> the network prepared for this request, once for all outputs."""

    @property
    def inputs(self) -> LoopInputs:
        return self.stage.inputs

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """Size of each kind of latents, in which noise is drawn."""
        return [kind.size for kind in self.inputs.latents]


class Conditioning(NamedTuple):
    """The inputs of a request's loops, without noise."""

    stages: tuple[PreparedStage, ...]
    """One for each denoising loop, in their order."""
    warnings: tuple[str, ...] = ()
    """Parts of the request without effect: text tokens that were cut."""

    @property
    def steps(self) -> int:
        """Steps of all loops."""
        return sum(stage.table.steps for stage in self.stages)

    @property
    def revised(self) -> str | None:
        """The prompt as a language model rewrote or wrote it; None where none did."""
        return self.stages[0].inputs.revised

    def settled(self, request: Request) -> Request:
        """The request with as many frames as its prompt asks for, where that decides."""
        if request.output.seconds is None:
            return request
        frames = self.stages[-1].stage.request.output.num_frames
        return replace(request, output=replace(request.output, num_frames=frames))


class Begun(NamedTuple):
    """One output at the first step of a stage."""

    inputs: LoopInputs
    """With what the stage before made."""
    denoising: loop.Denoising
    to_image_tokens: Callable[[Tensor], Tensor]
    """Tokens of the loop's state on this rank -> all those of the output."""


class Made(NamedTuple):
    """One output."""

    frames: numpy.ndarray
    """uint8 [frames, height, width, 3 or 4]."""
    latents: Tensor
    """Those of the frames, [N, C, F, H, W]."""
    sound: Sound | None = None


def condition(model: Model, request: Request) -> Conditioning:
    """Run the encoders and compute the table."""
    model = replace(model, nets=loras.for_request(model.nets, model.adapters, request.loras))
    if (second := request.refinement) is not None:
        strengths = loras.refining(model.adapters, request.loras, second.loras)
        request = replace(request, refinement=replace(second, loras=strengths))
    warnings: dict[str, None] = {}  # in order, each once: tokenizers of one length cut alike
    conditioning = _conditioned(
        model, request, make_context(model, request, lambda warning: warnings.update({warning: None}))
    )
    for warning in warnings:
        log.warning("%s", warning)
    return conditioning._replace(warnings=tuple(warnings))


@torch.no_grad()
def _conditioned(model: Model, request: Request, context: Context) -> Conditioning:
    net = model.denoiser
    _check_branches(net.plan, request)
    prepared = net.family.pipelines[model.blueprint.row.pipeline](net.config, context, request)
    stages = (Stage(request, prepared),) if isinstance(prepared, LoopInputs) else prepared
    first, *later = stages
    stages = replace(first, inputs=_start_from_image(first, context)), *later
    return Conditioning(tuple(_prepared(model, stage) for stage in stages))


def _check_branches(plan: Plan, request: Request) -> None:
    """Raises UserError where half of the ranks would have no branch, or not the one that they need."""
    if plan.group("cfg").size == 1:
        return
    guidance = request.guidance
    if request.step_cache is not None:
        message = "a step cache decides by the prompt's branch, which half of the ranks do not have"
        raise UserError("enable_cache_dit", f"enable_cache_dit: {message}; load with cfg_parallel_size 1")
    if guidance.branches == 1:
        message = (
            f"{guidance.scale:g} runs the prompt's branch alone, and cfg_parallel_size 2 "
            "gives half of the ranks another"
        )
        raise UserError(
            "guidance_scale",
            f"guidance_scale: {message}; give more than 1, or load with cfg_parallel_size 1",
        )


def _prepared(model: Model, stage: Stage) -> PreparedStage:
    nets = loras.for_request(model.nets, model.adapters, stage.request.loras)
    table = solver_table(model.blueprint, stage.request, stage.denoisers[0])

    @cache
    def expert(index: int) -> loop.Hoisted:
        net = cast(Net[Denoiser], nets[stage.denoisers[index]])
        return loop.hoist(
            _network(net, stage.request.guidance),
            net.weights,
            stage.inputs.branches,
            table,
            net.lora_scale,
            net.store,
        )

    return PreparedStage(stage, table, expert)


def _network(net: Net[Denoiser], guidance: Guidance) -> Network:
    """The denoiser of a loop. Without guidance there is one branch, which all ranks of `cfg` evaluate."""
    return net.network if guidance.branches > 1 else replace(net.network, plan=net.plan.without("cfg"))


def _start_from_image(stage: Stage, context: Context) -> LoopInputs:
    """The inputs of the first stage, which starts from the input image where the request asks for that."""
    images, inputs = stage.request.images, stage.inputs
    if not images.start:
        return inputs
    start = inputs.pack([context.encode(context.pixels(images.resized))])
    if images.mask is None:
        return replace(inputs, start=start)
    [kind] = inputs.latents
    mask = of_array(images.mask).to(start)[None, None] / 255
    mask = torch.nn.functional.interpolate(mask, size=kind.size[2:])
    return replace(inputs, start=start, mask=inputs.pack([mask[:, :, None].expand(1, *kind.size)]))


def solver_table(blueprint: Blueprint, request: Request, denoiser: str = "transformer") -> Table:
    """The solver of one loop as a table. denoiser: the component that it runs.

    Raises UserError for a scheduler or timesteps that cannot be.
    """
    schedule, guidance, times = request.schedule, request.guidance, request.schedule.dmd_timesteps
    table = (
        solvers.dmd(times, schedule.flow_shift or 1.0) if times else _scheduled(blueprint, request, denoiser)
    )
    if not all(column.isfinite().all() for column in (table.a, table.c, table.b1, table.b2, table.n)):
        shifted = schedule.flow_shift is not None
        field = "flow_shift" if shifted else "num_inference_steps"
        shift = f"a flow_shift of {schedule.flow_shift:g}" if shifted else "the schedule"
        message = f"{schedule.steps} steps of {shift} lie closer together than float32 can represent"
        raise UserError(field, f"{field}: {message}; take fewer steps or a shift nearer to 1")
    table = solvers.with_guidance(table, guidance.scale)
    if schedule.boundary_ratio is not None:
        table = solvers.with_experts(table, schedule.boundary_ratio, guidance.scale_2)
    return solvers.since(table, schedule.skipped)


def _scheduled(blueprint: Blueprint, request: Request, denoiser: str) -> Table:
    scheduler, net, schedule = dict(blueprint.scheduler), blueprint.expert(denoiser), request.schedule
    if schedule.flow_shift is not None:
        if scheduler.get(
            "use_dynamic_shifting"
        ):  # distilled models want a fixed shift in place of one by size
            scheduler |= {"use_dynamic_shifting": False, "shift_terminal": None}
        scheduler[solvers.SHIFT_NAMES.get(str(scheduler.get("_class_name")), "shift")] = schedule.flow_shift
    family, steps, from_text = net.family, schedule.steps, not request.images.start
    own = scheduler.get("use_flow_sigmas") and blueprint.row.pipeline in family.own_grid and from_text
    grid = sigmas.linear_grid(steps) if family.linear_grid and not own else None
    grid = torch.tensor(schedule.sigmas, dtype=torch.float64) if schedule.sigmas else grid
    vae, patch = blueprint.autoencoder.config, family.patch(net.config)
    behind = sum(frame > 0 for frame in request.images.frames)  # keyframes whose tokens are not the video's
    tokens = token_count(vae, request.output, patch)
    tokens += behind * token_count(vae, replace(request.output, num_frames=1), patch)
    mu = family.mu(net.config, tokens, steps, scheduler) if scheduler.get("use_dynamic_shifting") else None
    return solvers.from_scheduler_config(scheduler, steps, sigmas=grid, mu=mu)


def begin(
    model: Model,
    conditioning: Conditioning,
    seed: int,
    number: int = 0,
    before: tuple[LoopInputs, Sequence[Tensor]] | None = None,
    latents: Sequence[Tensor] | None = None,
    compiled: bool = False,
) -> Begun:
    """One output at the first step of stage `number`.

    before: of a later stage, the inputs of the one before and the latents of each kind that it made. latents:
    [1, *size] of each kind in place of the noise of `seed`. Every rank draws the same noise for the whole
    output and keeps its share: the output does not depend on the layout.
    """
    stage = _after(model, conditioning.stages[number], before)
    net, inputs, device = model.expert(stage.stage.denoisers[0]), stage.inputs, model.blueprint.device
    earlier = [
        shape for each in conditioning.stages[:number] for shape in noise.order(each.sizes, each.table)
    ]
    drawn, fresh = noise.latents(seed, stage.sizes, stage.table, earlier)
    x = inputs.pack([each.to(device) for each in latents or drawn])
    if inputs.blended is not None:
        tokens, share = inputs.blended
        x = torch.lerp(x, tokens.to(x), share)
    tokens = None if fresh is None else _packed_steps(inputs, [each.to(x) for each in fresh])
    made = x.shape[1]
    x, fixed = _first_tokens(x, stage)
    whole = x.shape[1]
    plan, kinds = net.plan, inputs.kinds
    tokens = None if tokens is None else sequence.shard(plan, tokens, 2, kinds)
    if fixed is not None:
        fixed = loop.FixedTokens(*(sequence.shard(plan, each, 1, kinds) for each in fixed))
    run = denoiser(model, stage, compiled)
    request = stage.stage.request
    memory = partial(step_cache.memory, _network(net, request.guidance)) if request.step_cache else None
    denoising = loop.start(
        run,
        stage.table,
        sequence.shard(plan, x, 1, kinds),
        stage.experts,
        tokens,
        fixed,
        step_caches.limits(request.step_cache, device),
        memory,
    )

    def to_image_tokens(x_BLP: Tensor) -> Tensor:
        return sequence.gather(plan, x_BLP, 1, whole, kinds)[:, :made]

    return Begun(inputs, denoising, to_image_tokens)


def _after(
    model: Model, stage: PreparedStage, before: tuple[LoopInputs, Sequence[Tensor]] | None
) -> PreparedStage:
    """A stage with the inputs that follow from what the one before made. Its network is prepared again where
    they change what that depends on.
    """
    if stage.stage.after is None or before is None:
        return stage
    inputs = stage.stage.after(*before)
    changed = replace(stage.stage, inputs=inputs)
    if inputs.branches is stage.inputs.branches:
        return stage._replace(stage=changed)
    return _prepared(model, changed)


def _packed_steps(inputs: LoopInputs, fresh: Sequence[Tensor]) -> Tensor:
    """Fresh noise of each kind [S, 1, *size] -> of their tokens [S, 1, L, P]."""
    return torch.stack([inputs.pack(step) for step in zip(*fresh, strict=True)])


def denoise(
    model: Model, conditioning: Conditioning, seed: int, latents: Sequence[Tensor] | None = None
) -> Iterator[Tensor]:
    """Run every stage, and yield the tokens [1, L, P] of the output, float32, after each step.

    The noise is that of `seed`, or `latents` of each kind.
    """
    return (tokens for _, tokens in _steps(model, conditioning, seed, latents))


def _steps(
    model: Model, conditioning: Conditioning, seed: int, latents: Sequence[Tensor] | None = None
) -> Iterator[tuple[LoopInputs, Tensor]]:
    """As `denoise`, with the inputs of the stage that each step belongs to."""
    before = None
    for number in range(len(conditioning.stages)):
        compiled = model.blueprint.compiled
        inputs, denoising, all_tokens = begin(model, conditioning, seed, number, before, latents, compiled)
        while not denoising.done:
            denoising = loop.advance(denoising, 1)
            yield inputs, all_tokens(denoising.state.x)
        if "reused" in (memory := denoising.state.memory):
            log.info("the step cache: %d of %d steps reused", memory["reused"].item(), denoising.step)
        before, latents = (inputs, inputs.unpack(all_tokens(denoising.state.x))), None


def _first_tokens(noise_BLP: Tensor, stage: PreparedStage) -> tuple[Tensor, loop.FixedTokens | None]:
    """(tokens at the noise level where the table begins, and the references' after them; what is fixed)."""
    x, inputs = noise_BLP, stage.inputs
    given = inputs.given_tokens
    if inputs.start is not None:
        clean = inputs.start.to(x.dtype)
        x = torch.lerp(clean, noise_BLP, stage.table.sigmas[0].item())
        if inputs.mask is not None:
            return x, loop.FixedTokens(inputs.mask.to(x.dtype), clean, noise_BLP)
    if given is None:
        return x, None
    tokens = given.tokens.to(x.dtype)
    x = torch.cat([x, tokens[:, x.shape[1] :]], 1)
    return x, loop.FixedTokens(given.denoised.to(x.dtype), tokens, tokens)


_eager = cache(loop.eager_denoise)
"""One function per network and form of guidance: images can share a loop only if they have the same function.
"""


def denoiser(model: Model, stage: PreparedStage, compiled: bool) -> loop.Denoise:
    """The loop with the stage's form of guidance. All requests of that form get the same function."""
    net, asked = model.expert(stage.stage.denoisers[0]), stage.stage.request.guidance
    form = guidance.KINDS[(stage.inputs.guidance or net.family.guidance) if asked.branches > 1 else "none"]
    network = _network(net, asked)
    fetch = stores.fetch(*(each.store for each in model.nets.values() if each.family.role == "dit"))
    reuse = stage.stage.request.step_cache
    cached_after = None if reuse is None else reuse.first_blocks
    if not compiled:
        return _eager(network, form, fetch, cached_after=cached_after)
    # pulls in the compiler: only those who compile pay for it
    from tinydiff.sampling.compile import compiled_blocks, compiled_denoise

    if fetch is RESIDENT:
        return compiled_denoise(network, form, cached_after=cached_after)
    return compiled_blocks(network, form, fetch, cached_after)


@torch.no_grad()
def decode(model: Model, output: Output, latents: Tensor) -> numpy.ndarray:
    """Latents [N, C, F, H, W] -> frames uint8 [frames, height, width, 3 or 4].

    The frames of the N videos follow one another.
    """
    count = 1 if model.blueprint.slicing else len(latents)  # one by one takes less memory
    decoded = [autoencoding.decode(model, output, part) for part in torch.split(latents, count)]
    x = torch.cat([video for videos in decoded for video in videos], 1)
    return as_frames(x[:, model.denoiser.family.unshown_frames(model.denoiser.config) :])


def _keep_outside_mask(frames: numpy.ndarray, images: InputImages) -> numpy.ndarray:
    """Inpainting: the given image's own pixels stay but in the mask and around it, where the two blend over
    twice `FEATHER` pixels.

    The share of what is made is 1 in the mask; outside, the mean over a square of `FEATHER` pixels to each
    side of what has mask so near.
    """
    if images.mask is None:
        return frames
    from PIL import Image, ImageFilter

    near = (
        Image.fromarray(images.mask)
        .filter(ImageFilter.BoxBlur(FEATHER))
        .point(lambda level: 255 if level else 0)
    )
    share = numpy.asarray(near.filter(ImageFilter.BoxBlur(FEATHER)))[..., None] / 255
    return (frames * share + images.resized[0] * (1 - share)).round().astype(numpy.uint8)


@torch.no_grad()
def finish(model: Model, request: Request, inputs: LoopInputs, tokens: Tensor) -> Made:
    """The output of the last step's tokens [1, L, P]. inputs: those of the last stage."""
    latents = inputs.unpack(tokens)
    if not all(x.isfinite().all() for x in latents):
        name, narrow = model.blueprint.row.name, PRECISIONS.get(model.denoiser.dtype)
        message = (
            f"{name} gave values that are not finite; its weights are broken, or {narrow} is too "
            "narrow for it"
        )
        raise UserError("model_path", f"model_path: {message} (see dit_precision)")
    made = decode(model, request.output, latents[0]) if inputs.frames is None else inputs.frames(latents[0])
    frames = _keep_outside_mask(made, request.images)
    if request.speech is not None:
        return Made(frames, latents[0], request.speech.sound if request.output.sound else None)
    kinds = zip(inputs.latents, latents, strict=True) if request.output.sound else ()
    sound = next((kind.decode(x) for kind, x in kinds if kind.decode is not None), None)
    return Made(frames, latents[0], sound)


def run(
    model: Model,
    request: Request,
    progress: Progress,
    save: postprocess.Save | None = None,
    keep: bool = True,
) -> Result:
    """Generate everything that one request asks for.

    save: called for each output. keep: whether the outputs are in the result; otherwise many prompts and long
    videos fit into memory, because frames that are added or enlarged pass to `save` one by one.
    """
    clock = Clock(progress)
    with clock.stage("encode"):
        conditioning = condition(model, request)
    request = conditioning.settled(request)
    effective = parameters(model, request, conditioning.revised, conditioning.warnings)
    outputs: list[Made] = []
    paths: list[Path] = []
    for index, seed in enumerate(request.seeds):
        with clock.stage("denoise"):
            steps = clock.steps(_steps(model, conditioning, seed), conditioning.steps)
            last = deque(steps, maxlen=1).pop()  # holding no others
        with clock.stage("decode"):
            output = finish(model, request, *last)
        frames, written = postprocess.deliver(
            model.blueprint, request, index, output.frames, output.sound, effective, clock, save, keep
        )
        paths += written
        if frames is not None:
            latents = output.latents.transpose(0, 1).flatten(1, 2).cpu()
            outputs.append(Made(frames, latents, output.sound))
    return Result(
        frames=tuple(output.frames for output in outputs),
        latents=tuple(output.latents for output in outputs),
        parameters=effective,
        seeds=request.seeds,
        seconds=clock.seconds,
        step_seconds=tuple(clock.step_seconds),
        paths=tuple(paths),
        sounds=tuple(output.sound for output in outputs if output.sound is not None),
    )
