"""The OpenAPI document: that it is valid, complete, and says what the server does."""

import json
from types import SimpleNamespace

import pytest
from falcon import testing
from openapi_spec_validator import OpenAPIV31SpecValidator

from tests.serve.fake import service
from tinydiff.config import SamplingOptions
from tinydiff.records import UserError
from tinydiff.serve import fields, info, openapi, schemas, videos
from tinydiff.serve.app import make_app
from tinydiff.serve.options import ServeOptions

ALIASES = {
    "/health_generate", "/models", "/model_info", "/release_memory_occupation", "/resume_memory_occupation", "/v1/set_lora",
    "/v1/merge_lora_weights", "/v1/unmerge_lora_weights", "/v1/videos/edits", "/v1/videos/extensions", "/v1/videos/characters",
    "/v1/videos/characters/{id}", "/", "/docs", "/openapi.json", "/page/{file}",
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
        return [*([node.uri_template] if node.uri_template else []), *(t for child in node.children for t in templates(child))]

    served = {template.replace(":path}", "}") for root in app._router._roots for template in templates(root)}
    assert len(served) > 25 and served - ALIASES == set(described["paths"])


def test_every_method_of_a_route_is_described(described):
    held = SimpleNamespace(blueprint=None)
    for template, resource in [*videos.routes(held), *info.routes(held)]:
        path = template.replace(":path}", "}")
        if path not in ALIASES:
            methods = {name.removeprefix("on_") for name in dir(resource) if name.startswith("on_")} - {"head"}
            assert set(described["paths"][path]) == methods, path


def test_every_field_of_a_request_is_described(described):
    given = {
        "image_path",
        "mask_path",
        "url",
        "reference_url",
        *fields._EXTRA,
        *(name for name, (free, _) in fields.IDLE.items() if not free),
    }
    for kind, paths in (("image", ("/v1/images/generations", "/v1/images/edits")), ("video", ("/v1/videos",))):
        named = {name for path in paths for schema in described["paths"][path]["post"]["requestBody"]["content"].values()
                 for name in schema["schema"]["properties"]}  # fmt: skip
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
    made = schemas.option(name)
    assert made.pop("description") == schemas.docstrings(schemas.OPTIONS[name])[name]
    assert made == schema


def test_an_option_of_several_values_is_one_or_a_list():
    one = {"type": "integer", "minimum": 0}
    assert schemas.option("seed")["anyOf"] == [one, {"type": "array", "items": one, "minItems": 1}]


def test_docstrings_leave_out_the_command_line():
    told = schemas.docstrings(SamplingOptions)
    assert told["strength"] == "How far a given picture is changed: near 0 hardly, at 1 wholly."
    assert set(told) == set(SamplingOptions.__dataclass_fields__) and not any("--" in text for text in told.values())


@pytest.mark.parametrize("kind", ["image", "video"])
def test_fields_that_are_no_options_are_described_as_they_are_checked(kind):
    for name, read in fields.OWN[kind].items():
        schema = schemas.request(kind, "shapes", form=True)["properties"][name]
        good = [*schema.get("enum", []), *(schema[bound] for bound in ("minimum", "maximum") if bound in schema)]
        for value in good:
            assert read(name, value, False) is not None
        beyond = [schema[bound] + step for bound, step in (("minimum", -1), ("maximum", 1)) if bound in schema]
        bad = [*beyond, [], *(["no such value"] if "enum" in schema and name != "model" else [])]
        for value in bad:
            with pytest.raises(UserError) as refused:
                read(name, value, False)
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
    said = {path: operation.get("security") for path, methods in described["paths"].items() for operation in methods.values()}
    assert said["/v1/sleep"] == [{"admin": []}] and said["/ready"] == [] and said["/v1/images/generations"] is None
    held = SimpleNamespace(blueprint=None)
    for template, resource in [*videos.routes(held), *info.routes(held)]:
        if (path := template.replace(":path}", "}")) in said:
            way = [{"admin": []}] if getattr(resource, "admin", False) else [] if getattr(resource, "public", False) else None
            assert said[path] == way, path


def test_the_model_is_named(described):
    assert body(described, "/v1/images/generations")["properties"]["model"]["enum"] == ["shapes", None]


def test_the_examples_are_good_requests(described, app):
    client = testing.TestClient(app, {"Host": "localhost"})
    for path in ("/v1/images/generations", "/v1/videos"):
        example = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
        assert client.simulate_post(path, json=example).status_code == 200


def test_the_document_is_plain_json(described):
    assert json.loads(json.dumps(described)) == described
