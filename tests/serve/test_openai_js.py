"""The official JavaScript client, run by node against a server whose scheduler makes plain images: its main
calls.
"""

import base64
import io

import pytest
from PIL import Image

from tests.serve import fake
from tests.serve.node import run_parts

SCRIPT = r"""
import OpenAI, { toFile } from "openai";
const [baseURL, apiKey, image] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 30000 });
const small = { prompt: "a red circle", model: "tinydiff/shapes", size: "64x48" };
const file = () => toFile(Buffer.from(image, "base64"), "image.png", { type: "image/png" });
const base64 = async (response) => Buffer.from(await response.arrayBuffer()).toString("base64");
const failure = async (call) => {
  try { return { none: await call() }; }
  catch (e) {
    const { status, code, param } = e;
    return { kind: e.constructor.name, status, code, param, request: Boolean(e.requestID) };
  }
};
async function done(id, signal) {
  return until(signal, async () => {
    const { data, response } = await client.videos.retrieve(id).withResponse();
    if (data.status === "completed" || data.status === "failed") return data;
    await sleep(Number(response.headers.get("openai-poll-after-ms")) / 4, undefined, { signal });
  });
}
const parts = {
  async video(signal) {
    const created = await client.videos.create({ ...small, seconds: "1", seed: 5 });
    const finished = await done(created.id, signal);
    const listed = [];
    for await (const one of client.videos.list({ limit: 1, order: "asc" })) listed.push(one.id);
    const content = {};
    for (const variant of ["video", "thumbnail", "spritesheet"])
      content[variant] = await base64(await client.videos.downloadContent(created.id, { variant }));
    const remix = await client.videos.remix(created.id, { prompt: "a blue square" });
    return { created, finished, listed, content, remix: await done(remix.id, signal) };
  },
  async input_image(signal) {
    const input_reference = await file();
    const asked = { ...small, seconds: "1", strength: 1, input_reference };
    return done((await client.videos.create(asked)).id, signal);
  },
  async deleted() {
    const { id } = await client.videos.create({ ...small, seconds: "1" });
    const gone = await client.videos.delete(id);
    return { id, gone, after: await failure(() => client.videos.retrieve(id)) };
  },
  async generate() { return client.images.generate({ ...small, n: 2, seed: 5 }); },
  async stream() {
    const events = [];
    const stream = await client.images.generate({ ...small, stream: true, partial_images: 2 });
    for await (const event of stream) events.push(event);
    return events;
  },
  async edit() { return client.images.edit({ ...small, image: await file(), mask: await file() }); },
  async edit_stream() {
    const kinds = [];
    const stream = await client.images.edit({ ...small, image: await file(), strength: 1, stream: true });
    for await (const event of stream) kinds.push(event.type);
    return kinds;
  },
  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    return ids;
  },
  async mistakes() {
    return {
      size: await failure(() => client.videos.create({ ...small, size: "64x50" })),
      field: await failure(() => client.images.generate({ ...small, num_infrence_steps: 3 })),
      model: await failure(() => client.images.generate({ ...small, model: "dall-e-3" })),
      key: await failure(() => new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 }).videos.list()),
    };
  },
};
"""


@pytest.fixture(scope="module")
def results(package, tmp_path_factory):
    """What each part of the script returned, by its name. The model is one that edits images too."""
    made = fake.service(
        tmp_path_factory.mktemp("state"), row={"image_use": "start"}, api_key=("open-sesame",)
    )
    made.scheduler.step_seconds = 0.02
    reference = base64.b64encode(fake.picture(64, 48, "white")).decode()
    with fake.listening(made) as url:
        return run_parts(package, SCRIPT, f"{url}/v1", "open-sesame", reference)


def image(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_create_and_retrieve(results):
    created, finished = results["video"]["created"], results["video"]["finished"]
    assert (created["object"], created["seconds"], created["size"]) == ("video", "1.125", "64x48")
    assert (finished["status"], finished["progress"], finished["seeds"]) == ("completed", 100, [5])


def test_list(results):
    assert results["video"]["listed"] == [results["video"]["created"]["id"]]


def test_content(results):
    content = results["video"]["content"]
    assert base64.b64decode(content["video"])[4:8] == b"ftyp"
    assert [image(content[name]).format for name in ("thumbnail", "spritesheet")] == ["WEBP", "WEBP"]


def test_remix(results):
    remix = results["video"]["remix"]
    assert (remix["status"], remix["prompt"], remix["seeds"]) == ("completed", "a blue square", [5])
    assert remix["remixed_from_video_id"] == results["video"]["created"]["id"]


def test_a_input_image(results):
    assert results["input_image"]["status"] == "completed"


def test_delete(results):
    part = results["deleted"]
    assert part["gone"] == {"id": part["id"], "deleted": True, "object": "video.deleted"}
    assert (part["after"]["kind"], part["after"]["status"]) == ("NotFoundError", 404)


def test_generate(results):
    answer = results["generate"]
    assert [image(one["b64_json"]).size for one in answer["data"]] == [(64, 48)] * 2
    assert (answer["seeds"], answer["usage"]["total_tokens"]) == ([5, 6], 0)


def test_a_stream_has_previews_and_ends_with_the_image(results):
    events = results["stream"]
    assert [event["type"].split(".")[1] for event in events] == [
        "partial_image",
        "partial_image",
        "completed",
    ]
    assert [event["partial_image_index"] for event in events[:-1]] == [0, 1]
    assert [image(event["b64_json"]).size for event in events] == [(64, 48)] * 3


def test_an_edit_with_a_mask(results):
    assert [image(one["b64_json"]).size for one in results["edit"]["data"]] == [(64, 48)]


def test_a_stream_of_an_edit(results):
    assert results["edit_stream"] == ["image_edit.completed"]


def test_models(results):
    assert results["models"] == ["tinydiff/shapes"]


@pytest.mark.parametrize(
    ("mistake", "kind", "status", "param"),
    [("size", "BadRequestError", 400, "size"), ("field", "BadRequestError", 400, "num_infrence_steps"),
     ("model", "NotFoundError", 404, "model"), ("key", "AuthenticationError", 401, None)],
)  # fmt: skip
def test_mistakes_are_errors_of_the_right_kind(results, mistake, kind, status, param):
    found = results["mistakes"][mistake]
    assert (found["kind"], found["status"], found["param"], found["request"]) == (kind, status, param, True)
