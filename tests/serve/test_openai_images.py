"""The official Python client, sync and async, against a real server: every call that it has for images."""

import asyncio
import base64
import io
import threading
import urllib.request

import openai
import pytest
from PIL import Image

from tests.serve import fake
from tinydiff.serve import images
from tinydiff.serve.jobs import Failure

KEY = "open-sesame"
ROW = {"images": (0, 4), "image_use": "start"}
SMALL = {"prompt": "a circle", "model": "tinydiff/shapes", "size": "64x48"}


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CHECK_S", 0.05)
    return fake.service(tmp_path, ROW, api_key=(KEY,))


@pytest.fixture
def address(made):
    with fake.listening(made) as found:
        yield found


@pytest.fixture
def client(address):
    with openai.OpenAI(api_key=KEY, base_url=f"{address}/v1", timeout=30) as found:
        yield found


@pytest.fixture
def requests(client):
    """(retry count) of every request that the client sends."""
    found = []
    client._client.event_hooks["request"].append(
        lambda request: found.append(request.headers.get("x-stainless-retry-count"))
    )
    return found


def opened(b64):
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def file(colour="red", size=(64, 48)):
    return io.BytesIO(fake.picture(*size, colour))


def test_generate(client):
    answer = client.images.generate(**SMALL, n=2, extra_body={"seed": 5, "guidance_scale": 2.0})
    assert [opened(entry.b64_json).size for entry in answer.data] == [(64, 48)] * 2
    assert (answer.size, answer.output_format, answer.usage.total_tokens) == ("64x48", "png", 0)
    assert (answer.seeds, answer.data[1].seed) == ([5, 6], 6)
    assert answer.timings["denoise"] > 0
    assert answer._request_id.startswith("req_")


def test_every_field_of_the_client_at_a_value_that_can_be(client):
    answer = client.images.generate(
        **SMALL, background="opaque", moderation="low", n=1, output_compression=50, output_format="jpeg",
        partial_images=0, quality="low",
        response_format="b64_json", safety_identifier="s", stream=False, user="u",
    )  # fmt: skip
    assert opened(answer.data[0].b64_json).format == "JPEG"
    assert (answer.safety_identifier, answer.user, answer.quality) == ("s", "u", "low")


def test_the_url_of_an_image_is_for_anyone_who_has_it(client, address):
    url = client.images.generate(**SMALL, response_format="url").data[0].url
    assert url.startswith(address)
    with urllib.request.urlopen(url) as answer:
        assert answer.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(answer.read())).size == (64, 48)


def test_stream_of_partial_images(client):
    found = list(client.images.generate(**SMALL, stream=True, partial_images=2))
    assert [event.type for event in found] == ["image_generation.partial_image"] * 2 + [
        "image_generation.completed"
    ]
    assert [type(event).__name__ for event in found[1:]] == [
        "ImageGenPartialImageEvent",
        "ImageGenCompletedEvent",
    ]
    assert [event.partial_image_index for event in found[:2]] == [0, 1]
    assert all(opened(event.b64_json).size == (64, 48) for event in found)


def test_the_first_partial_image_comes_before_the_image_is_made(made, client):
    made.scheduler.step_seconds = 0.3
    with client.images.generate(**SMALL, stream=True, partial_images=1) as stream:
        assert next(iter(stream)).type == "image_generation.partial_image"
        assert made.store.get(made.scheduler.submitted[0].id).status == "in_progress"


def test_edit_of_one_image_in_each_form(client):
    for image in (file(), fake.picture(64, 48), ("a.png", fake.picture(64, 48), "image/png")):
        answer = client.images.edit(
            image=image, prompt="p", size="64x48", extra_body={"seed": 1, "strength": 0.5}
        )
        assert (opened(answer.data[0].b64_json).size, answer.seed) == ((64, 48), 1)


def test_edit_of_several_images(made, client):
    answer = client.images.edit(
        image=[file(), ("b.png", fake.picture(64, 48, "blue"), "image/png")], prompt="p", size="64x48", n=2
    )
    assert len(answer.data) == 2
    assert len(made.scheduler.submitted[0].inputs["image_path"]) == 2


def test_edit_with_a_mask(made, client):
    client.images.edit(image=file(), mask=file("white"), prompt="p", size="64x48")
    assert fake.admit(made, made.scheduler.submitted[0]).images.mask.all()


def test_stream_of_an_edit(client):
    found = list(client.images.edit(image=file(), prompt="p", size="64x48", stream=True, partial_images=1))
    assert [event.type for event in found] == ["image_edit.partial_image", "image_edit.completed"]


def test_an_unknown_adapter_is_reported_in_every_form_that_the_client_sends(client):
    for loras in ([{"name": "x", "scale": 0.5}], {"x": 1}):
        for call in (
            lambda **more: client.images.generate(**SMALL, **more),
            lambda **more: client.images.edit(image=file(), prompt="p", **more),
        ):
            with pytest.raises(openai.BadRequestError, match="'x' is no adapter of this model") as caught:
                call(extra_body={"loras": loras})
            assert caught.value.param == "loras"


@pytest.mark.parametrize(
    ("more", "error", "code", "param"),
    [
        ({"size": "100x100"}, openai.BadRequestError, "invalid_value", "size"),
        ({"n": 11}, openai.BadRequestError, "invalid_value", "n"),
        ({"model": "gpt-image-2"}, openai.NotFoundError, "model_not_found", "model"),
        ({"extra_body": {"guidance": 3}}, openai.BadRequestError, "unknown_parameter", "guidance"),
    ],
)
def test_a_mistake_is_the_clients_own_exception(client, requests, more, error, code, param):
    with pytest.raises(error) as caught:
        client.images.generate(**{**SMALL, **more})
    found = caught.value
    assert (found.code, found.param, found.type) == (code, param, "invalid_request_error")
    assert found.request_id.startswith("req_")
    assert len(requests) == 1


def test_a_wrong_key(address):
    with (
        openai.OpenAI(api_key="wrong", base_url=f"{address}/v1") as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.images.generate(**SMALL)
    assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize("code", ["insufficient_memory", "server_error", "cancelled"])
def test_what_would_fail_again_is_asked_once(made, client, requests, code):
    made.scheduler.fail = lambda job: Failure(code, "no")
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.generate(**SMALL)
    assert (caught.value.code, len(requests)) == (code, 1)


def test_a_full_queue_is_asked_again(made, client, requests):
    made.scheduler.busy = 0.001
    with pytest.raises(openai.RateLimitError) as caught:
        client.images.generate(**SMALL)
    assert (caught.value.code, requests) == ("queue_full", ["0", "1", "2"])


def test_an_error_in_a_stream_is_the_clients_exception(made, client):
    made.scheduler.fail = lambda job: Failure("insufficient_memory", "too large")
    with pytest.raises(openai.APIError, match="too large") as caught:
        list(client.images.generate(**SMALL, stream=True))
    assert caught.value.code == "insufficient_memory"


def test_a_client_that_ran_out_of_patience_gets_the_image_that_it_asked_for_first(made, client, requests):
    made.scheduler.gate.clear()
    threading.Timer(1.7, made.scheduler.gate.set).start()
    client.with_options(timeout=1.0).images.generate(**SMALL)
    assert len(requests) > 1
    assert len(made.scheduler.submitted) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_closing_the_connection_cancels_the_job(made, address, stream):
    made.scheduler.gate.clear()

    async def ask():
        async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{address}/v1") as client:
            call = asyncio.create_task(client.images.generate(**SMALL, stream=stream))
            while not made.scheduler.submitted:
                await asyncio.sleep(0.01)
            call.cancel()

    asyncio.run(ask())
    id = made.scheduler.submitted[0].id
    with made.scheduler.watch(id) as watch:
        for _ in range(100):
            news = watch.next(0.1)
            if news is not None and news.job.error is not None:
                break
    assert made.store.get(id).error.code == "cancelled"


def test_the_async_client(made, address):
    async def ask():
        async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{address}/v1", timeout=30) as client:
            answers = await asyncio.gather(
                *[client.images.generate(**SMALL, extra_body={"seed": k}) for k in range(6)]
            )
            edit = await client.images.edit(
                image=[fake.picture(64, 48)], mask=fake.picture(64, 48, "white"), prompt="p", size="64x48"
            )
            stream = await client.images.generate(**SMALL, stream=True, partial_images=1)
            events = [event.type async for event in stream]
            stream = await client.images.edit(
                image=fake.picture(64, 48), prompt="p", size="64x48", stream=True
            )
            events += [event.type async for event in stream]
            with pytest.raises(openai.BadRequestError) as caught:
                await client.images.generate(**{**SMALL, "size": "1x1"})
            return [answer.seed for answer in answers], edit, events, caught.value.param

    seeds, edit, events, param = asyncio.run(ask())
    assert seeds == list(range(6))
    assert opened(edit.data[0].b64_json).size == (64, 48)
    assert events == ["image_generation.partial_image", "image_generation.completed", "image_edit.completed"]
    assert param == "size"
