// The page: sends the form as a request and follows it until it is done.

import { ask, askJson, decoded, events, onKeyNeeded, Refused, rest, saveKey, NoAnswer } from "./api.js";
import * as form from "./form.js";
import * as memory from "./memory.js";
import { announce, back, watch } from "./server.js";
import * as results from "./results.js";

const byId = (id) => document.getElementById(id);
const MAX_STREAMS = 3; // streamed answers; a browser opens six connections to a server, and the rest of the page needs some
const PREVIEWS = 3;

let model = null, streams = 0;
const waiting = new Set();

/** What the page needs to know about the model, from its entry in /v1/models. */
function describe({ id, task_types: tasks, defaults, sizes, input_images: given }) {
  const start = { use: "start", most: 1, mask: true };
  const first = given.use === "frames" && { use: "frames", most: given.most, mask: false };
  const image = first ? !given.least && start : given.use === "start" ? start : given.most > 0 && { ...given, mask: false };
  const { width, height, num_inference_steps, guidance_scale } = defaults;
  const both = { width, height, num_inference_steps, guidance_scale };
  return {
    id,
    kinds: [["image", "I"], ["video", "V"]].filter(([, ending]) => tasks.some((task) => task.endsWith(ending))).map(([kind]) => kind),
    multiple: sizes.multiple,
    stride: sizes.frame_multiple ?? 1,
    negative: defaults.negative_prompt !== null,
    defaults: { image: both, video: { ...both, num_frames: defaults.num_frames.video, fps: defaults.fps } },
    images: { image, video: first },
  };
}

/** Wait for one of the slots for concurrent streams. Returns a function that frees it. */
async function streamSlot(signal) {
  while (streams >= MAX_STREAMS) {
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

/** Request images and follow the stream: progress, previews and outputs. */
async function generateImages(item, { files, mask }, signal) {
  const { kind, ...wish } = item.wish;
  const fields = { model: model.id, ...wish, stream: true, partial_images: PREVIEWS, progress: true };
  const post = { method: "POST", signal, busy: (seconds) => waitBusy(item, seconds) };
  const answer = files.length
    ? await ask("v1/images/edits", { ...post, form: formData(fields, files, "image[]", mask) })
    : await ask("v1/images/generations", { ...post, json: fields });
  for await (const event of events(answer, signal)) {
    item.id = event.id ?? item.id;
    if (event.type.endsWith(".progress")) {
      progress(item, event.step, event.total, event.queue_position, event.eta_s);
    } else if (event.type.endsWith(".partial_image")) {
      item.preview = decoded(event.b64_json, event.output_format);
    } else if (event.type.endsWith(".completed")) {
      item.files = [...(item.files ?? []), decoded(event.b64_json, event.output_format)];
      item.seeds = [...(item.seeds ?? []), event.seed];
      Object.assign(item, { parameters: event.parameters, seconds: total(event.timings) });
    }
    results.update(item);
  }
  if (!item.files) throw new Error("the connection ended before the image was finished");
}

/** Request a video and poll until it is finished, even if the server does not answer for a while. */
async function generateVideo(item, { files }, signal) {
  if (!item.id) {
    const { kind, ...wish } = item.wish;
    const form = formData({ model: model.id, ...wish }, files, "input_reference");
    const post = { method: "POST", form, signal, busy: (seconds) => waitBusy(item, seconds) };
    item.id = (await askJson("v1/videos", post)).id;
  }
  const path = `v1/videos/${item.id}`;
  for (;;) {
    let answer, job;
    try {
      answer = await ask(path, { signal });
      job = await answer.json();
    } catch (error) {
      if (!(error instanceof NoAnswer)) throw error;
      await back(signal);
      continue;
    }
    if (job.status === "failed") throw new Refused(job.error, 200);
    if (job.status === "completed") {
      Object.assign(item, { seeds: job.seeds, parameters: job.parameters, seconds: total(job.timings) });
      return;
    }
    item.status = job.status;
    progress(item, job.progress, 100, job.queue_position, job.eta_s);
    results.update(item);
    await rest(Number(answer.headers.get("openai-poll-after-ms") ?? 1000), signal);
  }
}

const total = (timings) => (timings ? Object.values(timings).reduce((sum, s) => sum + s, 0) : null);

function waitBusy(item, seconds) {
  item.busy = seconds;
  results.update(item);
}

function progress(item, done, of, position, eta) {
  if (done && !item.begun) item.begun = Date.now();
  item.busy = null;
  Object.assign(item, { done, total: of, position, eta, status: done ? "in_progress" : item.status });
}

/** A multipart form with files. */
function formData(fields, files, name, mask) {
  const form = new FormData();
  for (const [key, value] of Object.entries(fields)) form.append(key, value);
  for (const file of files) form.append(name, file, file.name);
  if (mask) form.append("mask", mask, "mask.png");
  return form;
}

async function generate(item, given) {
  item.again = () => {
    Object.assign(item, { id: null, status: "queued", done: 0, total: 0, begun: null, error: null, preview: null });
    results.update(item);
    generate(item, given);
  };
  const stop = new AbortController();
  item.stop = () => {
    stop.abort();
    if (item.id) ask(`v1/${item.kind}s/${item.id}`, { method: "DELETE" }).catch(() => {}); // it may be done already
  };
  let leave = () => {};
  try {
    if (item.kind === "image") leave = await streamSlot(stop.signal);
    await (item.kind === "image" ? generateImages : generateVideo)(item, given, stop.signal);
    item.status = "completed";
    results.update(item);
    announce(`finished: ${item.wish.prompt || "without a prompt"}`);
  } catch (error) {
    if (stop.signal.aborted || error.code === "cancelled") results.forget(item);
    else if (error.field && !item.begun) { // a mistake in the form
      results.forget(item);
      form.refuse(error.field, error.message);
    } else {
      Object.assign(item, { status: "failed", error: error.message, busy: null });
      results.update(item);
      announce(`failed: ${error.message}`);
    }
  } finally {
    leave();
  }
}

/** Ask the user whether to generate without a prompt. */
function confirmNoPrompt() {
  const dialog = byId("sure");
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => { dialog.onclose = () => resolve(dialog.returnValue === "yes"); });
}

byId("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  form.accept();
  try {
    const wish = form.read();
    if (!wish.prompt && !(await confirmNoPrompt())) {
      byId("prompt").focus();
      return;
    }
    const given = await form.images();
    const item = { id: null, kind: wish.kind, wish, status: "queued", done: 0, total: 0, created: Date.now() };
    results.add(item);
    results.follow(item);
    byId("viewer").scrollIntoView({ block: "nearest", behavior: "smooth" });
    generate(item, given);
  } catch (error) {
    form.refuse(error.field, error.message);
  }
});
byId("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) event.currentTarget.requestSubmit();
});

byId("cancel").onclick = () => results.selected()[0].stop();
byId("remove").onclick = () => results.remove(results.selected()[0]);
byId("reuse").onclick = () => {
  const [item, output] = results.selected();
  form.accept();
  form.write(item.wish, item.seeds?.[output]);
};
byId("restart").onclick = async () => {
  const [item, output] = results.selected();
  form.accept();
  try {
    const { blob } = await results.load(item, output);
    if (!blob) throw new Error("this image lies in another storage, which the page may not read; download it and choose the file");
    await form.startFrom(new File([blob], `seed-${item.seeds[output]}.${blob.type.split("/")[1]}`, { type: blob.type }));
  } catch (error) {
    form.refuse("image", error.message);
  }
};
byId("retry").onclick = () => results.selected()[0].again();
byId("undo-removal").onclick = () => results.undoRemoval();
window.addEventListener("pagehide", () => results.finishRemoval());
window.addEventListener("beforeunload", (event) => {
  // The server cancels an image when its page is closed, but not a video.
  if (results.items.some((item) => results.isOpen(item) && (item.kind === "image" || !item.id))) event.preventDefault();
});
byId("theme").onclick = () => {
  const dark = getComputedStyle(document.documentElement).getPropertyValue("color-scheme") === "dark"
    || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  memory.remember("tinydiff-theme", document.documentElement.dataset.theme = dark ? "light" : "dark");
};
document.documentElement.dataset.theme = memory.recall("tinydiff-theme") ?? "";

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

/** Add an item from an earlier visit or another tab. */
function restoreItem(item) {
  if (results.find(item)) return;
  const known = { done: 0, total: 0, ...item };
  results.add(known);
  if (known.status !== "completed") generate(known, { files: [] });
}

/** Restore earlier results, and this user's videos on the server. */
async function restore() {
  const kept = memory.items();
  const listed = (await askJson("v1/videos?limit=50").catch(() => ({ data: [] }))).data;
  const known = new Set(kept.map((item) => item.id));
  for (const job of listed.filter((one) => !known.has(one.id) && one.status !== "failed")) {
    const [width, height] = job.size.split("x").map(Number);
    const wish = { kind: "video", prompt: job.prompt ?? "", width, height, seed: job.seeds?.[0] };
    const made = { seeds: job.seeds, parameters: job.parameters, seconds: total(job.timings) };
    kept.push({ id: job.id, kind: "video", wish, status: job.status, created: job.created_at * 1000, ...made });
  }
  for (const item of kept.sort((a, b) => a.created - b.created)) restoreItem(item);
  memory.onOthers(restoreItem, (gone) => { const item = results.find(gone); if (item) results.forget(item); });
  const last = results.items.find((item) => item.status === "completed");
  if (last && !results.selected()[0]) results.show(last);
}

/** Fill the page when the server first answers. */
async function begin() {
  const { data: [entry] } = await askJson("v1/models");
  model = describe(entry);
  byId("model").textContent = model.id;
  form.setUp(model);
  byId("form").dataset.ready = "";
  await restore();
}

let begun = false;
watch(async () => {
  if (begun) { results.retry(); return; }
  begun = true;
  try {
    await begin();
  } catch (error) {
    begun = Boolean(model);
    if (!(error instanceof NoAnswer)) form.refuse(null, error.message);
  }
});
