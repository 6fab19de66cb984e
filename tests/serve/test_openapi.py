"""The OpenAPI document: that it is valid, complete, and says what the server does."""

import json
from types import SimpleNamespace

import pytest
from falcon import testing
from openapi_spec_validator import OpenAPIV31SpecValidator

from tests.serve.fake import eventually, form, picture, service
from tinydiff.config import SamplingOptions
from tinydiff.records import UserError
from tinydiff.serve import fields, info, openapi, schemas, videos
from tinydiff.serve.app import make_app
from tinydiff.serve.options import ServeOptions

ALIASES = {
    "/health_generate", "/models", "/model_info", "/release_memory_occupation", "/resume_memory_occupation",
    "/v1/videos/edits", "/v1/videos/extensions", "/v1/videos/characters",
    "/v1/videos/characters/{id}", "/v1/images/variations", "/", "/docs", "/openapi.json", "/page/{file}",
}  # fmt: skip
"""Addresses that only repeat another, say that something does not exist, or are pages."""


@pytest.fixture(scope="module")
def described():
    return openapi.document(SimpleNamespace(name="shapes", options=ServeOptions()))


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    made = service(tmp_path_factory.mktemp("openapi"))
    yield make_app(made)
    made.scheduler.close()


def body(described, path, kind="application/json"):
    return described["paths"][path]["post"]["requestBody"]["content"][kind]["schema"]


def test_the_document_is_valid(described):
    assert list(OpenAPIV31SpecValidator(described).iter_errors()) == []


def test_it_is_served_without_a_key(tmp_path):
    made = service(tmp_path, api_key=("secret",))
    answer = testing.TestClient(make_app(made), {"Host": "localhost"}).simulate_get("/openapi.json")
    made.scheduler.close()
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    assert answer.json["openapi"].startswith("3.1") and answer.json["info"]["title"] == "tinydiff"


def test_every_route_is_described(described, app):
    def templates(node):
        return [
            *([node.uri_template] if node.uri_template else []),
            *(t for child in node.children for t in templates(child)),
        ]

    served = {template.replace(":path}", "}") for root in app._router._roots for template in templates(root)}
    assert len(served) > 25 and served - ALIASES == set(described["paths"])


def test_every_method_of_a_route_is_described(described):
    held = SimpleNamespace(blueprint=None)
    for template, resource in [*videos.routes(held), *info.routes(held)]:
        path = template.replace(":path}", "}")
        if path not in ALIASES:
            methods = {name.removeprefix("on_") for name in dir(resource) if name.startswith("on_")} - {
                "head"
            }
            assert set(described["paths"][path]) == methods, path


def test_every_field_of_a_request_is_described(described):
    given = {
        "image_path",
        "mask_path",
        "url",
        "reference_url",
        *fields.NESTED,
        *(name for name, (free, _) in fields.INERT.items() if not free),
    }
    for kind, paths in (
        ("image", ("/v1/images/generations", "/v1/images/edits")),
        ("video", ("/v1/videos",)),
    ):
        bodies = [described["paths"][path]["post"]["requestBody"]["content"] for path in paths]
        schemas = [content["schema"] for body in bodies for content in body.values()]
        named = {name for schema in schemas for name in schema["properties"]}
        assert set(fields.names(kind)) - given <= named


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("num_inference_steps", {"type": "integer", "minimum": 1, "maximum": 1000}),
        ("guidance_scale", {"type": "number", "minimum": 0, "maximum": 1000}),
        ("strength", {"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
        ("output_compression", {"type": "integer", "minimum": 0, "maximum": 100}),
        ("negative_prompt", {"type": "string"}),
    ],
)
def test_an_option_has_the_type_and_range_that_check_it(name, schema):
    made = fields.option(name)
    assert made.pop("description") == schemas.docstrings(fields.OPTIONS[name])[name]
    assert made == schema


def test_an_option_of_several_values_is_one_or_a_list():
    one = {"type": "integer", "minimum": 0}
    assert fields.option("seed")["anyOf"] == [one, {"type": "array", "items": one, "minItems": 1}]


def test_docstrings_leave_out_the_command_line():
    told = schemas.docstrings(SamplingOptions)
    assert told["strength"] == "How much the input image is changed: near 0 hardly, 1 completely."
    assert set(told) == set(SamplingOptions.__dataclass_fields__) and not any(
        "--" in text for text in told.values()
    )


@pytest.mark.parametrize("kind", ["image", "video"])
def test_fields_that_are_no_options_are_described_as_they_are_checked(kind):
    for name, field in fields.OWN[kind].items():
        schema = fields.request_schema(kind, "shapes", form=True)["properties"][name]
        good = [
            *schema.get("enum", []),
            *(schema[bound] for bound in ("minimum", "maximum") if bound in schema),
        ]
        for value in good:
            assert field.read(name, value, False) is not None
        beyond = [
            schema[bound] + step for bound, step in (("minimum", -1), ("maximum", 1)) if bound in schema
        ]
        bad = [*beyond, [], *(["no such value"] if "enum" in schema and name != "model" else [])]
        for value in bad:
            with pytest.raises(UserError) as refused:
                field.read(name, value, False)
            assert refused.value.field == name


def test_every_error_is_in_the_one_shape(described):
    shape = described["components"]["schemas"]["Error"]["properties"]["error"]
    assert set(shape["properties"]) == {"message", "type", "param", "code"} == set(shape["required"])
    for path, methods in described["paths"].items():
        for operation in methods.values():
            for status, answer in operation["responses"].items():
                if status >= "400" and path not in ("/health", "/ready"):
                    assert answer == {"$ref": f"#/components/responses/{status}"}


def test_what_needs_which_key_is_said(described):
    said = {
        path: operation.get("security")
        for path, methods in described["paths"].items()
        for operation in methods.values()
    }
    assert (
        said["/v1/sleep"] == [{"admin": []}]
        and said["/ready"] == []
        and said["/v1/images/generations"] is None
    )
    held = SimpleNamespace(blueprint=None)
    for template, resource in [*videos.routes(held), *info.routes(held)]:
        if (path := template.replace(":path}", "}")) in said:
            way = (
                [{"admin": []}]
                if getattr(resource, "admin", False)
                else []
                if getattr(resource, "public", False)
                else None
            )
            assert said[path] == way, path


def test_the_model_is_named(described):
    assert body(described, "/v1/images/generations")["properties"]["model"]["enum"] == ["shapes", None]


def test_the_examples_are_good_requests(described, app):
    client = testing.TestClient(app, {"Host": "localhost"})
    for path in ("/v1/images/generations", "/v1/videos"):
        example = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
        assert client.simulate_post(path, json=example).status_code == 200


def undescribed(document, schema, value, at=""):
    """Where an answer has keys that its schema has not, or lacks those that it promises. An object without
    properties may hold any.
    """
    if "$ref" in schema:
        found = document
        for name in schema["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        yield from undescribed(document, found, value, at)
    elif isinstance(value, dict) and "anyOf" in schema:
        [schema] = [one for one in schema["anyOf"] if one.get("type") != "null"]
        yield from undescribed(document, schema, value, at)
    elif isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        yield from (
            f"{at}.{name}"
            for name in value.keys() ^ known.keys()
            if name in value or name in schema["required"]
        )
        for name in value.keys() & known.keys():
            yield from undescribed(document, known[name], value[name], f"{at}.{name}")
    elif isinstance(value, list):
        for one in value:
            yield from undescribed(document, schema["items"], one, f"{at}[]")


SAID = {"prompt": "a star", "width": 64, "height": 64, "user": "me", "safety_identifier": "I"}


def test_every_key_of_an_answer_is_described_and_every_described_key_is_there(described, tmp_path):
    made = service(tmp_path, row={"images": (0, 2), "image_use": "start"})
    client = testing.TestClient(make_app(made), {"Host": "localhost"})
    image = client.simulate_post("/v1/images/generations", json=SAID).json
    video = client.simulate_post("/v1/videos", json=SAID).json
    asked = [
        ("post", "/v1/images/generations", image),
        (
            "post",
            "/v1/images/generations",
            client.simulate_post("/v1/images/generations", json={**SAID, "response_format": "url"}).json,
        ),
        ("post", "/v1/videos", video),
    ]
    assert (image["user"], image["safety_identifier"], video["user"], video["safety_identifier"]) == (
        "me",
        "I",
        "me",
        "I",
    )
    ids = {"/v1/videos": video["id"], "/v1/images": image["id"], "/v1/models": made.name}
    for path, methods in described["paths"].items():
        id = next((id for begin, id in ids.items() if path.startswith(begin)), "none")
        for method in ("get", "post"):
            if method in methods and not path.endswith(
                ("/content", "/generations", "/edits", "/v1/videos", "/metrics", "/set_lora")
            ):
                eventually(
                    lambda: (
                        not {"queued", "in_progress"}
                        & {name for name, count in made.store.counts().items() if count}
                    )
                )
                body = {"prompt": "another", "seed": 3} if path.endswith("remix") else {}
                answer = client.simulate_request(
                    method.upper(), path.replace("{id}", id), json=body if method == "post" else None
                )
                assert answer.status_code == 200, (path, answer.text)
                asked.append((method, path, answer.json))
    asked.append(("get", "/v1/videos", client.simulate_get("/v1/videos").json))
    made.scheduler.phase = "failed"
    for path in ("/health", "/ready"):
        answer = client.simulate_get(path)
        assert answer.status_code == 503
        asked.append(("get", path, answer.json))
    asked += [
        ("delete", f"{begin}/{{id}}", client.simulate_delete(f"{begin}/{ids[begin]}").json)
        for begin in ("/v1/videos", "/v1/images")
    ]
    made.scheduler.close()
    wrong = {}
    for method, path, answer in asked:
        status = "503" if answer.get("status") in ("unhealthy", "not ready") else "200"
        schema = described["paths"][path][method]["responses"][status]["content"]["application/json"][
            "schema"
        ]
        wrong[method, path] = sorted(undescribed(described, schema, answer))
    assert len(asked) > 20 and {call: names for call, names in wrong.items() if names} == {}


TROUBLE = [
    {"headers": {"Host": "localhost:x"}},
    {"headers": {"Host": "elsewhere.example"}},
    {"headers": {"Origin": "http://elsewhere.example"}},
    {"query_string": "no_such=1"},
    {"query_string": "limit=x&index=x&variant=x&after=x"},
    {"body": "{", "headers": {"Content-Type": "application/json"}},
    {"body": "{}", "headers": {"Content-Type": "application/json"}},
    {"body": "x", "headers": {"Content-Type": "text/plain"}},
    {"body": form(("prompt", "a"), ("image", b"none")),
    "headers": {"Content-Type": "multipart/form-data; " "boundary=B"}},
    {"body": form(("prompt", "a"), ("image", picture())),
    "headers": {"Content-Type": "multipart/form-data; " "boundary=B"}},
    {"body": "x" * 1_000_001},
]  # fmt: skip


@pytest.mark.parametrize(
    "keys",
    [{}, {"api_key": ("k",)}, {"api_key": ("k",), "admin_api_key": "boss"}],
    ids=["none", "key", "admin"],
)
def test_every_status_that_comes_is_described(described, tmp_path, keys):
    made = service(tmp_path, max_body=1.0, enable_metrics=False, **keys)
    client = testing.TestClient(make_app(made))
    lacking, seen = set(), set()
    for authorization in ("", "Bearer k", "Bearer boss", "Bearer wrong"):
        for trouble in ({}, *TROUBLE):
            headers = {"Host": "localhost", "Authorization": authorization, **trouble.get("headers", {})}
            for path, methods in described["paths"].items():
                for method, operation in methods.items():
                    asked = {**trouble, "headers": headers}
                    answer = client.simulate_request(method.upper(), path.replace("{id}", "none"), **asked)
                    seen.add(answer.status_code)
                    if str(answer.status_code) not in operation["responses"]:
                        lacking.add(f"{method} {path}: {answer.status_code}")
    made.scheduler.close()
    assert lacking == set() and {200, 400, 403, 404, 413, 415} <= seen


def test_variations_are_refused_in_a_sentence(app):
    """A bare 405 says nothing that OpenAI's clients would show."""
    answer = testing.TestClient(app, {"Host": "localhost"}).simulate_post(
        "/v1/images/variations", body=form(("image", picture()))
    )
    error = answer.json["error"]
    assert (answer.status_code, error["code"], answer.headers["x-should-retry"]) == (
        404,
        "not_supported",
        "false",
    )
    assert (
        error["message"]
        == "variations of an image are not supported; use POST /v1/images/edits with the image and a prompt"
    )


def test_the_document_is_plain_json(described):
    assert json.loads(json.dumps(described)) == described
