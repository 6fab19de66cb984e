"""`tinydiff serve` with the shipped model under many clients at once: whether it then has all jobs, memory
and files together.

    python -m benchmarks.serve_load [--clients 64] [--seconds 120]

Each client does one thing after another: images that it waits for, streams, videos that it polls and
downloads; it cancels by route, by DELETE and by closing its connection, and makes mistakes. Sizes, steps,
formats and counts vary. Then the server is let run dry and counted: in the answers, its lists, its figures,
its log, its database and its directory of files. Needs the test extra, and Linux. Prints a table; ends with 1
if a check fails.

Memory, open files and threads are those of the server's process, medians over the middle third of the time
against the last: the first third warms up. Memory may grow by GROWTH_MB, files by 2 that are just being
written, threads by 1, for the second one that encodes starts when it is needed. Connections come and go, so
they are counted at the start and the end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

import requests

from benchmarks.serve_clients import CLIPS, LONGEST, Client, Seen
from tests.serve.processes import Server, serving, wait
from tinydiff.serve.files import files_of
from tinydiff.serve.jobs import DONE, Job
from tinydiff.serve.store import open_store

GROWTH_MB = 32.0


class Sample(NamedTuple):
    """The server's process at a moment."""

    mb: float
    files: int
    sockets: int
    threads: int


def sample(process: Path) -> Sample:
    """process: its directory in /proc."""
    told = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    opened = []
    for link in (process / "fd").iterdir():
        with suppress(FileNotFoundError):
            opened.append(os.readlink(link).startswith("socket:"))
    return Sample(
        int(told["VmRSS"].split()[0]) / 1024, opened.count(False), opened.count(True), int(told["Threads"])
    )


def listed(server: Server) -> list[str]:
    """Ids of all videos on the server's list, page by page."""
    found, after = [], {}
    while True:
        page = server.get(CLIPS, params={"limit": 100, **after}).json()
        found += [each["id"] for each in page["data"]]
        if not page["has_more"]:
            return found
        after = {"after": page["last_id"]}


def figures(server: Server) -> dict[str, float]:
    """The figures of /metrics, added up over their labels."""
    sums: dict[str, float] = defaultdict(float)
    for line in server.get("/metrics").text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            sums[name.partition("{")[0]] += float(value)
    return sums


Checks = list[tuple[str, bool, str]]
"""(what should be, whether it is, in figures)."""


def load(
    folder: Path, clients: int, seconds: float, growth_mb: float | None = GROWTH_MB
) -> tuple[list[str], Checks]:
    """Start a server with its state in `directory` and load it: (a table in lines, what was checked).

    growth_mb: by how much its memory may grow; None for a run so short that its process has not come to rest,
    and is not looked at.
    """
    options = ("--max-queue", str(clients // 2), "--log-format", "json", "--batching-max-size", "8")
    with serving(folder, *options, OMP_NUM_THREADS="1") as server:
        server.wait_ready(LONGEST)
        process, seen = Path(f"/proc/{server.process.pid}"), Seen()
        samples, begun = [sample(process)], time.monotonic()
        crowd = [Client(server.url, number, begun + seconds, seen) for number in range(clients)]
        threads = [threading.Thread(target=client.run, daemon=True) for client in crowd]
        for thread in threads:
            thread.start()
        while time.monotonic() < begun + seconds:
            time.sleep(0.5)
            samples.append(sample(process))
        for thread in threads:
            thread.join(LONGEST)
        waiting = sum(thread.is_alive() for thread in threads)
        wait(lambda: _running_dry(server), LONGEST)
        time.sleep(1)
        at_rest = sample(process)
        told, clips = figures(server), listed(server)
        known = [(id, server.get(f"/v1/images/{id}")) for id in seen.accepted if id.startswith("img_")]
        stopped, said = server.stop(), server.said()
    store = open_store(folder / "state", None, 1)
    jobs = {job.id: job for job in store.every()}
    store.close()
    lasted = time.monotonic() - begun
    checks = [
        *_answers(seen, waiting),
        *_jobs(seen, jobs, clips, known, told),
        *_files(folder / "state" / "files", jobs),
        *_log(said, stopped),
        *([] if growth_mb is None else _process(samples, at_rest, growth_mb)),
    ]
    return _table(seen, jobs, told, lasted), checks


def _running_dry(server: Server) -> bool:
    told = server.get("/server_info").json()["figures"]
    return told["queued"] == told["running"] == 0


def _answers(seen: Seen, waiting: int) -> Checks:
    odd = [answer for answer in seen.answers if not answer.fitting]
    worst = max((answer.status for answer in seen.answers), default=0)
    return [
        (
            "every answer is of the kind that was asked for, or 429",
            not odd,
            f"{len(seen.answers)} answers, {len(odd)} others",
        ),
        ("no answer is from 500 on", worst < 500, f"the highest status is {worst}"),
        ("every client got all its answers", waiting == 0, f"{waiting} still wait"),
        ("nothing else was wrong", not seen.wrong, "; ".join(seen.wrong[:3]) or "nothing"),
    ]


def _jobs(
    seen: Seen,
    jobs: dict[str, Job],
    clips: list[str],
    known: list[tuple[str, requests.Response]],
    told: dict[str, float],
) -> Checks:
    closed = sum(answer.what == "image, closed" for answer in seen.answers)
    open_ones = [job.id for job in jobs.values() if job.status not in DONE]
    failed = Counter(job.error.code for job in jobs.values() if job.error is not None)
    gone = seen.deleted - jobs.keys()
    lost = seen.accepted - jobs.keys() - gone
    left = [id for id in seen.deleted & jobs.keys() if jobs[id].kind == "video"]
    unnamed = jobs.keys() - seen.accepted
    attempts = Counter(job.attempts for job in jobs.values() if job.status == "completed")
    undone = [id for id in seen.made - gone if id not in jobs or jobs[id].status != "completed"]
    in_rows = sorted(job.id for job in jobs.values() if job.kind == "video")
    apart = [
        id
        for id, answer in known
        if id not in gone and (not answer.ok or answer.json()["status"] != jobs[id].status)
    ]
    ended, expected = int(told["tinydiff_jobs_finished_total"]), len(jobs) + len(gone)
    return [
        ("every job is done", not open_ones, f"{len(jobs)} jobs, {len(open_ones)} are not"),
        ("none failed but those that were cancelled", set(failed) <= {"cancelled"}, str(dict(failed))),
        ("no accepted job is lost", not lost, f"{len(seen.accepted)} accepted, {len(lost)} lost"),
        (
            "the others are of clients that closed",
            len(unnamed) <= closed,
            f"{len(unnamed)} others, {closed} closed",
        ),
        ("each was made once", set(attempts) <= {1}, f"attempts {dict(attempts)}"),
        (
            "each has ended once",
            ended == expected,
            f"{ended} ends of {expected} jobs, {len(gone)} of them deleted",
        ),
        ("deleted videos are gone", not left, f"{len(seen.deleted)} deleted, {len(left)} videos still there"),
        ("what a client holds is completed", not undone, f"{len(seen.made)} held, {len(undone)} are not"),
        (
            "the list of videos is that of the database",
            sorted(clips) == in_rows,
            f"{len(clips)} listed, {len(in_rows)} there",
        ),
        ("images stand as in the database", not apart, f"{len(known)} asked, {len(apart)} apart"),
    ]


def _files(folder: Path, jobs: dict[str, Job]) -> Checks:
    there = {path.name for path in folder.iterdir()}
    named = [id for job in jobs.values() for id in files_of(job)]
    empty = [job.id for job in jobs.values() if job.status == "completed" and not job.outputs]
    missing, extra = set(named) - there, there - set(named)
    return [
        (
            "every completed job has its files",
            not missing and not empty,
            f"{len(named)} files, {len(missing) + len(empty)} lost",
        ),
        (
            "no file is nobody's",
            not extra and len(set(named)) == len(named),
            f"{len(there)} there, {len(extra)} nobody's",
        ),
    ]


def _log(said: str, stopped: int) -> Checks:
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    statuses = Counter(line["status"] for line in lines if "status" in line)
    errors = [line for line in lines if line.get("level") in ("WARNING", "ERROR", "CRITICAL")]
    fine = {200, 400, 404, 405, 409, 415, 429, 499, 503} >= statuses.keys()
    unready = {line["route"] for line in lines if line.get("status") == 503}
    return [
        ("the log has no error and no warning", not errors, str(errors[:2])),
        ("its statuses are these", fine and unready <= {"/ready"}, str(dict(sorted(statuses.items())))),
        ("the server ended well", stopped == 0, f"exit code {stopped}"),
    ]


def _process(samples: list[Sample], at_rest: Sample, growth_mb: float) -> Checks:
    third = len(samples) // 3

    def grown(of: Callable[[Sample], float]) -> tuple[float, float]:
        return median(map(of, samples[third : 2 * third])), median(map(of, samples[2 * third :]))

    mb, files, threads = grown(lambda s: s.mb), grown(lambda s: s.files), grown(lambda s: s.threads)
    sockets = samples[0].sockets, at_rest.sockets
    return [
        (
            f"memory grows by {growth_mb:g} MB at most",
            mb[1] - mb[0] <= growth_mb,
            f"{mb[0]:.0f} MB, then {mb[1]:.0f}",
        ),
        ("open files by 2 at most", files[1] <= files[0] + 2, f"{files[0]:.0f}, then {files[1]:.0f}"),
        ("threads by 1 at most", threads[1] <= threads[0] + 1, f"{threads[0]:.0f}, then {threads[1]:.0f}"),
        (
            "connections are closed",
            sockets[1] <= sockets[0] + 1,
            f"{sockets[0]} at the start, {sockets[1]} at the end",
        ),
    ]


def _table(seen: Seen, jobs: dict[str, Job], told: dict[str, float], lasted: float) -> list[str]:
    lines = [f"| {'what':20s} | answers | status | p50 s | p95 s |", "|---|---|---|---|---|"]
    for what in sorted({answer.what for answer in seen.answers}):
        mine = [answer for answer in seen.answers if answer.what == what]
        statuses = ", ".join(
            f"{count} x {status or 'closed'}"
            for status, count in sorted(Counter(a.status for a in mine).items())
        )
        times = sorted(answer.seconds for answer in mine)
        lines.append(
            f"| {what:20s} | {len(mine)} | {statuses} | {times[len(times) // 2]:.2f} | "
            f"{times[int(0.95 * len(times))]:.2f} |"
        )
    completed = sum(job.status == "completed" for job in jobs.values())
    steps, batches = told["tinydiff_steps_total"], told["tinydiff_batch_size_count"]
    gone = len(seen.deleted - jobs.keys())
    made = f"{steps:.0f} steps of images in {batches:.0f} of the loop"
    return [
        *lines,
        f"{len(jobs) + gone} jobs in {lasted:.0f} s: {completed} completed, "
        f"{len(jobs) - completed} cancelled, {gone} deleted; {made}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines, checks = load(Path(folder), given.clients, given.seconds)
    print("\n".join(lines))
    for what, good, shown in checks:
        print(f"{'good' if good else 'BAD '} {what}: {shown}")
    return 0 if all(good for _, good, _ in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
