"""Writes configs/gpu-*gb.yaml: for each size of GPU a model that the memory plan fits onto it, and how.

    python benchmarks/presets.py

The plan of `tinydiff plan MODEL --vram GB` decides where components live; a test holds the files to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinydiff.runtime.estimate import Subject
    from tinydiff.runtime.memory import MemoryPlan

CARDS = {
    8: "black-forest-labs/FLUX.1-schnell",
    12: "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    16: "Tongyi-MAI/Z-Image-Turbo",
    24: "black-forest-labs/FLUX.1-dev",
    48: "Qwen/Qwen-Image",
    80: "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
}
"""GB of memory of a GPU -> a model."""
PROMPT = "A lighthouse in a storm, oil painting"
BYTES = 2
"""Bytes of a value of the denoiser: on a GPU it computes in bfloat16."""
DIRECTORY = Path(__file__).parent.parent / "configs"


def planned(card: int) -> tuple[Subject, MemoryPlan]:
    """What the preset of a card makes, and where its components live."""
    from tinydiff.config import SamplingOptions
    from tinydiff.runtime import estimate, memory

    subject = estimate.subject(CARDS[card], SamplingOptions(), 1, BYTES)
    return subject, memory.choose(memory.footprints(subject), card)


def text(card: int) -> str:
    """The preset of a card. Its options are the plan's, one a line."""
    from tinydiff.runtime import memory

    subject, plan = planned(card)
    if not plan.fits:
        raise ValueError(f"{CARDS[card]} does not fit into {card} GB; choose a smaller model in CARDS")
    output = subject.request.output
    frames = f" and {output.num_frames} frames" if output.num_frames > 1 else ""
    name, peak, away = CARDS[card].rpartition("/")[2], plan.peak / 1e9, plan.away / 1e9
    lines = [
        f"# {name} at {output.width}x{output.height}{frames} on a GPU of {card} GB: "
        f"expected peak {peak:.1f} GB;",
        f"# {away:.1f} GB of weights are in the host's memory. Written by benchmarks/presets.py.",
        f"model_path: {CARDS[card]}",
        f"prompt: {PROMPT}",
    ]
    for name, values in _pairs(memory.flags(plan)):
        lines += [f"{name}: {values}"] if values == "true" else [f"{name}:", *_entries(values)]
    return "\n".join([*lines, ""])


def _pairs(options: str) -> list[tuple[str, str]]:
    """(name, value) of each option; a flag alone is true."""
    words = (each.partition(" ") for each in options.split("--") if each)
    return [(name.strip().replace("-", "_"), value.strip() or "true") for name, _, value in words]


def _entries(values: str) -> list[str]:
    return [f"  {each.replace('=', ': ')}" for each in values.split(",")]


def path(card: int) -> Path:
    """Where the preset of a card is."""
    return DIRECTORY / f"gpu-{card}gb.yaml"


if __name__ == "__main__":
    for card in CARDS:
        path(card).write_text(text(card))
        print(path(card))
