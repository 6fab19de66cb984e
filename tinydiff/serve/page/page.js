// The page: asks for what the form says and follows it until it is made.

import { ask, askJson, events, onKeyNeeded, picture, Refused, rest, saveKey } from "./api.js";
import * as form from "./form.js";
import * as shelf from "./shelf.js";

const byId = (id) => document.getElementById(id);
const AT_ONCE = 3; // streamed answers; a browser opens six connections to a server, and the rest of the page needs some
const PREVIEWS = 3;

let model = null, streams = 0;
const waiting = new Set();

/** What the page needs to know of the model, of its entry in /v1/models. */
function describe({ id, task_types: tasks, defaults, sizes, input_images: given }) {
  const start = { use: "start", most: 1, mask: true };
  const first = given.use === "frames" && { use: "frames", most: given.most, mask: false };
  const picture = first ? !given.least && start : given.use === "start" ? start : given.most > 0 && { ...given, mask: false };
  const { width, height, num_inference_steps, guidance_scale } = defaults;
  const both = { width, height, num_inference_steps, guidance_scale };
  return {
    id,
    kinds: [["image", "I"], ["video", "V"]].filter(([, ending]) => tasks.some((task) => task.endsWith(ending))).map(([kind]) => kind),
    multiple: sizes.multiple,
    stride: sizes.frame_multiple ?? 1,
    negative: defaults.negative_prompt !== null,
    defaults: { image: both, video: { ...both, num_frames: defaults.num_frames.video, fps: defaults.fps } },
    images: { image: picture, video: first },
  };
}

/** A place among the streams that run at once; what comes back leaves it. */
async function turn(signal) {
  while (streams >= AT_ONCE) {
    await new Promise((resolve, reject) => {
      waiting.add(resolve);
      signal.addEventListener("abort", () => { waiting.delete(resolve); reject(signal.reason); }, { once: true });
    });
  }
  streams += 1;
  return () => {
    streams -= 1;
    const [next] = waiting;
    waiting.delete(next);
    next?.();
  };
}

/** Ask for pictures and follow the stream: how far it is, previews, and what was made. */
async function makeImages(item, { files, mask }, signal) {
  const { kind, ...wish } = item.wish;
  const fields = { model: model.id, ...wish, stream: true, partial_images: PREVIEWS, progress: true };
  const answer = files.length
    ? await ask("v1/images/edits", { method: "POST", form: filled(fields, files, "image[]", mask), signal })
    : await ask("v1/images/generations", { method: "POST", json: fields, signal });
  for await (const event of events(answer)) {
    item.id = event.id ?? item.id;
    if (event.type.endsWith(".progress")) {
      progress(item, event.step, event.total, event.queue_position, event.eta_s);
    } else if (event.type.endsWith(".partial_image")) {
      item.preview = picture(event.b64_json, event.output_format);
    } else if (event.type.endsWith(".completed")) {
      item.files = [...(item.files ?? []), picture(event.b64_json, event.output_format)];
      item.seeds = [...(item.seeds ?? []), event.seed];
      Object.assign(item, { parameters: event.parameters, seconds: total(event.timings) });
    }
    shelf.update(item);
  }
  if (!item.files) throw new Error("the connection ended before the picture was made");
}

/** Ask for a clip and look again until it is made. */
async function makeClip(item, { files }, signal) {
  if (!item.id) {
    const { kind, ...wish } = item.wish;
    const form = filled({ model: model.id, ...wish }, files, "input_reference");
    item.id = (await askJson("v1/videos", { method: "POST", form, signal })).id;
  }
  const path = `v1/videos/${item.id}`;
  for (;;) {
    const answer = await ask(path, { signal });
    const job = await answer.json();
    if (job.status === "failed") throw new Refused(job.error, 200);
    if (job.status === "completed") {
      Object.assign(item, { seeds: job.seeds, parameters: job.parameters, seconds: total(job.timings) });
      return;
    }
    item.status = job.status;
    progress(item, job.progress, 100, job.queue_position, job.eta_s);
    shelf.update(item);
    await rest(Number(answer.headers.get("openai-poll-after-ms") ?? 1000), signal);
  }
}

const total = (timings) => (timings ? Object.values(timings).reduce((sum, s) => sum + s, 0) : null);

function progress(item, done, of, position, eta) {
  if (done && !item.begun) item.begun = Date.now();
  Object.assign(item, { done, total: of, position, eta, status: done ? "in_progress" : item.status });
}

/** A form with files, as HTML pages send it. */
function filled(fields, files, name, mask) {
  const form = new FormData();
  for (const [key, value] of Object.entries(fields)) form.append(key, value);
  for (const file of files) form.append(name, file, file.name);
  if (mask) form.append("mask", mask, "mask.png");
  return form;
}

async function make(item, given) {
  const stop = new AbortController();
  item.stop = () => {
    stop.abort();
    if (item.id) ask(`v1/${item.kind}s/${item.id}`, { method: "DELETE" }).catch(() => {}); // it may be done already
  };
  let leave = () => {};
  try {
    if (item.kind === "image") leave = await turn(stop.signal);
    await (item.kind === "image" ? makeImages : makeClip)(item, given, stop.signal);
    item.status = "completed";
    shelf.update(item);
  } catch (error) {
    if (stop.signal.aborted || error.code === "cancelled") shelf.forget(item);
    else if (error.field && !item.begun) { // a mistake in the form
      shelf.forget(item);
      form.refuse(error.field, error.message);
    } else {
      Object.assign(item, { status: "failed", error: error.message });
      shelf.update(item);
    }
  } finally {
    leave();
  }
}

byId("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  form.accept();
  try {
    const wish = form.read();
    const given = await form.pictures();
    const item = { id: null, kind: wish.kind, wish, status: "queued", done: 0, total: 0, created: Date.now() };
    shelf.add(item);
    shelf.follow(item);
    byId("viewer").scrollIntoView({ block: "nearest", behavior: "smooth" });
    make(item, given);
  } catch (error) {
    form.refuse(error.field, error.message);
  }
});
byId("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) event.currentTarget.requestSubmit();
});

byId("cancel").onclick = () => shelf.looking()[0].stop();
byId("remove").onclick = () => shelf.remove(shelf.looking()[0]);
byId("reuse").onclick = () => {
  const [item, output] = shelf.looking();
  form.accept();
  form.write(item.wish, item.seeds?.[output]);
};
byId("restart").onclick = async () => {
  const [item, output] = shelf.looking();
  const blob = await (await fetch(await shelf.load(item, output))).blob();
  form.give([new File([blob], `seed-${item.seeds[output]}.png`, { type: blob.type })]);
};
byId("theme").onclick = () => {
  const dark = getComputedStyle(document.documentElement).getPropertyValue("color-scheme") === "dark"
    || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  localStorage.setItem("tinydiff-theme", document.documentElement.dataset.theme = dark ? "light" : "dark");
};
document.documentElement.dataset.theme = localStorage.getItem("tinydiff-theme") ?? "";

let asking = null;
onKeyNeeded((refusal) => asking ??= new Promise((resolve) => {
  const dialog = byId("key-dialog");
  dialog.querySelector(".hint").textContent = refusal || dialog.querySelector(".hint").dataset.hint;
  dialog.querySelector(".hint").classList.toggle("error", Boolean(refusal));
  dialog.oncancel = (event) => event.preventDefault();
  dialog.onclose = () => {
    saveKey(byId("key").value.trim());
    byId("key").value = "";
    asking = null;
    resolve();
  };
  dialog.showModal();
}));

/** Show how the server is, now and then. */
async function watch() {
  for (;;) {
    const state = byId("state");
    let ready = false;
    try {
      const answer = await fetch("ready");
      const { phase, done, total: of, eta_s: eta } = await answer.json();
      ready = answer.ok;
      state.dataset.state = ready ? "ready" : phase;
      state.textContent = [phase, of > 1 && !ready && `${done} of ${of}`, eta && `${Math.ceil(eta)} s`].filter(Boolean).join(", ");
    } catch {
      state.dataset.state = "failed";
      state.textContent = "no answer";
    }
    await rest(ready ? 20_000 : 1500);
    while (document.hidden) await rest(1000);
  }
}

/** Bring back what was made before, and the clips that this user has on the server. */
async function restore() {
  const kept = shelf.remembered();
  const listed = (await askJson("v1/videos?limit=50").catch(() => ({ data: [] }))).data;
  const known = new Set(kept.map((item) => item.id));
  for (const job of listed.filter((one) => !known.has(one.id) && one.status !== "failed")) {
    const [width, height] = job.size.split("x").map(Number);
    const wish = { kind: "video", prompt: job.prompt ?? "", width, height, seed: job.seeds?.[0] };
    const made = { seeds: job.seeds, parameters: job.parameters, seconds: total(job.timings) };
    kept.push({ id: job.id, kind: "video", wish, status: job.status, created: job.created_at * 1000, ...made });
  }
  for (const item of kept.sort((a, b) => a.created - b.created)) {
    shelf.add({ done: 0, total: 0, ...item });
    if (item.status !== "completed") make(shelf.items[0], { files: [] });
  }
  const last = shelf.items.find((item) => item.status === "completed");
  if (last && !shelf.looking()[0]) shelf.show(last);
}

watch();
askJson("v1/models").then(async ({ data: [entry] }) => {
  model = describe(entry);
  byId("model").textContent = model.id;
  form.setUp(model);
  byId("form").dataset.ready = "";
  await restore();
}).catch((error) => form.refuse(null, error.message));
