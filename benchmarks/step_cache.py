"""What a step cache saves and changes: the shipped model with and without it, image by image.

    python benchmarks/step_cache.py [images]

For each setting the images run with and without the cache in turn, in one process. Printed are the steps that
reuse, the time of the denoising loop with the cache over that without it (the median over images; the time is
that of the process on a CPU, the clock's on CUDA), and how far the pixels differ.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from dataclasses import replace

import numpy
import torch

from tinydiff import config
from tinydiff.config import SamplingOptions
from tinydiff.records import Request, StepCache
from tinydiff.runtime import blueprint, pipeline
from tinydiff.runtime.admit import admit
from tinydiff.runtime.blueprint import Model

PROMPTS = (
    "a large red circle on a white background",
    "a small blue star at the top on yellow",
    "a green square to the left of a black ring on a white background",
    "an orange triangle on a purple background",
)
SETTINGS = (
    StepCache(),
    StepCache(threshold=0.12),
    StepCache(threshold=0.06),
    StepCache(warmup=8, threshold=0.12),
)
CUDA = torch.cuda.is_available()


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() if CUDA else time.process_time()


def run(model: Model, request: Request) -> tuple[float, numpy.ndarray, int]:
    """(seconds of the loop, frames, steps that reused)."""
    conditioning = pipeline.condition(model, request)
    inputs, denoising, tokens = pipeline.begin(model, conditioning, request.seeds[0])
    began = now()
    while not denoising.done:
        denoising = pipeline.loop.advance(denoising, 1)
    seconds = now() - began
    made = pipeline.finish(model, request, inputs, tokens(denoising.state.x))
    reused = denoising.state.memory.get("reused")
    return seconds, made.frames, 0 if reused is None else int(reused.item())


def main() -> None:
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    torch.set_num_threads(1)
    model = blueprint.load(blueprint.read(config.ModelOptions()))
    print(torch.cuda.get_device_name() if CUDA else "one CPU thread", "30 steps, guided")
    for cache in SETTINGS:
        ratios, errors, reused = [], [], []
        for index in range(images):
            options = SamplingOptions(prompt=(PROMPTS[index % len(PROMPTS)],), seed=(index,), num_frames=1)
            [plain] = admit(model.blueprint, options)
            before, want, _ = run(model, plain)
            after, got, steps = run(model, replace(plain, step_cache=cache))
            ratios.append(after / before)
            reused.append(steps)
            errors.append(float(((want.astype(float) - got) ** 2).mean()))
        quality = 10 * math.log10(255**2 / max(statistics.mean(errors), 1e-9))
        settings = f"Fn {cache.first_blocks}, warmup {cache.warmup}, rdt {cache.threshold}, mc {cache.most}"
        print(
            f"{settings}: {statistics.mean(reused):.1f} steps reuse, "
            f"time x {statistics.median(ratios):.2f}, {quality:.1f} dB to the whole run"
        )


if __name__ == "__main__":
    main()
