import base64
import io
import json
import threading

import numpy
import pytest
from falcon import testing
from PIL import Image

from tests.serve import fake
from tests.serve.fake import eventually, form, picture, service
from tinydiff.serve import images
from tinydiff.serve.app import make_app
from tinydiff.serve.jobs import Failure

START = {"images": (0, 1), "image_use": "start"}
REFERENCES = {"images": (1, 4), "image_use": "references"}
FORM = {"Content-Type": "multipart/form-data; boundary=B"}


@pytest.fixture
def build(tmp_path):
    made = []

    def found(row=None, **options):
        made.append(service(tmp_path / str(len(made)), row, **options))
        return made[-1], testing.TestClient(make_app(made[-1]), {"Host": "localhost"})

    yield found
    for each in made:
        each.scheduler.close()


@pytest.fixture
def both(build):
    """(service, client) of the shipped model."""
    return build()


def generate(client, headers=None, **fields):
    return client.simulate_post(
        "/v1/images/generations", json={"prompt": "a circle", "size": "64x48", **fields}, headers=headers
    )


def edit(client, *parts, path="/v1/images/edits"):
    return client.simulate_post(path, body=form(("prompt", "p"), *parts), headers=FORM)


def opened(b64):
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def events(answer):
    """(type, data) of a stream."""
    found = []
    for block in answer.text.strip().split("\n\n"):
        if not block.startswith(":"):
            [event, data] = block.split("\n")
            found.append((event.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


# --- generations ---


def test_the_answer_has_the_image_and_what_made_it(both):
    answer = generate(both[1], seed=5, user="me", num_inference_steps=4)
    assert answer.status_code == 200
    said = answer.json
    assert opened(said["data"][0]["b64_json"]).size == (64, 48)
    assert (said["size"], said["output_format"], said["quality"], said["background"], said["user"]) == (
        "64x48",
        "png",
        "auto",
        "auto",
        "me",
    )
    assert (said["seed"], said["seeds"], said["data"][0]["seed"]) == (5, [5], 5)
    assert said["usage"].keys() == {"input_tokens", "output_tokens", "total_tokens", "input_tokens_details"}
    assert said["timings"]["denoise"] > 0
    assert (said["computed_steps"], said["skipped_steps"]) == (3, 0)
    assert said["parameters"]["width"] == 64
    assert said["id"].startswith("img_") and isinstance(said["created"], int)


def test_several_images_have_seeds_of_their_own(both):
    said = generate(both[1], seed=5, n=3).json
    assert [entry["seed"] for entry in said["data"]] == [5, 6, 7]
    assert len({entry["b64_json"] for entry in said["data"]}) == 3


def test_without_a_size_it_is_the_models_and_the_answer_says_so(both):
    assert both[1].simulate_post("/v1/images/generations", json={"prompt": "p"}).json["size"] == "128x128"


@pytest.mark.parametrize(("format", "name"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_the_format_is_as_asked(both, format, name):
    assert opened(generate(both[1], output_format=format).json["data"][0]["b64_json"]).format == name


def test_a_url_serves_the_image(both):
    said = generate(both[1], response_format="url").json
    assert "b64_json" not in said["data"][0]
    answer = both[1].simulate_get(said["data"][0]["url"].removeprefix("http://localhost"))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert Image.open(io.BytesIO(answer.content)).size == (64, 48)


def test_urls_begin_with_the_public_one(build):
    said = generate(build(public_url="https://images.example/api/")[1], response_format="url").json
    assert said["data"][0]["url"].startswith("https://images.example/api/v1/files/")


@pytest.mark.parametrize("name", ["tinydiff/shapes", "mine", "", None])
def test_the_model_may_be_named(build, name):
    assert generate(build(served_model_name="mine")[1], model=name).status_code == 200


def test_another_model_is_not_found(both):
    answer = generate(both[1], model="gpt-image-2")
    assert answer.status_code == 404
    assert (answer.json["error"]["code"], answer.json["error"]["param"]) == ("model_not_found", "model")


def test_a_mistake_is_a_400_and_nothing_is_queued(both):
    answer = generate(both[1], guidance_scal=2)
    assert (answer.status_code, answer.json["error"]["code"], answer.json["error"]["param"]) == (
        400,
        "unknown_parameter",
        "guidance_scal",
    )
    assert both[0].scheduler.submitted == []


@pytest.mark.parametrize(
    "kind", ["application/x-www-form-urlencoded", "", ";", "application/json; charset=utf-16"]
)
def test_other_bodies_are_a_415(both, kind):
    answer = both[1].simulate_post(
        "/v1/images/generations", body='{"prompt": "p"}', headers={"Content-Type": kind}
    )
    assert (answer.status_code, answer.json["error"]["code"]) == (415, "unsupported_media_type")


def test_a_full_queue_and_a_stopping_server_are_reported(both):
    both[0].scheduler.busy = 7.0
    assert (generate(both[1]).status_code, generate(both[1]).headers["retry-after"]) == (429, "7")
    both[0].scheduler.stopping = True
    assert generate(both[1]).json["error"]["code"] == "stopping"


def test_a_failure_is_reported_to_who_waits(both):
    both[0].scheduler.fail = lambda job: Failure("insufficient_memory", "too large; 64x64 would fit")
    answer = generate(both[1])
    assert (answer.status_code, answer.headers["x-should-retry"]) == (507, "false")
    assert answer.json["error"] == {
        "message": "too large; 64x64 would fit", "type": "server_error", "param": None,
        "code": "insufficient_memory",
    }  # fmt: skip


def test_a_priority_above_nought_is_the_admins(build):
    made, client = build(api_key=("k",), admin_api_key="boss")
    assert generate(client, {"Authorization": "Bearer k"}, priority=1).status_code == 403
    assert generate(client, {"Authorization": "Bearer k"}, priority=-1).status_code == 200
    assert generate(client, {"Authorization": "Bearer boss"}, priority=5).status_code == 200
    assert [job.priority for job in made.scheduler.submitted] == [-1, 5]


# --- streams ---


def test_a_stream_has_partial_images_and_then_the_image(both):
    answer = generate(both[1], stream=True, partial_images=2, seed=3)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer)
    assert [kind for kind, _ in found] == ["image_generation.partial_image"] * 2 + [
        "image_generation.completed"
    ]
    assert [data["partial_image_index"] for _, data in found[:2]] == [0, 1]
    for kind, data in found:
        assert data["type"] == kind
        assert opened(data["b64_json"]).size == (64, 48)
        assert {"created_at", "size", "quality", "background", "output_format"} <= data.keys()
    assert found[-1][1]["usage"]["total_tokens"] == 0
    assert found[-1][1]["seed"] == 3


def test_a_stream_without_partial_images_is_one_event_for_each_image(both):
    found = events(generate(both[1], stream=True, n=2, seed=1))
    assert [(kind, data["seed"]) for kind, data in found] == [
        ("image_generation.completed", 1),
        ("image_generation.completed", 2),
    ]


def test_progress_is_reported_where_it_is_asked_for(both):
    both[0].scheduler.step_seconds = 0.02
    found = [
        data
        for kind, data in events(generate(both[1], stream=True, progress=True))
        if kind == "image_generation.progress"
    ]
    assert found[-1]["total"] == 3
    assert [data["step"] for data in found] == sorted(data["step"] for data in found)


def test_a_stream_that_fails_says_why(both):
    both[0].scheduler.fail = lambda job: Failure("server_error", "no luck")
    [(kind, data)] = events(generate(both[1], stream=True))
    assert (kind, data["error"]["code"], data["error"]["message"]) == ("error", "server_error", "no luck")


def test_a_mistake_in_a_stream_is_an_ordinary_400(both):
    assert generate(both[1], stream=True, size="7x7").status_code == 400


def test_silence_is_filled_with_comments(both, monkeypatch):
    monkeypatch.setattr(images, "CHECK_S", 0.01)
    monkeypatch.setattr(images, "KEEPALIVE_S", 0.02)
    both[0].scheduler.gate.clear()
    threading.Timer(0.2, both[0].scheduler.gate.set).start()
    assert ": keepalive\n\n" in generate(both[1], stream=True).text


def test_steps_that_are_not_reported_are_no_news(both, monkeypatch):
    monkeypatch.setattr(images, "KEEPALIVE_S", 0.02)
    both[0].scheduler.step_seconds = 0.03
    said = generate(both[1], stream=True).text
    assert said.startswith(": begun\n\n")
    assert ": keepalive\n\n" in said


# --- edits ---


def test_an_edit_starts_from_the_image(build):
    made, client = build(START)
    answer = edit(client, ("image", picture(64, 48)), ("strength", "0.5"), ("seed", "1"))
    assert answer.status_code == 200
    assert answer.json["size"] != "128x128"  # it has the image's aspect
    [job] = made.scheduler.submitted
    assert fake.admit(made, job).schedule.strength == 0.5


@pytest.mark.parametrize("name", ["image", "image[]"])
def test_several_images_are_references(build, name):
    made, client = build(REFERENCES)
    assert edit(client, (name, picture(colour="red")), (name, picture(64, 64, "blue"))).status_code == 200
    [job] = made.scheduler.submitted
    assert [image.shape[:2] for image in fake.admit(made, job).images.originals] == [(128, 128), (64, 64)]


def test_a_json_edit_names_images_by_data_and_by_file(build):
    made, client = build(REFERENCES)
    file = made.files.put(picture(64, 64), "image/png", "x")
    uri = "data:image/png;base64," + base64.b64encode(picture()).decode()
    said = {"prompt": "p", "images": [{"image_url": uri}, {"file_id": file}]}
    assert client.simulate_post("/v1/images/edits", json=said).status_code == 200
    assert len(made.scheduler.submitted[0].inputs["image_path"]) == 2


def test_the_file_of_another_job_is_copied(build):
    made, client = build(REFERENCES)
    file = made.files.put(picture(), "image/png", "x")
    client.simulate_post("/v1/images/edits", json={"prompt": "p", "image": {"file_id": file}})
    assert made.scheduler.submitted[0].inputs["image_path"] != (file,)


def half_clear():
    """An image whose left half has no alpha."""
    found = numpy.full((128, 128, 4), 255, numpy.uint8)
    found[:, :64, 3] = 0
    out = io.BytesIO()
    Image.fromarray(found).save(out, "PNG")
    return out.getvalue()


def half_white():
    found = numpy.zeros((128, 128), numpy.uint8)
    found[:, :64] = 255
    out = io.BytesIO()
    Image.fromarray(found).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("mask", [half_clear, half_white])
def test_a_mask_is_inpainted_where_it_is_transparent_or_white(build, mask):
    made, client = build(START)
    assert edit(client, ("image", picture()), ("mask", mask())).status_code == 200
    found = fake.admit(made, made.scheduler.submitted[0]).images.mask
    assert (found[:, :64] == 255).all() and (found[:, 64:] == 0).all()


@pytest.mark.parametrize(
    ("row", "parts", "param", "part"),
    [
        (START, [], "image", "is missing"),
        (REFERENCES, [], "image", "edits an image; give one with image"),
        (START, [("image", b"no image")], "image", "image: "),
        (START, [("image[]", picture()), ("image[]", picture())], "image", "takes at most 1"),
        (START, [("image", picture()), ("mask", picture(64, 64))], "mask", "both must be the same"),
        (REFERENCES, [("image", picture()), ("mask", picture())], "mask", "takes no mask"),
        (START, [("image", "/etc/passwd")], "image", "image: "),
        (START, [("image", "http://127.0.0.1/x.png")], "image", "image: "),
    ],
)
def test_what_cannot_be_edited_is_named_and_leaves_no_file(build, row, parts, param, part):
    made, client = build(row)
    answer = edit(client, *parts)
    assert (answer.status_code, answer.json["error"]["param"]) == (400, param), answer.json
    assert part in answer.json["error"]["message"]
    assert [path for path in made.files.folder.glob("*") if path.is_file()] == []


def test_a_file_that_is_not_there_is_a_404(build):
    answer = build(START)[1].simulate_post(
        "/v1/images/edits", json={"prompt": "p", "image": {"file_id": "../../etc/passwd"}}
    )
    assert (answer.status_code, answer.json["error"]["code"]) == (404, "not_found")


def test_an_edit_may_stream(build):
    found = events(edit(build(START)[1], ("image", picture()), ("stream", "true"), ("partial_images", "1")))
    assert [kind for kind, _ in found] == ["image_edit.partial_image", "image_edit.completed"]


# --- the jobs behind ---


def started(both):
    """A request that waits at the gate: (its thread, its answers, its job)."""
    made, client = both
    made.scheduler.gate.clear()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(generate(client)))
    thread.start()
    eventually(lambda: made.scheduler.submitted)
    return thread, answers, made.scheduler.submitted[0]


def test_a_job_can_be_looked_at_and_cancelled(both):
    thread, answers, job = started(both)
    said = both[1].simulate_get(f"/v1/images/{job.id}").json
    assert (said["id"], said["object"], said["prompt"], said["size"]) == (
        job.id,
        "image",
        "a circle",
        "64x48",
    )
    assert said["status"] in ("queued", "in_progress")
    assert (said["queue_position"], said["eta_s"], said["data"]) == (0, 1.5, [])
    assert both[1].simulate_get(f"/v1/images/{job.id}/content").json["error"]["code"] == "not_ready"
    assert both[1].simulate_post(f"/v1/images/{job.id}/cancel").status_code == 200
    thread.join(10)
    assert (
        answers[0].status_code,
        answers[0].json["error"]["code"],
        answers[0].headers["x-should-retry"],
    ) == (409, "cancelled", "false")
    assert both[1].simulate_get(f"/v1/images/{job.id}").json["error"]["code"] == "cancelled"


def test_delete_cancels_what_runs(both):
    thread, answers, job = started(both)
    assert both[1].simulate_delete(f"/v1/images/{job.id}").json == {
        "id": job.id,
        "deleted": True,
        "object": "image.deleted",
    }
    thread.join(10)
    assert answers[0].json["error"]["code"] == "cancelled"


def test_delete_removes_what_is_done_with_its_files(build):
    made, client = build(START)
    id = edit(client, ("image", picture())).json["id"]
    assert len(list(made.files.folder.glob("*"))) == 2
    client.simulate_delete(f"/v1/images/{id}")
    assert client.simulate_get(f"/v1/images/{id}").status_code == 404
    assert list(made.files.folder.glob("*")) == []


def test_content_is_the_image_of_a_variant(both):
    id = generate(both[1], n=2, seed=1).json["id"]
    found = [both[1].simulate_get(f"/v1/images/{id}/content", params={"variant": k}).content for k in "01"]
    assert found[0] == both[1].simulate_get(f"/v1/images/{id}/content").content != found[1]
    answer = both[1].simulate_get(f"/v1/images/{id}/content", params={"variant": "2"})
    assert (answer.status_code, answer.json["error"]["param"]) == (400, "variant")
    for wrong in ({"variant": "0000000005"}, {"varaint": "1"}):
        answer = both[1].simulate_get(f"/v1/images/{id}/content", params=wrong)
        assert (answer.status_code, answer.json["error"]["param"]) == (400, next(iter(wrong)))


def test_content_comes_in_small(both):
    id = generate(both[1], size="1024x64", seed=1).json["id"]
    answer = both[1].simulate_get(f"/v1/images/{id}/content", params={"thumbnail": "true"})
    small, whole = (
        Image.open(io.BytesIO(data))
        for data in (answer.content, both[1].simulate_get(f"/v1/images/{id}/content").content)
    )
    assert (small.format, small.size, whole.size) == ("WEBP", (512, 32), (1024, 64)) and answer.headers[
        "content-type"
    ] == "image/webp"
    assert (
        numpy.abs(numpy.asarray(small.convert("RGB"))[0, 0].astype(int) - numpy.asarray(whole)[0, 0]).max()
        < 8
    )
    answer = both[1].simulate_get(f"/v1/images/{id}/content", params={"thumbnail": "1"})
    assert (
        answer.status_code == 400
        and answer.json["error"]["message"] == "thumbnail: '1' must be true or false"
    )


def test_anothers_job_is_not_there(build):
    client = build(api_key=("a", "b"))[1]
    id = generate(client, {"Authorization": "Bearer a"}).json["id"]
    for path in (f"/v1/images/{id}", f"/v1/images/{id}/content"):
        assert client.simulate_get(path, headers={"Authorization": "Bearer a"}).status_code == 200
        assert client.simulate_get(path, headers={"Authorization": "Bearer b"}).status_code == 404
    assert (
        client.simulate_delete(f"/v1/images/{id}", headers={"Authorization": "Bearer b"}).status_code == 404
    )
    assert client.simulate_get("/v1/images/../jobs").status_code == 404
