"""LoRA adapters of a running server: loaded, listed, chosen by requests, given to all, taken away."""

import os
import threading

import pytest
import torch
from falcon import testing
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.serve.test_scheduler import asked, started, wait  # noqa: F401  a fixture
from tinydiff.config import ModelOptions
from tinydiff.records import UserError
from tinydiff.runtime import blueprint
from tinydiff.serve import adapters, server
from tinydiff.serve.app import make_app
from tinydiff.serve.options import ServeOptions

SIZE = {"height": 32, "width": 32, "num_frames": 1, "num_inference_steps": 2}
LAYER = "transformer.blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def plan():
    return blueprint.read(ModelOptions())


@pytest.fixture
def folder(plan, tmp_path):
    """Three adapters of one layer, one of them for another model."""
    width = plan.denoiser.config.num_attention_heads * plan.denoiser.config.attention_head_dim
    directory = tmp_path / "loras"
    directory.mkdir()
    for seed, (name, inputs) in enumerate((("style", width), ("ink", width), ("other", width + 1))):
        generator = torch.Generator().manual_seed(seed)
        pair = {
            f"{LAYER}.lora_A.weight": torch.randn(2, inputs, generator=generator),
            f"{LAYER}.lora_B.weight": torch.randn(width, 2, generator=generator),
        }
        save_file(pair, directory / f"{name}.safetensors")
    return directory


@pytest.fixture
def client(started, folder):  # noqa: F811
    service = started(lora_dir=str(folder))
    return service, testing.TestClient(make_app(service), {"Host": "localhost"})


def pixels(service, **fields):
    job, _ = wait(service, service.scheduler.submit(asked(**SIZE | fields)))
    assert job.status == "completed", job.error
    [output] = job.outputs
    with Image.open(service.files.path(output.file)) as image:
        return image.tobytes(), job.result["parameters"].get("loras")


def post(client, name, **body):
    return client.simulate_post(f"/v1/{name}", json=body)


def test_requests_choose_adapters_of_the_directory(client):
    service, web = client
    base, none = pixels(service)
    assert none is None and web.simulate_get("/v1/list_loras").json["available"] == ["ink", "other", "style"]
    style, said = pixels(service, loras={"style": 0.5})
    assert style != base and said == {"style": 0.5}
    both, said = pixels(service, loras={"style": 0.5, "ink": -1})
    assert both != style and said == {"style": 0.5, "ink": -1.0}
    again, said = pixels(service)
    assert again == base and said is None


def test_requests_with_different_adapters_share_a_batch(client):
    service, _ = client
    alone = [pixels(service, loras=loras)[0] for loras in ({"style": 1}, {"ink": 1}, {"style": 0})]
    together, threads = [b""] * 3, []
    for i, loras in enumerate(({"style": 1}, {"ink": 1}, {"style": 0})):

        def ask(i=i, loras=loras):
            together[i] = pixels(service, loras=loras)[0]

        threads.append(threading.Thread(target=ask))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_sglangs_routes_set_merge_and_take_out(client, folder):
    service, web = client
    base, _ = pixels(service)
    path = str(folder / "style.safetensors")
    answer = post(web, "set_lora", lora_nickname="mine", lora_path=path, strength=0.5)
    assert answer.status_code == 200
    assert answer.json["loaded_adapters"] == [{"lora_nickname": "mine", "lora_path": path}]
    assert answer.json["active"] == {
        "transformer": [{"nickname": "mine", "path": path, "merged": False, "strength": 0.5}]
    }
    active, said = pixels(service)
    assert active != base and said == {"mine": 0.5}
    assert active == pixels(service, loras={"style": 0.5})[0]
    assert post(web, "unmerge_lora_weights").json["active"] == {}
    assert pixels(service)[0] == base
    assert post(web, "merge_lora_weights", strength=1).json["active"]["transformer"][0]["strength"] == 1
    assert pixels(service)[1] == {"mine": 1.0}
    names = ["mine", "ink"]
    answer = post(web, "set_lora", lora_nickname=names, lora_path=[path, str(folder / "ink.safetensors")])
    assert [each["nickname"] for each in answer.json["active"]["transformer"]] == names


@pytest.mark.parametrize(
    ("name", "body", "param", "words"),
    [
        ("set_lora", {}, "lora_nickname", "is missing"),
        ("set_lora", {"lora_nickname": "none"}, "lora_nickname", "'none' is no adapter of this model"),
        ("set_lora", {"lora_nickname": "a", "lora_path": "/nowhere/a.safetensors"}, "lora_path", "neither"),
        (
            "set_lora",
            {"lora_nickname": "a b", "lora_path": "FOLDER/ink.safetensors"},
            "lora_nickname",
            "letters",
        ),
        (
            "set_lora",
            {"lora_nickname": "a", "lora_path": "FOLDER/other.safetensors"},
            "lora_path",
            "does not fit",
        ),
        ("set_lora", {"lora_nickname": "a", "strength": "1"}, "strength", "is not a number from -100 to 100"),
        ("set_lora", {"lora_nickname": "a", "strength": [1, 2]}, "strength", "2 are given for 1 adapters"),
        ("set_lora", {"lora_nickname": "a", "merge_mode": "merge"}, "merge_mode", "beside the weights"),
        ("set_lora", {"lora_nickname": "a", "lora_name": "b"}, "lora_name", "did you mean 'lora_nickname'"),
        ("merge_lora_weights", {"target": "vae"}, "target", "it may be 'all'"),
        ("unmerge_lora_weights", {"strength": 1}, "strength", "no such field"),
    ],
)
def test_a_mistake_changes_nothing(client, folder, name, body, param, words):
    _, web = client
    body = {key: v.replace("FOLDER", str(folder)) if isinstance(v, str) else v for key, v in body.items()}
    answer = post(web, name, **body)
    assert (answer.status_code, answer.json["error"]["param"]) == (400, param)
    assert words in answer.json["error"]["message"]
    assert web.simulate_get("/v1/list_loras").json["loaded_adapters"] == []


class Harm:
    """What leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return self.mark.mkdir, ()


def bad_files(folder, good):
    """Adapters that are none, and a part of the sentence for each."""
    pair = load_file(good)
    a = f"{LAYER}.lora_A.weight"
    tensors = {
        "half": ({a: pair[a]}, "has half a pair only"),
        "nan": (pair | {a: pair[a] * float("nan")}, "has values that are not numbers in"),
        "alpha": (pair | {f"{LAYER}.alpha": torch.tensor(float("inf"))}, "has a scale that is not a number"),
        "foreign": (
            {key.replace("blocks.0.attn1", "double_blocks.0"): x for key, x in pair.items()},
            "match no weight",
        ),
    }
    for name, (file, words) in tensors.items():
        save_file(file, folder / f"{name}.safetensors")
        yield name, words
    (folder / "cut.safetensors").write_bytes(good.read_bytes()[:-20])
    yield "cut", "is truncated"
    torch.save({"a": Harm(folder / "executed")}, folder / "code.safetensors")
    yield "code", "is a pickle, which can run code and is never read"
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    yield "pointer", "is a Git LFS pointer"


def test_a_bad_adapter_leaves_the_server_as_it_was(client, folder):
    """By the administrator's route, of the directory, and with a good one beside it."""
    service, web = client
    assert post(web, "set_lora", lora_nickname="style", lora_path=str(folder / "style.safetensors")).json
    right, said = pixels(service)
    assert said == {"style": 1.0}
    before = web.simulate_get("/v1/list_loras").json
    body = {"prompt": "a", "size": "32x32", "num_inference_steps": 2}
    for name, words in bad_files(folder, folder / "style.safetensors"):
        path = str(folder / f"{name}.safetensors")
        answers = (
            post(web, "set_lora", lora_nickname="mine", lora_path=path),
            post(web, "set_lora", lora_nickname="style", lora_path=path),
            web.simulate_post("/v1/images/generations", json=body | {"loras": {"style": 1, name: 1}}),
        )
        for answer in answers:
            message = answer.json["error"]["message"]
            assert answer.status_code == 400 and words in message and "\n" not in message, (name, message)
        after = web.simulate_get("/v1/list_loras").json
        assert (after["loaded_adapters"], after["active"]) == (before["loaded_adapters"], before["active"])
    assert pixels(service) == (right, said) and not (folder / "executed").exists()


def test_an_adapter_whose_file_is_overwritten_stays_what_it_was(client, folder):
    service, web = client
    path = folder / "style.safetensors"
    post(web, "set_lora", lora_nickname="style", lora_path=str(path))
    os.truncate(path, 0)
    active, said = pixels(service)
    assert said == {"style": 1.0} and active != pixels(service, loras={"style": 0})[0]


def test_an_adapter_of_another_model_fails_its_request_alone(client):
    service, web = client
    body = {"prompt": "a", "loras": {"other": 1}, **SIZE}
    answer = web.simulate_post(
        "/v1/images/generations", json={k: v for k, v in body.items() if k != "num_frames"}
    )
    assert answer.status_code == 400 and answer.json["error"]["param"] in ("loras", "lora_path")
    assert pixels(service)[1] is None


def test_adapters_that_the_device_cannot_take_fail_a_request_and_no_more(client, monkeypatch):
    service, web = client
    base, _ = pixels(service)

    def full(model, read, mode):
        raise torch.OutOfMemoryError("allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(blueprint, "with_adapters", full)
        job, _ = wait(service, service.scheduler.submit(asked(**SIZE, loras={"style": 1})))
        assert (job.status, job.error.code) == ("failed", "insufficient_memory")
        body = {"prompt": "a", "size": "32x32", "num_inference_steps": 2, "loras": {"ink": 1}}
        assert web.simulate_post("/v1/images/generations", json=body).status_code == 507
    assert pixels(service, loras={"style": 0})[0] == base


def test_adapters_merged_at_the_start_stay_and_others_come_beside(started, folder, tmp_path):  # noqa: F811
    """Merging adds in another order than a product beside the weights, so pixels may differ by a rounding."""
    model = ModelOptions(
        lora_path=(str(folder / "style.safetensors"),), lora_nickname=("base",), lora_merge_mode="merge"
    )
    plain, merged = (
        started(),
        server.build(model, ServeOptions(state_dir=str(tmp_path / "merged"), warmup_steps=0)),
    )
    merged.scheduler.start()
    try:
        web = testing.TestClient(make_app(merged), {"Host": "localhost"})
        first, said = pixels(merged)
        assert said == {"base": 1.0} and first != pixels(plain)[0]
        path = str(folder / "ink.safetensors")
        active = post(web, "set_lora", lora_nickname="ink", lora_path=path).json["active"]["transformer"]
        assert [(each["nickname"], each["merged"]) for each in active] == [("base", True), ("ink", False)]
        assert pixels(merged)[1] == {"base": 1.0, "ink": 1.0}
        post(web, "unmerge_lora_weights")
        assert pixels(merged) == (first, {"base": 1.0})
        with pytest.raises(UserError, match="'base' is merged into the weights"):
            merged.adapters.strengths({"base": 0.5})
    finally:
        merged.scheduler.stop(0.0)


def test_of_more_than_the_most_the_one_used_least_recently_leaves(plan, folder, monkeypatch):
    monkeypatch.setattr(adapters, "MOST", 2)
    made = adapters.Adapters(plan)
    for name in ("a", "b", "c"):
        made.add(name, str(folder / "style.safetensors"))
        made.strengths({name: 1.0})
    assert [each.chosen.name for each in made.now()] == ["b", "c"]
    made.activate({"b": 1.0})
    made.add("d", str(folder / "ink.safetensors"))
    assert {each.chosen.name for each in made.now()} == {"b", "d"}


def test_a_directory_that_is_none_is_refused_at_the_start(tmp_path):
    options = ServeOptions(state_dir=str(tmp_path), lora_dir=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"lora_dir: '.*none' is not a directory"):
        server.build(ModelOptions(), options)
