import pytest
from falcon import testing

from tests.serve.fake import service
from tinydiff.serve.app import RESOURCES, make_app
from tinydiff.serve.guard import EXPOSED

MINE = {"Origin": "https://mine.example"}


@pytest.fixture
def build(tmp_path):
    made = []

    def found(**options):
        made.append(service(tmp_path / str(len(made)), **options))
        return made[-1], testing.TestClient(make_app(made[-1]), {"Host": "localhost"})

    yield found
    for each in made:
        each.scheduler.close()


def test_every_part_answers(build):
    client = build()[1]
    for path in ("/v1/models", "/liveness", "/openapi.json", "/", "/v1/videos", "/v1/models/"):
        assert client.simulate_get(path).status_code == 200, path


def test_what_answers_get_answers_head(build):
    client = build()[1]
    for path in ("/v1/models", "/metrics", "/v1/videos", "/server_info"):
        answer = client.simulate_head(path)
        assert (answer.status_code, answer.content) == (200, b""), path


def test_what_openai_has_beyond_this_is_a_404(build):
    for path in ("/v1/videos/edits", "/v1/videos/characters", "/v1/videos/characters/x"):
        assert build()[1].simulate_post(path).json["error"]["code"] == "not_supported"


def test_with_keys_only_what_is_public_answers_without_one(build):
    made, client = build(api_key=("k",))
    for part in RESOURCES:
        for path, resource in part.routes(made):
            if not getattr(resource, "public", False):
                method = "GET" if hasattr(resource, "on_get") else "POST"
                at = path.replace("{id:path}", "x").replace("{id}", "x")
                assert client.simulate_request(method, at).status_code in (401, 403), path


def test_other_origins_read_nothing_by_default(build):
    answer = build()[1].simulate_get("/v1/models", headers=MINE)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_an_allowed_origin_reads_answers_and_errors(build):
    client = build(cors_origin=("https://mine.example",))[1]
    for path in ("/v1/models", "/v1/images/none"):
        headers = client.simulate_get(path, headers=MINE).headers
        assert headers["access-control-allow-origin"] == "https://mine.example"
        assert headers["access-control-expose-headers"] == ", ".join(EXPOSED)
        assert headers["vary"] == "Origin"
    assert (
        "access-control-allow-origin"
        not in client.simulate_get("/v1/models", headers={"Origin": "https://evil.example"}).headers
    )


def test_a_browser_may_ask_first_without_a_key(build):
    client = build(cors_origin=("https://mine.example",), api_key=("k",))[1]
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    answer = client.simulate_options("/v1/images/generations", headers={**MINE, **asked})
    assert answer.status_code == 200
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == "authorization"


def test_any_origin_may_where_that_is_asked_for(build):
    answer = build(cors_origin=("*",))[1].simulate_get("/v1/models", headers=MINE)
    assert answer.headers["access-control-allow-origin"] == "*"
