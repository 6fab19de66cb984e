"""The server's log: lines for people, or JSON objects for a collector. No torch here."""

from __future__ import annotations

import json
import logging
from typing import Literal

REQUESTS = "tinydiff.serve.requests"
"""The logger of requests, whose lines `guard` writes."""


def configure(level: str, form: Literal["text", "json"]) -> None:
    """Write the log to standard error, from `level` on."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        Objects() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("waitress.queue").setLevel(
        logging.ERROR
    )  # requests that wait for a thread are told in /metrics


class Objects(logging.Formatter):
    """One JSON object a line. Those of requests are such already."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name == REQUESTS:
            return record.getMessage()
        told = {
            "time": round(record.created, 3),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        return json.dumps(
            told | ({"trace": self.formatException(record.exc_info)} if record.exc_info else {})
        )
