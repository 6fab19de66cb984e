"""Clients of `tinydiff serve` that do what clients do, one thing after another, until a time: see
`serve_load`.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests
from PIL import Image

from tinydiff.serve.jobs import DONE

LONGEST = 180
"""Seconds that a client waits for an answer."""

SIZES = ("128x128", "128x128", "128x128", "96x160", "160x96", "64x64", "192x128")
PICTURES, EDITS, CLIPS = "/v1/images/generations", "/v1/images/edits", "/v1/videos"
SHAPES = (
    "a red circle",
    "a large yellow star on a purple background",
    "a small blue ring",
    "a green triangle above a white square",
)

MISTAKES: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    ("POST", PICTURES, {"json": {"prompt": "a red circle", "num_inference_step": 2}}, 400),
    ("POST", PICTURES, {"json": {"prompt": "a red circle", "size": "100x100"}}, 400),
    ("POST", PICTURES, {"json": {"prompt": "a red circle", "size": "40000x40000"}}, 400),
    ("POST", PICTURES, {"json": {"prompt": "a red circle", "model": "another"}}, 404),
    ("POST", PICTURES, {"data": b"{", "headers": {"content-type": "application/json"}}, 400),
    (
        "POST",
        PICTURES,
        {"data": b"prompt=a", "headers": {"content-type": "application/x-www-form-urlencoded"}},
        415,
    ),
    (
        "POST",
        EDITS,
        {"data": {"prompt": "a red circle"}, "files": {"image": ("a.png", b"no image", "image/png")}},
        400,
    ),
    ("POST", CLIPS, {"json": {"prompt": "a red circle", "num_frames": 7}}, 400),
    ("GET", f"{CLIPS}/video_{'0' * 32}", {}, 404),
    ("GET", f"{CLIPS}?limit=0", {}, 400),
    ("DELETE", f"/v1/images/img_{'0' * 32}", {}, 404),
    ("PUT", PICTURES, {}, 405),
    ("GET", "/v1/nothing", {}, 404),
)
"""(method, address, what is sent, the status that answers it)."""


class Answered(NamedTuple):
    """One answer, or a connection that the client closed (status 0)."""

    what: str
    status: int
    seconds: float
    fitting: bool
    """Whether that status answers what was asked."""


@dataclass
class Seen:
    """What all clients saw; lists and sets only grow, so that threads share them."""

    answers: list[Answered] = field(default_factory=list)
    accepted: set[str] = field(default_factory=set)
    """Ids of jobs that an answer named."""
    deleted: set[str] = field(default_factory=set)
    """Of them, those that were deleted: a video goes, an image that was not done yet stays as a cancelled
    one.
    """
    made: set[str] = field(default_factory=set)
    """Of them, those whose outputs a client has had in hand."""
    wrong: list[str] = field(default_factory=list)
    """What should not have been."""


class Client:
    """One of the clients, in a thread of its own."""

    def __init__(self, url: str, number: int, until: float, seen: Seen) -> None:
        self.url, self.until, self.seen = url, until, seen
        self.chance, self.session = random.Random(number), requests.Session()

    def run(self) -> None:
        doings = {
            self.picture: 8, self.stream: 3, self.stopped_stream: 3, self.closed: 4, self.clip: 3,
            self.cancelled_clip: 3, self.mistake: 3,
            self.look: 1,
        }  # fmt: skip
        while time.monotonic() < self.until:
            [do] = self.chance.choices(list(doings), list(doings.values()))
            try:
                do()
            except Exception as error:
                self.seen.wrong.append(f"{do.__name__}: {type(error).__name__}: {error}")
        self.session.close()

    # --- what a client does
    # ----------------------------------------------------------------------------------------------

    def picture(self) -> None:
        asked = self._asked() | {
            "n": self.chance.choice((1, 1, 1, 2)),
            "output_format": self.chance.choice(("png", "png", "webp", "jpeg")),
        }
        as_url = self.chance.random() < 0.3
        if (
            told := self._ask(
                "picture", PICTURES, json=asked | ({"response_format": "url"} if as_url else {})
            )
        ) is None:
            return
        self.seen.made.add(told["id"])
        for each in told["data"]:
            data = (
                requests.get(each["url"], timeout=LONGEST).content
                if as_url
                else base64.b64decode(each["b64_json"])
            )
            self._check_size(asked, data)

    def stream(self) -> None:
        asked = self._asked() | {"stream": True, "partial_images": 1}
        for event in self._events("stream", asked):
            if event["type"].endswith(".completed"):
                self.seen.made.add(event["id"])
                self._check_size(asked, base64.b64decode(event["b64_json"]))

    def stopped_stream(self) -> None:
        """Deletes an image while it is made; the stream then ends with the word, unless it was
        done before.
        """
        ended = ""
        for event in self._events(
            "stream, then DELETE",
            self._asked() | {"stream": True, "progress": True, "num_inference_steps": 30},
        ):
            if event.get("type", "").endswith(".progress") and not ended:
                ended = "asked"
                self._send("DELETE image", "DELETE", f"/v1/images/{event['id']}")
                self.seen.deleted.add(event["id"])
            elif event.get("type", "").endswith(".completed"):
                ended = "completed"
            elif "error" in event:
                ended = event["error"]["code"]
        if ended not in ("", "completed", "cancelled", "not_found", "file_expired"):
            self.seen.wrong.append(f"a deleted image's stream ended with {ended!r}")

    def closed(self) -> None:
        """Asks for an image and goes."""
        begun, body = time.monotonic(), json.dumps(self._asked() | {"num_inference_steps": 30})
        line = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=LONGEST)
        line.request("POST", PICTURES, body, {"content-type": "application/json"})
        time.sleep(self.chance.uniform(0, 1))
        line.close()
        self.seen.answers.append(Answered("image, closed", 0, time.monotonic() - begun, True))

    def clip(self) -> None:
        told = self._ask(
            "clip", CLIPS, json=self._asked() | {"size": "128x128", "num_frames": self.chance.choice((5, 9))}
        )
        if told is None:
            return
        while told["status"] not in DONE:
            time.sleep(self.chance.uniform(0.1, 0.5))
            told = self._send("poll", "GET", f"{CLIPS}/{told['id']}").json()
        if told["status"] == "failed":
            self.seen.wrong.append(f"the video {told['id']} failed: {told['error']}")
            return
        for variant in ("video", "thumbnail", "spritesheet"):
            if not self._send("download", "GET", f"{CLIPS}/{told['id']}/content?variant={variant}").content:
                self.seen.wrong.append(f"{told['id']} has an empty {variant}")
        self.seen.made.add(told["id"])
        if self.chance.random() < 0.3:
            self._send("DELETE video", "DELETE", f"{CLIPS}/{told['id']}")
            self.seen.deleted.add(told["id"])

    def cancelled_clip(self) -> None:
        asked = self._asked() | {"size": "128x128", "num_frames": 17, "num_inference_steps": 30}
        if (told := self._ask("clip", CLIPS, json=asked)) is None:
            return
        time.sleep(self.chance.uniform(0, 1.5))
        if self.chance.random() < 0.5:
            self._send("cancel video", "POST", f"{CLIPS}/{told['id']}/cancel")
        else:
            self._send("DELETE video", "DELETE", f"{CLIPS}/{told['id']}")
            self.seen.deleted.add(told["id"])

    def mistake(self) -> None:
        method, address, sent, status = self.chance.choice(MISTAKES)
        self._send("mistake", method, address, (status,), **sent)

    def look(self) -> None:
        self._send(
            "look",
            "GET",
            self.chance.choice(("/health", "/metrics", "/server_info", "/v1/models", f"{CLIPS}?limit=5")),
        )

    # --- how
    # ----------------------------------------------------------------------------------------------

    def _asked(self) -> dict[str, Any]:
        chance = self.chance
        return {
            "prompt": chance.choice(SHAPES), "seed": chance.randrange(2**32), "size": chance.choice(SIZES),
            "num_inference_steps": chance.randint(1, 8), "guidance_scale": chance.choice((1.0, 2.5, 4.0)),
        }  # fmt: skip

    def _send(
        self, what: str, method: str, address: str, good: tuple[int, ...] = (200,), **sent: Any
    ) -> requests.Response:
        begun = time.monotonic()
        answer = self.session.request(method, self.url + address, timeout=LONGEST, **sent)
        fitting = answer.status_code in good
        self.seen.answers.append(Answered(what, answer.status_code, time.monotonic() - begun, fitting))
        if not fitting:
            self.seen.wrong.append(
                f"{method} {address} was answered {answer.status_code}: {answer.text[:200]}"
            )
        return answer

    def _ask(self, what: str, address: str, **sent: Any) -> Any:
        """A job is asked for: the answer, or None after a rest where the server has too many."""
        answer = self._send(what, "POST", address, (200, 429), **sent)
        if answer.status_code != 200:
            self._rest(answer)
            return None
        told = answer.json()
        self.seen.accepted.add(told["id"])
        return told

    def _rest(self, answer: requests.Response) -> None:
        time.sleep(
            min(2.0, float(answer.headers.get("retry-after", 1)), max(0.0, self.until - time.monotonic()))
        )

    def _events(self, what: str, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        begun = time.monotonic()
        with self.session.post(self.url + PICTURES, json=asked, stream=True, timeout=LONGEST) as answer:
            if answer.status_code == 200:
                for line in answer.iter_lines():
                    if line.startswith(b"data: "):
                        event = json.loads(line.removeprefix(b"data: "))
                        if "id" in event:
                            self.seen.accepted.add(event["id"])
                        yield event
            fitting = answer.status_code in (200, 429)
            self.seen.answers.append(Answered(what, answer.status_code, time.monotonic() - begun, fitting))
            if answer.status_code == 429:
                self._rest(answer)

    def _check_size(self, asked: dict[str, Any], data: bytes) -> None:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            if "x".join(map(str, picture.size)) != asked["size"]:
                self.seen.wrong.append(f"an image of {asked['size']} came as {picture.size}")
