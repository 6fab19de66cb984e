// What was asked for: the queue, the gallery, and the one of them that is looked at. An item is a plain object:
//   id (the server's, or null), kind, wish (of the form), status, done, total, position, eta, preview, files (addresses within this page,
//   one an output), seeds, parameters, seconds, error, created, begun, stop().

import { ask, askFile, askJson } from "./api.js";

const byId = (id) => document.getElementById(id);
const KEPT = "tinydiff-gallery";
const MOST = 200; // items kept in this browser
const runs = (item) => item && open(item) && item.done > 0;
const open = (item) => !["completed", "failed"].includes(item.status);

export let items = []; // the newest first
let shown = null, index = 0;
let following = true; // what is being made, until the user looks at something else
const rows = new Map(), cards = new Map();

/** Put a new item on the shelf. */
export function add(item) {
  items.unshift(item);
  update(item);
}

/** Show what has become of an item. */
export function update(item) {
  const queued = item.status !== "completed";
  if (queued) showRow(item);
  else {
    rows.get(item)?.remove();
    rows.delete(item);
    showCards(item);
  }
  showBoxes();
  const news = runs(item) || (item.status === "completed" && item.stop); // what was made before has no stop
  if (following && news && shown !== item && !runs(shown)) show(item, 0, true);
  else if (shown === item) view();
  keep();
}

/** Take an item off the shelf. */
export function forget(item) {
  items = items.filter((other) => other !== item);
  rows.get(item)?.remove();
  rows.delete(item);
  for (const card of cards.get(item) ?? []) card.remove();
  cards.delete(item);
  showBoxes();
  if (shown === item) show(items.find((other) => other.status === "completed") ?? null);
  keep();
}

function showBoxes() {
  byId("queue-box").hidden = !rows.size;
  byId("gallery-box").hidden = !cards.size;
}

/** Look at an item; then, if asked to, at what is made after it. */
export function show(item, output = 0, follow = false) {
  [shown, index, following] = [item, output, follow];
  view();
}

/** Look at what is being made: this item, unless another runs. */
export function follow(item) {
  following = true;
  if (!runs(shown)) show(item, 0, true);
}

export const looking = () => [shown, index];

/** What this browser remembers of earlier visits, the newest first. */
export function remembered() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) ?? [];
  } catch {
    return [];
  }
}

function keep() {
  const kept = items.filter((item) => item.id && (item.status === "completed" || (item.kind === "video" && open(item))));
  const plain = kept.slice(0, MOST).map(({ id, kind, wish, status, seeds, parameters, seconds, created }) =>
    ({ id, kind, wish, status, seeds, parameters, seconds, created }));
  localStorage.setItem(KEPT, JSON.stringify(plain));
}

/** Where the server has an output. */
export const address = (item, output, variant = "video") =>
  `v1/${item.kind}s/${item.id}/content?${item.kind === "video" ? `variant=${variant}&index` : "variant"}=${output}`;

/** Fetch an output that is not in this page yet. */
export async function load(item, output) {
  item.files ??= [];
  item.files[output] ??= (await askFile(address(item, output))) ?? (await elsewhere(item, output));
  return item.files[output];
}

/** The address of an output in another storage, whose pictures may be shown. */
async function elsewhere(item, output) {
  const job = await askJson(`v1/${item.kind}s/${item.id}`);
  return (job.data ?? job.outputs)[output].url;
}

const element = (name, fields) => Object.assign(document.createElement(name), fields);
const seconds = (s) => (s < 9.95 ? `${s.toFixed(1)} s` : s < 90 ? `${Math.round(s)} s` : `${Math.round(s / 60)} min`);

/** One line on how an item stands. */
function standing(item) {
  if (item.status === "failed") return item.error;
  if (item.status === "completed") return "";
  if (item.done) {
    const left = ((Date.now() - item.begun) / 1000 / item.done) * (item.total - item.done);
    const steps = item.kind === "video" ? `${item.done} %` : `step ${item.done} of ${item.total}`;
    return item.done < item.total ? `${steps}, ${seconds(left)} left` : "finishing";
  }
  if (item.status === "in_progress") return "beginning";
  const eta = item.eta ? `, done in about ${seconds(item.eta)}` : "";
  return (item.position ? `waiting behind ${item.position}` : item.position === 0 ? "next" : "waiting") + eta;
}

function showRow(item) {
  if (!rows.has(item)) {
    const row = byId("queue-row").content.firstElementChild.cloneNode(true);
    row.querySelector(".pick").onclick = () => show(item);
    row.querySelector(".drop-job").onclick = () => (open(item) ? item.stop() : forget(item));
    byId("queue").append(row);
    rows.set(item, row);
  }
  const row = rows.get(item);
  row.dataset.status = item.status;
  row.querySelector(".what").textContent = item.wish.prompt || "without a prompt";
  row.querySelector(".where").textContent = standing(item);
  row.querySelector("progress").value = item.total ? item.done / item.total : 0;
  row.querySelector(".drop-job").setAttribute("aria-label", open(item) ? "Cancel" : "Dismiss");
}

function showCards(item) {
  if (cards.has(item)) return;
  const made = item.seeds.map((seed, output) => {
    const card = byId("gallery-card").content.firstElementChild.cloneNode(true);
    const button = card.querySelector("button");
    button.setAttribute("aria-label", `${item.wish.prompt || "without a prompt"}, seed ${seed}`);
    button.onclick = () => { show(item, output); byId("viewer").scrollIntoView({ block: "nearest" }); };
    thumbnail(item, output).then((src) => button.append(element("img", { src, alt: "" })), () => forget(item));
    if (item.kind === "video") button.append(element("span", { className: "badge", textContent: "clip" }));
    return card;
  });
  cards.set(item, made);
  const older = items.slice(items.indexOf(item) + 1).find((other) => cards.has(other));
  if (older) cards.get(older)[0].before(...made);
  else byId("gallery").append(...made);
}

async function thumbnail(item, output) {
  const small = address(item, output, "thumbnail");
  return item.kind === "video" ? (await askFile(small)) ?? small : load(item, output);
}

function view() {
  const item = shown;
  const status = item?.status ?? "empty";
  byId("viewer").dataset.status = status;
  for (const [id, when] of Object.entries({
    cancel: item && open(item), download: status === "completed", reuse: item, remove: status === "completed",
    restart: status === "completed" && item.kind === "image",
  })) byId(id).hidden = !when;
  byId("progress").value = item?.total ? item.done / item.total : 0;
  byId("details").hidden = status !== "completed";
  byId("caption").textContent = !item ? "What you make appears here." : status === "completed" ? summary(item) : standing(item);
  for (const mark of document.querySelectorAll(".gallery [aria-current]")) mark.removeAttribute("aria-current");
  if (!item) { byId("media").replaceChildren(); return; }
  const { width = 1, height = 1 } = { ...item.wish, ...item.parameters };
  byId("media").style.setProperty("--ratio", width / height);
  byId("media").style.setProperty("--most", `${4 * width}px`);
  if (status === "completed") {
    cards.get(item)?.[index]?.querySelector("button").setAttribute("aria-current", "true");
    byId("parameters").replaceChildren(...Object.entries({ ...item.parameters, seed: item.seeds[index] }).flatMap(([name, value]) =>
      value === null || value === "" || value?.length === 0 ? [] : [element("dt", { textContent: name }), element("dd", { textContent: said(value) })]));
    viewMade(item, index);
  } else paint(item.preview && element("img", { src: item.preview, alt: "A preview", className: "preview" }), item.preview);
}

const said = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));

function summary(item) {
  const { width, height, num_frames: frames } = { ...item.wish, ...item.parameters };
  const parts = [item.wish.prompt, `${width} × ${height}`, frames > 1 && `${frames} frames`, `seed ${item.seeds[index]}`];
  return [...parts, item.seconds && `made in ${seconds(item.seconds)}`].filter(Boolean).join(" · ");
}

async function viewMade(item, output) {
  let src;
  try {
    src = await load(item, output);
  } catch (error) {
    byId("caption").textContent = error.message;
    return;
  }
  if (shown !== item || index !== output) return;
  const clip = { src, controls: true, loop: true, muted: true, autoplay: true, playsInline: true };
  const made = item.kind === "video" ? element("video", clip) : element("img", { src, alt: item.wish.prompt || "the picture" });
  if (item.kind === "video") made.setAttribute("aria-label", item.wish.prompt || "the clip");
  paint(made, src);
  byId("download").href = src;
  byId("download").download = `tinydiff-${item.seeds[output]}.${item.kind === "video" ? "mp4" : "png"}`;
}

let painted = 0;

/** Show a picture or clip in place of what was there, once it can be drawn, so that nothing flickers; the last one asked for wins. */
async function paint(made, src) {
  const turn = ++painted;
  if (byId("media").firstElementChild?.getAttribute("src") === (src ?? null) && src) return;
  if (made?.decode) await made.decode().catch(() => {});
  if (turn === painted) byId("media").replaceChildren(...(made ? [made] : []));
}

/** Have the server remove an item, and forget it. */
export async function remove(item) {
  forget(item);
  await ask(`v1/${item.kind}s/${item.id}`, { method: "DELETE" }).catch(() => {}); // it may be gone already
}
