"""Requests on their way from the HTTP thread that checked them to the device, so that nothing is decoded and
resized twice.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinydiff.records import Request

MOST_BYTES = 2**29
"""Of the images of requests that are held; the oldest ones go, and are read from their files again."""


class Handover:
    """Requests by the ids of their jobs. Each is taken once."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._held = most_bytes, 0
        self._requests: OrderedDict[str, Request] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, id: str, request: Request) -> None:
        """Hold a request that has images; one without costs nothing to make again."""
        if not (size := _bytes(request)):
            return
        with self._lock:
            self._requests[id] = request
            self._held += size
            while self._held > self._most:
                self._held -= _bytes(self._requests.popitem(last=False)[1])

    def take(self, id: str) -> Request | None:
        """The request of a job, which is then no longer held; None where it is not."""
        with self._lock:
            request = self._requests.pop(id, None)
            self._held -= 0 if request is None else _bytes(request)
        return request


def _bytes(request: Request) -> int:
    arrays = (*request.images, *request.originals, *(() if request.mask is None else (request.mask,)))
    return sum(array.nbytes for array in arrays)
