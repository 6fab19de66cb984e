"""Seconds per denoising step of tinydiff against diffusers' WanPipeline: the same random weights, sizes,
noise and solver.

    python benchmarks/step_overhead.py [rounds]

Guided UniPC, float32, from prompt embeddings to latents: hoisting and the making of the table count for us,
all but encoders and autoencoder for the pipeline. Four ways run in turn, forward and back, in one process on
one thread: each of the two eager and compiled (of the pipeline the transformer, by its own `compile()`). On
the CPU the time is that of the process, so that a shared machine disturbs little; on CUDA it is the clock.
Ratios are taken within a round, then their median and quartiles are printed; below 1 we are faster. The
results are compared too.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from typing import Any

import torch
from cases import SCHEDULER, Case, made_up, weights
from torch import Tensor

from tinydiff.models import wan
from tinydiff.ops.network import Network
from tinydiff.ops.patch import patchify, unpatchify
from tinydiff.sampling import guidance, loop, solvers
from tinydiff.sampling.compile import compiled_denoise

STEPS, SCALE, PATCH = 10, 5.0, (1, 2, 2)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = (
    made_up("tiny: 30 blocks of width 128, 64 tokens", layers=30, heads=4, size=(1, 16, 16)),
    made_up("small: 8 blocks of width 384, 320 tokens", layers=8, heads=12, size=(5, 16, 16)),
)


def pipeline(case: Case, flat: dict[str, Tensor], compiled: bool) -> Any:
    diffusers: Any = import_module("diffusers")  # its types do not fit their own use
    transformer = diffusers.WanTransformer3DModel(**asdict(case.config)).to(DEVICE).eval()
    transformer.load_state_dict(copy.deepcopy(flat))
    if compiled:
        transformer.compile()
    scheduler = diffusers.UniPCMultistepScheduler.from_config({**SCHEDULER, "num_train_timesteps": 1000})
    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": None}
    pipe = diffusers.WanPipeline(transformer=transformer, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe: Any, case: Case, text: Tensor, start: Tensor) -> Tensor:
    frames, height, width = case.size
    return pipe(
        prompt_embeds=text[:1],
        negative_prompt_embeds=text[1:],
        latents=start.clone(),
        num_frames=4 * frames - 3,
        height=8 * height,
        width=8 * width,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        output_type="latent",
    ).frames


def ours(denoise: loop.Denoise, case: Case, flat: dict[str, Tensor], text: Tensor, start: Tensor) -> Tensor:
    table = solvers.with_guidance(solvers.from_scheduler_config(SCHEDULER, STEPS), SCALE)
    inputs = [
        {"text": each[None], "positions": wan.positions(case.config, case.size, DEVICE)} for each in text
    ]
    network = loop.hoist(Network(wan.FAMILY, case.config), flat, inputs, table)
    for progress in loop.run(denoise, table, patchify(start, PATCH), lambda _: network, chunk=1):
        x = progress.x
    return unpatchify(x, PATCH, case.size)


def timed(run: Callable[[], Tensor]) -> float:
    """Seconds per step."""
    clock = time.process_time if DEVICE.type == "cpu" else time.perf_counter
    before = clock()
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - before) / STEPS


def measure(case: Case, rounds: int) -> None:
    flat = weights(case.config, DEVICE)
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2, case.text_tokens, case.config.text_dim, generator=generator).to(DEVICE)
    start = torch.randn(1, case.config.in_channels, *case.size, generator=generator).to(DEVICE)
    eager = loop.eager_denoise(Network(wan.FAMILY, case.config), guidance.classifier_free)
    fast = compiled_denoise(Network(wan.FAMILY, case.config), guidance.classifier_free)
    slow_pipe, fast_pipe = (pipeline(case, flat, compiled) for compiled in (False, True))
    ways: dict[str, Callable[[], Tensor]] = {
        "tinydiff eager": lambda: ours(eager, case, flat, text, start),
        "diffusers eager": lambda: theirs(slow_pipe, case, text, start),
        "tinydiff compiled": lambda: ours(fast, case, flat, text, start),
        "diffusers compiled": lambda: theirs(fast_pipe, case, text, start),
    }
    made = {name: run() for name, run in ways.items()}  # also compiles
    error = max((made["diffusers eager"] - each).abs().max().item() for each in made.values())
    times: list[dict[str, float]] = []
    for i in range(rounds):
        order = list(ways) if i % 2 == 0 else list(reversed(ways))
        times.append({name: timed(ways[name]) for name in order})
    print(
        f"{case.name} ({DEVICE.type}, {STEPS} steps, {rounds} rounds; results differ by at most {error:.0e})"
    )
    for name in ways:
        print(f"  {name:20s} {1000 * statistics.median(each[name] for each in times):8.2f} ms/step")
    for a, b in (
        ("tinydiff eager", "diffusers eager"),
        ("tinydiff compiled", "diffusers compiled"),
        ("tinydiff compiled", "diffusers eager"),
    ):
        low, middle, high = statistics.quantiles([each[a] / each[b] for each in times], n=4)
        print(f"  {a} / {b}: ratio {middle:.2f} (quartiles {low:.2f} to {high:.2f})", flush=True)


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    for case in CASES:
        measure(case, int(sys.argv[1]) if len(sys.argv) > 1 else 8)


if __name__ == "__main__":
    main()
