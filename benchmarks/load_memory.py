"""Peak resident memory of loading a sharded float32 checkpoint as bfloat16, against the size of the weights
in bfloat16.

    python benchmarks/load_memory.py

Each loader runs in a fresh process and reports how far its peak (VmHWM) rose above where it stood before
loading. Linux only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WIDTH, LAYERS, SHARDS = 2048, 24, 4
EMBEDDING = 16384
"""One tensor far larger than the others, as a text encoder's embedding is: 128 MiB of 512 MiB in float32."""


def shapes() -> dict[str, tuple[int, ...]]:
    layers = {f"blocks.{index}.weight": (WIDTH, WIDTH) for index in range(LAYERS)}
    norms = {f"blocks.{index}.norm": (WIDTH,) for index in range(LAYERS)}
    return {**layers, **norms, "embed.weight": (EMBEDDING, WIDTH)}


def make(folder: Path) -> None:
    """Write the checkpoint shard by shard."""
    import torch
    from safetensors.torch import save_file

    names, index = list(shapes()), {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = {name: torch.randn(shapes()[name]) for name in names[shard::SHARDS]}
        save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def resident(field: str) -> int:
    """A memory figure of this process in bytes: "VmHWM" is the peak, "VmRSS" now."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(loader: str, folder: Path) -> None:
    """Load once in this process and print the rise of its peak, the weights' size and the
    seconds, as JSON.
    """
    import torch
    from safetensors.torch import load_file

    from tinydiff.io.weights import load_weights
    from tinydiff.parallel.plan import Row

    torch.ones(1).to(torch.bfloat16)
    Path("/proc/self/clear_refs").write_text("5")  # the peak restarts at what is resident now
    before, start = resident("VmRSS"), time.perf_counter()
    if loader == "tinydiff":
        rows = [Row(name, shape, float32=name.endswith("norm")) for name, shape in shapes().items()]
        weights = load_weights(folder, rows, torch.bfloat16)
    else:
        files = sorted(folder.glob("*.safetensors"))
        loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in loaded.items()}
    seconds = time.perf_counter() - start
    size = sum(tensor.nbytes for tensor in weights.values())
    print(json.dumps({"peak": resident("VmHWM") - before, "size": size, "seconds": seconds}))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        for loader, name in (
            ("tinydiff", "tinydiff.io.weights"),
            ("safetensors", "safetensors load_file, then .to"),
        ):
            command = [sys.executable, __file__, loader, folder]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            peak, size = result["peak"] / 2**20, result["size"] / 2**20
            print(
                f"{name:32s} peak {peak:7.1f} MiB of {size:7.1f} MiB bfloat16: ratio "
                f"{peak / size:.3f}, {result['seconds']:.2f} s"
            )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
