"""What it costs to start: CPU seconds and memory from a fresh process to an answer, beside torch alone and
diffusers.

    python benchmarks/import_and_construct.py [rounds]

"construct" makes the whole Wan2.2 TI2V-5B transformer without its numbers: for tinydiff the rows of its spec
as tensors on the meta device, for diffusers the class on the meta device. Each figure is the median over
rounds of fresh processes, user and system time together, the rounds going through all rows in turn. The
ratios at the end are diffusers over tinydiff.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

MODEL = "Wan2.2-TI2V-5B-Diffusers"
HERE = Path(__file__).parent

CONSTRUCT = f"""
from cases import released, weights
assert len(weights(released({MODEL!r}).config, "meta")) > 800
"""
REFERENCE = f"""
import json, torch
from diffusers import WanTransformer3DModel
released = json.load(open({str(HERE.parent / "tinydiff/models/released" / f"Wan-AI__{MODEL}.json")!r}))
config = released["components"]["transformer"]["config"]
with torch.device("meta"):
    WanTransformer3DModel(**{{name: value for name, value in config.items() if not name.startswith("_")}})
"""
ROWS = {
    "python alone": ["-c", "pass"],
    "import tinydiff": ["-c", "import tinydiff"],
    "tinydiff --help": ["-m", "tinydiff.cli", "--help"],
    "tinydiff generate --help": ["-m", "tinydiff.cli", "generate", "--help"],
    "import torch": ["-c", "import torch"],
    "tinydiff: import all of the runtime": ["-c", "import tinydiff.runtime.generate"],
    "tinydiff: construct": ["-c", CONSTRUCT],
    "import diffusers": ["-c", "import diffusers"],
    "diffusers: import WanPipeline": ["-c", "from diffusers import WanPipeline"],
    "diffusers: construct": ["-c", REFERENCE],
}


def cost(arguments: list[str]) -> tuple[float, float]:
    """(CPU seconds, peak resident MiB) of one fresh Python process. Posix only."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.execve(sys.executable, [sys.executable, *arguments], environment)
    _, status, used = os.wait4(child, 0)
    if status:
        raise SystemExit(f"failed: {arguments}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for arguments in ROWS.values():
        cost(arguments)  # the first run reads the disk
    measured = [{name: cost(arguments) for name, arguments in ROWS.items()} for _ in range(rounds)]
    seconds = {name: statistics.median(each[name][0] for each in measured) for name in ROWS}
    for name in ROWS:
        memory = statistics.median(each[name][1] for each in measured)
        print(f"{name:38s} {seconds[name]:6.2f} CPU s  {memory:6.0f} MiB")
    own = seconds["import tinydiff"] - seconds["python alone"]
    print(f"import tinydiff, above Python alone: {own:.3f} CPU s")
    for theirs, ours in (
        ("import diffusers", "import tinydiff"),
        ("diffusers: import WanPipeline", "tinydiff: import all of the runtime"),
        ("diffusers: construct", "tinydiff: construct"),
    ):
        print(f"{theirs} / {ours.removeprefix('tinydiff: ')}: ratio {seconds[theirs] / seconds[ours]:.2f}")


if __name__ == "__main__":
    main()
