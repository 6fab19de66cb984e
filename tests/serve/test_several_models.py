"""Several models behind one server: which one runs a request, whose turn it is, which leaves the device."""

from __future__ import annotations

import base64
import shutil
import time
from contextlib import closing, contextmanager
from dataclasses import replace

import falcon.testing
import pytest
import requests
from safetensors.torch import load_file, save_file

from tests.serve.turns import TWO, service
from tinydiff.io import hub
from tinydiff.records import UserError
from tinydiff.runtime import fit
from tinydiff.serve import models as several
from tinydiff.serve import server
from tinydiff.serve.app import make_app
from tinydiff.serve.jobs import Job, Turn
from tinydiff.serve.options import ServeOptions


@pytest.fixture
def other(tmp_path):
    """A directory with the shipped model that paints the opposite: its velocity has another sign."""
    folder = shutil.copytree(hub.resolve("tinydiff/shapes", None, weights=True), tmp_path / "other")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: -x if name.startswith("proj_out") else x for name, x in weights.items()}, file)
    return folder


def test_requests_choose_their_model_over_http(tmp_path, other):
    made = service(tmp_path / "state", ("a=tinydiff/shapes", f"b={other}"))
    asked = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 2, "seed": 1}
    with server.running(made, server.listening(ServeOptions(port=0))) as url:

        def image(**more):
            answer = requests.post(f"{url}/v1/images/generations", json=asked | more, timeout=60).json()
            return answer["model"], base64.b64decode(answer["data"][0]["b64_json"])

        first, named, second = image(), image(model="a"), image(model="b")
        assert first == named and first[0] == "a" and second[0] == "b" and first[1] != second[1]
        cards = requests.get(f"{url}/v1/models", timeout=60).json()["data"]
        assert [(card["id"], card["loaded"]) for card in cards] == [("a", True), ("b", True)]
        assert requests.get(f"{url}/v1/models/b", timeout=60).json()["id"] == "b"
        video = requests.post(
            f"{url}/v1/videos", json=asked | {"model": "b", "num_frames": 5}, timeout=60
        ).json()
        assert video["model"] == "b"
        refused = requests.post(f"{url}/v1/images/generations", json=asked | {"model": "c"}, timeout=60)
        assert refused.status_code == 404 and refused.json()["error"] == {
            "message": "model: this server does not serve 'c'; it serves 'a', 'b'",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }


def test_a_stream_of_requests_for_one_model_does_not_starve_another(turns):
    """While one model's images run, those of it that come after a job of another model wait for that."""
    one = turns()
    one.submit("a", "b", "b")
    for _ in range(4):
        one.turn()
        one.submit("a")  # every turn brings another request for a
    one.drain()
    jobs = sorted(one.service.store.every(), key=lambda job: job.started_at)
    assert [job.model for job in jobs] == ["a", "b", "b", "a", "a", "a", "a"]
    assert {job.status for job in jobs} == {"completed"}


def test_jobs_of_one_model_that_wait_together_run_together(turns):
    one = turns()
    one.submit("a", "b", "a", "b")
    rounds = one.drain()
    models = [next(iter(set(running))) for running in rounds]
    assert rounds[0] == ["a", "a"] and rounds[models.index("b")] == ["b", "b"]
    assert all(set(running) == {model} for running, model in zip(rounds, models, strict=True))
    assert models == sorted(models), "each model had one turn"


def test_the_line_lets_only_jobs_of_the_turn_overtake(both):
    def add(at, model, priority=0):
        return both.add(Job(f"image_{at}", "image", at, model=model, priority=priority)).id

    add(1.0, "b")
    early, late = add(2.0, "a"), add(4.0, "a")
    until = time.time() + 30
    turn = Turn("a", 3.0)
    assert both.take("here", until, turn).id == early
    assert both.take("here", until, turn) is None and both.get(late).status == "queued"
    assert both.take("here", until).model == "b"
    assert both.take("here", until, turn).id == late  # nobody waits for the device
    add(5.0, "b", priority=1)
    add(2.5, "a")
    assert both.take("here", until, turn) is None, "a higher priority is not overtaken"


def test_the_model_that_was_used_least_recently_leaves(turns, monkeypatch):
    one = turns(models=("a=tinydiff/shapes", "b=tinydiff/shapes", "c=tinydiff/shapes"))
    plan = fit.planned(one.device.blueprint, (), 10**12)
    held = sum(part.weights for part in plan.footprints)
    room = int(plan.peak + held * 1.5 + (10**12 / 1e9 - plan.room / 1e9) * 1e9)  # for one beside it, not two
    monkeypatch.setattr(fit, "free_bytes", lambda device: room)
    names = one.scheduler.loaded
    one.submit("a", "b")
    one.drain()
    assert names() == {"a", "b"}
    one = one.scheduler
    one.loading.load("a")
    one.loading.load("c")
    assert one.loaded() == {"a", "c"}
    one.loading.load("b")
    assert one.loaded() == {"b", "c"}
    text = one.metrics.text().decode()
    assert 'tinydiff_model_on_device{model="a"} 0.0' in text and "tinydiff_model_loaded 1.0" in text
    one.loading.asleep = True
    one.loading.unload_unused()
    assert one.loaded() == frozenset() and one.state().phase == "asleep"
    assert "tinydiff_model_loaded 0.0" in one.metrics.text().decode()


def test_the_start_says_which_models_fit_together_and_which_take_turns(tmp_path, monkeypatch):
    three = ("a=tinydiff/shapes", "b=tinydiff/shapes", "c=tinydiff/shapes")
    with closing((made := service(tmp_path, three)).store):
        plan = fit.planned(made.blueprint, (), 10**12)
    held = sum(part.weights for part in plan.footprints)
    reserved = round(10**12 - plan.room)

    def told(beside, models=made.models):
        monkeypatch.setattr(fit, "free_bytes", lambda device: reserved + plan.peak + beside * held)
        return list(several.told(models))

    fits = "fits on the device beside"
    assert told(2) == [f"a {fits} b, c", f"b {fits} a, c", f"c {fits} a, b"]
    assert told(1)[0] == f"a {fits} some of b, c"
    assert told(0)[1] == "b takes turns with a, c"
    assert told(2, made.models[:1]) == []
    a, b, c = made.models
    foreign = replace(c.adapters.base, foreign=object())
    assert list(fit.together({"a": a.adapters.base, "b": b.adapters.base, "x": foreign}, 10**12)) == [
        f"a {fits} b and takes turns with x",
        f"b {fits} a and takes turns with x",
        "x takes turns with a, b",
    ]


def test_the_server_prints_them_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    @contextmanager
    def failed(made, sock):
        made.scheduler._set_phase("failed", detail="of the test")
        with sock, closing(made.store):
            yield "URL"

    monkeypatch.setattr(server, "running", failed)
    monkeypatch.setattr(fit, "free_bytes", lambda device: 10**12)
    asked = server.parse(("--state-dir", str(tmp_path), "--port", "0", "--models", *TWO))
    assert server.serve_here(asked, signals=()) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "tinydiff: a fits on the device beside b",
        "tinydiff: b fits on the device beside a",
    ]
    assert lines[2].startswith("tinydiff: a, b at URL")


def test_each_model_has_its_own_adapters(tmp_path):
    made = service(tmp_path, lora_dir=str(hub.resolve("tinydiff/shapes", None, weights=True) / "loras"))
    client = falcon.testing.TestClient(make_app(made), headers={"Host": "localhost"})
    with closing(made.store):
        asked = {"lora_nickname": "purple", "lora_path": "tinydiff/shapes/loras/purple.safetensors"}
        said = client.simulate_post("/v1/set_lora", json=asked | {"model": "b"})
        assert said.status_code == 200, said.text
        assert list(made.of("b").adapters.strengths({})) == ["purple"] and not made.adapters.strengths({})
        listed = [
            client.simulate_get("/v1/list_loras", params=which).json["loaded_adapters"]
            for which in ({}, {"model": "b"})
        ]
        assert [len(each) for each in listed] == [0, 1]
        refused = client.simulate_post("/v1/unmerge_lora_weights", json={"model": "c"})
        assert (refused.status_code, refused.json["error"]["code"]) == (404, "model_not_found")
        assert client.simulate_post("/v1/merge_lora_weights", json={"model": 3}).status_code == 400


def test_a_released_name_means_a_model_where_it_is_the_only_one(tmp_path):
    with closing((one := service(tmp_path / "1", ("a=tinydiff/shapes",))).store):
        assert one.of("tinydiff/shapes").name == one.of("a").name == one.of("").name == "a"
    with (
        closing((two := service(tmp_path / "2")).store),
        pytest.raises(UserError, match="it serves 'a', 'b'"),
    ):
        two.of("tinydiff/shapes")


def test_a_job_of_a_model_that_is_served_no_longer_fails_with_the_names(turns):
    one = turns()
    [gone] = one.submit("z")
    one.drain()
    error = one.service.store.get(gone.id).error
    assert (error.code, error.param) == ("invalid_value", "model")
    assert error.message == "model: this server does not serve 'z'; it serves 'a', 'b'"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--models", "a=x,"), "models: '' is not a directory, a hub id or NAME=MODEL"),
        (("--models", "=x"), "models: '=x' is not a directory, a hub id or NAME=MODEL"),
        (("--models", *TWO, "b=x"), "models: 'b' is given twice; write NAME=MODEL with two names"),
        (("--models", *TWO, "--served-model-name", "c"), "served_model_name: 'c' names one model"),
        (
            ("--models", *TWO, "--model-path", "x"),
            "model_path: a model is named by it and others by --models",
        ),
        (("tinydiff/shapes", "--models", *TWO), "model_path: a model is named by it and others by --models"),
        (("--models", *TWO, "--vae-path", "x"), "component_paths: {'vae': 'x'} is about one model"),
        (("--models", *TWO, "--lora-path", "x"), r"lora_path: \('x',\) is about one model"),
        (("--models", *TWO, "--num-gpus", "2"), "models: several models share one GPU, and 2 ranks"),
    ],
)
def test_what_makes_no_sense_together_is_one_sentence(tmp_path, words, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        asked = server.parse(("--state-dir", str(tmp_path), *words) if words[0][0] == "-" else words)
        server.serve(asked)
    assert "\n" not in str(error.value)
