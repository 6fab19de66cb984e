"""`tinydiff plan`: memory and time of a request on each layout of GPUs, estimated from configs alone."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Literal

from tinydiff import weight_plan
from tinydiff.config import ModelOptions, ParallelOptions, SamplingOptions
from tinydiff.entries import EntryDict
from tinydiff.parallel.cost import Machine
from tinydiff.parallel.layout import AXES, AXIS_OPTIONS, Layout
from tinydiff.records import UserError, nearest
from tinydiff.residency import PerformanceMode
from tinydiff.values import GIGABYTES, Precision, positional, same, within, within_limits

if TYPE_CHECKING:
    from tinydiff.runtime.estimate import Estimate, Subject
    from tinydiff.runtime.memory import MemoryPlan

LINKS = {"nvlink": 300.0, "pcie": 25.0}
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class PlanOptions:
    """What is planned for, and how it is printed."""

    model: str = positional()
    """A model's name (`tinydiff models`), a directory in diffusers layout or a hub id."""
    num_gpus: int = within(1, least=1, most=2**16)
    """Number of GPUs."""
    vram: float | None = within(above=0, units=GIGABYTES)
    """Memory of each GPU in GB, or with a unit, such as 24GiB. If left out, the usual layout is compared with
    GPUs of 12 to 192 GB."""
    ram: float | None = within(above=0, units=GIGABYTES)
    """Memory of the machine in GB, or with a unit. Offloaded weights must fit there."""
    performance_mode: PerformanceMode = "auto"
    """auto moves the fewest bytes among what fits; memory has the smallest peak; speed and manual keep all on
    the GPU."""
    height: int | None = same(SamplingOptions, "height")
    width: int | None = same(SamplingOptions, "width")
    num_frames: int | None = same(SamplingOptions, "num_frames")
    num_inference_steps: int | None = same(SamplingOptions, "num_inference_steps")
    guidance_scale: float | None = same(SamplingOptions, "guidance_scale")
    true_cfg_scale: float | None = same(SamplingOptions, "true_cfg_scale")
    enable_upscaling: bool = same(SamplingOptions, "enable_upscaling")
    upscaling_scale: int | None = same(SamplingOptions, "upscaling_scale")
    upscaling_model_path: str | None = same(ModelOptions, "upscaling_model_path")
    enable_frame_interpolation: bool = same(SamplingOptions, "enable_frame_interpolation")
    frame_interpolation_scale: float | None = same(SamplingOptions, "frame_interpolation_scale")
    frame_interpolation_model_path: str | None = same(ModelOptions, "frame_interpolation_model_path")
    dit_precision: Precision = "bf16"
    """Data type of the denoiser."""
    quantization: Literal["fp8", "int8", "none"] | None = same(ModelOptions, "quantization")
    component_quantizations: Mapping[str, Literal["fp8", "int8", "none"]] = same(
        ModelOptions, "component_quantizations"
    )
    quantization_ignored_layers: tuple[str, ...] = same(ModelOptions, "quantization_ignored_layers")
    tflops: float = within(400.0, above=0)
    """10^12 operations per second that a GPU reaches. An H100 peaks at 989."""
    bandwidth: str = "nvlink"
    """GB per second from one GPU to others of its machine: nvlink (300), pcie (25) or a number."""
    net_bandwidth: float = within(25.0, above=0)
    """GB per second between machines."""
    gpus_per_node: int = within(8, least=1)
    """Number of GPUs of one machine."""
    placements: bool = False
    """Print the placement of every weight instead, on the layout that `generate` has with these options."""
    tp_size: int | None = same(ParallelOptions, "tp_size")
    ulysses_degree: int | None = same(ParallelOptions, "ulysses_degree")
    ring_degree: int | None = same(ParallelOptions, "ring_degree")
    cfg_parallel_size: int | None = same(ParallelOptions, "cfg_parallel_size")
    data_parallel_size: int | None = same(ParallelOptions, "data_parallel_size")
    use_fsdp_inference: bool | None = same(ParallelOptions, "use_fsdp_inference")
    encoder_parallel: Literal["auto", "fold", "replicate"] = same(ParallelOptions, "encoder_parallel")
    json: bool = False
    """Print JSON."""

    @property
    def sampling(self) -> SamplingOptions:
        """The request."""
        return SamplingOptions(**self._shared_with(SamplingOptions))

    @property
    def model_options(self) -> EntryDict:
        """The other options of the model."""
        return self._shared_with(ModelOptions)

    @property
    def parallel(self) -> ParallelOptions:
        """The layout of `placements`.

        Degrees that are given make num_gpus where it is 1. Raises UserError where degrees are given and
        nothing would come of them.
        """
        plain, shared = ParallelOptions(), self._shared_with(ParallelOptions)
        asked = {name: value for name, value in shared.items() if value != getattr(plain, name)}
        if asked and not self.placements:
            name = next(iter(asked))
            raise UserError(name, f"{name}: every layout is compared; give --placements too to see one")
        return ParallelOptions(num_gpus=None if asked and self.num_gpus == 1 else self.num_gpus, **asked)

    def _shared_with(self, record: type) -> EntryDict:
        shared = (entry.name for entry in fields(self) if entry.metadata.get("same") is record)
        return {name: getattr(self, name) for name in shared}

    @property
    def machine(self) -> Machine:
        """What the layouts run on. Raises UserError."""
        link = LINKS.get(self.bandwidth) or _link(self.bandwidth)
        return Machine(self.tflops, link, self.net_bandwidth, self.gpus_per_node)


def run(question: PlanOptions) -> int:
    """Run the command. Raises UserError."""
    if not question.model:
        raise UserError("model", "model: is missing; `tinydiff models` lists the names")
    machine, parallel = question.machine, question.parallel
    if question.placements:
        print(
            weight_plan.text(
                question.model, question.sampling, parallel, question.json, question.model_options
            )
        )
        return 0
    from tinydiff.runtime import estimate, memory  # torch, for those who get here

    subject = estimate.subject(
        question.model,
        question.sampling,
        question.num_gpus,
        ITEM_BYTES[question.dit_precision],
        question.model_options,
    )
    notes = list(assumptions(question, subject, estimate.RESERVED, estimate.REFERENCE))
    usual = estimate.usual(subject, question.num_gpus)
    if question.vram is None:
        cards = estimate.over_cards(subject, question.num_gpus, machine)
        why, report = peak(question, cards[0][0], usual), _cards_json(subject, cards)
        columns = len(CARD_HEAD) if any(helped for _, helped in cards) else CARD_HEAD.index("help")
        rows = [row[:columns] for row in (CARD_HEAD, *(_card(*each) for each in cards))]
    else:
        estimates = estimate.estimates(subject, question.num_gpus, question.vram, machine)
        why = reason(question, question.vram, best(estimates), usual)
        report = _layouts_json(subject, estimates)
        rows = [HEAD, *(_cells(each, subject.decoding[0] is None) for each in estimates)]
    memory_lines: list[str] = []
    if question.vram is not None and question.num_gpus == 1:
        plan = memory.choose(memory.footprints(subject), question.vram, question.performance_mode)
        if plan.fits and plan.moved:
            why = "not all weights fit on the GPU at once; offload makes the request fit, as shown below"
        report |= {"memory": _memory_json(plan)}
        memory_lines = ["", *_table(memory.rows(plan)), in_memory(question, plan)]
    if question.json:
        report = _question_json(question, subject) | {"reason": why} | report | {"assumptions": notes}
        print(json.dumps(report, indent=2))
    else:
        print("\n".join([_headline(question, subject), why, "", *_table(rows), *memory_lines, "", *notes]))
    return 0


def _link(text: str) -> float:
    try:
        return within_limits("bandwidth", float, text, {"above": 0})
    except UserError as error:
        if text.replace(".", "").lstrip("-").isdigit():
            raise
        allowed = f"{', '.join(LINKS)} or a number{nearest(text, LINKS)}"
        raise UserError("bandwidth", f"bandwidth: {text!r} is not {allowed}") from error


# --- what is printed


def named(layout: Layout) -> str:
    """A layout's name, such as "cfg 2 x ulysses 4"."""
    axes = " x ".join(f"{axis} {n}" for axis, n in zip(AXES, layout.sizes, strict=True) if n > 1) or "one GPU"
    return axes + " + encoders" * layout.encoders + " + fsdp" * layout.fsdp


def flags(layout: Layout) -> str:
    """The options of `generate` that select a layout."""
    sizes = zip(AXES, layout.sizes, strict=True)
    axes = [f"--{AXIS_OPTIONS[axis].replace('_', '-')} {n}" for axis, n in sizes if n > 1]
    switches = ["--encoder-parallel fold"] * layout.encoders + ["--use-fsdp-inference"] * layout.fsdp
    return " ".join([*axes, *switches])


def quantized(question: PlanOptions) -> Iterator[str]:
    """The options of `generate` that quantise as the plan assumes."""
    if question.quantization is not None:
        yield f"--quantization {question.quantization}"
    if own := question.component_quantizations:
        yield f"--component-quantizations {','.join(f'{name}={value}' for name, value in own.items())}"
    if layers := question.quantization_ignored_layers:
        yield f"--quantization-ignored-layers {shlex.join(layers)}"


COUNTS = {2: "two", 3: "three", 4: "four"}
WHY = {
    "cfg": "the branches of guidance exchange data once per step",
    "ulysses": "attention swaps sequence shards for head shards twice",
    "ring": "keys and values are passed around, and heads stay whole",
    "tp": "weights are sharded, with an all-reduce after every second layer",
    "fsdp": "weights are sharded and gathered block by block",
    "encoders": "text encoders are sharded over all ranks",
}


def best(estimates: Sequence[Estimate]) -> Estimate:
    """The fastest that fits, else the one that lacks least."""
    return estimates[0] if estimates[0].lacks <= 0 else min(estimates, key=lambda each: each.lacks)


def peak(question: PlanOptions, plain: Estimate, usual: Layout | None) -> str:
    """One line: what the layout needs on any GPU. usual: the layout that `generate` selects by itself."""
    chosen = plain.layout == usual and question.num_gpus > 1
    command = " ".join(["tinydiff generate", *quantized(question), f"--num-gpus {question.num_gpus}"])
    how = f", which `{command}` selects," if chosen else ""
    needs = f"needs {plain.total / 1e9:.1f} GB at its peak and takes {plain.seconds:.3g} s/step"
    return f"{named(plain.layout)}{how} {needs}"


def reason(question: PlanOptions, vram: float, first: Estimate, usual: Layout | None) -> str:
    """One line: why this layout, and how to select it, or that nothing fits."""
    layout = first.layout
    if first.lacks > 0:
        closest = f"{named(layout)} comes nearest and lacks {first.lacks:.1f} GB"
        return f"nothing fits into {vram:g} GB; {closest}; use more GPUs, larger ones or a smaller size"
    if layout.size == 1:
        return "one GPU has room"
    parts = (name for name in (*AXES, "encoders", "fsdp") if int(getattr(layout, name)) > (name in AXES))
    command = " ".join(["tinydiff generate", *quantized(question), f"--num-gpus {question.num_gpus}"])
    how = f"`{command}` selects it" if layout == usual else f"`{command} {flags(layout)}`"
    return f"{named(layout)} is the fastest that fits: {'; '.join(WHY[name] for name in parts)}. {how}"


def in_memory(question: PlanOptions, plan: MemoryPlan) -> str:
    """One line: the expected peak of the memory plan, how to select it, and whether the machine has room."""
    from tinydiff.runtime import memory

    options = " ".join([*quantized(question), *filter(None, [memory.flags(plan)])])
    how = f"`tinydiff generate {options}`" if options else "`tinydiff generate` as it is"
    if not plan.fits:
        lacks = (plan.peak - plan.room) / 1e9
        return f"peak {plan.peak / 1e9:.1f} GB lacks {lacks:.1f} GB: take a smaller size, or more GPUs; {how}"
    if question.ram is not None and (away := plan.away / 1e9) > question.ram:
        return f"{away:.1f} GB of offloaded weights do not fit into {question.ram:g} GB of memory; add memory"
    return f"expected peak {plan.peak / 1e9:.1f} GB of {question.vram:g} GB: {how}"


def _memory_json(plan: MemoryPlan) -> EntryDict:
    return {
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "moved_bytes": plan.moved,
        "components": {
            part.name: asdict(plan.where[part.name]) | {"weight_bytes": part.weights}
            for part in plan.footprints
        },
    }


def _headline(question: PlanOptions, subject: Subject) -> str:
    request, work = subject.request, subject.work
    frames = f", {request.output.num_frames} frames" if request.output.num_frames > 1 else ""
    frames = frames or (f", {request.output.layers} layers" if request.output.layers else "")
    runs = f"{COUNTS[work.branches]} branches of guidance" if work.branches > 1 else "no guidance"
    gpus = "one GPU" if question.num_gpus == 1 else f"{question.num_gpus} GPUs"
    on = gpus if question.vram is None else f"{question.num_gpus} x {question.vram:g} GB"
    what = (
        f"{subject.name}, {request.output.width}x{request.output.height}{frames}, {work.steps} steps, {runs}"
    )
    return f"{what}: {work.image} image tokens and {work.text} of text, on {on}"


HEAD = ("layout", "weights", "activations", "decoding", "total", "fits", "sent/step", "s/step", "speed-up")


CARD_HEAD = ("GPU", "peak", "fits", "help", "peak with it", "fits with it", "s/step with it")


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        yield "  ".join([name.ljust(widths[0]), *right])


def _cells(each: Estimate, unknown: bool) -> tuple[str, ...]:
    sizes = [f"{size / 1e9:.1f} GB" for size in (each.weights, each.activations, each.decoding, each.total)]
    sizes[2] = "not known" if unknown else sizes[2]
    times = f"{each.seconds:.3g}", f"{each.speedup:.2f}"
    return named(each.layout), *sizes, _fits(each), _sent(sum(each.sent.values())), *times


def _card(plain: Estimate, helped: Estimate | None) -> tuple[str, ...]:
    rest = ("-",) * 4
    if helped is not None:
        switches = " + ".join(["encoders"] * helped.layout.encoders + ["fsdp"] * helped.layout.fsdp)
        rest = switches, f"{helped.total / 1e9:.1f} GB", _fits(helped), f"{helped.seconds:.3g}"
    return f"{plain.vram:g} GB", f"{plain.total / 1e9:.1f} GB", _fits(plain), *rest


def _fits(each: Estimate) -> str:
    return "yes" if each.lacks <= 0 else f"lacks {each.lacks:.1f} GB"


def _sent(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def assumptions(question: PlanOptions, subject: Subject, reserved: float, reference: int) -> Iterator[str]:
    """What the numbers assume, one line each."""
    m = question.machine
    yield "Estimated, not measured. Every number is for one GPU; 1 GB is 10^9 bytes."
    yield f"weights: all networks stay loaded; denoiser in {question.dit_precision}, text encoders in bf16,"
    yield "  image encoder and autoencoder in fp32"
    if question.quantization in ("fp8", "int8"):
        yield f"  linear layers of the denoiser's blocks in {question.quantization}"
    for name, value in question.component_quantizations.items():
        yield f"  linear layers of the blocks of {name} " + ("decoded" if value == "none" else f"in {value}")
    yield "activations: what a step needs beside weights, without torch.compile, and what is computed before"
    yield "total: weights, and the larger of activations and decoding;"
    yield f"  {reserved:g} GB more must be free for the driver and libraries"
    if question.vram is not None:
        yield "sent/step: bytes that a rank passes to collectives"
    speeds = f"{m.link:g} GB/s in a machine of {m.ranks} GPUs, {m.net:g} GB/s between machines"
    yield f"s/step: operations at {m.tflops:g} TFLOP/s, then communication at {speeds};"
    yield "  only gathering weights overlaps with computing; launches and waiting are not counted"
    if subject.decoding[0] is None:
        yield "decoding: not known for this autoencoder, and left out"
    if subject.references:
        yield f"image tokens: with {subject.references} reference image of {reference}x{reference}"
    if question.num_gpus > 1:
        yield "replicas (--data-parallel-size) are left out: they make no single request faster"


def _question_json(question: PlanOptions, subject: Subject) -> EntryDict:
    request = subject.request
    return {
        "model": subject.name,
        "request": {
            "width": request.output.width,
            "height": request.output.height,
            "num_frames": request.output.num_frames,
            **asdict(subject.work),
        },
        "gpus": question.num_gpus,
        "vram_gb": question.vram,
        "machine": asdict(question.machine),
    }


def _layouts_json(subject: Subject, estimates: Sequence[Estimate]) -> EntryDict:
    first = best(estimates)
    recommended = named(first.layout) if first.lacks <= 0 else None
    return {"recommended": recommended, "layouts": [_estimate_json(subject, each) for each in estimates]}


def _cards_json(subject: Subject, cards: Sequence[tuple[Estimate, Estimate | None]]) -> EntryDict:
    rows = []
    for plain, helped in cards:
        extra = None if helped is None else _estimate_json(subject, helped)
        rows.append({"vram_gb": plain.vram, **_estimate_json(subject, plain), "help": extra})
    return {"cards": rows}


def _estimate_json(subject: Subject, each: Estimate) -> EntryDict:
    return {
        "layout": named(each.layout),
        "options": flags(each.layout),
        **asdict(each.layout),
        "weight_bytes": each.weights,
        "activation_bytes": each.activations,
        "decoding_bytes": None if subject.decoding[0] is None else each.decoding,
        "total_bytes": each.total,
        "fits": each.lacks <= 0,
        "lacks_gb": max(0.0, round(each.lacks, 3)),
        "sent_bytes": dict(each.sent),
        "seconds_per_step": each.seconds,
        "speedup": each.speedup,
    }
