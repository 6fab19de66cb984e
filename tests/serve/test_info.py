"""What the server says of itself, in every phase, and what an administrator may tell it."""

import sqlite3
import threading
from contextlib import closing
from types import SimpleNamespace

import falcon.testing
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve import fake
from tinydiff import __version__
from tinydiff.serve import info, sql
from tinydiff.serve.app import make_app
from tinydiff.serve.errors import of_exception
from tinydiff.serve.service import State

NAME = "tinydiff/shapes"


def client_of(made, key=None):
    return falcon.testing.TestClient(
        make_app(made), headers={"Host": "localhost"} | ({"Authorization": f"Bearer {key}"} if key else {})
    )


@pytest.fixture
def serve(tmp_path):
    """Options (and `row`) to a running service, ended after the test."""
    made = []

    def start(**options):
        made.append(fake.service(tmp_path / str(len(made)), **options))
        return made[-1]

    yield start
    for one in made:
        one.scheduler.close()


def set_state(made, *state):
    made.scheduler.state = lambda: State(*state)


def test_models_is_a_list_of_one_with_openais_fields(serve):
    made = serve()
    answer = client_of(made).simulate_get("/v1/models").json
    assert (answer["object"], len(answer["data"])) == ("list", 1)
    card = answer["data"][0]
    assert (card["id"], card["object"], card["created"], card["owned_by"]) == (
        NAME,
        "model",
        made.created,
        "tinydiff",
    )


def test_the_card_says_what_the_model_does_and_takes(serve):
    card = client_of(serve()).simulate_get("/v1/models").json["data"][0]
    assert (card["task_type"], card["task_types"]) == ("TI2V", ["T2V", "T2I", "I2V"])
    assert card["pipeline_class"] == "WanPipeline"
    assert (card["dit_precision"], card["precisions"]["vae"], card["device"], card["num_gpus"]) == (
        "fp32",
        "fp32",
        "cpu",
        0,
    )
    assert card["quantization"] == {}
    assert card["defaults"]["num_frames"] == {"image": 1, "video": 17}
    assert (card["defaults"]["num_inference_steps"], card["defaults"]["guidance_scale"]) == (30, 2.5)
    own = 128 * 128
    assert card["sizes"] == {
        "default": "128x128", "multiple": 16, "max_pixels": 4 * own, "max_video_pixels": 4 * 17 * own,
        "max_outputs": 10,
        "frame_multiple": 4,
    }  # fmt: skip
    assert card["input_images"] == {"least": 0, "most": 1, "use": "frames"}


@pytest.mark.parametrize(
    ("row", "kind", "kinds"),
    [
        ({"default_video_frames": None, "images": (0, 0)}, "T2I", ["T2I"]),
        ({"default_video_frames": None, "images": (0, 1), "image_use": "start"}, "TI2I", ["T2I", "I2I"]),
        ({"default_video_frames": None, "images": (1, 3), "image_use": "references"}, "I2I", ["I2I"]),
        ({"num_frames": 81, "default_video_frames": None, "images": (0, 0)}, "TI2V", ["T2V", "T2I"]),
        ({"num_frames": 81, "default_video_frames": None, "images": (1, 2)}, "I2V", ["I2V"]),
    ],
)
def test_the_tasks_of_other_models(serve, row, kind, kinds):
    card = client_of(serve(row=row)).simulate_get("/v1/models").json["data"][0]
    assert card["task_types"] == kinds
    assert card["task_type"] == (kind if row["images"] != (0, 0) or len(kinds) == 1 else kinds[0])


def test_a_model_is_found_by_its_name_with_slashes(serve):
    assert client_of(serve()).simulate_get(f"/v1/models/{NAME}").json["id"] == NAME
    assert client_of(serve(served_model_name="shapes")).simulate_get("/v1/models/shapes").json["root"] == NAME


def test_another_model_is_not_there(serve):
    answer = client_of(serve(served_model_name="shapes")).simulate_get("/v1/models/shape")
    assert answer.status_code == 404
    error = answer.json["error"]
    assert (error["code"], error["param"], error["type"]) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )
    assert "'shapes'" in error["message"]


def test_sglangs_urls(serve):
    client = client_of(serve(served_model_name="shapes"))
    flat = client.simulate_get("/models").json
    assert (flat["model_path"], flat["task_type"], flat["pipeline_class"]) == (NAME, "TI2V", "WanPipeline")
    info = client.simulate_get("/model_info").json
    assert info == client.simulate_get("/v1/model_info").json
    assert (info["model_type"], info["served_model_name"], info["supports_video_generation"]) == (
        "diffusion",
        "shapes",
        True,
    )
    assert client.simulate_get("/v1/list_loras").json == {
        "loaded_adapters": [],
        "active": {},
        "available": [],
    }


def test_server_info_tells_options_but_no_secrets_or_places(serve, tmp_path):
    options = {"api_key": ("open-sesame",), "admin_api_key": "hush-hush", "max_queue": 7}
    answer = client_of(serve(**options), "open-sesame").simulate_get("/server_info")
    assert answer.json["version"] == __version__
    assert answer.json["options"]["max_queue"] == 7
    assert answer.json["figures"]["queued"] == 0
    for secret in ("open-sesame", "hush-hush", str(tmp_path), "state_url"):
        assert secret not in answer.text


@pytest.mark.parametrize(
    "address", ["/server_info", "/v1/models", "/model_info", "/models", "/v1/model_info", "/v1/list_loras"]
)
def test_what_says_more_than_health_needs_a_key(serve, address):
    made = serve(api_key=("k",))
    assert client_of(made).simulate_get(address).status_code == 401
    assert client_of(made, "k").simulate_get(address).status_code == 200


@pytest.mark.parametrize("address", ["/liveness", "/health", "/health_generate", "/ready", "/metrics"])
def test_health_and_metrics_need_none(serve, address):
    assert client_of(serve(api_key=("k",))).simulate_get(address).status_code == 200


@pytest.mark.parametrize(
    ("phase", "alive", "healthy", "ready"),
    [("loading", 200, 200, 503), ("warming", 200, 200, 503), ("ready", 200, 200, 200), ("asleep", 200, 200,
    200),
     ("stopping", 200, 200, 503), ("failed", 200, 503, 503)],
)  # fmt: skip
def test_health_in_every_phase(serve, phase, alive, healthy, ready):
    made = serve()
    set_state(made, phase, 1, 3, None, "")
    got = [
        client_of(made).simulate_get(address).status_code
        for address in ("/liveness", "/health", "/health_generate", "/ready")
    ]
    assert got == [alive, healthy, healthy, ready]
    heads = [
        client_of(made).simulate_head(address)
        for address in ("/liveness", "/health", "/health_generate", "/ready")
    ]
    assert [(head.status_code, head.content) for head in heads] == [(status, b"") for status in got], (
        "load balancers ask so"
    )


def test_ready_says_how_far_it_is(serve):
    made = serve()
    set_state(made, "warming", 2, 5, 7.4, "")
    answer = client_of(made).simulate_get("/ready")
    assert answer.json == {
        "status": "not ready",
        "phase": "warming",
        "done": 2,
        "total": 5,
        "eta_s": 7.4,
        "detail": "",
    }
    assert answer.headers["retry-after"] == "7"


def test_health_says_why_it_failed(serve):
    made = serve()
    set_state(made, "failed", 0, 0, None, "the weights cannot be read")
    assert client_of(made).simulate_get("/health").json["error"] == "the weights cannot be read"


def figures(client):
    """{(name, its labels' values by label): value}."""
    text = client.simulate_get("/metrics").text
    return {
        (s.name, *(s.labels[k] for k in sorted(s.labels))): s.value
        for f in text_string_to_metric_families(text)
        for s in f.samples
    }


def test_metrics_has_the_scheduler_s_figures_and_the_requests(serve):
    made = serve()
    made.scheduler.figures = lambda: {"queued": 3, "running": 2, "peak_memory_bytes": 12345}
    client = client_of(made)
    client.simulate_get("/v1/models")
    client.simulate_get("/v1/nothing")
    found = figures(client)
    assert (
        found["tinydiff_jobs_queued",],
        found["tinydiff_jobs_running",],
        found["tinydiff_peak_memory_bytes",],
    ) == (3, 2, 12345)
    assert found["tinydiff_http_requests_total", "GET", "/v1/models", "200"] == 1
    assert found["tinydiff_http_requests_total", "GET", "none", "404"] == 1, (
        "addresses that clients make up are one route"
    )


def test_metrics_is_in_prometheus_s_form(serve):
    answer = client_of(serve()).simulate_get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_metrics_can_be_off(serve):
    answer = client_of(serve(enable_metrics=False)).simulate_get("/metrics")
    assert (answer.status_code, answer.json["error"]["code"]) == (404, "metrics_off")


@pytest.mark.parametrize(
    ("away", "back"), [("/v1/sleep", "/v1/wake"), ("/release_memory_occupation", "/resume_memory_occupation")]
)
def test_sleep_and_wake(serve, away, back):
    made = serve()
    client = client_of(made)
    assert client.simulate_post(away).json["success"] is True
    assert made.scheduler.phase == "asleep"
    assert client.simulate_post(back, json={}).json["success"] is True
    assert made.scheduler.phase == "ready"


def test_no_sleep_while_jobs_wait(serve):
    made = serve()
    made.scheduler.gate.clear()
    client = client_of(made)
    client.simulate_post("/v1/videos", json={"prompt": "a red circle"})
    answer = client.simulate_post("/v1/sleep")
    assert (answer.status_code, answer.json["error"]["code"], answer.headers["x-should-retry"]) == (
        409,
        "busy",
        "false",
    )
    assert made.scheduler.phase == "ready"


@pytest.mark.parametrize(
    ("body", "param"), [('{"tags": ["weights"]}', "tags"), ("[1]", "body"), ("{", "body")]
)
def test_an_order_takes_no_fields(serve, body, param):
    made = serve()
    answer = client_of(made).simulate_post(
        "/release_memory_occupation", body=body, content_type="application/json"
    )
    assert (answer.status_code, answer.json["error"]["param"], made.scheduler.phase) == (400, param, "ready")


ORDERS = [
    "/v1/sleep",
    "/v1/wake",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/v1/set_lora",
    "/v1/merge_lora_weights",
]


@pytest.mark.parametrize("address", [*ORDERS, "/v1/unmerge_lora_weights"])
def test_what_changes_the_server_needs_the_admin_key(serve, address):
    made = serve(api_key=("k",), admin_api_key="a")
    assert client_of(made, "k").simulate_post(address).status_code == 403
    assert client_of(made, "a").simulate_post(address).status_code in (200, 400)


@pytest.fixture
def locked(serve, monkeypatch, tmp_path):
    """A server whose database another process holds."""
    monkeypatch.setattr(sql, "BUSY", 0.01)
    made = serve()
    made.scheduler.close()  # its own thread would wait too
    with closing(sqlite3.connect(tmp_path / "0" / "jobs.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield made


def test_a_locked_database_is_a_503(locked):
    client = client_of(locked)
    answer = client.simulate_get("/ready")
    assert (answer.status_code, answer.json["status"]) == (503, "not ready")
    assert answer.json["detail"] == "the job database does not answer; try again soon"
    assert [client.simulate_get(path).status_code for path in ("/liveness", "/health", "/metrics")] == [
        200
    ] * 3
    answer = client.simulate_post("/v1/videos", json={"prompt": "a"})
    assert (answer.status_code, answer.json["error"]["code"], answer.headers["retry-after"]) == (
        503,
        "store_unreachable",
        "5",
    )


def test_a_store_that_does_not_answer_holds_no_probe(serve, monkeypatch):
    monkeypatch.setattr(info, "CHECK_S", 0.01)
    made, let = serve(), threading.Event()
    asked = []
    monkeypatch.setattr(made.store, "check", lambda: (asked.append(1), let.wait(20)))
    client = client_of(made)
    assert [client.simulate_get("/ready").status_code for _ in range(5)] == [503] * 5
    assert asked == [1]  # all of them wait for one
    let.set()
    fake.eventually(lambda: client.simulate_get("/ready").status_code == 200)


@pytest.mark.parametrize("free", [0, info.LEAST_FREE - 1])
def test_a_full_disk_is_not_ready(serve, monkeypatch, free):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    answer = client_of(serve()).simulate_get("/ready")
    assert (answer.status_code, answer.json["detail"]) == (503, "the disk of the server is full")


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [(sqlite3.SQLITE_FULL, 507, "storage_failed"), (sqlite3.SQLITE_IOERR_WRITE, 507, "storage_failed"),
     (sqlite3.SQLITE_BUSY, 503, "store_unreachable"), (sqlite3.SQLITE_LOCKED, 503, "store_unreachable")],
)  # fmt: skip
def test_what_the_database_refuses_has_one_form(code, status, told):
    error = sqlite3.OperationalError("refused")
    error.sqlite_errorcode = code
    refusal = of_exception(error)
    assert (refusal.status, refusal.code) == (status, told)
