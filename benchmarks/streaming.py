"""A denoiser of 4 GB under a limit of memory: streamed by block it completes, resident it is killed.

    python benchmarks/streaming.py [--gigabytes 4] [--resident 2] [--ahead 1]

A random Wan network in bfloat16 is written to a temporary directory, loaded in float32 by a process that may
take `limit` bytes of anonymous memory (RLIMIT_DATA), and evaluated for two steps. Streamed, the peak of its
resident memory must stay below what the residency says: weights that belong to no block, resident and
prefetched blocks and the one at work, and activations. Linux only.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WIDTH, HEADS, TOKENS = 2048, 16, 256
SHARD = 2**28
"""Bytes of a file: a mapping counts as memory of the process while it is there."""


def config(layers: int) -> Any:
    from tinydiff.models import wan

    return wan.Config(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        ffn_dim=4 * WIDTH,
        num_layers=layers,
        text_dim=64,
        in_channels=16,
        out_channels=16,
    )


def layers_of(size: int) -> int:
    """How many blocks make a checkpoint of `size` bytes in bfloat16."""
    from tinydiff.models import wan

    one = sum(row.numel for row in wan.spec(config(2))) - sum(row.numel for row in wan.spec(config(1)))
    return -(-size // (2 * one))


def write(directory: Path, layers: int) -> None:
    """Write the checkpoint file by file."""
    import torch
    from safetensors.torch import save_file

    from tinydiff.models import wan

    index: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(index.values())):05d}.safetensors"
        save_file(part, directory / name, {"format": "pt"})
        index.update(dict.fromkeys(part, name))
        part.clear()

    for row in wan.spec(config(layers)):
        part[row.name] = torch.randn(row.shape, dtype=torch.bfloat16) * 0.02 + (len(row.shape) == 1)
        if sum(x.nbytes for x in part.values()) > SHARD:
            flush()
    flush()
    told = json.dumps({"metadata": {}, "weight_map": index})
    (directory / "diffusion_pytorch_model.safetensors.index.json").write_text(told)


def resident(field: str) -> int:
    """A figure of /proc/self/status in bytes: "VmHWM" is the peak of resident memory, "VmRSS" that now."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(directory: Path, layers: int, kept: int | None, ahead: int, limit: int) -> None:
    """Load and take two steps in this process, under the limit; print the peaks as JSON.

    kept: resident blocks, None for all.
    """
    import torch

    from tinydiff.io.weights import load_weights, unread
    from tinydiff.models import wan
    from tinydiff.ops import store as stores
    from tinydiff.ops.network import Network
    from tinydiff.sampling import guidance, loop, solvers

    c = config(layers)
    rows = list(wan.spec(c))
    network = Network(wan.FAMILY, c, dtype=torch.float32)
    before = resident("VmRSS")
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    Path("/proc/self/clear_refs").write_text("5")  # the peak restarts at what is resident now
    store, left, started = None, (), time.perf_counter()
    if kept is not None:
        read = unread(directory, rows, torch.float32)
        prefixes = [prefix for _, prefix in wan.FAMILY.blocks(c)][kept:]
        left = {row.name for row in rows if row.name.startswith(tuple(f"{each}." for each in prefixes))}
        source = stores.Mapped(read, torch.device("cpu"))
        store = stores.Store(source, torch.device("cpu"), stores.loop_names(rows, prefixes), ahead)
    weights = load_weights(directory, rows, torch.float32, left=left)
    table = solvers.with_guidance(
        solvers.from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, 2),
        1.0,
    )
    frame = (1, 16, 2 * TOKENS // 16)
    inputs = {"text": torch.ones(1, 64, 64), "positions": wan.positions(c, frame)}
    hoisted = loop.hoist(network, weights, [inputs], table, store=store)
    denoise = loop.eager_denoise(network, guidance.none, stores.fetch(store))
    x = torch.randn(1, frame[1] * frame[2] // 4, 64, generator=torch.Generator().manual_seed(0))
    last = list(loop.run(denoise, table, x, lambda _: hoisted))[-1].x
    block = sum(row.numel for row in rows if row.name.startswith("blocks.0.")) * 4
    total = sum(row.numel for row in rows) * 4
    print(
        json.dumps(
            {
                "peak": resident("VmHWM") - before,
                "seconds": time.perf_counter() - started,
                "block": block,
                "beside blocks": total - layers * block,
                "total": total,
                "sum": last.double().abs().sum().item(),
            }
        )
    )


def run(directory: str, *arguments: object) -> dict[str, float] | None:
    command = [sys.executable, __file__, "--measure", directory, *map(str, arguments)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode == 0:
        return json.loads(made.stdout)
    print(f"  ended with {made.returncode}: {(made.stderr.strip().splitlines() or ['killed'])[-1][:160]}")
    return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--resident", type=int, default=2)
    parser.add_argument("--ahead", type=int, default=1)
    parser.add_argument("--activations", type=float, default=0.3, help="GB left for activations and torch")
    asked = parser.parse_args()
    layers = layers_of(int(asked.gigabytes * 1e9))
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory), layers)
        free = run(directory, layers, asked.resident, asked.ahead, 2**40)
        assert free is not None
        blocks = asked.resident + asked.ahead + 1
        allowed = free["beside blocks"] + blocks * free["block"] + asked.activations * 1e9
        limit = int(allowed + 1e9)  # libraries, and mappings of files, count for the limit
        print(f"{layers} blocks of {free['block'] / 1e9:.2f} GB, {free['total'] / 1e9:.1f} GB in float32")
        print(f"streamed, no limit:   peak {free['peak'] / 1e9:.2f} GB, {free['seconds']:.1f} s")
        held = run(directory, layers, asked.resident, asked.ahead, limit)
        assert held is not None
        print(
            f"streamed, {limit / 1e9:.1f} GB: peak {held['peak'] / 1e9:.2f} GB, allowed {allowed / 1e9:.2f}"
        )
        print(f"resident, {limit / 1e9:.1f} GB:")
        whole = run(directory, layers, "all", 0, limit)
        assert max(free["peak"], held["peak"]) <= allowed and whole is None and held["sum"] == free["sum"]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        at, layers, kept, ahead, limit = sys.argv[2:]
        measure(Path(at), int(layers), None if kept == "all" else int(kept), int(ahead), int(limit))
    else:
        main()
