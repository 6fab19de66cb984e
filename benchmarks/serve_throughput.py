"""What sharing the denoising loop is worth, and what a request costs beside it: `tinydiff serve` with the
shipped model.

    python -m benchmarks.serve_throughput [--rounds 6] [--requests 100] [--enable-torch-compile]

Throughput: two servers, one that batches up to 8 images and one that makes them one by one, each with one
thread of torch. They take
turns: eight clients ask one of them for images of 128x128, each for its next as soon as it has one.
Images a second of each, and the ratio within a round, as median and quartiles.

Overhead: one client asks the first server for one image after another, and in turn the library is called
for the same. Milliseconds that are no encoding of the prompt, denoising or decoding, by the seconds of stages
in the answer: waiting for the device, storing the PNG, and the rest: HTTP, checks, the database, threads.
Needs the test extra.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests
import torch

import tinydiff
from tests.serve.processes import Server, serving

CLIENTS, EACH = 8, 2
"""Clients at once, and how many images each asks for in its turn."""
STEPS, FEW_STEPS = 8, 4
"""Of an image where throughput is measured, and overhead."""
MADE = ("encode", "denoise", "decode")
"""Stages that make the image; all else is overhead."""
UNTIL_READY = 600
"""Seconds that a server may take to start, compiling included."""


def asked(seed: int, steps: int) -> dict[str, Any]:
    return {"prompt": "a red circle", "seed": seed, "num_inference_steps": steps}


def post(session: requests.Session, url: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = session.post(f"{url}/v1/images/generations", json=body, timeout=UNTIL_READY)
    answer.raise_for_status()
    return answer.json()


def pictures_per_second(server: Server) -> float:
    """With CLIENTS at once."""
    failed: list[Exception] = []

    def client(number: int) -> None:
        try:
            with requests.Session() as session:
                for k in range(EACH):
                    post(session, server.url, asked(number * EACH + k, STEPS))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return CLIENTS * EACH / (time.perf_counter() - begun)


def throughput(together: Server, alone: Server, rounds: int) -> None:
    for server in (together, alone):
        pictures_per_second(server)  # also measures how many are worth making together
    found: list[tuple[float, float]] = []
    for i in range(rounds):
        order = (together, alone) if i % 2 == 0 else (alone, together)
        made = {id(server): pictures_per_second(server) for server in order}
        found.append((made[id(together)], made[id(alone)]))
    print(f"throughput: {CLIENTS} clients, {STEPS} steps, {rounds} rounds of {CLIENTS * EACH} images")
    for name, rates in zip(("up to 8 together", "one by one"), zip(*found, strict=True), strict=True):
        print(f"  {name:20s} {statistics.median(rates):6.2f} images/s ({min(rates):.2f} to {max(rates):.2f})")
    low, middle, high = statistics.quantiles([a / b for a, b in found], n=4)
    print(f"  together / one by one: ratio {middle:.2f} (quartiles {low:.2f} to {high:.2f})", flush=True)


def overhead(server: Server, options: dict[str, Any], count: int) -> None:
    model = tinydiff.load(**options)
    served: list[dict[str, float]] = []
    called: list[dict[str, float]] = []
    with requests.Session() as session:
        for seed in range(count + 5):
            begun = time.perf_counter()
            told = post(session, server.url, asked(seed, FEW_STEPS))
            served.append(split(time.perf_counter() - begun, told["timings"]))
            begun = time.perf_counter()
            result = tinydiff.generate(model, **asked(seed, FEW_STEPS))
            called.append(split(time.perf_counter() - begun, result.seconds))
    print(f"overhead: one client, {FEW_STEPS} steps, {count} requests; ms")
    for name, rows in (("server", served[5:]), ("library", called[5:])):
        for part in rows[0]:
            times = [1000 * row[part] for row in rows]
            print(
                f"  {name + ', ' + part:22s} p50 {statistics.median(times):7.2f}   p95 "
                f"{statistics.quantiles(times, n=20)[-1]:7.2f}"
            )


def split(wall: float, seconds: Any) -> dict[str, float]:
    """Where the seconds of a request went."""
    made = sum(seconds[stage] for stage in MADE)
    others = {stage: spent for stage, spent in seconds.items() if stage not in MADE}
    return {"making it": made, **others, "rest": wall - made - sum(others.values()), "overhead": wall - made}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--enable-torch-compile", action="store_true")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    compiled = ["--enable-torch-compile"] if given.enable_torch_compile else []
    with (
        tempfile.TemporaryDirectory() as first,
        tempfile.TemporaryDirectory() as second,
        serving(Path(first), "--batching-max-size", "8", *compiled, OMP_NUM_THREADS="1") as together,
        serving(Path(second), "--batching-max-size", "1", *compiled, OMP_NUM_THREADS="1") as alone,
    ):
        for server in (together, alone):
            server.wait_ready(UNTIL_READY)
        throughput(together, alone, given.rounds)
        overhead(together, {"enable_torch_compile": given.enable_torch_compile}, given.requests)


if __name__ == "__main__":
    main()
