"""What compiling the denoising loop costs, against depth and against steps: it should grow with neither.

    python benchmarks/compile_cost.py

The first compiled call of tiny Wan blocks, guided. Each point is a fresh process with all compiler caches off
and one compile thread; CPU seconds of the process and its children (the C++ compiler). Graphs are counted
after the first call and again after a second call with another size, step count and guidance scale. Ratios
are over the first point.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile

POINTS = ((4, 5), (8, 5), (16, 5), (4, 20), (4, 50))


def cpu_seconds() -> float:
    """Of this process and its finished children."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure(layers: int, steps: int) -> None:
    """Compile in this process and print the figures as JSON."""
    import torch
    from cases import SCHEDULER, made_up, weights

    from tinydiff.models import wan
    from tinydiff.ops.network import Network
    from tinydiff.sampling import guidance, loop, solvers
    from tinydiff.sampling.compile import compiled_denoise, graph_breaks, graph_count

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def run(denoise: loop.Denoise, side: int, count: int, scale: float) -> torch.Tensor:
        case = made_up("", layers=layers, heads=2, size=(1, side, side))
        c = case.config
        table = solvers.with_guidance(solvers.from_scheduler_config(SCHEDULER, count), scale)
        generator = torch.Generator().manual_seed(1)
        texts = torch.randn(2, 1, case.text_tokens, c.text_dim, generator=generator).to(device)
        inputs = [{"text": text, "positions": wan.positions(c, case.size, device)} for text in texts]
        network = loop.hoist(Network(wan.FAMILY, c), weights(c, device), inputs, table)
        x = torch.randn(1, case.tokens, c.in_channels * 4, generator=generator).to(device)
        return list(loop.run(denoise, table, x, lambda _: network))[-1].x

    config = made_up("", layers=layers, heads=2, size=(1, 8, 8)).config
    fast = compiled_denoise(Network(wan.FAMILY, config), guidance.classifier_free)
    eager = loop.eager_denoise(Network(wan.FAMILY, config), guidance.classifier_free)
    run(eager, 8, steps, 5.0)
    before = cpu_seconds()
    made = run(fast, 8, steps, 5.0)
    seconds, first = cpu_seconds() - before, graph_count()
    error = (made - run(eager, 8, steps, 5.0)).abs().max().item()
    run(fast, 12, steps + 1, 3.0)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "graphs": first,
                "then": graph_count(),
                "breaks": graph_breaks(),
                "error": error,
            }
        )
    )


def main() -> None:
    first = None
    for layers, steps in POINTS:
        with tempfile.TemporaryDirectory() as folder:
            off = {
                "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
                "TORCHINDUCTOR_CACHE_DIR": folder,
                "TORCHINDUCTOR_COMPILE_THREADS": "1",
            }
            command = [sys.executable, __file__, str(layers), str(steps)]
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, env={**os.environ, **off}
            )
        point = json.loads(done.stdout)
        first = first or point["seconds"]
        ratio = point["seconds"] / first
        graphs = (
            f"{point['graphs']} graph, {point['then']} after another size, step count and scale, "
            f"{point['breaks']} breaks"
        )
        print(
            f"{layers:3d} blocks {steps:3d} steps: {point['seconds']:6.1f} CPU s, ratio "
            f"{ratio:.2f}, {graphs}, error {point['error']:.0e}",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(int(sys.argv[1]), int(sys.argv[2]))
    else:
        main()
