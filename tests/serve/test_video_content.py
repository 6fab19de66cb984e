"""What can be downloaded of a video, and where."""

import io
from dataclasses import replace

import falcon.testing
import pytest
from PIL import Image

from tests.serve import fake
from tests.serve.clips import create, error, finished, until
from tinydiff.serve.app import make_app
from tinydiff.serve.jobs import Failure


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


@pytest.mark.parametrize(
    ("variant", "media_type"),
    [("video", "video/mp4"), ("thumbnail", "image/webp"), ("spritesheet", "image/webp")],
)
def test_content(client, variant, media_type):
    answer = client.simulate_get(f"/v1/videos/{finished(client)['id']}/content", params={"variant": variant})
    assert (answer.status_code, answer.headers["content-type"]) == (200, media_type)
    assert (
        answer.content[4:8] == b"ftyp"
        if variant == "video"
        else Image.open(io.BytesIO(answer.content)).format == "WEBP"
    )


def test_content_is_the_video_by_default_and_has_ranges_and_head(client):
    address = f"/v1/videos/{finished(client)['id']}/content"
    whole = client.simulate_get(address)
    assert whole.content == client.simulate_get(address, params={"variant": "video"}).content
    part = client.simulate_get(address, headers={"Range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")
    assert client.simulate_head(address).headers["content-length"] == str(len(whole.content))
    assert client.simulate_get(address, headers={"Range": f"bytes={len(whole.content)}-"}).status_code == 416
    assert client.simulate_get(address, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304


def test_content_of_several_videos(client):
    answer = finished(client, n=2, seed=5)
    assert ([output["seed"] for output in answer["outputs"]], answer["seeds"]) == ([5, 6], [5, 6])
    address = f"/v1/videos/{answer['id']}/content"
    clips = [client.simulate_get(address, params={"index": str(index)}).content for index in (0, 1)]
    assert [len(clip) for clip in clips] == [output["bytes"] for output in answer["outputs"]] and clips[
        0
    ] != clips[1]
    stills = [
        client.simulate_get(address, params={"variant": "thumbnail", "index": str(index)}).content
        for index in (0, 1)
    ]
    assert stills[0] != stills[1]
    for index in ("2", "-1", "x", "", "١"):
        assert error(client.simulate_get(address, params={"index": index})) == (400, "invalid_value", "index")


def test_content_of_what_is_not_done_says_so(client, held):
    id = create(client)["id"]
    answer = client.simulate_get(f"/v1/videos/{id}/content")
    assert error(answer) == (404, "not_ready", None) and "%" in answer.json["error"]["message"]
    assert answer.headers["openai-poll-after-ms"] == "200"


def test_content_of_a_failed_video_says_why(made, client):
    made.scheduler.fail = lambda job: Failure("insufficient_memory", "it does not fit")
    id = until(client, create(client)["id"], "failed")["id"]
    answer = client.simulate_get(f"/v1/videos/{id}/content")
    assert (
        error(answer)[:2] == (404, "insufficient_memory")
        and "it does not fit" in answer.json["error"]["message"]
    )


@pytest.mark.parametrize(
    ("params", "code", "param"),
    [({"variant": "thumb"}, "invalid_value", "variant"), ({"varient": "video"}, "unknown_parameter",
    "varient"),
     ({"variant": ["video", "thumbnail"]}, "invalid_value", "variant")],
)  # fmt: skip
def test_a_wrong_query_of_content(client, params, code, param):
    answer = client.simulate_get(
        f"/v1/videos/{finished(client)['id']}/content", params=params, params_csv=False
    )
    assert error(answer) == (400, code, param)


def test_content_that_was_uploaded_is_found_there(made, client):
    id, there = finished(client)["id"], "https://bucket.example/clip.mp4"
    [clip, *small] = made.store.get(id).outputs
    made.files.moved(clip.file, there)
    made.store.update_outputs(id, (replace(clip, url=there), *small))
    for answer in (
        client.simulate_get(f"/v1/videos/{id}/content"),
        client.simulate_get(f"/v1/files/{clip.file}/content"),
    ):
        assert (answer.status_code, answer.headers["location"]) == (302, there)
    assert client.simulate_get(f"/v1/videos/{id}").json["outputs"][0]["url"] == there
    assert client.simulate_get(f"/v1/videos/{id}/content", params={"variant": "thumbnail"}).status_code == 200


def test_what_went_wrong_in_uploading_is_reported(made, client):
    id = finished(client)["id"]
    [clip, *small] = made.store.get(id).outputs
    made.store.update_outputs(id, (replace(clip, warning="the bucket said no"), *small))
    assert client.simulate_get(f"/v1/videos/{id}").json["outputs"][0]["warning"] == "the bucket said no"
    assert client.simulate_get(f"/v1/videos/{id}/content").status_code == 200


def test_content_whose_file_is_gone(made, client):
    answer = finished(client)
    for output in made.store.get(answer["id"]).outputs:
        made.files.delete(output.file)
    assert error(client.simulate_get(f"/v1/videos/{answer['id']}/content"))[:2] == (404, "file_expired")


def test_a_file_is_its_own_key_s_alone_whether_it_is_read_or_given(tmp_path):
    """Its id is no secret: another key that knows it learns no more than of an id that never was."""
    made = fake.service(
        tmp_path,
        api_key=("mine", "theirs"),
        admin_api_key="boss",
        row={"images": (0, 4), "image_use": "references"},
    )
    app = make_app(made)
    try:
        mine, theirs, admin = (
            falcon.testing.TestClient(app, {"Host": "localhost", "Authorization": f"Bearer {key}"})
            for key in ("mine", "theirs", "boss")
        )
        id = mine.simulate_post("/v1/images/generations", json={"prompt": "p", "size": "64x64"}).json["id"]
        [output] = made.store.get(id).outputs
        never = output.file[::-1][4:] + ".png"
        path = f"/v1/files/{output.file}/content"
        assert mine.simulate_get(path).content == made.files.path(output.file).read_bytes()
        for other in (theirs, admin):
            answers = [other.simulate_get(where) for where in (path, f"/v1/files/{never}/content")]
            assert [error(answer) for answer in answers] == [(404, "file_expired", None)] * 2
        edit = {"prompt": "p", "image": {"file_id": output.file}}
        assert error(theirs.simulate_post("/v1/images/edits", json=edit)) == (404, "not_found", "image")
        assert mine.simulate_post("/v1/images/edits", json=edit).status_code == 200
        given = made.scheduler.submitted[-1].inputs["image_path"][0]
        assert mine.simulate_get(f"/v1/files/{given}/content").status_code == 200
        assert theirs.simulate_get(f"/v1/files/{given}/content").status_code == 404
    finally:
        made.scheduler.close()


def test_an_output_s_url_works_without_a_key(tmp_path):
    made = fake.service(tmp_path, api_key=("k",))
    app = make_app(made)
    try:
        client, stranger = (
            falcon.testing.TestClient(app, {"Host": "localhost", **key})
            for key in ({"Authorization": "Bearer k"}, {})
        )
        answer = finished(client)
        [output] = answer["outputs"]
        path, query = output["url"].removeprefix("http://localhost").split("?")
        whole = stranger.simulate_get(path, query_string=query)
        assert (whole.status_code, len(whole.content), whole.headers["content-type"]) == (
            200,
            output["bytes"],
            "video/mp4",
        )
        assert (
            stranger.simulate_get(path, query_string=query, headers={"Range": "bytes=4-7"}).content == b"ftyp"
        )
        assert error(stranger.simulate_get(path, query_string=query[:-1]))[:2] == (403, "bad_signature")
        assert error(stranger.simulate_get(path, query_string=query.replace("expires=", "expires=9")))[
            :2
        ] == (403, "bad_signature")
        assert error(stranger.simulate_get(path))[:2] == (401, "invalid_api_key")
        assert client.simulate_get(path).content == whole.content
        assert error(client.simulate_get("/v1/files/nothing/content"))[:2] == (404, "file_expired")
    finally:
        made.scheduler.close()


def test_urls_are_those_that_clients_reach(tmp_path):
    made = fake.service(tmp_path, public_url="https://images.example/")
    try:
        [output] = finished(falcon.testing.TestClient(make_app(made), {"Host": "localhost"}))["outputs"]
        assert output["url"].startswith("https://images.example/v1/files/")
    finally:
        made.scheduler.close()
