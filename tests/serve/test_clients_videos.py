"""The official Python client, sync and async, asks `tinydiff serve` for videos of the shipped model: every
call that it has for them.
"""

import asyncio
import base64
import io
import time

import av
import numpy as np
import openai
import pytest
from PIL import Image

from tests.serve.processes import serving, wait

pytestmark = pytest.mark.slow

CLIP = {"model": "tinydiff/shapes", "prompt": "a large red circle moving right"}
SHORT = {"num_frames": 5, "num_inference_steps": 3}
LONG = {"num_frames": 5, "num_inference_steps": 1000}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as one:
        yield one.wait_ready()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60) as one:
        yield one


@pytest.fixture(scope="module")
def clip(client):
    """A video that was made."""
    return client.videos.create_and_poll(**CLIP, extra_body={"seed": 5, **SHORT})


def figure(server, name):
    return server.get("/server_info").json()["figures"][name]


def frames(data):
    """uint8 [T, H, W, 3] of a clip's bytes."""
    with av.open(io.BytesIO(data)) as opened:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)])


def test_a_video_is_made_and_says_how(clip):
    assert (clip.status, clip.progress, clip.object, clip.error) == ("completed", 100, "video", None)
    assert (clip.model, clip.prompt, clip.size, clip.seconds) == (
        CLIP["model"],
        CLIP["prompt"],
        "128x128",
        "0.625",
    )
    assert (clip.seeds, clip.computed_steps, clip.queue_position) == ([5], 3, None)
    assert clip.parameters["num_frames"] == 5 and clip.timings["denoise"] > 0
    assert clip.created_at <= clip.completed_at < clip.expires_at


def test_it_is_seen_on_its_way(client):
    video = client.videos.create(**CLIP, extra_body={**LONG, "num_inference_steps": 300})
    assert (video.status, video.progress, video.completed_at) == ("queued", 0, None)
    seen = [0]
    while len(set(seen)) < 3:
        raw = client.videos.with_raw_response.retrieve(video.id)
        assert (
            raw.parse().status in ("queued", "in_progress")
            and 200 <= int(raw.headers["openai-poll-after-ms"]) <= 10_000
        )
        seen.append(raw.parse().progress)
        time.sleep(0.02)
    assert seen == sorted(seen) and seen[-1] < 100
    client.videos.delete(video.id)


def test_every_variant_is_downloaded(client, clip):
    made = frames(client.videos.download_content(clip.id).read())
    assert made.shape == (5, 128, 128, 3)
    assert len(client.videos.download_content(clip.id, variant="video").content) == clip.outputs[0]["bytes"]
    small = np.asarray(
        Image.open(io.BytesIO(client.videos.download_content(clip.id, variant="thumbnail").content)).convert(
            "RGB"
        )
    )
    assert np.abs(small.mean((0, 1)) - made[0].mean((0, 1))).max() < 12, (
        "the thumbnail is not the first frame"
    )
    sheet = Image.open(io.BytesIO(client.videos.download_content(clip.id, variant="spritesheet").content))
    assert sheet.format == "WEBP" and sheet.width > small.shape[1]


def test_the_seed_makes_the_same_video_again(client, clip):
    again = client.videos.create_and_poll(**CLIP, extra_body={"seed": clip.seeds[0], **SHORT})
    assert again.id != clip.id
    assert (
        frames(client.videos.download_content(again.id).content)
        == frames(client.videos.download_content(clip.id).content)
    ).all()


def test_a_video_begins_with_an_input_image(client):
    answer = client.images.generate(
        model=CLIP["model"], prompt="a large red circle", response_format="b64_json", extra_body={"seed": 1}
    )
    given = base64.b64decode(answer.data[0].b64_json)
    video = client.videos.create_and_poll(
        **CLIP, input_reference=("first.png", given, "image/png"), extra_body=SHORT
    )
    assert video.status == "completed"
    first = frames(client.videos.download_content(video.id).content)[0].astype(int)
    assert np.abs(first - np.asarray(Image.open(io.BytesIO(given)).convert("RGB")).astype(int)).mean() < 8


def test_list_turns_pages(client, clip):
    more = [client.videos.create(**CLIP, extra_body={**SHORT, "seed": seed}).id for seed in (1, 2)]
    listed = [video.id for video in client.videos.list(limit=1)]
    assert listed[:2] == more[::-1] and clip.id in listed
    assert [video.id for video in client.videos.list(limit=2, order="asc")] == listed[::-1]
    for id in more:
        client.videos.poll(id)


def test_remix(client, clip):
    remix = client.videos.poll(client.videos.remix(clip.id, prompt="a large blue circle").id)
    assert (remix.status, remix.remixed_from_video_id, remix.prompt, remix.seeds) == (
        "completed",
        clip.id,
        "a large blue circle",
        [5],
    )
    assert (remix.size, remix.seconds, remix.parameters["num_inference_steps"]) == (
        clip.size,
        clip.seconds,
        3,
    )
    assert remix.id != clip.id and client.videos.retrieve(clip.id).prompt == CLIP["prompt"]


def test_delete_takes_its_files_too(client, server):
    video = client.videos.create_and_poll(**CLIP, extra_body=SHORT)
    address = video.outputs[0]["url"]
    assert server.get(address.removeprefix(server.url)).status_code == 200
    gone = client.videos.delete(video.id)
    assert (gone.id, gone.deleted, gone.object) == (video.id, True, "video.deleted")
    for call in (client.videos.retrieve, client.videos.download_content, client.videos.delete):
        with pytest.raises(openai.NotFoundError):
            call(video.id)
    assert server.get(address.removeprefix(server.url)).status_code == 404


def test_a_running_video_is_gone_from_the_device_when_its_delete_is_answered(client, server):
    video = client.videos.create(**CLIP, extra_body=LONG)
    wait(lambda: figure(server, "pictures_in_loop") == 1)
    assert client.videos.delete(video.id).deleted
    assert figure(server, "running") == figure(server, "pictures_in_loop") == 0
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_a_cancelled_video_says_so_and_has_no_content(client, server):
    video = client.videos.create(**CLIP, extra_body=LONG)
    wait(lambda: client.videos.retrieve(video.id).status == "in_progress")
    with pytest.raises(openai.NotFoundError) as caught:
        client.videos.download_content(video.id)
    assert caught.value.code == "not_ready"
    server.post(f"/v1/videos/{video.id}/cancel")
    ended = client.videos.poll(video.id)
    assert (ended.status, ended.error.code) == ("failed", "cancelled")
    with pytest.raises(openai.NotFoundError) as caught:
        client.videos.download_content(video.id)
    assert caught.value.code == "cancelled"
    assert figure(server, "running") == 0


@pytest.mark.parametrize(
    ("more", "error", "code", "param"),
    [
        ({"model": "sora-2"}, openai.NotFoundError, "model_not_found", "model"),
        ({"size": "720x1281"}, openai.BadRequestError, "invalid_value", "size"),
        ({"seconds": "never"}, openai.BadRequestError, "invalid_value", "seconds"),
        ({"extra_body": {"num_frams": 5}}, openai.BadRequestError, "unknown_parameter", "num_frams"),
        ({"extra_body": {"num_frames": 1}}, openai.BadRequestError, "invalid_value", "num_frames"),
        (
            {"extra_body": {"strength": 0.5}, "input_reference": b"no image"},
            openai.BadRequestError,
            "invalid_value",
            "input_reference",
        ),
    ],
)
def test_a_mistake_names_its_field(client, more, error, code, param):
    with pytest.raises(error) as caught:
        client.videos.create(**{**CLIP, **more})
    assert (caught.value.code, caught.value.param) == (code, param)


def test_the_async_client(server):
    async def everything():
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60
        ) as client:
            calls = [
                client.videos.create_and_poll(**CLIP, extra_body={**SHORT, "seed": seed})
                for seed in (7, 8, 9)
            ]
            made = await asyncio.gather(*calls)
            listed = [video.id async for video in client.videos.list(limit=2)]
            content = await client.videos.download_content(made[0].id)
            remix = await client.videos.poll(
                (await client.videos.remix(made[0].id, prompt="a blue square")).id
            )
            running = await client.videos.create(**CLIP, extra_body=LONG)
            gone = [(await client.videos.delete(video.id)).deleted for video in (*made, remix, running)]
            return made, listed, content.content, remix, gone

    made, listed, content, remix, gone = asyncio.run(everything())
    assert [(video.status, video.seeds) for video in made] == [("completed", [seed]) for seed in (7, 8, 9)]
    assert {video.id for video in made} <= set(listed)
    assert frames(content).shape == (5, 128, 128, 3)
    assert (remix.remixed_from_video_id, remix.seeds, gone) == (made[0].id, [7], [True] * 5)
