"""The official Python client, sync and async, against a real server: every call that it has for videos and
models.
"""

import asyncio
import io

import openai
import pytest
from PIL import Image

from tests.serve import fake
from tinydiff.serve.jobs import Failure

KEY = "open-sesame"
SMALL = {"prompt": "a red circle", "model": "tinydiff/shapes", "size": "64x48", "seconds": "1"}


@pytest.fixture
def made(tmp_path):
    return fake.service(tmp_path, api_key=(KEY,))


@pytest.fixture
def address(made):
    with fake.listening(made) as url:
        yield f"{url}/v1"


@pytest.fixture
def client(address):
    with openai.OpenAI(api_key=KEY, base_url=address, max_retries=0, timeout=30) as found:
        yield found


def test_create_and_poll(client):
    video = client.videos.create_and_poll(**SMALL)
    assert (video.status, video.progress, video.object, video.error) == ("completed", 100, "video", None)
    assert (video.model, video.size, video.seconds, video.prompt) == (
        "tinydiff/shapes",
        "64x48",
        "1.125",
        "a red circle",
    )


def test_create_answers_at_once(made, client):
    made.scheduler.gate.clear()
    video = client.videos.create(**SMALL)
    assert video.status in ("queued", "in_progress") and video.completed_at is None


def test_our_fields_go_through_extra_body_and_come_back(made, client):
    video = client.videos.create(
        **SMALL, extra_body={"seed": 17, "num_inference_steps": 5, "guidance_scale": 1.5}
    )
    assert {"seed", "num_inference_steps", "guidance_scale"} <= set(made.store.get(video.id).fields)
    done = client.videos.poll(video.id)
    assert done.seeds == [17]  # pyright: ignore
    assert done.timings["denoise"] > 0  # pyright: ignore


@pytest.mark.parametrize(
    "reference",
    [
        fake.picture(64, 48),
        io.BytesIO(fake.picture(64, 48)),
        ("first.png", fake.picture(64, 48), "image/png"),
    ],
    ids=["bytes", "stream", "named"],
)
def test_a_first_frame(made, client, reference):
    video = client.videos.create(**SMALL, input_reference=reference)
    [id] = made.store.get(video.id).inputs["image_path"]
    assert Image.open(made.files.path(id)).size == (64, 48)


def test_retrieve_of_an_unknown_video(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.videos.retrieve("video_nothing")
    assert caught.value.code == "not_found"
    assert caught.value.request_id


def test_poll_waits_as_long_as_the_server_says(made, client):
    made.scheduler.steps, made.scheduler.step_seconds = 3, 0.1
    asked = []
    made.scheduler.poll_after_ms = lambda job: asked.append(job.id) or 150
    video = client.videos.create(**SMALL)
    assert client.videos.poll(video.id).status == "completed"
    assert 1 <= len(asked) <= 6, "a client that did not read the header would wait a second between questions"


def test_list_turns_its_pages_itself(made, client):
    made.scheduler.gate.clear()
    ids = [client.videos.create(**{**SMALL, "prompt": str(k)}).id for k in range(5)]
    assert [video.id for video in client.videos.list(limit=2)] == ids[::-1]
    assert [video.id for video in client.videos.list(limit=2, order="asc")] == ids
    first = client.videos.list(limit=2, order="asc")
    assert (first.has_more, first.last_id) == (True, ids[1])
    assert [video.id for video in client.videos.list(after=ids[3], order="asc")] == ids[4:]


def test_download_every_variant(client, tmp_path):
    video = client.videos.create_and_poll(**SMALL)
    assert client.videos.download_content(video.id).read()[4:8] == b"ftyp"
    for variant in ("thumbnail", "spritesheet"):
        assert (
            Image.open(io.BytesIO(client.videos.download_content(video.id, variant=variant).content)).format
            == "WEBP"
        )
    client.videos.download_content(video.id, variant="video").write_to_file(tmp_path / "clip.mp4")
    assert (tmp_path / "clip.mp4").stat().st_size == video.outputs[0]["bytes"]  # pyright: ignore


def test_download_before_it_is_done(made, client):
    made.scheduler.gate.clear()
    with pytest.raises(openai.NotFoundError) as caught:
        client.videos.download_content(client.videos.create(**SMALL).id)
    assert caught.value.code == "not_ready"


def test_remix(client):
    source = client.videos.create_and_poll(**SMALL, extra_body={"seed": 3})
    remix = client.videos.poll(client.videos.remix(source.id, prompt="a blue square").id)
    assert (remix.remixed_from_video_id, remix.prompt, remix.size) == (source.id, "a blue square", "64x48")
    assert remix.seeds == [3]  # pyright: ignore


def test_delete(client):
    video = client.videos.create_and_poll(**SMALL)
    gone = client.videos.delete(video.id)
    assert (gone.id, gone.deleted, gone.object) == (video.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        client.videos.delete(video.id)


def test_delete_while_it_runs(made, client):
    made.scheduler.steps, made.scheduler.step_seconds = 1000, 0.01
    video = client.videos.create(**SMALL)
    assert client.videos.delete(video.id).deleted
    assert made.store.get(video.id) is None


def test_a_failed_video_ends_the_poll(made, client):
    made.scheduler.fail = lambda job: Failure("insufficient_memory", "it does not fit")
    video = client.videos.create_and_poll(**SMALL)
    assert (video.status, video.error.code, video.error.message) == (
        "failed",
        "insufficient_memory",
        "it does not fit",
    )


def test_a_cancelled_video_ends_the_poll(made, client):
    made.scheduler.gate.clear()
    video = client.videos.create(**SMALL)
    client.post(f"/videos/{video.id}/cancel", cast_to=object)
    assert client.videos.poll(video.id).error.code == "cancelled"


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda client: client.videos.edit(prompt="x", video=b"clip"), "edits"),
        (lambda client: client.videos.extend(prompt="x", seconds="4", video=b"clip"), "extensions"),
        (lambda client: client.videos.create_character(name="x", video=b"clip"), "characters"),
        (lambda client: client.videos.get_character("char_1"), "characters"),
    ],
)
def test_what_is_not_here_says_so(client, call, names):
    with pytest.raises(openai.NotFoundError) as caught:
        call(client)
    assert caught.value.code == "not_supported" and names in str(caught.value)


def test_a_mistake_is_an_error_of_the_right_kind_with_its_parameter(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(**{**SMALL, "size": "64x50"})
    assert (caught.value.param, caught.value.type) == ("size", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(**SMALL, extra_body={"num_frams": 17})
    assert caught.value.param == "num_frams" and "num_frames" in str(caught.value)
    with pytest.raises(openai.NotFoundError) as caught:
        client.videos.create(**{**SMALL, "model": "sora-2"})
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_wrong_key(address):
    with (
        openai.OpenAI(api_key="wrong", base_url=address, max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.videos.list()


def test_a_full_queue_is_asked_again_after_the_time_it_says(made, address):
    asked = []
    submit = made.scheduler.submit

    def full_once(job, previews=0):
        asked.append(job.id)
        made.scheduler.busy = 0.2 if len(asked) == 1 else None
        return submit(job, previews)

    made.scheduler.submit = full_once
    with openai.OpenAI(api_key=KEY, base_url=address, max_retries=1) as patient:
        assert patient.videos.create(**SMALL).status in ("queued", "in_progress", "completed")
    assert len(asked) == 2


def test_models(client):
    [model] = client.models.list()
    assert (model.id, model.object) == ("tinydiff/shapes", "model")
    assert client.models.retrieve("tinydiff/shapes").owned_by == "tinydiff"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("sora-2")
    assert caught.value.code == "model_not_found"


def test_the_async_client_does_all_of_it(address):
    async def everything():
        async with openai.AsyncOpenAI(api_key=KEY, base_url=address, max_retries=0, timeout=30) as client:
            videos = await asyncio.gather(
                *(client.videos.create_and_poll(**SMALL, extra_body={"seed": seed}) for seed in (1, 2, 3))
            )
            listed = [video.id async for video in client.videos.list(limit=2)]
            content = await client.videos.download_content(videos[0].id, variant="thumbnail")
            remix = await client.videos.poll((await client.videos.remix(videos[0].id, prompt="another")).id)
            again = await client.videos.retrieve(videos[1].id)
            gone = [(await client.videos.delete(video.id)).deleted for video in (*videos, remix)]
            with pytest.raises(openai.NotFoundError):
                await client.videos.retrieve(remix.id)
            return videos, listed, content.content, remix, again, gone

    videos, listed, content, remix, again, gone = asyncio.run(everything())
    # pyright: ignore
    assert [(video.status, video.seeds) for video in videos] == [("completed", [seed]) for seed in (1, 2, 3)]
    assert sorted(listed) == sorted(video.id for video in videos)
    assert Image.open(io.BytesIO(content)).format == "WEBP"
    assert (remix.remixed_from_video_id, again.id, gone) == (videos[0].id, videos[1].id, [True] * 4)
