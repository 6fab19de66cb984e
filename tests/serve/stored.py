"""Jobs and what is done with them, for the tests of the store."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from tinydiff.serve.jobs import Job, Output

NUMBERS = count(1)
LEASE = 60.0


def job(owner="", **more):
    """A video that came after all those before."""
    number = next(NUMBERS)
    return Job(
        **{"id": f"video_{number:06}", "kind": "video", "created_at": 1e9 + number, "owner": owner} | more
    )


def take(store, server="here", lease=LEASE):
    return store.take(server, time.time() + lease)


def file(name="f", size=10, **more):
    return Output(name, "video/mp4", size, 1, **more)


def at_once(work, number=8):
    """What `work(i)` returned in so many threads that began together."""
    gate = threading.Barrier(number)

    def run(i):
        gate.wait()
        return work(i)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(run, range(number)))
