"""The official Python client, and others, against `tinydiff serve` as users start it: a process of its own,
with the shipped model.
"""

import asyncio
import base64
import io
import json
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
import requests
from PIL import Image

from tests.serve.processes import serving, wait
from tinydiff.runtime.pipeline import FEATHER

pytestmark = pytest.mark.slow

FIRST, SECOND, ADMIN = "key-of-the-first", "key-of-the-second", "key-of-the-admin"
RED, BLUE = (216, 26, 36), (35, 84, 224)
"""Of what the model makes when it is told so."""
CIRCLE = {"model": "tinydiff/shapes", "prompt": "a large red circle"}
SHORT = {"num_inference_steps": 4}
LONG = {"num_inference_steps": 1000}
"""A minute on a fast machine; every test that asks for it has it cancelled."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    keys = ("--api-key", FIRST, "--api-key", SECOND, "--admin-api-key", ADMIN)
    with serving(tmp_path_factory.mktemp("server"), *keys, "--log-format", "json") as one:
        yield one.wait_ready()


def client_of(server, key=FIRST, kind=openai.OpenAI, **options):
    return kind(base_url=f"{server.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 60, **options})


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as one:
        yield one


@pytest.fixture(autouse=True)
def nothing_left(server):
    """No test leaves the device a job."""
    yield
    wait(lambda: busy(server) == (0, 0))


def ask(server, method, path, key=FIRST, **more):
    return requests.request(
        method, server.url + path, headers={"Authorization": f"Bearer {key}"}, timeout=60, **more
    )


def busy(server):
    """(jobs that run, jobs that wait)."""
    figures = ask(server, "GET", "/server_info").json()["figures"]
    return figures["running"], figures["queued"]


def log(server, id):
    """The lines of the log about requests of this id."""
    lines = [json.loads(line) for line in server.said().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("request") == id]


def pixels(picture):
    """int [H, W, 3] of a file's bytes or their base64."""
    data = base64.b64decode(picture) if isinstance(picture, str) else picture
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def made(answer):
    return [pixels(entry.b64_json) for entry in answer.data]


def middle(picture):
    """The colour in the middle."""
    height, width = picture.shape[:2]
    return np.median(
        picture[height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4].reshape(-1, 3), axis=0
    )


def near(colour, other, levels=40):
    return np.abs(np.asarray(colour) - np.asarray(other)).max() <= levels


# --- images ---


@pytest.mark.parametrize(("prompt", "colour"), [("a large red circle", RED), ("a small blue square", BLUE)])
def test_an_image_shows_what_was_asked_for(client, prompt, colour):
    answer = client.images.generate(model="tinydiff/shapes", prompt=prompt, extra_body={"seed": 1, **SHORT})
    [picture] = made(answer)
    assert picture.shape == (128, 128, 3) and near(middle(picture), colour)
    assert (answer.size, answer.output_format, answer.quality, answer.background) == (
        "128x128",
        "png",
        "auto",
        "auto",
    )
    assert answer.usage.output_tokens == 64 and answer.usage.total_tokens == 64 + answer.usage.input_tokens


def test_the_answer_repeats_what_was_made_and_its_seed_makes_it_again(client):
    first = client.images.generate(**CIRCLE, size="64x96", extra_body={**SHORT, "guidance_scale": 3.0})
    said = first.parameters
    assert (said["prompt"], said["width"], said["height"]) == (CIRCLE["prompt"], 64, 96)
    assert (
        said["num_inference_steps"],
        said["guidance_scale"],
        first.computed_steps,
        first.skipped_steps,
    ) == (4, 3.0, 4, 0)
    assert (
        first.timings.keys() == {"queue", "encode", "denoise", "decode", "save"}
        and first.timings["denoise"] > 0
    )
    again = client.images.generate(
        **CIRCLE, size="64x96", extra_body={**SHORT, "guidance_scale": 3.0, "seed": first.seed}
    )
    assert again.data[0].b64_json == first.data[0].b64_json and again.id != first.id
    other = client.images.generate(
        **CIRCLE, size="64x96", extra_body={**SHORT, "guidance_scale": 3.0, "seed": first.seed + 1}
    )
    assert other.data[0].b64_json != first.data[0].b64_json


def test_several_images_have_seeds_in_a_row_and_are_what_each_is_alone(client):
    answer = client.images.generate(**CIRCLE, n=2, extra_body={"seed": 41, **SHORT})
    assert answer.seeds == [entry.seed for entry in answer.data] == [41, 42]
    for picture, seed in zip(made(answer), answer.seeds, strict=True):
        alone = client.images.generate(**CIRCLE, extra_body={"seed": seed, **SHORT})
        assert np.abs(picture - made(alone)[0]).max() <= 2


def test_a_url_is_for_anyone_who_has_it_and_for_nobody_who_guesses(client):
    asked = {"seed": 3, **SHORT}
    [entry] = client.images.generate(**CIRCLE, response_format="url", extra_body=asked).data
    assert entry.b64_json is None
    found = requests.get(entry.url, timeout=30)
    assert found.headers["content-type"] == "image/png"
    assert (pixels(found.content) == made(client.images.generate(**CIRCLE, extra_body=asked))[0]).all()
    assert (
        requests.get(entry.url[:-1] + ("0" if entry.url[-1] != "0" else "1"), timeout=30).status_code == 403
    )


@pytest.mark.parametrize(("format", "kind"), [("webp", "WEBP"), ("jpeg", "JPEG")])
def test_other_formats(client, format, kind):
    answer = client.images.generate(
        **CIRCLE, output_format=format, output_compression=90, extra_body={"seed": 1, **SHORT}
    )
    assert Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).format == kind
    assert answer.output_format == format and near(middle(made(answer)[0]), RED)


def test_a_stream_shows_the_image_on_its_way(client):
    asked = {
        "model": "tinydiff/shapes",
        "prompt": "a small blue square",
        "extra_body": {"seed": 1, "num_inference_steps": 12},
    }
    events = list(client.images.generate(**asked, stream=True, partial_images=3))
    assert [event.type.split(".")[1] for event in events] == ["partial_image"] * 3 + ["completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    *previews, last = [pixels(event.b64_json) for event in events]
    assert {preview.shape for preview in previews} == {last.shape}
    assert near(middle(last), BLUE) and near(middle(previews[-1]), BLUE, 50)
    assert np.abs(previews[-1] - last).mean() < 25
    assert (last == made(client.images.generate(**asked))[0]).all() and events[-1].usage.output_tokens == 64


def test_a_stream_of_two_images_tells_of_each(client):
    events = list(client.images.generate(**CIRCLE, n=2, stream=True, extra_body={"seed": 7, **SHORT}))
    assert [(event.type, event.seed) for event in events] == [
        ("image_generation.completed", 7),
        ("image_generation.completed", 8),
    ]


def test_many_at_once_from_the_async_client(server):
    async def ask():
        async with client_of(server, kind=openai.AsyncOpenAI) as client:
            sizes = ["128x128", "64x96", "96x64"] * 3
            calls = [
                client.images.generate(
                    **CIRCLE, size=size, extra_body={"seed": seed, "num_inference_steps": 3 + seed % 3}
                )
                for seed, size in enumerate(sizes)
            ]
            answers = await asyncio.gather(*calls)
            stream = await client.images.generate(
                **CIRCLE, stream=True, partial_images=1, extra_body={"num_inference_steps": 6}
            )
            events = [event.type async for event in stream]
            with pytest.raises(openai.BadRequestError) as caught:
                await client.images.generate(**CIRCLE, size="100x100")
            return (
                answers,
                sizes,
                events,
                caught.value.param,
                [model.id async for model in client.models.list()],
            )

    answers, sizes, events, param, models = asyncio.run(ask())
    assert [(answer.seed, answer.size) for answer in answers] == list(enumerate(sizes))
    assert all(picture.shape == (*map(int, size.split("x")[::-1]), 3) for answer, size in zip(answers, sizes,
    strict=True)
               for picture in made(answer))  # fmt: skip
    assert events == ["image_generation.partial_image", "image_generation.completed"]
    assert (param, models) == ("size", ["tinydiff/shapes"])


# --- edits ---


@pytest.fixture(scope="module")
def given(client):
    """An image of the model's own: a large red circle."""
    return base64.b64decode(client.images.generate(**CIRCLE, extra_body={"seed": 1}).data[0].b64_json)


def mask_of(width, height, rows, form="L"):
    """A mask whose given rows are inpainted: white there, or as OpenAI has it, transparent."""
    painted = np.zeros((height, width), np.uint8)
    painted[rows] = 255
    out = io.BytesIO()
    mask = Image.fromarray(painted) if form == "L" else Image.merge("RGBA", [Image.new("L", (width,
    height))] * 3 + [
        Image.fromarray(255 - painted)])  # fmt: skip
    mask.save(out, "PNG")
    return out.getvalue()


def test_strength_says_how_much_of_the_input_image_is_left(client, given):
    asked = {"prompt": "a large blue circle", "size": "128x128"}
    weak, strong = (
        client.images.edit(image=given, **asked, extra_body={"seed": 0, "strength": strength})
        for strength in (0.2, 1.0)
    )
    assert weak.parameters["strength"] == 0.2 and weak.computed_steps == 6 and strong.computed_steps == 30
    assert np.abs(made(weak)[0] - pixels(given)).mean() < 5
    of_text_alone = client.images.generate(model="tinydiff/shapes", **asked, extra_body={"seed": 0})
    assert np.abs(made(strong)[0] - made(of_text_alone)[0]).max() <= 2 and near(middle(made(strong)[0]), BLUE)


@pytest.mark.parametrize("form", ["L", "RGBA"])
def test_a_mask_is_inpainted_and_nothing_else_is_touched(client, given, form):
    mask = mask_of(128, 128, slice(64, 128), form)
    [edited] = made(
        client.images.edit(image=given, mask=mask, prompt="a large blue circle", extra_body={"seed": 2})
    )
    kept, changed = 64 - 2 * FEATHER, np.abs(edited - pixels(given)).max(axis=-1)
    assert (changed[:kept] == 0).all() and changed[64:].mean() > 20


def test_a_stream_of_an_edit(client, given):
    asked = {"image": given, "prompt": "a large blue circle", "stream": True, "partial_images": 1}
    events = list(
        client.images.edit(**asked, extra_body={"seed": 2, "num_inference_steps": 10, "strength": 1.0})
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_several_images_are_more_than_the_model_takes(client, given):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=[given, given], prompt="both")
    assert (
        caught.value.param == "image"
        and "2 images are given" in str(caught.value)
        and "takes" in str(caught.value)
    )


# --- mistakes ---


def test_models(client):
    [model] = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("tinydiff/shapes", "model", "tinydiff")
    assert client.models.retrieve("tinydiff/shapes").created == model.created
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("tinydiff/shape")
    assert caught.value.code == "model_not_found" and "tinydiff/shapes" in str(caught.value)


@pytest.mark.parametrize(
    ("more", "error", "code", "param", "said"),
    [
        ({"model": "gpt-image-1"}, openai.NotFoundError, "model_not_found", "model",
        "serves 'tinydiff/shapes'"),
        ({"extra_body": {"guidance_scal": 3}}, openai.BadRequestError, "unknown_parameter", "guidance_scal",
        "guidance_scale"),
        ({"extra_body": {"seed": "one"}}, openai.BadRequestError, "invalid_value", "seed", "an integer"),
        ({"extra_body": {"guidance_scale": -1}}, openai.BadRequestError, "invalid_value", "guidance_scale",
        "-1"),
        ({"size": "100x128"}, openai.BadRequestError, "invalid_value", "size", "96 and 112"),
        ({"n": 11}, openai.BadRequestError, "invalid_value", "n", "11 outputs are more than the 10"),
        ({"extra_body": {"prompt": None}}, openai.BadRequestError, "invalid_value", "prompt", "is missing"),
        ({"background": "transparent"}, openai.BadRequestError, "invalid_value", "background", "opaque"),
        ({"style": "vivid"}, openai.BadRequestError, "invalid_value", "style", "in the prompt"),
        ({"extra_body": {"priority": 5}}, openai.PermissionDeniedError, "admin_required", "priority",
        "admin key"),
    ],
)  # fmt: skip
def test_a_mistake_names_its_field_and_what_is_allowed(client, more, error, code, param, said):
    with pytest.raises(error) as caught:
        client.images.generate(**{**CIRCLE, **more})
    assert (caught.value.code, caught.value.param) == (code, param) and said in str(caught.value)
    assert caught.value.request_id.startswith("req_")


# --- clients that go, come again, or have had enough ---


@pytest.mark.parametrize("stream", [False, True], ids=["at once", "stream"])
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_client_that_goes_frees_the_device(server, stream, reset):
    place, id = urlsplit(server.url), f"goes-{stream}-{reset}"
    body = json.dumps({**CIRCLE, **LONG, "stream": stream}).encode()
    head = [
        f"Host: {place.netloc}",
        f"Authorization: Bearer {FIRST}",
        f"X-Request-ID: {id}",
        "Content-Type: application/json",
    ]
    lines = "\r\n".join(
        ["POST /v1/images/generations HTTP/1.1", *head, f"Content-Length: {len(body)}", "", ""]
    )
    with socket.create_connection((place.hostname, place.port)) as line:
        line.sendall(lines.encode() + body)
        wait(lambda: busy(server) == (1, 0))
        if reset:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait(lambda: busy(server) == (0, 0))
    [told] = wait(lambda: log(server, id))
    assert told["error"] == "client_gone"
    job = ask(server, "GET", f"/v1/images/{told['job']}").json()
    assert (job["status"], job["error"]["code"], job["data"]) == ("failed", "cancelled", [])


def test_an_image_is_cancelled_by_its_id_and_its_client_told(client, server):
    stream = client.images.generate(**CIRCLE, stream=True, extra_body={"progress": True, **LONG})
    id = next(event for event in stream if event.type == "image_generation.progress" and event.step > 0).id
    assert ask(server, "DELETE", f"/v1/images/{id}").json() == {
        "id": id,
        "deleted": True,
        "object": "image.deleted",
    }
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "cancelled"


def test_a_key_joins_the_request_that_already_runs(server, client):
    asked = {
        **CIRCLE,
        "extra_body": {"num_inference_steps": 100},
        "extra_headers": {"Idempotency-Key": "once"},
    }
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.images.generate, **asked)
        wait(lambda: sum(busy(server)) == 1)
        second = pool.submit(client.images.generate, **asked)
        with pytest.raises(openai.ConflictError) as caught:
            client.images.generate(**{**asked, "n": 2})
    assert caught.value.code == "idempotency_key_reused"
    assert first.result().id == second.result().id
    assert first.result().data[0].b64_json == second.result().data[0].b64_json


def test_an_impatient_client_comes_again_to_the_same_image(server):
    asked = {
        **CIRCLE,
        "extra_body": {"num_inference_steps": 120},
        "extra_headers": {"X-Request-ID": "impatient"},
    }
    with client_of(server, timeout=0.5, max_retries=40) as client:
        answer = client.images.generate(**asked)
    wait(lambda: busy(server) == (0, 0))
    told = log(server, "impatient")
    accepted = [line for line in told if line["status"] != 429]  # four may wait for one request, no more
    assert len(told) > 1 and {line["job"] for line in accepted} == {answer.id}


# --- whose what is ---


def test_owners_do_not_see_each_others_jobs(server, client):
    video = client.videos.create(**CIRCLE, extra_body={"num_frames": 5, "num_inference_steps": 1})
    client.videos.poll(video.id)
    picture = client.images.generate(**CIRCLE, extra_body=SHORT)
    with client_of(server, SECOND) as other:
        assert video.id not in [one.id for one in other.videos.list()]
        calls = (
            other.videos.retrieve,
            other.videos.delete,
            other.videos.download_content,
            lambda id: other.videos.remix(id, prompt="x"),
        )
        for call in calls:
            with pytest.raises(openai.NotFoundError) as caught:
                call(video.id)
            assert caught.value.code == "not_found"
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", ""), ("POST", "/cancel")):
        assert ask(server, method, f"/v1/images/{picture.id}{path}", SECOND).status_code == 404
    assert ask(server, "GET", f"/v1/images/{picture.id}/content").content == base64.b64decode(
        picture.data[0].b64_json
    )
    assert video.id in [one.id for one in client.videos.list()]


@pytest.mark.parametrize(
    ("key", "said"),
    [("", (401, "invalid_api_key")), ("no", (401, "invalid_api_key")), (FIRST, (403, "admin_required"))],
)
def test_only_the_admin_changes_the_server(server, key, said):
    for path in ("/v1/sleep", "/release_memory_occupation", "/v1/wake", "/resume_memory_occupation"):
        answer = ask(server, "POST", path, key)
        assert (answer.status_code, answer.json()["error"]["code"]) == said


def test_a_wrong_key(server):
    with client_of(server, "wrong") as stranger, pytest.raises(openai.AuthenticationError) as caught:
        stranger.images.generate(**CIRCLE)
    assert caught.value.code == "invalid_api_key"
    assert requests.get(f"{server.url}/liveness", timeout=30).status_code == 200


def phase(server):
    return requests.get(f"{server.url}/ready", timeout=30).json()["phase"]


def test_sleep_and_wake(server, client):
    stream = client.images.generate(**CIRCLE, stream=True, extra_body={"progress": True, **LONG})
    next(iter(stream))
    refused = ask(server, "POST", "/v1/sleep", ADMIN)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "busy") and int(
        refused.headers["retry-after"]
    ) >= 1
    stream.close()
    wait(lambda: busy(server) == (0, 0))
    for waken in (
        lambda: ask(server, "POST", "/v1/wake", ADMIN),
        lambda: client.images.generate(**CIRCLE, extra_body=SHORT),
    ):
        assert ask(server, "POST", "/v1/sleep", ADMIN).json()["success"]
        wait(lambda: phase(server) == "asleep")
        waken()
        wait(lambda: phase(server) == "ready")


def test_the_log_has_a_line_for_each_request_and_no_key(server, client):
    answer = client.images.generate(**CIRCLE, extra_body=SHORT, extra_headers={"X-Request-ID": "logged"})
    assert answer._request_id == "logged"
    [line] = wait(lambda: log(server, "logged"))
    said = {name: line[name] for name in ("method", "route", "status", "job")}
    assert said == {"method": "POST", "route": "/v1/images/generations", "status": 200, "job": answer.id}
    assert line["seconds"] > 0 and len(line["owner"]) == 16
    assert not any(key in server.said() for key in (FIRST, SECOND, ADMIN))


def test_every_line_of_a_log_in_json_is_an_object(server):
    lines = [line for line in server.said().splitlines() if not line.startswith("tinydiff: ")]
    told = [json.loads(line) for line in lines]
    assert any(line.get("message", "").startswith("tinydiff/shapes was loaded") for line in told) and all(
        line["time"] for line in told
    )
