"""`tinydiff plan`: memory and time of a request on each layout of GPUs, estimated from configs alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from tinydiff import config, values
from tinydiff.parallel.cost import Machine
from tinydiff.parallel.layout import AXES, OPTIONS, Layout
from tinydiff.records import UserError, nearest

if TYPE_CHECKING:
    from tinydiff.runtime.estimate import Estimate, Subject

USAGE = """\
usage: tinydiff plan MODEL [--num-gpus N] [--vram GB] [options]

Estimate memory, bytes sent and seconds per step of each layout on N GPUs, from
the model's configs. Needs no GPU and no weights.

  MODEL                     a model's name (`tinydiff models`), a directory in
                            diffusers layout or a hub id
  --num-gpus N              number of GPUs: 1 (default)
  --vram GB                 memory of each GPU; if left out, the usual layout is
                            compared with GPUs of 12 to 192 GB
  --size WIDTHxHEIGHT       size in pixels, such as 1280x720 (default: the model's)
  --num-frames N            frames of a video (default: the model's)
  --num-inference-steps N   denoising steps (default: the model's)
  --guidance-scale X        guidance, which runs the network twice per step
                            (default: the model's)
  --true-cfg-scale X        the same for models whose guidance_scale is an input
                            of the network
  --dit-precision TYPE      data type of the denoiser: bf16 (default), fp16 or fp32
  --tflops X                10^12 operations per second that a GPU reaches: 400
                            (default; an H100 peaks at 989)
  --bandwidth X             GB per second from one GPU to others of its machine:
                            nvlink (300, default), pcie (25) or a number
  --net-bandwidth X         GB per second between machines: 25 (default)
  --gpus-per-node N         GPUs of one machine: 8 (default)
  --json                    print JSON
"""

LINKS = {"nvlink": 300.0, "pcie": 25.0}
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Question:
    """The parsed command line. vram: GB, None if left out."""

    model: str
    ranks: int
    vram: float | None
    sampling: config.SamplingOptions
    precision: str
    machine: Machine
    as_json: bool


def main(argv: Sequence[str]) -> int:
    """Run the command. Raises UserError."""
    question = _parsed(argv)
    if question is None:
        print(USAGE, end="")
        return 0
    from tinydiff.runtime import estimate  # torch, for those who get here

    subject = estimate.subject(
        question.model, question.sampling, question.ranks, ITEM_BYTES[question.precision]
    )
    notes = list(assumptions(question, subject, estimate.RESERVED, estimate.REFERENCE))
    usual = estimate.usual(subject, question.ranks)
    if question.vram is None:
        cards = estimate.over_cards(subject, question.ranks, question.machine)
        why, report = peak(question, cards[0][0], usual), _cards_json(subject, cards)
        columns = len(CARD_HEAD) if any(helped for _, helped in cards) else CARD_HEAD.index("help")
        rows = [row[:columns] for row in (CARD_HEAD, *(_card(*each) for each in cards))]
    else:
        estimates = estimate.estimates(subject, question.ranks, question.vram, question.machine)
        why = reason(question, question.vram, best(estimates), usual)
        report = _layouts_json(subject, estimates)
        rows = [HEAD, *(_cells(each, subject.decoding[0] is None) for each in estimates)]
    if question.as_json:
        report = _question_json(question, subject) | {"reason": why} | report | {"assumptions": notes}
        print(json.dumps(report, indent=2))
    else:
        print("\n".join([_headline(question, subject), why, "", *_table(rows), "", *notes]))
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError("plan", f"plan: {message}; see `tinydiff plan --help`")


def _parsed(argv: Sequence[str]) -> Question | None:
    """The question, None for --help."""
    if {"-h", "--help"} & set(argv):
        return None
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--json", action="store_true")
    sampling = ("num_frames", "num_inference_steps", "guidance_scale", "true_cfg_scale")
    numbers = {"vram": None, "tflops": 400.0, "net_bandwidth": 25.0}
    for name in ("num_gpus", "size", "dit_precision", "bandwidth", "gpus_per_node", *sampling, *numbers):
        parser.add_argument(f"--{name.replace('_', '-')}")
    words = {name: value for name, value in vars(parser.parse_args(list(argv))).items() if value is not None}
    shared = {name: words[name] for name in ("num_gpus", "dit_precision", *sampling) if name in words}
    options = config.options(shared | _size(words.get("size")))
    speeds = {
        name: _positive(name, float, words[name]) if name in words else default
        for name, default in numbers.items()
    }
    link = words.get("bandwidth", "nvlink")
    machine = Machine(
        tflops=speeds["tflops"],
        link=LINKS.get(link) or _link(link),
        net=speeds["net_bandwidth"],
        ranks=_positive("gpus_per_node", int, words.get("gpus_per_node", "8")),
    )
    ranks, precision = options.parallel.num_gpus or 1, options.model.dit_precision or "bf16"
    return Question(
        words["model"], ranks, speeds["vram"], options.sampling, precision, machine, words["json"]
    )


def _size(text: str | None) -> dict[str, int]:
    if text is None:
        return {}
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise UserError("size", f"size: {text!r} is not WIDTHxHEIGHT, such as 1280x720")
    return {"width": int(width), "height": int(height)}


def _positive(name: str, kind: type, text: str) -> Any:
    value = values.read(name, kind, text)
    if not 0 < value < float("inf"):
        raise UserError(name, f"{name}: {text} must be above 0 and finite")
    return value


def _link(text: str) -> float:
    try:
        return _positive("bandwidth", float, text)
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
    axes = [f"--{OPTIONS[axis].replace('_', '-')} {n}" for axis, n in sizes if n > 1]
    switches = ["--encoder-parallel fold"] * layout.encoders + ["--use-fsdp-inference"] * layout.fsdp
    return " ".join([*axes, *switches])


WHY = {
    "cfg": "the two branches of guidance exchange data once per step",
    "ulysses": "attention swaps sequence shards for head shards twice",
    "ring": "keys and values are passed around, and heads stay whole",
    "tp": "weights are sharded, with an all-reduce after every second layer",
    "fsdp": "weights are sharded and gathered block by block",
    "encoders": "text encoders are sharded over all ranks",
}


def best(estimates: Sequence[Estimate]) -> Estimate:
    """The fastest that fits, else the one that lacks least."""
    return estimates[0] if estimates[0].lacks <= 0 else min(estimates, key=lambda each: each.lacks)


def peak(question: Question, plain: Estimate, usual: Layout | None) -> str:
    """One line: what the layout needs on any GPU. usual: the layout that `generate` selects by itself."""
    chosen = plain.layout == usual and question.ranks > 1
    how = f", which `tinydiff generate --num-gpus {question.ranks}` selects," if chosen else ""
    needs = f"needs {plain.total / 1e9:.1f} GB at its peak and takes {plain.seconds:.3g} s/step"
    return f"{named(plain.layout)}{how} {needs}"


def reason(question: Question, vram: float, first: Estimate, usual: Layout | None) -> str:
    """One line: why this layout, and how to select it, or that nothing fits."""
    layout = first.layout
    if first.lacks > 0:
        closest = f"{named(layout)} comes nearest and lacks {first.lacks:.1f} GB"
        return f"nothing fits into {vram:g} GB; {closest}; use more GPUs, larger ones or a smaller size"
    if layout.size == 1:
        return "one GPU has room"
    parts = (name for name in (*AXES, "encoders", "fsdp") if int(getattr(layout, name)) > (name in AXES))
    command = f"tinydiff generate --num-gpus {question.ranks}"
    how = f"`{command}` selects it" if layout == usual else f"`{command} {flags(layout)}`"
    return f"{named(layout)} is the fastest that fits: {'; '.join(WHY[name] for name in parts)}. {how}"


def _headline(question: Question, subject: Subject) -> str:
    request, work = subject.request, subject.work
    frames = f", {request.output.num_frames} frames" if request.output.num_frames > 1 else ""
    frames = frames or (f", {request.output.layers} layers" if request.output.layers else "")
    runs = "two branches of guidance" if work.branches > 1 else "no guidance"
    gpus = "one GPU" if question.ranks == 1 else f"{question.ranks} GPUs"
    on = gpus if question.vram is None else f"{question.ranks} x {question.vram:g} GB"
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


def assumptions(question: Question, subject: Subject, reserved: float, reference: int) -> Iterator[str]:
    """What the numbers assume, one line each."""
    m = question.machine
    yield "Estimated, not measured. Every number is for one GPU; 1 GB is 10^9 bytes."
    yield f"weights: all networks stay loaded; denoiser in {question.precision}, text encoders in bf16,"
    yield "  image encoder and autoencoder in fp32"
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
    if question.ranks > 1:
        yield "replicas (--data-parallel-size) are left out: they make no single request faster"


def _question_json(question: Question, subject: Subject) -> dict[str, Any]:
    request = subject.request
    return {
        "model": subject.name,
        "request": {
            "width": request.output.width,
            "height": request.output.height,
            "num_frames": request.output.num_frames,
            **asdict(subject.work),
        },
        "gpus": question.ranks,
        "vram_gb": question.vram,
        "machine": asdict(question.machine),
    }


def _layouts_json(subject: Subject, estimates: Sequence[Estimate]) -> dict[str, Any]:
    first = best(estimates)
    recommended = named(first.layout) if first.lacks <= 0 else None
    return {"recommended": recommended, "layouts": [_estimate_json(subject, each) for each in estimates]}


def _cards_json(subject: Subject, cards: Sequence[tuple[Estimate, Estimate | None]]) -> dict[str, Any]:
    rows = []
    for plain, helped in cards:
        extra = None if helped is None else _estimate_json(subject, helped)
        rows.append({"vram_gb": plain.vram, **_estimate_json(subject, plain), "help": extra})
    return {"cards": rows}


def _estimate_json(subject: Subject, each: Estimate) -> dict[str, Any]:
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
