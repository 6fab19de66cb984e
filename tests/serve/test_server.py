"""The server as a process: what is left when it is killed, stopped or shared, and what its log says."""

import json
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import boto3
import pytest
import requests
from moto.server import ThreadedMotoServer

from tests.serve.processes import TRACED, serving, wait
from tests.sources import ROOT
from tinydiff.records import UserError
from tinydiff.serve import server

CLIP = {"prompt": "a red circle", "num_frames": 5, "num_inference_steps": 2}
STEPS = 40


def videos(one):
    """All videos of a server, from its list."""
    found, after = [], None
    while True:
        page = one.get("/v1/videos", params={"limit": 100, **({"after": after} if after else {})}).json()
        found += page["data"]
        if not page["has_more"]:
            return {video["id"]: video for video in found}
        after = page["last_id"]


def create(one, **fields):
    answer = one.post("/v1/videos", json={**CLIP, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def all_done(one, ids):
    found = videos(one)
    return found if all(found[id]["status"] in ("completed", "failed") for id in ids) else None


@pytest.mark.slow
def test_a_killed_server_loses_no_job_and_makes_none_twice(tmp_path):
    """Where that is asked for, a job that it left unfinished fails with a code instead."""
    with serving(tmp_path, "--lease", "1") as first:
        first.wait_ready()
        ids = [create(first, seed=k, num_inference_steps=STEPS, size="64x64") for k in range(4)]
        wait(lambda: any(video["status"] == "in_progress" for video in videos(first).values()))
        first.kill()
    with serving(tmp_path, "--lease", "1") as second:
        found = wait(lambda: all_done(second, ids), 180)
        assert sorted(found) == sorted(ids)
        assert [video["status"] for video in found.values()] == ["completed"] * 4
        assert second.get(f"/v1/videos/{ids[0]}/content").content[4:8] == b"ftyp"
        id = create(second, num_inference_steps=1000)
        wait(lambda: videos(second)[id]["status"] == "in_progress")
        second.kill()
    with serving(tmp_path, "--lease", "1", "--unfinished", "fail") as third:
        found = wait(lambda: all_done(third, [id]))
        assert found[id]["status"] == "failed" and found[id]["error"]["code"] == "server_restarted"


@pytest.mark.slow
def test_stopping_lets_running_jobs_end_and_keeps_the_rest(tmp_path):
    with serving(tmp_path, "--batching-max-size", "1") as first:
        first.wait_ready()
        running, waiting = create(first, num_inference_steps=STEPS), create(first, num_inference_steps=1000)
        wait(lambda: videos(first)[running]["status"] == "in_progress")
        assert first.stop() == 0
        assert "stopping" in first.said()
    with serving(tmp_path) as second:
        assert videos(second)[running]["status"] == "completed"
        assert videos(second)[waiting]["status"] in ("queued", "in_progress")


def test_two_servers_share_a_database_and_one_dies(tmp_path, postgres_url):
    options = ("--state-url", postgres_url, "--lease", "1", "--batching-max-size", "1")
    with serving(tmp_path, *options) as first, serving(tmp_path, *options) as second:
        first.wait_ready(), second.wait_ready()
        ids = [
            create((first, second)[k % 2], seed=k, num_inference_steps=STEPS, size="64x64") for k in range(5)
        ]
        wait(lambda: sum(video["status"] == "in_progress" for video in videos(first).values()) == 2)
        first.kill()
        found = wait(lambda: all_done(second, ids), 180)
        assert sorted(found) == sorted(ids)
        assert [video["status"] for video in found.values()] == ["completed"] * 5


@pytest.mark.slow
def test_outputs_go_to_object_storage_and_leave_with_their_job(tmp_path):
    storage = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    storage.start()
    endpoint = "http://{}:{}".format(*storage.get_host_and_port())
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="k", aws_secret_access_key="s", region_name="us-east-1"
    )
    client.create_bucket(Bucket="of-a-server")
    told = {
        "CLOUD_STORAGE_TYPE": "s3",
        "S3_BUCKET_NAME": "of-a-server",
        "S3_ACCESS_KEY_ID": "k",
        "S3_SECRET_ACCESS_KEY": "s",
    }
    try:
        with serving(
            tmp_path,
            **{f"SGLANG_{name}": value for name, value in told.items()},
            SGLANG_S3_ENDPOINT_URL=endpoint,
        ) as one:
            id = create(one.wait_ready())
            wait(lambda: all_done(one, [id]))
            wait(
                lambda: len(client.list_objects_v2(Bucket="of-a-server").get("Contents", ())) == 3
            )  # the video, its first frame, its sheet
            wait(lambda: all(output["url"].startswith(endpoint) for output in videos(one)[id]["outputs"]))
            assert one.get(f"/v1/videos/{id}/content").content[4:8] == b"ftyp"
            assert one.session.delete(f"{one.url}/v1/videos/{id}").json()["deleted"]
            wait(lambda: "Contents" not in client.list_objects_v2(Bucket="of-a-server"))
    finally:
        storage.stop()


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A server for several tests, and the directory of its outputs, which holds another's file."""
    folder = tmp_path_factory.mktemp("logged")
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("x" * 10_000)
    options = ("--log-format", "json", "--max-body", "0.001", "--output-path", str(folder / "out"))
    with serving(folder, *options, "--host", "127.0.0.1") as one:
        yield one.wait_ready(), folder / "out"


def test_one_line_a_request_with_its_id(logged):
    one, _ = logged
    one.get("/v1/models", headers={"x-request-id": "mine"})
    lines = [json.loads(line) for line in one.said().splitlines() if line.startswith("{")]
    assert [line["route"] for line in lines if line.get("request") == "mine"] == ["/v1/models"]


@pytest.mark.slow
def test_stopping_tells_those_who_wait(tmp_path):
    with serving(tmp_path, "--http-graceful-shutdown-timeout", "0.2") as one:
        one.wait_ready()
        with ThreadPoolExecutor(2) as pool:
            asked = {"prompt": "a red circle", "num_inference_steps": 1000}
            url = f"{one.url}/v1/images/generations"
            waiting = [
                pool.submit(requests.post, url, json={**asked, "stream": stream}, timeout=60)
                for stream in (False, True)
            ]
            wait(
                lambda: one.get("/server_info").json()["figures"]["running"] == 2
            )  # over a connection that is kept
            assert one.stop() == 0
        answer, stream = (each.result() for each in waiting)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_restarted")
        assert stream.text.startswith(": begun\n\nevent: error\n") and "server_restarted" in stream.text


def test_stopping_waits_for_answers_and_for_no_idle_connection(monkeypatch):
    idle, busy = (SimpleNamespace(requests=[], total_outbufs_len=length) for length in (0, 100))
    connections = SimpleNamespace(active_channels={1: idle, 2: busy})
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        busy.total_outbufs_len -= 50

    monkeypatch.setattr(server.time, "sleep", sleep)
    server._answered(connections)
    assert len(waits) == 2


def test_an_option_with_several_values_may_be_given_several_times():
    options = server.parse(
        ["--api-key", "a", "--port", "1", "--api-key", "b", "c", "--port", "2", "--cors-origin", "*"]
    ).server
    assert (options.api_key, options.port, options.cors_origin) == (("a", "b", "c"), 2, ("*",))


def test_what_origins_and_a_public_url_may_be():
    origins = (
        "http://localhost:3000",
        "https://a.example",
        "http://[::1]:8080",
        "chrome-extension://abc",
        "https://b_c.example:8443",
    )
    argv = ["--cors-origin", *origins, "--public-url", "https://a.example:8443/images/"]
    options = server.checked(server.parse(argv).server)
    assert (options.cors_origin, options.public_url) == (origins, "https://a.example:8443/images/")


def test_the_model_may_come_first_as_sglang_has_it():
    asked = server.parse(["some/model", "--port", "1"])
    assert (asked.model.model_path, asked.server.port) == ("some/model", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "code"),
    [("SIGINT", "SIGTERM", 143), ("SIGTERM", "SIGINT", 130)],
)
def test_asked_twice_it_stops_at_once(tmp_path, first, second, code):
    with serving(tmp_path) as one:
        create(one.wait_ready(), num_inference_steps=1000)
        wait(lambda: one.get("/server_info").json()["figures"]["running"] == 1)
        one.process.send_signal(getattr(signal, first))
        wait(lambda: "stopping" in one.said())
        one.process.send_signal(getattr(signal, second))
        assert one.process.wait(60) == code
        assert (
            one.said().endswith("stopped at once; the next start runs unfinished jobs again\n")
            and "Traceback" not in one.said()
        )


def test_files_go_where_sglang_has_them_go(logged, tmp_path):
    one, out = logged
    answer = one.post(
        "/v1/images/generations", json={"prompt": "a", "num_inference_steps": 1, "response_format": "url"}
    ).json()
    assert requests.get(answer["data"][0]["url"], timeout=60).content[:4] == b"\x89PNG"
    assert [path.suffix for path in out.glob("*.png")] == [".png"]
    assert str(out.parent) not in one.get("/server_info").text
    with pytest.raises(UserError, match=r"output_path: .* has the files of a server with another state_dir"):
        other = ["--state-dir", str(tmp_path), "--output-path", str(out)]
        server.serve(server.parse(["--port", "0", *other]))


@pytest.mark.slow
def test_a_warning_beyond_loopback_without_a_key(tmp_path, logged):
    quiet, _ = logged
    assert "--api-key" not in quiet.said()
    with serving(tmp_path, "--host", "0.0.0.0", TINYDIFF_API_KEY="k") as keyed:
        assert "--api-key" not in keyed.said()


def test_a_body_that_is_never_read_is_refused_in_the_same_form(logged):
    one, _ = logged
    answer = one.post("/v1/images/generations", data=b"x" * 2**21)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--api-key", ""], "api_key: is empty"),
        (["--admin-api-key", ""], "admin_api_key: is empty"),
        (["--host", "nowhere.invalid"], "host: 'nowhere.invalid' cannot be used"),
        (["--model-path", "/nowhere"], "model_path: '/nowhere'"),
        (["--enable-sequence-shard", "true"], "not supported yet"),
        (["--warmup-resolutions", "128"], "warmup_resolutions: '128' is not WIDTHxHEIGHT"),
        (["--warmup-resolutions", "100x100"], "height: 100 is not a multiple"),
        (["--webui"], "webui: is not an option of the server"),
        (
            ["--cors-origin", "evil.com"],
            "cors_origin: 'evil.com' is neither * nor SCHEME://HOST or SCHEME://HOST:PORT; did you mean 'https://evil.com'?",
        ),
        (["--cors-origin", "*", "https://A.example:443/"], "did you mean 'https://a.example'?"),
        (["--cors-origin", "http://a.example/page"], "did you mean 'http://a.example'?"),
        (["--cors-origin", "http://a.example:70000"], "such as 'https://example.com'"),
        (["--cors-origin", "null"], "did you mean 'https://null'?"),
        (["--cors-origin", ""], "cors_origin: '' is neither"),
        (["--public-url", "nonsense"], "public_url: 'nonsense' is not http(s)://HOST"),
        (["--public-url", "ftp://a.example"], "public_url: 'ftp://a.example' is not http(s)://HOST"),
        (["--public-url", "https://"], "public_url: 'https://' is not"),
        (["--public-url", "https://a.example/?q=1"], "public_url: 'https://a.example/?q=1' is not"),
        (["--public-url", "https://user:word@a.example"], "public_url: 'https://user:word@a.example' is not"),
        (["--public-url", "https://a.example:99999"], "public_url: 'https://a.example:99999' is not"),
        (["--api-key", "a\nb"], "api_key: holds a control character"),
        (["--admin-api-key", "a\x7fb"], "admin_api_key: holds a control character"),
        (["--host", ""], "host: '' is empty"),
        (["--host", "a" * 300], "host: "),
        (["--served-model-name", " "], "served_model_name: ' ' is empty"),
        (["--output-path", ""], "output_path: '' is empty"),
        (["--output-path", "/dev/null/x"], "output_path: cannot write to '/dev/null/x' (not a directory)"),
        (["--output-limit", "1e300"], "output_limit: 1e+300 must be"),
        (["somewhere", "--model-path", "elsewhere"], "model_path: is given twice"),
        (["--state-url", "mysql://x"], "state_url: 'mysql://x' must have the form"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_loaded(argv, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        server.serve(server.parse([*argv, "--state-dir", str(tmp_path), "--port", "0"]))


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_it_answers_while_it_compiles_and_compiles_nothing_once_it_is_ready(tmp_path):
    """One graph serves both sizes. Batches of several are in tests/runtime/test_continuous.py, Inductor in a
    thread is in tests/sampling/test_compile.py.
    """
    options = ("--enable-torch-compile", "--warmup-resolutions", "128x128", "96x160")
    options += ("--batching-max-size", "1")

    def picture(one, size):
        return one.post(
            "/v1/images/generations", json={"prompt": "a red circle", "num_inference_steps": 3, "size": size}
        ).status_code

    def compiled(one):
        return next(
            line
            for line in one.get("/metrics").text.splitlines()
            if line.startswith("tinydiff_recompiles_total")
        )

    with serving(tmp_path, *options, command=TRACED, PYTHONPATH=str(ROOT)) as one:
        wait(lambda: one.get("/ready").json()["phase"] == "compiling")
        assert picture(one, "128x128") == 200 and one.get("/ready").status_code == 503
        one.wait_ready(400)
        before = compiled(one)
        with ThreadPoolExecutor(6) as pool:
            assert set(pool.map(lambda k: picture(one, ("128x128", "96x160")[k % 2]), range(12))) == {200}
        assert compiled(one) == before == "tinydiff_recompiles_total 1.0"
