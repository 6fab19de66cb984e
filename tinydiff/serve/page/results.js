// All requests of the page: the queue, the gallery, and the item in the viewer. An item is a plain object:
//   id (the server's, or null), kind, wish (of the form), status, done, total, position, eta, busy (seconds until it is asked for again),
//   preview, files ({ blob, src }, one an output; without blob where it lies in another storage), seeds, parameters, seconds, error,
//   created, begun, stop(), again().

import { ask, askFile, askJson } from "./api.js";
import * as memory from "./memory.js";

const byId = (id) => document.getElementById(id);
const UNDO = 10_000; // milliseconds in which a removal can be undone
const isRunning = (item) => item && isOpen(item) && item.done > 0;
export const isOpen = (item) => !["completed", "failed"].includes(item.status);

export let items = []; // newest first
let shown = null, index = 0;
let following = true; // whether the viewer switches to running items, until the user selects one
const rows = new Map(), cards = new Map();

export const find = ({ kind, id }) => items.find((item) => id && item.kind === kind && item.id === id);

/** Add an item, sorted by age. */
export function add(item) {
  const older = items.findIndex((other) => other.created <= item.created);
  items.splice(older < 0 ? items.length : older, 0, item);
  update(item);
}

/** Show the current state of an item. */
export function update(item) {
  if (item.status !== "completed") showRow(item);
  else {
    rows.get(item)?.remove();
    rows.delete(item);
    showCards(item);
  }
  showSections();
  const news = isRunning(item) || (item.status === "completed" && item.stop); // restored items have no stop
  if (following && news && shown !== item && !isRunning(shown)) show(item, 0, true);
  else if (shown === item) view();
  if (item.id && (item.status === "completed" || (item.kind === "video" && isOpen(item)))) memory.keep(item);
}

/** Remove an item from the page. */
export function forget(item) {
  items = items.filter((other) => other !== item);
  rows.get(item)?.remove();
  rows.delete(item);
  for (const card of cards.get(item) ?? []) card.remove();
  cards.delete(item);
  showSections();
  if (shown === item) show(items.find((other) => other.status === "completed") ?? null);
  memory.drop(item);
}

function showSections() {
  byId("queue-box").hidden = !rows.size;
  byId("gallery-box").hidden = !cards.size;
}

/** Show an item in the viewer; with `follow`, later running items replace it. */
export function show(item, output = 0, follow = false) {
  [shown, index, following] = [item, output, follow];
  view();
}

/** Show this item in the viewer, unless another is running. */
export function follow(item) {
  following = true;
  if (!isRunning(shown)) show(item, 0, true);
}

export const selected = () => [shown, index];

/** The URL of an output on the server. */
const contentUrl = (item, output) => `v1/${item.kind}s/${item.id}/content?${item.kind === "video" ? "index" : "variant"}=${output}`;

/** Fetch an output, once. */
export async function load(item, output) {
  item.files ??= [];
  item.files[output] ??= (await askFile(contentUrl(item, output))) ?? { src: await storageUrl(item, output) };
  return item.files[output];
}

/** The URL of an output in another storage, whose images may be shown. */
async function storageUrl(item, output) {
  const job = await askJson(`v1/${item.kind}s/${item.id}`);
  return (job.data ?? job.outputs)[output].url;
}

const element = (name, fields) => Object.assign(document.createElement(name), fields);
const seconds = (s) => (s < 9.95 ? `${s.toFixed(1)} s` : s < 90 ? `${Math.round(s)} s` : `${Math.round(s / 60)} min`);

/** The status of an item in one line. */
function statusText(item) {
  if (item.status === "failed") return item.error;
  if (item.status === "completed") return "";
  if (item.busy) return `the server is busy; trying again in ${seconds(item.busy)}`;
  if (item.done) {
    const left = ((Date.now() - item.begun) / 1000 / item.done) * (item.total - item.done);
    const steps = item.kind === "video" ? `${item.done} %` : `step ${item.done} of ${item.total}`;
    return item.done < item.total ? `${steps}, ${seconds(left)} left` : "finishing";
  }
  if (item.status === "in_progress") return "starting";
  const eta = item.eta ? `, done in about ${seconds(item.eta)}` : "";
  return (item.position ? `waiting behind ${item.position}` : item.position === 0 ? "next" : "waiting") + eta;
}

function showRow(item) {
  if (!rows.has(item)) {
    const row = byId("queue-row").content.firstElementChild.cloneNode(true);
    row.querySelector(".pick").onclick = () => show(item);
    row.querySelector(".drop-job").onclick = () => (isOpen(item) ? item.stop() : forget(item));
    byId("queue").append(row);
    rows.set(item, row);
  }
  const row = rows.get(item);
  row.dataset.status = item.status;
  row.querySelector(".what").textContent = item.wish.prompt || "without a prompt";
  row.querySelector(".where").textContent = statusText(item);
  row.querySelector("progress").value = item.total ? item.done / item.total : 0;
  row.querySelector(".drop-job").setAttribute("aria-label", isOpen(item) ? "Cancel" : "Dismiss");
}

const outputs = new WeakMap(); // of cards: [item, output]
const failedCards = new Set(); // cards whose image failed to load
const visibleCards = new IntersectionObserver((entries) => {
  for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
    visibleCards.unobserve(target);
    fill(target);
  }
}, { rootMargin: "300px" });

function showCards(item) {
  if (cards.has(item)) return;
  const made = item.seeds.map((seed, output) => {
    const card = byId("gallery-card").content.firstElementChild.cloneNode(true);
    const button = card.querySelector("button");
    button.setAttribute("aria-label", `${item.wish.prompt || "without a prompt"}, seed ${seed}`);
    button.onclick = () => { show(item, output); byId("viewer").scrollIntoView({ block: "nearest" }); };
    if (item.kind === "video") button.append(element("span", { className: "badge", textContent: "video" }));
    outputs.set(card, [item, output]);
    visibleCards.observe(card);
    return card;
  });
  cards.set(item, made);
  const older = items.slice(items.indexOf(item) + 1).find((other) => cards.has(other));
  if (older) cards.get(older)[0].before(...made);
  else byId("gallery").append(...made);
}

/** Fetch a card's small image. An item that the server no longer has is removed; after any other failure the card waits for `retry`. */
async function fill(card) {
  const [item, output] = outputs.get(card);
  try {
    const src = await thumbnail(item, output);
    card.querySelector("button").prepend(element("img", { src, alt: "" }));
    failedCards.delete(card);
  } catch (error) {
    if (error.status === 404) forget(item);
    else failedCards.add(card);
  }
}

async function thumbnail(item, output) {
  const known = item.kind === "image" && item.files?.[output];
  const small = `${contentUrl(item, output)}&${item.kind === "video" ? "variant=thumbnail" : "thumbnail=true"}`;
  return known ? known.src : (await askFile(small))?.src ?? (item.kind === "video" ? small : (await load(item, output)).src);
}

/** Retry the cards whose image failed to load. */
export function retry() {
  for (const card of failedCards) visibleCards.observe(card);
  failedCards.clear();
  if (shown?.status === "completed" && !byId("media").firstElementChild) view();
}

function view() {
  const item = shown;
  const status = item?.status ?? "empty";
  byId("viewer").dataset.status = status;
  for (const [id, when] of Object.entries({
    cancel: item && isOpen(item), download: status === "completed", reuse: item, remove: status === "completed",
    restart: status === "completed" && item.kind === "image", retry: status === "failed" && item.again,
  })) byId(id).hidden = !when;
  byId("progress").value = item?.total ? item.done / item.total : 0;
  byId("details").hidden = status !== "completed";
  const [said, facts] = !item ? ["Results appear here."] : status === "completed" ? summary(item) : [statusText(item)];
  byId("caption").textContent = said;
  byId("facts").textContent = facts ?? "";
  for (const mark of document.querySelectorAll(".gallery [aria-current]")) mark.removeAttribute("aria-current");
  if (!item) { byId("media").replaceChildren(); return; }
  const { width = 1, height = 1 } = { ...item.wish, ...item.parameters };
  byId("frame").style.setProperty("--ratio", width / height);
  byId("frame").style.setProperty("--most", `${4 * width}px`);
  if (status === "completed") {
    cards.get(item)?.[index]?.querySelector("button").setAttribute("aria-current", "true");
    byId("parameters").replaceChildren(...Object.entries({ ...item.parameters, seed: item.seeds[index] }).flatMap(([name, value]) =>
      value === null || value === "" || value?.length === 0 ? [] : [element("dt", { textContent: name }), element("dd", { textContent: shownAs(value) })]));
    viewOutput(item, index);
  } else display(item.preview && element("img", { src: item.preview.src, alt: "A preview", className: "preview" }), item.preview?.src);
}

const shownAs = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));

/** The prompt, and facts about the output. */
function summary(item) {
  const { width, height, num_frames: frames } = { ...item.wish, ...item.parameters };
  const facts = [`${width} × ${height}`, frames > 1 && `${frames} frames`, `seed ${item.seeds[index]}`];
  return [item.wish.prompt, [...facts, item.seconds && `made in ${seconds(item.seconds)}`].filter(Boolean).join(" · ")];
}

async function viewOutput(item, output) {
  let src;
  try {
    ({ src } = await load(item, output));
  } catch (error) {
    if (shown !== item || index !== output) return;
    display(null);
    byId("caption").textContent = error.message;
    return;
  }
  if (shown !== item || index !== output) return;
  const video = { src, controls: true, loop: true, muted: true, autoplay: true, playsInline: true };
  const made = item.kind === "video" ? element("video", video) : element("img", { src, alt: item.wish.prompt || "the image" });
  if (item.kind === "video") made.setAttribute("aria-label", item.wish.prompt || "the video");
  display(made, src);
  byId("download").href = src;
  byId("download").download = `tinydiff-${item.seeds[output]}.${item.kind === "video" ? "mp4" : "png"}`;
}

let displayed = 0;

/** Replace the media in the viewer once the new one can be drawn, so that nothing flickers. The latest call wins. */
async function display(made, src) {
  const turn = ++displayed;
  if (byId("media").firstElementChild?.getAttribute("src") === (src ?? null) && src) return;
  if (made?.decode) await made.decode().catch(() => {});
  if (turn === displayed) byId("media").replaceChildren(...(made ? [made] : []));
}

let removing = null; // the item that is removed from the page but not yet from the server

/** Remove an item from the page, and from the server once the removal cannot be undone. */
export function remove(item) {
  finishRemoval();
  forget(item);
  removing = { item, timer: setTimeout(finishRemoval, UNDO) };
  byId("removed").hidden = false;
}

export function undoRemoval() {
  if (!removing) return;
  clearTimeout(removing.timer);
  const { item } = removing;
  removing = null;
  byId("removed").hidden = true;
  add(item);
  show(item);
}

export function finishRemoval() {
  if (!removing) return;
  clearTimeout(removing.timer);
  const { kind, id } = removing.item;
  removing = null;
  byId("removed").hidden = true;
  ask(`v1/${kind}s/${id}`, { method: "DELETE", keepalive: true }).catch(() => {}); // it may be gone already
}
