"""Connections of waitress whose own refusals, of a body too large or a broken request, are OpenAI's error object too."""

from __future__ import annotations

import json
import secrets
from typing import Any, cast

from waitress.channel import HTTPChannel
from waitress.task import ErrorTask

from tinydiff.serve.errors import body

CODES = {413: "request_too_large", 431: "headers_too_large"}


class Refused(ErrorTask):
    """The answer to a request that never reached the app."""

    def execute(self) -> None:
        error: Any = cast(Any, self.request).error
        said = json.dumps(body(error.code, CODES.get(error.code, "bad_request"), f"{error.reason}: {error.body}")).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers = [
            *self.response_headers, ("Content-Type", "application/json"), ("x-request-id", f"req_{secrets.token_hex(12)}"),
        ]  # fmt: skip
        self.set_close_on_finish()
        self.content_length = len(said)
        self.write(said)


class Channel(HTTPChannel):
    """A connection."""

    error_task_class = Refused
