"""`tinydiff plan`: what each way of sharing a request among GPUs costs, by arithmetic on configs; no GPU, no
weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tinydiff import config, values
from tinydiff.parallel.cost import Machine
from tinydiff.parallel.layout import AXES, OPTIONS, Layout
from tinydiff.records import UserError, nearest

if TYPE_CHECKING:
    from tinydiff.runtime.estimate import Estimate, Subject

USAGE = """\
usage: tinydiff plan MODEL [--num-gpus N] [--vram GB] [options]

What each way of sharing a request among N GPUs costs: memory, bytes sent, estimated seconds a step. By arithmetic; nothing is run.

  MODEL                     a model's name (`tinydiff models`), a directory in diffusers layout or a hub id; JSON files are enough
  --num-gpus N              GPUs in all: 1 (default)
  --vram GB                 memory of each; left out, the usual layout is held against GPUs of 12 to 192 GB
  --size WIDTHxHEIGHT       pixels, such as 1280x720; left out, the model's own, as are
  --num-frames N            frames of a video
  --num-inference-steps N   denoising steps
  --guidance-scale X, --true-cfg-scale X   guidance, which runs the network twice a step
  --dit-precision TYPE      of the denoiser's weights: bf16 (default), fp16 or fp32
  --tflops X                10^12 operations a second that a GPU reaches: 400 (default; the peak of an H100 is 989)
  --bandwidth X             GB a second that a GPU sends to others of its machine: nvlink (300, default), pcie (25) or a number
  --net-bandwidth X         the same between machines: 25 (default)
  --gpus-per-node N         GPUs of a machine: 8 (default)
  --json                    print JSON
"""

LINKS = {"nvlink": 300.0, "pcie": 25.0}
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Asked:
    """The command line. vram: GB, None where it is left out."""

    model: str
    ranks: int
    vram: float | None
    sampling: config.SamplingOptions
    precision: str
    machine: Machine
    as_json: bool


def main(argv: Sequence[str]) -> int:
    """Run the command. Raises UserError."""
    asked = _parsed(argv)
    if asked is None:
        print(USAGE, end="")
        return 0
    from tinydiff.runtime import estimate  # torch, for those who get here

    subject = estimate.subject(asked.model, asked.sampling, asked.ranks, ITEM_BYTES[asked.precision])
    rests = list(assumptions(asked, subject, estimate.RESERVED, estimate.REFERENCE))
    usual = estimate.usual(subject, asked.ranks)
    if asked.vram is None:
        cards = estimate.over_cards(subject, asked.ranks, asked.machine)
        why, told = peak(asked, cards[0][0], usual), _cards_json(subject, cards)
        columns = len(CARD_HEAD) if any(helped for _, helped in cards) else CARD_HEAD.index("help")
        rows = [row[:columns] for row in (CARD_HEAD, *(_card(*each) for each in cards))]
    else:
        found = estimate.estimates(subject, asked.ranks, asked.vram, asked.machine)
        why, told = reason(asked, asked.vram, best(found), usual), _layouts_json(subject, found)
        rows = [HEAD, *(_cells(each, subject.decoding[0] is None) for each in found)]
    if asked.as_json:
        print(
            json.dumps(
                _asked_json(asked, subject) | {"reason": why} | told | {"assumptions": rests}, indent=2
            )
        )
    else:
        print("\n".join([_asked_for(asked, subject), why, "", *_table(rows), "", *rests]))
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError("plan", f"plan: {message}; `tinydiff plan --help` shows what it takes")


def _parsed(argv: Sequence[str]) -> Asked | None:
    """None where help is asked for."""
    if {"-h", "--help"} & set(argv):
        return None
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--json", action="store_true")
    sampling = ("num_frames", "num_inference_steps", "guidance_scale", "true_cfg_scale")
    numbers = {"vram": None, "tflops": 400.0, "net_bandwidth": 25.0}
    for name in ("num_gpus", "size", "dit_precision", "bandwidth", "gpus_per_node", *sampling, *numbers):
        parser.add_argument(f"--{name.replace('_', '-')}")
    given = {name: value for name, value in vars(parser.parse_args(list(argv))).items() if value is not None}
    made = config.options(
        {name: given[name] for name in ("num_gpus", "dit_precision", *sampling) if name in given}
        | _size(given.get("size"))
    )
    found = {
        name: _positive(name, float, given[name]) if name in given else default
        for name, default in numbers.items()
    }
    link = given.get("bandwidth", "nvlink")
    machine = Machine(
        tflops=found["tflops"],
        link=LINKS.get(link) or _link(link),
        net=found["net_bandwidth"],
        ranks=_positive("gpus_per_node", int, given.get("gpus_per_node", "8")),
    )
    ranks, precision = made.parallel.num_gpus or 1, made.model.dit_precision or "bf16"
    return Asked(given["model"], ranks, found["vram"], made.sampling, precision, machine, given["json"])


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
        raise UserError(
            "bandwidth", f"bandwidth: {text!r} is not {', '.join(LINKS)} or a number{nearest(text, LINKS)}"
        ) from error


# --- how it is told
# -----------------------------------------------------------------------------------------------------------------


def named(layout: Layout) -> str:
    """A layout in words."""
    axes = " x ".join(f"{axis} {n}" for axis, n in zip(AXES, layout.sizes, strict=True) if n > 1) or "one GPU"
    return axes + " + encoders" * layout.encoders + " + fsdp" * layout.fsdp


def flags(layout: Layout) -> str:
    """The options of `generate` that ask for a layout."""
    axes = [
        f"--{OPTIONS[axis].replace('_', '-')} {n}"
        for axis, n in zip(AXES, layout.sizes, strict=True)
        if n > 1
    ]
    return " ".join(
        [*axes, *["--encoder-parallel fold"] * layout.encoders, *["--use-fsdp-inference"] * layout.fsdp]
    )


WHY = {
    "cfg": "the two branches of guidance meet once a step",
    "ulysses": "attention trades tokens for heads twice",
    "ring": "keys and values go round, and no head is cut",
    "tp": "it divides the weights, at a sum after every second layer",
    "fsdp": "weights lie divided and are gathered block by block",
    "encoders": "text encoders are divided over all ranks",
}


def best(found: Sequence[Estimate]) -> Estimate:
    """The fastest that fits, else what comes nearest to fitting."""
    return found[0] if found[0].lacks <= 0 else min(found, key=lambda each: each.lacks)


def peak(asked: Asked, plain: Estimate, usual: Layout | None) -> str:
    """What a layout needs, whatever the GPU: a line. usual: what `generate` chooses by itself."""
    how = (
        f", which `tinydiff generate --num-gpus {asked.ranks}` chooses,"
        if plain.layout == usual and asked.ranks > 1
        else ""
    )
    return f"{named(plain.layout)}{how} needs {plain.total / 1e9:.1f} GB at its peak and takes {plain.seconds:.3g} s/step"


def reason(asked: Asked, vram: float, first: Estimate, usual: Layout | None) -> str:
    """Why this one, and how to ask for it, or that nothing fits: a line. usual: what `generate` chooses by
    itself.
    """
    if first.lacks > 0:
        advice = "more GPUs, more memory or a smaller size would help"
        return f"nothing fits into {vram:g} GB; {named(first.layout)} comes nearest and lacks {first.lacks:.1f} GB; {advice}"
    if first.layout.size == 1:
        return "one GPU has room"
    why = "; ".join(
        WHY[name] for name in (*AXES, "encoders", "fsdp") if int(getattr(first.layout, name)) > (name in AXES)
    )
    how = f"tinydiff generate --num-gpus {asked.ranks}"
    how = f"`{how}` chooses it" if first.layout == usual else f"`{how} {flags(first.layout)}`"
    return f"{named(first.layout)} is the fastest that fits: {why}. {how}"


def _asked_for(asked: Asked, subject: Subject) -> str:
    request, work = subject.request, subject.work
    frames = (
        f", {request.num_frames} frames"
        if request.num_frames > 1
        else f", {request.layers} layers"
        if request.layers
        else ""
    )
    runs = "two branches of guidance" if work.branches > 1 else "no guidance"
    gpus = "one GPU" if asked.ranks == 1 else f"{asked.ranks} GPUs"
    on = gpus if asked.vram is None else f"{asked.ranks} x {asked.vram:g} GB"
    what = f"{subject.name}, {request.width}x{request.height}{frames}, {work.steps} steps, {runs}"
    return f"{what}: {work.image} image tokens and {work.text} of text, on {on}"


HEAD = ("layout", "weights", "activations", "decoding", "total", "fits", "sent/step", "s/step", "speed-up")


CARD_HEAD = ("GPU", "peak", "fits", "help", "peak with it", "fits with it", "s/step with it")


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        yield "  ".join(
            [
                name.ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)),
            ]
        )


def _cells(each: Estimate, unknown: bool) -> tuple[str, ...]:
    sizes = [f"{size / 1e9:.1f} GB" for size in (each.weights, each.activations, each.decoding, each.total)]
    sizes[2] = "not known" if unknown else sizes[2]
    return (
        named(each.layout),
        *sizes,
        _fits(each),
        _sent(sum(each.sent.values())),
        f"{each.seconds:.3g}",
        f"{each.speedup:.2f}",
    )


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


def assumptions(asked: Asked, subject: Subject, reserved: float, reference: int) -> Iterator[str]:
    """What the numbers take for granted."""
    m = asked.machine
    yield "Estimated, not measured. Every number is of one GPU; GB are 10^9 bytes."
    yield f"weights: all networks stay there; denoiser in {asked.precision}, text encoders in bf16, image encoder and autoencoder in fp32"
    yield "activations: what a step needs beside weights, run operation by operation, and what is computed once before the steps"
    yield f"total: weights and the larger of activations and decoding; {reserved:g} GB more must be free, for driver and libraries"
    if asked.vram is not None:
        yield "sent/step: what a rank hands to collectives"
    speeds = f"{m.link:g} GB/s in a machine of {m.ranks} GPUs, {m.net:g} GB/s beyond"
    yield f"s/step: operations at {m.tflops:g} TFLOP/s, then sending, {speeds};"
    yield "  only the gathering of weights hides behind other work; launches and waiting are not counted"
    if subject.decoding[0] is None:
        yield "decoding: not known of this autoencoder, and left out"
    if subject.references:
        yield f"image tokens: with {subject.references} reference image of {reference}x{reference}"
    if asked.ranks > 1:
        yield "replicas (--data-parallel-size) are left out: they make no request faster"


def _asked_json(asked: Asked, subject: Subject) -> dict[str, Any]:
    request = subject.request
    return {
        "model": subject.name,
        "request": {
            "width": request.width,
            "height": request.height,
            "num_frames": request.num_frames,
            **asdict(subject.work),
        },
        "gpus": asked.ranks,
        "vram_gb": asked.vram,
        "machine": asdict(asked.machine),
    }


def _layouts_json(subject: Subject, found: Sequence[Estimate]) -> dict[str, Any]:
    first = best(found)
    recommended = named(first.layout) if first.lacks <= 0 else None
    return {"recommended": recommended, "layouts": [_estimate_json(subject, each) for each in found]}


def _cards_json(subject: Subject, cards: Sequence[tuple[Estimate, Estimate | None]]) -> dict[str, Any]:
    return {
        "cards": [
            {
                "vram_gb": plain.vram,
                **_estimate_json(subject, plain),
                "help": None if helped is None else _estimate_json(subject, helped),
            }
            for plain, helped in cards
        ]
    }


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
