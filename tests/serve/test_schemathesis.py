"""Requests made up from our own OpenAPI document: no answer is an error of the server, and every one is as
described.
"""

import time
from collections import Counter

import pytest
import schemathesis
from falcon import testing
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import one_of
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.generation.modes import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serve.fake import service
from tinydiff.serve.app import make_app
from tinydiff.serve.openapi import operations

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 40
"""Requests of each operation that fit its schema, and as many that do not."""

POSITIVE, NEGATIVE = GenerationMode
OPERATIONS = [
    pytest.param(one.method, one.path, mode, id=f"{one.name}-{mode}")
    for one in operations("")
    for mode in ((POSITIVE, NEGATIVE) if one.body or one.query else (POSITIVE,))  # nothing else can be wrong
]
SMALL = {"prompt": "a star", "width": 16, "height": 16}

answered: Counter[tuple[str, int]] = Counter()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    made = service(tmp_path_factory.mktemp("schemathesis"), max_pixels=2**20, max_queue=10_000)
    made.scheduler.step_seconds = 0.0
    yield made
    made.scheduler.close()


@pytest.fixture(scope="module")
def described(made):
    return schemathesis.openapi.from_wsgi("/openapi.json", make_app(made))


def known(made, path):
    """The id of a thing that is there for this address."""
    if path.startswith("/v1/models"):
        return made.name
    kind = "videos" if path.startswith("/v1/videos") else "images/generations"
    id = (
        testing.TestClient(make_app(made), {"Host": "localhost"})
        .simulate_post(f"/v1/{kind}", json=SMALL)
        .json["id"]
    )
    while made.store.get(id).status != "completed":
        time.sleep(0.01)
    return made.store.get(id).outputs[0].file if path.startswith("/v1/files") else id


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path", "mode"), OPERATIONS)
def test_answers_are_as_described(made, described, method, path, mode):
    operation = described[path][method.upper()]
    cases = operation.as_strategy(generation_mode=mode)
    if "{id}" in path:
        cases = one_of(
            operation.as_strategy(generation_mode=mode, path_parameters={"id": known(made, path)}), cases
        )

    @given(cases)
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def ask(case):
        answered[f"{method} {path}", case.call_and_validate(checks=CHECKS).status_code] += 1

    ask()


@pytest.mark.slow
def test_enough_was_asked_and_answered():
    assert sum(answered.values()) > 1000
    refused = {one.call for one in operations("")} - {call for call, status in answered if status == 200}
    made_up = {"post /v1/images/edits", "post /v1/set_lora"}
    assert refused <= made_up, "made-up bytes are no image, and a made-up name no adapter"


def test_an_answer_that_is_not_as_described_is_found(made):
    app = make_app(made)
    wrong = testing.TestClient(app, {"Host": "localhost"}).simulate_get("/openapi.json").json
    wrong["paths"]["/liveness"]["get"]["responses"]["200"]["content"]["application/json"]["schema"][
        "required"
    ] = ["other"]
    schema = schemathesis.openapi.from_dict(wrong)
    schema.app = app
    with pytest.raises(FailureGroup):
        schema["/liveness"]["GET"].Case().call_and_validate(checks=CHECKS)
