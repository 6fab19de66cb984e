"""The official JavaScript client, run by node, against `tinydiff serve` with the shipped model: its main
calls.
"""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tests.serve.node import run_parts
from tests.serve.processes import serving, wait

KEY = "open-sesame"
BLUE, RED = (35, 84, 224), (216, 26, 36)

SCRIPT = r"""
import OpenAI, { toFile } from "openai";
const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 60000 });
const circle = { prompt: "a large red circle", model: "tinydiff/shapes", seed: 1 };
const video = { ...circle, num_frames: 5, num_inference_steps: 2 };
const base64 = async (response) => Buffer.from(await response.arrayBuffer()).toString("base64");
const failure = async (call) => {
  try { return { none: await call() }; }
  catch (e) { return { kind: e.constructor.name, status: e.status, code: e.code, param: e.param }; }
};
async function done(id, signal) {
  return until(signal, async () => {
    const { data, response } = await client.videos.retrieve(id).withResponse();
    if (data.status === "completed" || data.status === "failed") return data;
    await sleep(Number(response.headers.get("openai-poll-after-ms")) / 4, undefined, { signal });
  });
}
const parts = {
  async generate() {
    const first = await client.images.generate({ ...circle, n: 2, num_inference_steps: 4 });
    return { first, again: await client.images.generate({ ...circle, n: 2, num_inference_steps: 4 }) };
  },
  async url() {
    const { data } = await client.images.generate(
      { ...circle, num_inference_steps: 4, response_format: "url" });
    return base64(await fetch(data[0].url));
  },
  async stream() {
    const events = [];
    const asked = {
      ...circle, prompt: "a small blue square", num_inference_steps: 12, stream: true, partial_images: 2 };
    for await (const event of await client.images.generate(asked)) events.push(event);
    return events;
  },
  async edit() {
    const { data } = await client.images.generate(circle);
    const file = await toFile(Buffer.from(data[0].b64_json, "base64"), "image.png", { type: "image/png" });
    const edited = await client.images.edit(
      { image: file, prompt: "a large blue circle", seed: 0, strength: 1 });
    const several = await failure(() => client.images.edit({ image: [file, file], prompt: "both" }));
    return { edited, several };
  },
  async gone(signal) {
    const stop = new AbortController();
    const call = failure(() => client.images.generate(
      { ...circle, num_inference_steps: 1000 }, { signal: stop.signal }));
    const running = (number) => until(signal, async () =>
      (await client.get("/../server_info")).figures.running === number || undefined);
    await running(1);
    stop.abort();
    await running(0);
    return call;
  },
  async video(signal) {
    const finished = await done((await client.videos.create(video)).id, signal);
    const content = {};
    for (const variant of ["video", "thumbnail", "spritesheet"])
      content[variant] = await base64(await client.videos.downloadContent(finished.id, { variant }));
    const changed = await client.videos.remix(finished.id, { prompt: "a large blue circle" });
    const remix = await done(changed.id, signal);
    const listed = [];
    for await (const one of client.videos.list({ limit: 1, order: "asc" })) listed.push(one.id);
    return { finished, content, remix, listed };
  },
  async deleted() {
    const { id } = await client.videos.create({ ...video, num_inference_steps: 1000 });
    const gone = await client.videos.delete(id);
    return { id, gone, after: await failure(() => client.videos.retrieve(id)) };
  },
  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    return ids;
  },
  async mistakes() {
    return {
      size: await failure(() => client.videos.create({ ...video, size: "64x50" })),
      field: await failure(() => client.images.generate({ ...circle, num_infrence_steps: 3 })),
      model: await failure(() => client.images.generate({ ...circle, model: "dall-e-3" })),
      key: await failure(() => new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 }).videos.list()),
    };
  },
};
"""


@pytest.fixture(scope="module")
def results(package, tmp_path_factory):
    """What each part of the script found, by its name. Nothing may be left on the device."""
    with serving(tmp_path_factory.mktemp("server"), "--api-key", KEY) as server:
        server.session.headers["Authorization"] = f"Bearer {KEY}"
        found = run_parts(package, SCRIPT, f"{server.wait_ready().url}/v1", KEY)
        wait(lambda: server.get("/server_info").json()["figures"]["running"] == 0)
    return found


def pixels(text):
    """int [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(int)


def middle(text):
    picture = pixels(text)
    assert picture.shape == (128, 128, 3)
    return np.median(picture[56:72, 56:72].reshape(-1, 3), axis=0)


def test_generate(results):
    first, again = results["generate"]["first"], results["generate"]["again"]
    assert (first["seeds"], first["parameters"]["num_inference_steps"], first["computed_steps"]) == (
        [1, 2],
        4,
        8,
    )
    assert np.abs(middle(first["data"][0]["b64_json"]) - RED).max() < 40
    for one, other in zip(first["data"], again["data"], strict=True):
        assert (
            one["seed"] == other["seed"]
            and np.abs(pixels(one["b64_json"]) - pixels(other["b64_json"])).max() <= 2
        )


def test_a_url(results):
    assert np.abs(middle(results["url"]) - RED).max() < 40


def test_a_stream(results):
    *previews, last = results["stream"]
    assert [event["type"] for event in previews] == ["image_generation.partial_image"] * 2
    assert last["type"] == "image_generation.completed" and np.abs(middle(last["b64_json"]) - BLUE).max() < 40
    assert np.abs(middle(previews[-1]["b64_json"]) - BLUE).max() < 80


def test_an_edit(results):
    edited, several = results["edit"]["edited"], results["edit"]["several"]
    assert (
        np.abs(middle(edited["data"][0]["b64_json"]) - BLUE).max() < 40
        and edited["parameters"]["strength"] == 1
    )
    assert (several["kind"], several["status"], several["param"]) == ("BadRequestError", 400, "image")


def test_a_client_that_aborts_frees_the_device(results):
    assert results["gone"]["kind"] == "APIUserAbortError"


def test_a_video_and_its_files(results):
    finished, content = results["video"]["finished"], results["video"]["content"]
    assert (finished["status"], finished["seconds"], finished["seeds"]) == ("completed", "0.625", [1])
    assert base64.b64decode(content["video"])[4:8] == b"ftyp"
    assert [
        Image.open(io.BytesIO(base64.b64decode(content[name]))).format
        for name in ("thumbnail", "spritesheet")
    ] == ["WEBP"] * 2


def test_remix_and_list(results):
    finished, remix = results["video"]["finished"], results["video"]["remix"]
    assert (remix["status"], remix["prompt"], remix["remixed_from_video_id"]) == (
        "completed",
        "a large blue circle",
        finished["id"],
    )
    assert results["video"]["listed"] == [finished["id"], remix["id"]]


def test_delete_of_a_running_video(results):
    part = results["deleted"]
    assert part["gone"] == {"id": part["id"], "deleted": True, "object": "video.deleted"}
    assert (part["after"]["kind"], part["after"]["code"]) == ("NotFoundError", "not_found")


def test_models(results):
    assert results["models"] == ["tinydiff/shapes"]


@pytest.mark.parametrize(
    ("mistake", "error"),
    [("size", ("BadRequestError", 400, "size")), ("field", ("BadRequestError", 400, "num_infrence_steps")),
     ("model", ("NotFoundError", 404, "model")), ("key", ("AuthenticationError", 401, None))],
)  # fmt: skip
def test_mistakes(results, mistake, error):
    found = results["mistakes"][mistake]
    assert (found["kind"], found["status"], found["param"]) == error
