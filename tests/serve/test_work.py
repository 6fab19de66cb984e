"""What a request costs before any limit of the model is looked at: function calls and bytes, both bounded by
what was sent.
"""

from __future__ import annotations

import base64
import json

import pytest
from falcon import testing

from tests.serve.counting import counting
from tests.serve.fake import form, service
from tinydiff.serve.app import make_app

IMAGES, EDITS, VIDEOS = "/v1/images/generations", "/v1/images/edits", "/v1/videos"
JSON = "application/json"
FORM = "multipart/form-data; boundary=B"

MOST_CALLS = 200_000
"""Of a request that is refused; the smallest ones need about a thousand. A walk over the names below would be
far beyond it.
"""
MOST_COPIES = 6
"""How many times a body's bytes may be held at once; what Python makes of many small values is larger than
their text.
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    made = service(tmp_path_factory.mktemp("work"))
    yield testing.TestClient(make_app(made), {"Host": "localhost"})
    made.scheduler.close()


def objects(count, twice=False):
    names = [f"n{number}" for number in range(count)] + ["n0"] * twice
    return "{" + ",".join(f'"{name}":1' for name in names) + "}"


def prompt(**more):
    return json.dumps({"prompt": "a", **more}).encode()


URI = "data:image/png;base64,"
MANY = 4_500_000
REFUSED = {
    "a content type of 240,000 semicolons": (IMAGES, 'application/json; a="' + ";" * 240_000, prompt(),
    "Content-Type", "1024 are"),
    "a content type of 1,000 semicolons": (IMAGES, 'application/json; a="' + ";" * 1000, prompt(),
    "Content-Type", "parameters"),
    "40,000 names, the last one twice": (IMAGES, JSON, objects(40_000, True).encode(), "body",
    "20,000 values"),
    "19,000 names, the last one twice": (IMAGES, JSON, objects(19_000, True).encode(), "n0",
    "is given twice"),
    "19,000 unknown names": (IMAGES, JSON, objects(19_000).encode(), "n0", "no such field"),
    "19,000 names in extra_body": (IMAGES, JSON, prompt(extra_body=objects(19_000, True)), "n0",
    "is given twice"),
    "a list of 4.5 million seeds": (IMAGES, JSON, prompt(seed=[1] * MANY), "body", "20,000 values"),
    "a list of 19,000 seeds": (IMAGES, JSON, prompt(seed=[1] * 19_000), "seed", "at most 10,000 are allowed"),
    "a form's list of 4.5 million seeds": (IMAGES, FORM, form(("seed", "1 " * MANY)), "seed",
    "9,000,000 characters"),
    "a form's JSON list of 4.5 million seeds": (IMAGES, FORM, form(("seed", f"[{'1,' * MANY}1]")), "seed",
    "characters"),
    "20 million empty lists": (IMAGES, JSON, b'{"prompt":[' + b"[]," * 20_000_000 + b"1]}", "body",
    "20,000 values"),
    "20 million empty objects": (IMAGES, JSON, b'{"prompt":[' + b"{}," * 20_000_000 + b"1]}", "body",
    "20,000 values"),
    "an output_format of 20 MB": (IMAGES, JSON, prompt(output_format="p" * 20_000_000), "output_format",
    "is not one of"),
    "a quality of 20 MB": (IMAGES, JSON, prompt(quality="hi" * 10_000_000), "quality", "is not one of"),
    "an x264_preset of 20 MB": (VIDEOS, JSON, prompt(x264_preset="f" * 20_000_000), "x264_preset",
    "characters"),
    "a size of 20 MB": (IMAGES, JSON, prompt(size="1" * 20_000_000), "size", "WIDTHxHEIGHT"),
    "seconds of 20 MB": (VIDEOS, JSON, prompt(seconds="1" * 20_000_000), "seconds", "too many digits"),
    "a number of 4,300 digits": (IMAGES, JSON, b'{"prompt":"a","n":' + b"1" * 4300 + b"}", "n",
    "must be from"),
    "a name of 20 MB": (IMAGES, JSON, prompt(**{"p" * 20_000_000: 1}), "p" * 80, "no such field"),
    "a name of 20 MB in extra_body": (IMAGES, JSON, prompt(extra_body={"p" * 20_000_000: 1}), "p" * 80,
    "no such field"),
    "a later option of 20 MB": (IMAGES, JSON, prompt(w="1" * 20_000_000), "w", "not supported yet"),
    "a prompt of 20 MB": (IMAGES, JSON, prompt(prompt="é" * 10_000_000), "prompt", "characters"),
    "a model of 20 MB": (IMAGES, JSON, prompt(model="m" * 20_000_000), "model", "characters"),
    "a data URI of escapes": (VIDEOS, JSON, prompt(input_reference=URI + "%41" * 7_000_000),
    "input_reference", "invalid base64"),
    "a data URI of blanks": (VIDEOS, JSON, prompt(input_reference=URI + "A " * 10_000_000), "input_reference",
    "not a complete"),
    "an image that is none": (VIDEOS, FORM, form(("input_reference", b"\xff" * 20_000_000)),
    "input_reference", "not a complete"),
    "a form of 10 million boundaries": (IMAGES, FORM, b"--B\r\n" * 4_000_000, "body", "malformed form"),
    "a form of one million parts": (IMAGES, FORM, form(("a", ""))[:-7] * 100_000, "body",
    "more than 512 parts"),
    "a form whose headers do not end": (IMAGES, FORM, b"--B\r\n" + b"a: b\r\n" * 3_000_000 + b"--B--", "body",
    "malformed form"),
    "headers of escaped quotes": (
        IMAGES, FORM,
        (b'--B\r\nContent-Disposition: form-data; a="' + rb"\";b=\"" * 500 + b"\r\n\r\nx\r\n") * 500
        + b"--B--",
        "Content-Disposition", "is not a value with parameters",
    ),
    "a form's name of 4,000 brackets": (IMAGES, FORM, form(("a" + "[" * 3900, "x")), "body",
    "is not a field name"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_is_walked_that_is_refused_anyway(client, case):
    path, kind, data, param, said = REFUSED[case]
    with counting() as cost:
        answer = client.simulate_post(path, body=data, headers={"Content-Type": kind})
    assert answer.status_code == 400, answer.text[:300]
    error = answer.json["error"]
    assert (error["param"], said in error["message"]) == (param, True) and len(error["message"]) < 1200
    assert cost.calls < MOST_CALLS
    assert cost.bytes < MOST_COPIES * len(data) + 2**23


def test_a_data_uri_costs_no_more_than_its_bytes(client):
    body = prompt(input_reference=URI + base64.b64encode(bytes(15_000_000)).decode())
    with counting() as cost:
        answer = client.simulate_post(VIDEOS, body=body, headers={"Content-Type": JSON})
    assert answer.status_code == 400 and cost.calls < MOST_CALLS and cost.bytes < MOST_COPIES * len(body)


def test_a_walk_over_names_would_be_seen():
    """The count sees what the budgets are there for."""
    with counting() as cost:
        assert sum(map(str.isascii, ["a"] * 100)) == sum(one.isascii() for one in ["a"] * 210_000) - 209_900
    assert cost.calls > MOST_CALLS
    with counting() as cost:
        assert len(bytes(10**7)) == 10**7
    assert cost.bytes > 9 * 10**6
