"""Videos over HTTP: the life of a job, what a client sees of it, what is refused."""

import json
import time

import falcon.testing
import pytest
from PIL import Image

from tests.serve import fake
from tests.serve.clips import PARTS, PICTURE, SMALL, URI, create, error, finished, form, kept, until
from tinydiff.serve.app import make_app
from tinydiff.serve.jobs import Failure, Job, new_id
from tinydiff.serve.service import QueuePlace

OPENAI = {
    "id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at", "prompt",
    "size", "seconds",
    "remixed_from_video_id", "error",
}  # fmt: skip
OURS = {
    "parameters",
    "seeds",
    "timings",
    "computed_steps",
    "skipped_steps",
    "queue_position",
    "eta_s",
    "outputs",
    "warnings",
}


@pytest.fixture
def made(tmp_path):
    service = fake.service(tmp_path)
    yield service
    service.scheduler.close()


@pytest.fixture
def client(made):
    return falcon.testing.TestClient(make_app(made), {"Host": "localhost"})


@pytest.fixture
def held(made):
    """Jobs wait until the test says `held.set()`."""
    made.scheduler.gate.clear()
    return made.scheduler.gate


# --- create and retrieve ---


def test_a_new_video_has_all_of_openais_keys_and_ours(client, held):
    answer = create(client)
    assert set(answer) == OPENAI | OURS
    assert (answer["object"], answer["model"], answer["prompt"]) == (
        "video",
        "tinydiff/shapes",
        "a red circle",
    )
    assert answer["status"] in ("queued", "in_progress")
    assert [
        answer[name] for name in ("completed_at", "expires_at", "remixed_from_video_id", "error", "timings")
    ] == [None] * 5


def test_size_and_seconds_are_the_effective_ones(client, held):
    """8 frames a second and 4 k + 1 frames: the nearest to 1.3 s is 9 of them."""
    answer = create(client, seconds="1.3")
    assert (answer["size"], answer["seconds"], answer["parameters"]["num_frames"]) == ("64x48", "1.125", 9)
    default = client.simulate_post("/v1/videos", json={"prompt": "a red circle"}).json
    assert (default["size"], default["seconds"]) == ("128x128", "2.125")


def test_a_completed_video_says_what_was_made(client):
    answer = finished(client, seed=11)
    assert (answer["progress"], answer["seeds"], answer["error"]) == (100, [11], None)
    assert answer["parameters"]["height"] == 48
    assert (answer["computed_steps"], answer["skipped_steps"], answer["queue_position"], answer["eta_s"]) == (
        3,
        0,
        None,
        None,
    )
    assert answer["timings"]["denoise"] > 0
    assert 0 <= answer["completed_at"] - answer["created_at"] < 60
    assert 86390 < answer["expires_at"] - answer["completed_at"] < 86410
    assert all(isinstance(answer[name], int) for name in ("created_at", "completed_at", "expires_at"))


def test_a_waiting_video_says_where_it_stands_and_when_to_ask(made, client, held):
    made.scheduler.place = lambda job: QueuePlace(4, 12.5)
    made.scheduler.poll_after_ms = lambda job: 3456
    answer = client.simulate_post("/v1/videos", json=SMALL)
    assert (answer.json["queue_position"], answer.json["eta_s"], answer.headers["openai-poll-after-ms"]) == (
        4,
        12.5,
        "3456",
    )
    assert client.simulate_get(f"/v1/videos/{answer.json['id']}").headers["openai-poll-after-ms"] == "3456"


def test_a_video_that_is_done_is_not_asked_again(client):
    assert "openai-poll-after-ms" not in client.simulate_get(f"/v1/videos/{finished(client)['id']}").headers


def test_a_failed_video_says_why(made, client):
    made.scheduler.fail = lambda job: Failure("insufficient_memory", "it does not fit")
    answer = until(client, create(client)["id"], "failed")
    assert answer["error"] == {"code": "insufficient_memory", "message": "it does not fit"}
    assert answer["outputs"] == []


def test_an_unknown_video_is_not_there(client):
    for method, tail in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("POST", "/cancel")):
        assert error(client.simulate_request(method, f"/v1/videos/video_nothing{tail}"))[:2] == (
            404,
            "not_found",
        )


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"prompt": None}, "prompt"), ({"size": "64x50"}, "size"), ({"seconds": "x"}, "seconds"),
    ({"promt": "x"}, "promt"),
     ({"num_frames": 8, "seconds": None}, "num_frames"), ({"model": "sora-2"}, "model")],
)  # fmt: skip
def test_a_mistake_is_named_and_nothing_queued(made, client, fields, param):
    answer = client.simulate_post("/v1/videos", json={**SMALL, **fields})
    assert answer.status_code in (400, 404) and answer.json["error"]["param"] == param
    assert made.scheduler.submitted == []


def test_a_full_queue_says_when(made, client):
    made.scheduler.busy = 3.0
    answer = client.simulate_post("/v1/videos", json=SMALL)
    assert (answer.status_code, answer.headers["retry-after"], answer.json["error"]["code"]) == (
        429,
        "3",
        "queue_full",
    )


def test_a_repeated_key_is_the_same_video(client, held):
    headers = {"Idempotency-Key": "abc"}
    first, second = (
        client.simulate_post("/v1/videos", json=SMALL, headers=headers).json["id"] for _ in range(2)
    )
    assert first == second


# --- given images ---


@pytest.mark.parametrize(
    "request_",
    [
        form(*PARTS, ("input_reference", PICTURE, "upload")),
        form(*PARTS, ("input_reference", PICTURE, "lies.txt")),
        form(*PARTS, ("input_reference[image_url]", URI, None)),
        form(*PARTS, ("input_reference", URI, None)),
        {"json": {**SMALL, "input_reference": {"image_url": URI}}},
        {"json": {**SMALL, "input_reference": URI}},
        {"json": {**SMALL, "extra_body": {"input_reference": {"image_url": URI}}}},
    ],
    ids=["file", "misnamed", "form-object", "form-text", "object", "text", "extra_body"],
)
def test_a_first_frame_in_every_form(made, client, request_):
    answer = client.simulate_post("/v1/videos", **request_)
    assert answer.status_code == 200, answer.text
    [id] = made.store.get(answer.json["id"]).inputs["image_path"]
    assert Image.open(made.files.path(id)).size == (64, 48)


def test_a_form_without_a_file_is_enough(client):
    assert client.simulate_post("/v1/videos", **form(*PARTS)).json["size"] == "64x48"


def test_what_is_no_image_is_refused_and_not_kept(made, client):
    answer = client.simulate_post("/v1/videos", **form(*PARTS, ("input_reference", b"no image", "a.png")))
    assert (answer.status_code, answer.json["error"]["param"]) == (400, "input_reference")
    assert made.scheduler.submitted == [] and kept(made) == []


# --- list ---


def test_the_list_is_empty_at_first(client):
    assert client.simulate_get("/v1/videos").json == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }


def test_the_list_goes_by_pages_in_both_directions(client, held):
    ids = [create(client, prompt=f"{k}")["id"] for k in range(5)]
    for order, wanted in (("desc", ids[::-1]), ("asc", ids)):
        found, after, pages = [], None, 0
        while True:
            page = client.simulate_get(
                "/v1/videos", params={"limit": "2", "order": order, **({"after": after} if after else {})}
            ).json
            found, pages = found + [one["id"] for one in page["data"]], pages + 1
            assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
            if not page["has_more"]:
                break
            after = page["last_id"]
        assert (found, pages) == (wanted, 3)
    assert [one["id"] for one in client.simulate_get("/v1/videos").json["data"]] == ids[::-1], (
        "the newest first unless told"
    )


def test_the_list_has_no_images(made, client, held):
    made.store.add(Job(new_id("image"), "image", time.time(), fields={"prompt": "x"}))
    assert client.simulate_get("/v1/videos").json["data"] == []


@pytest.mark.parametrize(
    ("params", "code", "param"),
    [({"limit": "0"}, "invalid_value", "limit"), ({"limit": "101"}, "invalid_value", "limit"),
    ({"limit": "x"}, "invalid_value", "limit"),
     ({"order": "up"}, "invalid_value", "order"), ({"after": "video_x"}, "invalid_value", "after"),
     ({"limt": "1"}, "unknown_parameter", "limt")],
)  # fmt: skip
def test_a_wrong_query_of_the_list(client, params, code, param):
    assert error(client.simulate_get("/v1/videos", params=params)) == (400, code, param)


# --- keys ---


def test_another_key_neither_sees_nor_touches_a_video(tmp_path):
    made = fake.service(tmp_path, api_key=("mine", "theirs"))
    app = make_app(made)
    try:
        mine, theirs = (
            falcon.testing.TestClient(app, headers={"Authorization": f"Bearer {key}"})
            for key in ("mine", "theirs")
        )
        id = finished(mine)["id"]
        assert theirs.simulate_get("/v1/videos").json["data"] == []
        for method, tail, more in (("GET", "", {}), ("DELETE", "", {}), ("GET", "/content", {}), ("POST",
        "/cancel", {}),
                                   ("POST", "/remix", {"json": {"prompt": "x"}})):  # fmt: skip
            assert error(theirs.simulate_request(method, f"/v1/videos/{id}{tail}", **more))[:2] == (
                404,
                "not_found",
            )
        assert error(theirs.simulate_get("/v1/videos", params={"after": id}))[0] == 400
        assert [one["id"] for one in mine.simulate_get("/v1/videos").json["data"]] == [id]
    finally:
        made.scheduler.close()


def test_a_key_that_has_its_share_of_the_queue_leaves_room_for_another(tmp_path):
    made = fake.service(tmp_path, api_key=("mine", "theirs"), max_queue=4)
    made.scheduler.gate.clear()
    app = make_app(made)
    try:
        mine, theirs = (
            falcon.testing.TestClient(app, headers={"Authorization": f"Bearer {key}"})
            for key in ("mine", "theirs")
        )
        until(mine, create(mine)["id"], "in_progress")  # what runs does not wait
        answers = [mine.simulate_post("/v1/videos", json=SMALL) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert (
            "this API key has as many waiting jobs" in answers[2].json["error"]["message"]
            and "retry-after" in answers[2].headers
        )
        assert theirs.simulate_post("/v1/videos", json=SMALL).status_code == 200
    finally:
        made.scheduler.close()


# --- cancel and delete ---


def test_cancel_of_a_waiting_video(client, held):
    first, second = create(client)["id"], create(client)["id"]
    until(client, first, "in_progress")
    answer = client.simulate_post(f"/v1/videos/{second}/cancel")
    assert (answer.status_code, answer.json["status"], answer.json["error"]["code"]) == (
        200,
        "failed",
        "cancelled",
    )


def test_cancel_of_a_running_video(made, client):
    made.scheduler.steps, made.scheduler.step_seconds = 500, 0.02
    id = create(client)["id"]
    until(client, id, "in_progress")
    assert client.simulate_post(f"/v1/videos/{id}/cancel").status_code == 200
    assert until(client, id, "failed")["error"]["code"] == "cancelled"


def test_cancel_of_a_finished_video_leaves_it(client):
    id = finished(client)["id"]
    assert client.simulate_post(f"/v1/videos/{id}/cancel").json["status"] == "completed"


def test_delete_takes_the_video_and_its_files_and_once(made, client):
    id = client.simulate_post("/v1/videos", **form(*PARTS, ("input_reference", PICTURE, "upload"))).json["id"]
    until(client, id, "completed")
    assert len(kept(made)) == 4, "the given image, the video and its two small images"
    assert client.simulate_delete(f"/v1/videos/{id}").json == {
        "id": id,
        "deleted": True,
        "object": "video.deleted",
    }
    assert (kept(made), made.store.get(id)) == ([], None)
    assert error(client.simulate_delete(f"/v1/videos/{id}"))[:2] == (404, "not_found")


def test_delete_of_a_waiting_video(made, client, held):
    first, second = create(client)["id"], create(client)["id"]
    until(client, first, "in_progress")
    assert client.simulate_delete(f"/v1/videos/{second}").json["deleted"] is True
    held.set()
    until(client, first, "completed")
    assert made.store.get(second) is None


def test_delete_of_a_running_video_stops_it(made, client):
    made.scheduler.steps, made.scheduler.step_seconds = 500, 0.02
    id = create(client)["id"]
    until(client, id, "in_progress")
    assert client.simulate_delete(f"/v1/videos/{id}").json["deleted"] is True
    assert made.scheduler.done.get(id, 0) < made.scheduler.steps
    assert (made.store.get(id), kept(made)) == (None, [])
    made.scheduler.steps = 1
    finished(client)  # the device is free


# --- remix ---


def test_a_remix_is_the_same_but_for_the_prompt(client):
    source = finished(client, seed=9, num_inference_steps=7)
    answer = client.simulate_post(f"/v1/videos/{source['id']}/remix", json={"prompt": "a blue square"})
    assert answer.status_code == 200, answer.text
    remix = until(client, answer.json["id"], "completed")
    assert (remix["remixed_from_video_id"], remix["prompt"], remix["seeds"]) == (
        source["id"],
        "a blue square",
        [9],
    )
    assert [remix[name] for name in ("size", "seconds", "model")] == [
        source[name] for name in ("size", "seconds", "model")
    ]
    assert remix["id"] != source["id"] and remix["created_at"] >= source["created_at"]


def test_a_remix_keeps_a_seed_that_was_drawn(client):
    source = finished(client)
    remix = client.simulate_post(f"/v1/videos/{source['id']}/remix", json={"prompt": "another"}).json
    assert until(client, remix["id"], "completed")["seeds"] == source["seeds"]


def test_a_remix_with_another_seed(client, made):
    source = finished(client, seed=9, num_inference_steps=7)
    remix = client.simulate_post(
        f"/v1/videos/{source['id']}/remix", json={"prompt": "another", "seed": 4}
    ).json
    assert until(client, remix["id"], "completed")["seeds"] == [4]
    assert made.store.get(remix["id"]).fields["num_inference_steps"] == 7


def test_a_remix_outlives_what_it_was_made_from(made, client, held):
    source = client.simulate_post("/v1/videos", **form(*PARTS, ("input_reference", PICTURE, "upload"))).json[
        "id"
    ]
    remix = client.simulate_post(f"/v1/videos/{source}/remix", json={"prompt": "another"}).json["id"]
    client.simulate_post(f"/v1/videos/{source}/cancel")
    client.simulate_delete(f"/v1/videos/{source}")
    [id] = made.store.get(remix).inputs["image_path"]
    assert made.files.path(id).read_bytes() == PICTURE
    held.set()
    assert until(client, remix, "completed", "failed")["error"] is None


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [({}, "invalid_value", "prompt"), ({"prompt": None}, "invalid_value", "prompt"), ({"prompt": 3},
    "invalid_value", "prompt"),
     ({"prompt": "x", "size": "64x64"}, "unknown_parameter", "size"), ({"prompt": "x", "seed": "four"},
     "invalid_value", "seed")],
)  # fmt: skip
def test_a_wrong_remix(made, client, body, code, param):
    id = finished(client)["id"]
    assert error(client.simulate_post(f"/v1/videos/{id}/remix", json=body)) == (400, code, param)
    assert len(made.scheduler.submitted) == 1


def test_a_remix_that_the_queue_refuses_leaves_no_image_behind(made, client):
    source = client.simulate_post("/v1/videos", **form(*PARTS, ("input_reference", PICTURE, "upload"))).json[
        "id"
    ]
    until(client, source, "completed")
    before = kept(made)
    made.scheduler.busy = 1.0
    assert client.simulate_post(f"/v1/videos/{source}/remix", json={"prompt": "x"}).status_code == 429
    assert kept(made) == before


# --- what does not exist ---


@pytest.mark.parametrize(
    ("method", "address"),
    [("POST", "edits"), ("POST", "extensions"), ("POST", "characters"), ("GET", "characters/char_1")],
)
def test_what_openai_has_beyond_this_says_that_it_is_not_here(client, method, address):
    answer = client.simulate_request(method, f"/v1/videos/{address}", **form(*PARTS))
    assert (
        error(answer)[:2] == (404, "not_supported")
        and address.split("/")[0] in answer.json["error"]["message"]
    )
    assert answer.headers["x-should-retry"] == "false"


def test_answers_are_json_without_nan(client):
    json.loads(client.simulate_get(f"/v1/videos/{finished(client)['id']}").text, parse_constant=pytest.fail)
