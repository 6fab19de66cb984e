"""Costs of the layouts in which GPUs can share a request.

They come from a model's configs alone, without a GPU or weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from tinydiff import paths
from tinydiff.config import ModelOptions, ParallelOptions, SamplingOptions
from tinydiff.entries import Entries
from tinydiff.io import hub, sources
from tinydiff.io.sources import Checkpoint
from tinydiff.models import registry, released, workload
from tinydiff.models.family import Autoencoder, Record
from tinydiff.models.ltx2_recipe import audio_tokens
from tinydiff.models.recipe import latent_size, token_count
from tinydiff.parallel import cost
from tinydiff.parallel.cost import CostModel, Machine, Work
from tinydiff.parallel.layout import Layout, check, choose
from tinydiff.parallel.plan import Row
from tinydiff.parallel.shards import why_indivisible
from tinydiff.records import Output, Request, UserError, nearest
from tinydiff.runtime import blueprint, components, postprocess
from tinydiff.runtime.admit import admit
from tinydiff.runtime.autoencoding import PIXELS_PER_PASS
from tinydiff.runtime.net_plan import NetPlan

ROLE_BYTES = {"text_encoder": 2, "image_encoder": 4, "vae": 4}
"""Bytes of a value in the networks beside the denoiser, in their default dtypes on a GPU."""
RESERVED = 1.0
"""GB of every GPU that remain for driver, libraries and fragmentation."""
NEAR = 1.02
"""A layout counts as fast as the fastest if it takes at most this many times as long."""
CARDS = (12, 16, 24, 32, 48, 80, 96, 141, 192)
"""GB of common GPUs."""
REFERENCE = 1024
"""Assumed side length in pixels of a reference image."""


@dataclass(frozen=True)
class Subject:
    """What is planned for: the networks of a model, and one request."""

    name: str
    request: Request
    net: CostModel
    experts: int
    others: Mapping[str, tuple[tuple[Row, ...], int]]
    """The networks beside the denoiser: name -> (weights, bytes of a value)."""
    decoding: tuple[int | None, int | None]
    """Peak bytes of decoding on one rank, and on each of several that share the height; None where not known.
    """
    tiled: int | None
    """Peak bytes of decoding in tiles on one rank."""
    references: int
    """Reference images among the image tokens."""
    work: Work
    b: int
    """Bytes of a value in the denoiser."""
    after: Mapping[str, tuple[int, int]]
    """What is done to decoded frames -> (bytes of its weights, bytes beside them)."""


@dataclass(frozen=True)
class Estimate:
    """A layout's cost per GPU in bytes, and seconds of a step.

    activations: with hoisted tensors. sent: axis -> bytes in a step.
    """

    layout: Layout
    weights: int
    activations: int
    decoding: int
    sent: Mapping[str, int]
    seconds: float
    speedup: float
    vram: float

    @property
    def total(self) -> int:
        return self.weights + max(self.activations, self.decoding)

    @property
    def lacks(self) -> float:
        """Missing GB; 0 or less where it fits."""
        return self.total / 1e9 + RESERVED - self.vram


def subject(
    model: str, sampling: SamplingOptions, ranks: int, b: int, options: Entries | None = None
) -> Subject:
    """Read a model and admit a request as a generation would.

    Input images and sound need not be given, since they have no bearing here. Of a video in segments, one is
    planned.

    model: a name in the registry, a directory or a hub id. b: bytes of a value of the denoiser. options:
    other model options that bear on it. Raises UserError.
    """
    plan = blueprint_of(model, options)
    request = request_without_images(plan, sampling)
    name = plan.row.name if _is_released(model) else model
    return subject_of(plan, request, name, ranks, lambda net: ROLE_BYTES.get(net.family.role, b))


def request_without_images(plan: blueprint.Blueprint, sampling: SamplingOptions) -> Request:
    """The request that these options make, but for images and sound to be given. Raises UserError."""
    row = replace(plan.row, images=(0, plan.row.images[1]), speech=False)
    [request] = admit(replace(plan, row=row), replace(sampling, prompt=("",)))
    return request


def subject_of(
    plan: blueprint.Blueprint,
    request: Request,
    name: str,
    ranks: int,
    itemsize: Callable[[NetPlan[Record]], int],
) -> Subject:
    """What is planned for. itemsize: a network -> bytes of its values."""
    row, net, vae = plan.row, plan.denoiser, plan.autoencoder
    references = row.images[0] if row.image_use == "references" and not row.layers else 0
    tokens, text = _tokens(plan, request, references)
    others = {
        name: (tuple(each.family.spec(each.config)), itemsize(each))
        for name, each in plan.nets.items()
        if each.family.role != "dit"
    }
    passes = max(1, PIXELS_PER_PASS // (4 * request.output.height * request.output.width))
    strips = min(ranks, latent_size(vae.config, request.output)[1])
    size = request.output.num_frames, request.output.height, request.output.width
    whole, shared = (
        workload.decode_bytes(vae.family, vae.config, *size, passes, n, itemsize(vae)) for n in (1, strips)
    )
    return Subject(
        name=name,
        request=request,
        net=workload.cost_model(net.family, net.config),
        experts=len(plan.nets) - len(others),
        others=others,
        decoding=(whole, shared),
        tiled=_tiled_bytes(vae, request.output, passes, itemsize(vae), plan.tile or blueprint.TILE),
        references=references,
        work=Work(
            image=tokens,
            text=text,
            views=plan.nets["image_encoder"].config.tokens if "image_encoder" in plan.nets else 0,
            branches=request.guidance.branches,
            steps=request.schedule.steps,
            audio=audio_tokens(plan.nets["audio_vae"].config, request.output)
            if "audio_vae" in plan.nets
            else 0,
        ),
        b=itemsize(net),
        after=postprocess.needs(request.output),
    )


def _tiled_bytes(vae: NetPlan[Autoencoder], output: Output, passes: int, b: int, side: int) -> int | None:
    """Peak bytes of decoding in tiles: those of one tile beside the pixels of those before, or in the end all
    tiles, which cover 16/9 of the image, their rows and the whole.
    """
    sides = output.num_frames, min(side, output.height), min(side, output.width)
    one = workload.decode_bytes(vae.family, vae.config, *sides, passes, 1, b)
    pixels = 3 * output.num_frames * output.height * output.width
    tiles = pixels * 16 // 9
    return None if one is None else max(one + tiles * b, (tiles + 2 * pixels) * b)


def _tokens(plan: blueprint.Blueprint, request: Request, references: int) -> tuple[int, int]:
    """(image tokens, those of references among them; tokens of the longest text)."""
    net, vae = plan.denoiser, plan.autoencoder.config
    patch = net.family.patch(net.config)
    image = token_count(vae, request.output, patch) * (
        request.output.layers + 2 if request.output.layers else 1
    )
    image += references * token_count(vae, replace(request.output, height=REFERENCE, width=REFERENCE), patch)
    configs = {name: each.config for name, each in plan.nets.items()}
    text = request.text.max_tokens + net.family.leading_tokens(net.config, configs)
    return image + net.family.pad_tokens(image), text + net.family.pad_tokens(text)


def blueprint_of(model: str, options: Entries | None = None) -> blueprint.Blueprint:
    """A model of which only the configs are read; those of a released model are known. Raises UserError."""
    return blueprint.from_components(_checkpoint(model), ModelOptions(model_path=model, **options or {}))


def _checkpoint(model: str) -> Checkpoint:
    """The components of a directory or of a hub id; those of a released model are known."""
    row = registry.find(model)
    if row is None or not _is_released(model):
        try:
            return sources.from_directory(hub.resolve(model, weights=False), model)
        except UserError as error:
            names = [entry.name for entry in registry.MODELS]
            hint = nearest(model, [*names, *(name.rpartition("/")[2] for name in names)])
            raise UserError(
                error.field, f"{error}{hint if '; did you mean' not in str(error) else ''}"
            ) from error
    if row.name == registry.SHIPPED:
        return sources.from_directory(components.SHIPPED, row.name)
    return sources.from_released(row.name, released.REPOSITORIES[row.name])


def _is_released(model: str) -> bool:
    """Whether this names a released model, and no directory."""
    return registry.find(model) is not None and paths.kind(paths.path(model, "model_path")) != "directory"


def layouts(subject: Subject, ranks: int) -> Iterator[Layout]:
    """All layouts for one request on this many ranks, with the autoencoder's height sharded."""
    for cfg, tp in ((cfg, tp) for cfg in (1, 2) for tp in range(1, ranks + 1) if ranks % (cfg * tp) == 0):
        if why_indivisible(subject.net.rows, tp) is None:
            rest = ranks // (cfg * tp)
            each = (
                Layout(cfg=cfg, ring=rest // n, ulysses=n, tp=tp, vae=ranks > 1)
                for n in range(1, rest + 1)
                if rest % n == 0
            )
            yield from (layout for layout in each if _possible(subject, layout))


def _possible(subject: Subject, layout: Layout) -> bool:
    try:
        check(layout, subject.net.heads, subject.request.guidance.branches > 1, subject.work.image)
    except UserError:
        return False
    return True


def usual(subject: Subject, ranks: int) -> Layout | None:
    """The layout that `generate --num-gpus` chooses by itself; None where it refuses."""
    try:
        return choose(
            ParallelOptions(num_gpus=ranks),
            ranks,
            subject.net.heads,
            subject.request.guidance.branches > 1,
            subject.work.image,
        )[0]
    except UserError:
        return None


def estimates(subject: Subject, ranks: int, vram: float, machine: Machine) -> list[Estimate]:
    """The layouts that fit into `vram` GB, fastest first, then the others.

    The layout that `generate` chooses comes first where it is hardly slower.

    Each layout that does not fit is followed by the first of these that makes it fit, else by the smallest:
    sharding text encoders over all ranks, full sharding, both.
    """
    found: list[Estimate] = []
    for layout in layouts(subject, ranks):
        found.append(estimate(subject, layout, vram, machine))
        if found[-1].lacks > 0 and layout.size > layout.tp:
            found.append(_helped(subject, layout, vram, machine))
    found.sort(key=lambda each: (each.lacks > 0, float(f"{each.seconds:.3g}"), each.layout.ring, each.total))
    chosen = usual(subject, ranks)
    near = [each for each in found if each.lacks <= 0 and each.seconds <= NEAR * found[0].seconds]
    first = next(
        (each for each in near if chosen is not None and each.layout.sizes == chosen.sizes), found[0]
    )
    return [first, *(each for each in found if each is not first)]


def _helped(subject: Subject, layout: Layout, vram: float, machine: Machine) -> Estimate:
    """The first change that makes a layout fit, else the smallest result: sharding text encoders over all
    ranks, full sharding, both.
    """
    smaller = [
        replace(layout, encoders=encoders, fsdp=fsdp)
        for encoders, fsdp in ((True, False), (False, True), (True, True))
    ]
    tried = [estimate(subject, each, vram, machine) for each in smaller]
    return next((each for each in tried if each.lacks <= 0), min(tried, key=lambda each: each.total))


def over_cards(subject: Subject, ranks: int, machine: Machine) -> list[tuple[Estimate, Estimate | None]]:
    """For each of CARDS: the usual layout, and what helps where it does not fit.

    The layout is the fastest one where `generate` has no usual one.

    None where it fits, and where no layer is held twice, so that nothing is left to divide.
    """
    layout = usual(subject, ranks) or estimates(subject, ranks, float("inf"), machine)[0].layout
    plain = [estimate(subject, layout, vram, machine) for vram in CARDS]
    can = layout.size > layout.tp
    return [
        (each, _helped(subject, layout, each.vram, machine) if each.lacks > 0 and can else None)
        for each in plain
    ]


def estimate(subject: Subject, layout: Layout, vram: float, machine: Machine) -> Estimate:
    """The cost of a layout.

    Text encoders are sharded over tp, or over all ranks, where that divides their heads.
    """
    net, work, b = subject.net, subject.work, subject.b
    weights = cost.denoiser_bytes(net, layout, b, subject.experts)
    for name, (rows, each) in subject.others.items():
        over = (layout.size if layout.encoders else layout.tp) if name.startswith("text_encoder") else 1
        weights += cost.weight_bytes(rows, each, over if why_indivisible(rows, over) is None else 1)
    weights += sum(held for held, _ in subject.after.values())
    seconds = cost.step_seconds(net, layout, work, machine, b)
    return Estimate(
        layout=layout,
        weights=weights,
        activations=cost.activation_bytes(net, layout, work, b)
        + cost.hoisted_bytes(net, layout, work, b)
        + cost.decoded_bytes(net.rows, layout.tp),
        decoding=max(subject.decoding[layout.vae] or 0, *(beside for _, beside in subject.after.values()), 0),
        sent=cost.step_bytes(net, layout, work, b),
        seconds=seconds,
        speedup=cost.step_seconds(net, Layout(), work, machine, b) / seconds,
        vram=vram,
    )
