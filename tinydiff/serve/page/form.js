// The form: what the model can do, what is asked of it, the given images, and where a mistake is shown.

import { makeBrush } from "./brush.js";

const byId = (id) => document.getElementById(id);
const form = byId("form");
const NUMBERS = ["width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale", "n", "strength"];
const ELSEWHERE = {
  size: "width", seconds: "num_frames", num_outputs_per_prompt: "n", true_cfg_scale: "guidance_scale", images: "image", "image[]": "image",
  image_path: "image", input_reference: "image", mask: "image", mask_path: "image",
};
const LARGEST = Number.MAX_SAFE_INTEGER;

let model = null, given = [], strong = false; // whether the user chose the strength
const brush = makeBrush(byId("canvas"), () => {
  byId("undo").disabled = !brush.strokes;
  byId("brush-size").value = Math.round(brush.size * 100);
  if (!strong) byId("strength").value = brush.strokes ? 1 : 0.6; // what the server does where it is not told
  showStrength();
});

export const kind = () => form.elements.kind.value;

/** Fill the form with what the model does where nothing is said. */
export function setUp(described) {
  model = described;
  byId("kinds").hidden = model.kinds.length < 2;
  if (!model.kinds.includes(kind())) form.elements.kind.value = model.kinds[0];
  byId("negative").hidden = !model.negative;
  form.elements.width.step = form.elements.height.step = model.multiple;
  form.elements.num_frames.step = model.stride;
  setDefaults(null);
}

/** Fields that still hold what the model does get what it does now. */
function setDefaults(before) {
  const [old, now] = [model.defaults[before] ?? {}, model.defaults[kind()]];
  for (const [name, value] of Object.entries(now)) {
    const input = form.elements[name];
    if (input && (!before || input.value === "" || input.value === String(old[name] ?? ""))) input.value = value;
  }
  for (const part of form.querySelectorAll("[data-kind]")) part.hidden = part.dataset.kind !== kind();
  const takes = model.images[kind()];
  byId("given").hidden = !takes;
  byId("given-label").textContent = { frames: "First frame", references: "Images to work from" }[takes?.use] ?? "Start from an image";
  showGiven();
}

/** What the form asks for: names of the interface and their values; what was left empty is left out. Throws at the first mistake. */
export function read() {
  const wish = { kind: kind(), prompt: form.elements.prompt.value.trim() };
  const negative = form.elements.negative_prompt.value.trim();
  if (negative && model.negative) wish.negative_prompt = negative;
  for (const name of NUMBERS) {
    const input = form.elements[name];
    if (input.closest("[data-kind]")?.hidden || (name === "strength" && byId("strength-field").hidden)) continue;
    if (input.validity.badInput) throw new Mistake(name, `${name}: that is not a number`);
    if (input.value !== "") wish[name] = Number(input.value);
  }
  const seed = form.elements.seed;
  if (seed.validity.badInput || Number(seed.value) > LARGEST) throw new Mistake("seed", `seed: give a whole number from 0 to ${LARGEST}`);
  wish.seed = seed.value === "" ? Math.floor(Math.random() * 2 ** 31) : Number(seed.value);
  return wish;
}

export class Mistake extends Error {
  constructor(field, message) { super(message); this.field = field; }
}

/** Put back what `read` gave once. */
export function write(wish, seed) {
  const before = kind();
  form.elements.kind.value = wish.kind;
  if (before !== kind()) setDefaults(before);
  form.elements.negative_prompt.value = "";
  strong = "strength" in wish;
  for (const [name, value] of Object.entries(wish)) {
    if (form.elements[name] && name !== "kind") form.elements[name].value = value;
  }
  form.elements.seed.value = seed ?? wish.seed;
  showDice(); showStrength(); grow();
  form.elements.prompt.focus();
}

/** Show a mistake at the field that it names, or below the form. */
export function refuse(field, message) {
  const input = form.elements[ELSEWHERE[field] ?? field];
  const hint = input?.type && !input.closest("[hidden]") && (input.closest(".row") ?? input.closest(".field")).querySelector(":scope > .hint");
  if (!hint) { byId("problem").textContent = message; return; }
  hint.textContent = message;
  hint.classList.add("error");
  hint.setAttribute("role", "alert");
  hint.id ||= `${input.name}-hint`;
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-describedby", hint.id);
  input.focus();
}

/** Forget all mistakes. */
export function accept() {
  byId("problem").textContent = "";
  for (const hint of form.querySelectorAll(".error")) {
    hint.textContent = "";
    hint.classList.remove("error");
  }
  for (const input of form.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
}

/** The given images of a request, and its mask where one was painted. */
export async function images() {
  const takes = model.images[kind()];
  return takes ? { files: given.map((one) => one.file), mask: takes.mask ? await brush.mask() : null } : { files: [], mask: null };
}

/** Go on from an image that was made. */
export async function startFrom(file) {
  if (!model.images[kind()] && model.images.image) {
    form.elements.kind.value = "image";
    form.elements.kind[0].dispatchEvent(new Event("change", { bubbles: true }));
  }
  if (!model.images[kind()]) throw new Mistake(null, "this model starts from no image");
  await give([file]);
  byId("given").scrollIntoView({ block: "nearest" });
}

/** Take images: the last ones where the model takes fewer. */
export async function give(files) {
  const takes = model?.images[kind()];
  if (!takes) return;
  const added = [];
  for (const file of files) {
    const image = new Image();
    image.src = URL.createObjectURL(file);
    try {
      await image.decode();
    } catch {
      refuse("image", `image: ${file.name} is not an image that this browser can show`);
      continue;
    }
    added.push({ file, image });
  }
  given = [...given, ...added].slice(-takes.most);
  openBrush();
  showGiven();
}

function showGiven() {
  const takes = model.images[kind()];
  const list = byId("images");
  byId("brush").hidden = !(takes?.mask && given.length);
  byId("strength-field").hidden = !(takes?.use === "start" && given.length);
  byId("drop").classList.toggle("small", given.length > 0);
  list.hidden = !given.length || Boolean(takes?.mask);
  list.replaceChildren(...given.map((one, index) => {
    const row = document.createElement("li");
    const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "✕", className: "icon" });
    remove.setAttribute("aria-label", `Remove ${one.file.name}`);
    remove.onclick = () => drop(index);
    one.image.alt = one.file.name;
    row.append(one.image, remove);
    return row;
  }));
}

function drop(index) {
  given.splice(index, 1);
  if (!index) openBrush();
  showGiven();
  byId("image").focus();
}

const openBrush = () => brush.open(given[0] ? Object.assign(new Image(), { src: given[0].image.src }) : null);
const showDice = () => byId("dice").setAttribute("aria-pressed", String(form.elements.seed.value === ""));
const showStrength = () => { form.querySelector("output").value = Number(form.elements.strength.value).toFixed(2); };

/** Text fields are as tall as their text, where the browser cannot do so by itself. */
function grow() {
  if (CSS.supports("field-sizing", "content")) return;
  for (const area of form.querySelectorAll("textarea")) {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
  }
}

let lastKind = kind();
form.addEventListener("change", (event) => {
  if (event.target.name !== "kind") return;
  accept();
  setDefaults(lastKind);
  lastKind = kind();
});
form.addEventListener("input", () => { showDice(); showStrength(); grow(); });
byId("dice").onclick = () => {
  const seed = form.elements.seed;
  seed.value = seed.value === "" ? Math.floor(Math.random() * 2 ** 31) : "";
  showDice();
};
byId("swap").onclick = () => {
  const { width, height } = form.elements;
  [width.value, height.value] = [height.value, width.value];
};
byId("image").onchange = async (event) => {
  await give(event.target.files);
  event.target.value = "";
};
for (const name of ["dragover", "drop"]) {
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    if (name === "drop") give(event.dataTransfer.files);
  });
}
document.addEventListener("paste", (event) => { if (event.clipboardData.files.length) give(event.clipboardData.files); });

function press(erase) {
  brush.erasing(erase);
  byId("paint").setAttribute("aria-pressed", String(!erase));
  byId("erase").setAttribute("aria-pressed", String(erase));
}
byId("paint").onclick = () => press(false);
byId("erase").onclick = () => press(true);
byId("strength").oninput = () => { strong = true; };
byId("undo").onclick = () => brush.undo();
byId("clear").onclick = () => drop(0);
byId("brush-size").oninput = (event) => brush.resize(event.target.value / 100);
showStrength();
