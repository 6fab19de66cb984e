import json
import logging

import falcon
import pytest
from falcon import testing

from tests.serve.fake import service
from tinydiff.serve import errors
from tinydiff.serve.body import read_bytes
from tinydiff.serve.guard import Guard, loopback, owner


class Echo:
    def on_get(self, req, resp):
        resp.media = {"owner": req.context.owner, "admin": req.context.admin, "id": req.context.request_id}

    def on_post(self, req, resp):
        resp.media = {"bytes": len(read_bytes(req, 1000))}


class Public(Echo):
    public = True


class Admin(Echo):
    admin = True


class Stream:
    def on_get(self, req, resp, id):
        resp.stream = iter([b"a", b"b"])


@pytest.fixture
def client(tmp_path):
    made = []

    def build(**options):
        made.append(service(tmp_path / str(len(made)), **options))
        app = falcon.App(middleware=[Guard(made[-1])])
        errors.install(app)
        for address, resource in {
            "/it": Echo(),
            "/public": Public(),
            "/admin": Admin(),
            "/stream/{id}": Stream(),
        }.items():
            app.add_route(address, resource)
        return testing.TestClient(app, headers={"Host": "localhost:30000"})

    yield build
    for each in made:
        each.scheduler.close()


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def code(answer):
    return answer.status_code, answer.json.get("error", {}).get("code")


# --- keys ---


def test_without_keys_everyone_on_loopback_may_everything(client):
    found = client()
    assert found.simulate_get("/it").json["admin"] is True
    assert found.simulate_get("/it").json["owner"] == ""
    assert found.simulate_post("/admin").status_code == 200


def test_beyond_loopback_nobody_changes_the_server_without_an_admin_key(client):
    assert code(client(host="0.0.0.0").simulate_post("/admin")) == (403, "admin_key_missing")


def test_every_key_opens_and_each_has_its_own_jobs(client):
    found = client(api_key=("one", "zwei ü"))
    owners = [
        found.simulate_get("/it", headers=bearer(key)).json["owner"]
        for key in ("one", "zwei ü".encode().decode("latin-1"))
    ]
    assert owners == [owner(b"one"), owner("zwei ü".encode())]
    assert "one" not in owners[0]


@pytest.mark.parametrize(
    "headers",
    [{}, bearer("on"), bearer(""), bearer("onee"), {"Authorization": "one"}, {"Authorization": "Basic one"}],
)
def test_what_is_no_key_does_not(client, headers):
    answer = client(api_key=("one",)).simulate_get("/it", headers=headers)
    assert code(answer) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_public_urls_and_options_need_none(client):
    found = client(api_key=("one",))
    assert found.simulate_get("/public").status_code == 200
    assert found.simulate_options("/it").status_code == 200


def test_an_ordinary_key_does_not_change_the_server(client):
    assert code(client(api_key=("one",)).simulate_post("/admin", headers=bearer("one"))) == (
        403,
        "admin_key_missing",
    )
    found = client(api_key=("one",), admin_api_key="boss")
    assert code(found.simulate_post("/admin", headers=bearer("one"))) == (403, "admin_required")
    assert code(found.simulate_post("/admin")) == (401, "invalid_api_key")
    assert found.simulate_post("/admin", headers=bearer("boss")).status_code == 200
    assert found.simulate_get("/it", headers=bearer("boss")).json["admin"] is True


def test_with_an_admin_key_alone_the_rest_is_free(client):
    found = client(admin_api_key="boss")
    assert found.simulate_get("/it").json["admin"] is False
    assert code(found.simulate_post("/admin")) == (401, "invalid_api_key")
    assert found.simulate_get("/it", headers=bearer("boss")).json["owner"] == ""


# --- ids ---


def test_a_sane_request_id_is_kept_and_any_other_replaced(client):
    found = client()
    assert (
        found.simulate_get("/it", headers={"x-request-id": "a-1_b.c:d"}).headers["x-request-id"]
        == "a-1_b.c:d"
    )
    for id in ("", "a b", "x" * 200, "a\tb"):
        answer = found.simulate_get("/it", headers={"x-request-id": id})
        assert answer.headers["x-request-id"].startswith("req_")
        assert answer.headers["x-request-id"] == answer.json["id"]


def test_an_error_has_an_id_too(client):
    assert client().simulate_get("/none").headers["x-request-id"].startswith("req_")


# --- bodies ---


def test_a_body_that_says_it_is_too_large_is_not_read(client):
    answer = client(max_body=0.01).simulate_post("/it", headers={"Content-Length": "10001"}, body=b"")
    assert code(answer) == (413, "request_too_large")


def test_a_body_without_a_length_is_counted(client):
    found = client()
    env = {"wsgi.input_terminated": True}
    assert code(found.simulate_post("/it", body=b"x" * 1001, extras=env, headers={"Content-Length": ""})) == (
        413,
        "request_too_large",
    )


# --- other pages ---


@pytest.mark.parametrize(
    ("headers", "wanted"),
    [
        ({}, (200, None)),
        ({"Origin": "http://localhost:30000"}, (200, None)),
        ({"Origin": "https://evil.example"}, (403, "foreign_origin")),
        ({"Origin": "null"}, (403, "foreign_origin")),
        ({"Origin": "http://localhost:8000"}, (403, "foreign_origin")),
        ({"Origin": "http://evil.example:30000", "Host": "evil.example:30000"}, (403, "unknown_host")),
        ({"Sec-Fetch-Site": "same-origin", "Host": "evil.example"}, (403, "unknown_host")),
        ({"Host": "evil.example"}, (403, "unknown_host")),
        ({"Origin": "http://["}, (403, "foreign_origin")),
    ],
)
def test_a_server_without_keys_is_no_other_pages_to_use(client, headers, wanted):
    assert code(client().simulate_post("/it", headers=headers)) == wanted


def test_a_name_that_merely_leads_here_reads_nothing(client):
    """A page of that name asks without an Origin."""
    assert code(client().simulate_get("/it", headers={"Host": "evil.example:30000"})) == (403, "unknown_host")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:abc",
        "localhost:1:2",
        "localhost:999999",
        "[::1",
        "[::1]x",
        "a b",
        "user@localhost",
        "localhost/",
        "ü",
        "a, b",
        "a" * 300,
    ],
)
@pytest.mark.parametrize("options", [{}, {"api_key": ("one",)}, {"host": "0.0.0.0"}])
def test_a_host_that_is_none_is_a_400(client, host, options):
    headers = {"Host": host.encode().decode("latin-1"), **bearer("one")}
    assert code(client(**options).simulate_get("/public", headers=headers)) == (400, "invalid_host")


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]", "[::1]:30000", "a.localhost:", "127.0.0.1:65535", ""],
)
def test_a_host_of_this_machine(client, host):
    assert client().simulate_get("/it", headers={"Host": host}).status_code == 200


def test_nobody_holds_an_empty_key(client):
    assert client(api_key=("",)).simulate_get("/it").status_code == 401


def test_an_allowed_origin_and_a_public_name_may(client):
    found = client(cors_origin=("https://mine.example",), public_url="https://images.example")
    assert found.simulate_post("/it", headers={"Origin": "https://mine.example"}).status_code == 200
    headers = {"Origin": "https://images.example", "Host": "images.example"}
    assert found.simulate_post("/it", headers=headers).status_code == 200


def test_another_page_may_send_get_but_not_read_the_answer(client):
    answer = client().simulate_get("/it", headers={"Origin": "https://evil.example"})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_with_keys_an_origin_does_not_matter(client):
    headers = {"Origin": "https://evil.example", **bearer("one")}
    assert client(api_key=("one",)).simulate_post("/it", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", 1), ("127.8.9.1", 1), ("::1", 1), ("localhost", 1), ("0.0.0.0", 0), ("a.b", 0)],
)
def test_loopback(host, own):
    assert loopback(host) is bool(own)


# --- the log ---


def test_one_line_for_each_request(client, caplog):
    found = client()
    with caplog.at_level(logging.INFO, "tinydiff.serve.requests"):
        found.simulate_get("/stream/secret", headers={"x-request-id": "r1"})
        found.simulate_get("/none?key=secret", headers={"x-request-id": "r2"})
    lines = [record.message for record in caplog.records if record.name == "tinydiff.serve.requests"]
    assert [line.split()[:3] for line in lines] == [["GET", "/stream/{id}", "200"], ["GET", "none", "404"]]
    assert lines[1].endswith("request=r2 error=not_found")
    assert "secret" not in "".join(lines)


def test_a_line_may_be_json(client, caplog):
    found = client(log_format="json", api_key=("one",))
    with caplog.at_level(logging.INFO, "tinydiff.serve.requests"):
        found.simulate_get("/it", headers=bearer("one"))
    told = json.loads(caplog.records[-1].message)
    assert (told["method"], told["route"], told["status"], told["owner"]) == (
        "GET",
        "/it",
        200,
        owner(b"one"),
    )
    assert told["seconds"] >= 0


def test_requests_are_counted_by_route(tmp_path):
    made = service(tmp_path)
    app = falcon.App(middleware=[Guard(made)])
    app.add_route("/stream/{id}", Stream())
    testing.TestClient(app, {"Host": "localhost"}).simulate_get("/stream/1")
    made.scheduler.close()
    assert (
        b'tinydiff_http_requests_total{method="GET",route="/stream/{id}",status="200"} 1.0'
        in made.metrics.text()
    )
