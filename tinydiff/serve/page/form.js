// The form: the model's limits and defaults, the request, its input images, and errors at their fields.

import { makeBrush } from "./brush.js";

const byId = (id) => document.getElementById(id);
const form = byId("form");
const NUMBERS = ["width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale", "n", "strength"];
const FORM_FIELDS = {
  size: "width", seconds: "num_frames", num_outputs_per_prompt: "n", true_cfg_scale: "guidance_scale", images: "image", "image[]": "image",
  image_path: "image", input_reference: "image", mask: "image", mask_path: "image",
};
const LARGEST = Number.MAX_SAFE_INTEGER;

let model = null, given = [], strengthChosen = false; // strengthChosen: whether the user set the strength
const brush = makeBrush(byId("canvas"), () => {
  byId("undo").disabled = !brush.strokes;
  byId("brush-size").value = Math.round(brush.size * 100);
  if (!strengthChosen) byId("strength").value = brush.strokes ? 1 : 0.6; // the server's default
  showStrength();
});

export const kind = () => form.elements.kind.value;

/** Fill the form with the model's defaults. */
export function setUp(described) {
  model = described;
  byId("kinds").hidden = model.kinds.length < 2;
  if (!model.kinds.includes(kind())) form.elements.kind.value = model.kinds[0];
  byId("negative").hidden = !model.negative;
  form.elements.width.step = form.elements.height.step = model.multiple;
  form.elements.num_frames.step = model.stride;
  setDefaults(null);
}

/** Fields that still have the default of kind `before` get the default of the current kind. */
function setDefaults(before) {
  const [old, now] = [model.defaults[before] ?? {}, model.defaults[kind()]];
  for (const [name, value] of Object.entries(now)) {
    const input = form.elements[name];
    if (input && (!before || input.value === "" || input.value === String(old[name] ?? ""))) input.value = value;
  }
  for (const part of form.querySelectorAll("[data-kind]")) part.hidden = part.dataset.kind !== kind();
  const accepts = model.images[kind()];
  byId("given").hidden = !accepts;
  byId("given-label").textContent = { frames: "First frame", references: "Reference images" }[accepts?.use] ?? "Start from an image";
  showGiven();
}

/** The request: API field names and values, without empty fields. Throws at the first invalid field. */
export function read() {
  const wish = { kind: kind(), prompt: form.elements.prompt.value.trim() };
  const negative = form.elements.negative_prompt.value.trim();
  if (negative && model.negative) wish.negative_prompt = negative;
  for (const name of NUMBERS) {
    const input = form.elements[name];
    if (input.closest("[data-kind]")?.hidden || (name === "strength" && byId("strength-field").hidden)) continue;
    if (input.validity.badInput) throw new FieldError(name, `${name}: must be a number`);
    if (input.value !== "") wish[name] = Number(input.value);
  }
  const seed = form.elements.seed;
  if (seed.validity.badInput || Number(seed.value) > LARGEST) throw new FieldError("seed", `seed: must be an integer from 0 to ${LARGEST}`);
  wish.seed = seed.value === "" ? Math.floor(Math.random() * 2 ** 31) : Number(seed.value);
  return wish;
}

export class FieldError extends Error {
  constructor(field, message) { super(message); this.field = field; }
}

/** Fill the form with an earlier result of `read`. */
export function write(wish, seed) {
  const before = kind();
  form.elements.kind.value = wish.kind;
  if (before !== kind()) setDefaults(before);
  form.elements.negative_prompt.value = "";
  strengthChosen = "strength" in wish;
  for (const [name, value] of Object.entries(wish)) {
    if (form.elements[name] && name !== "kind") form.elements[name].value = value;
  }
  form.elements.seed.value = seed ?? wish.seed;
  showDice(); showStrength(); grow();
  form.elements.prompt.focus();
}

/** Show an error at its field, or below the form. */
export function refuse(field, message) {
  const input = form.elements[FORM_FIELDS[field] ?? field];
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

/** Clear all errors. */
export function accept() {
  byId("problem").textContent = "";
  for (const hint of form.querySelectorAll(".error")) {
    hint.textContent = "";
    hint.classList.remove("error");
  }
  for (const input of form.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
}

/** The input images of a request, and its mask if one was painted. */
export async function images() {
  const accepts = model.images[kind()];
  return accepts ? { files: given.map((one) => one.file), mask: accepts.mask ? await brush.mask() : null } : { files: [], mask: null };
}

/** Use an output as the input image. */
export async function startFrom(file) {
  if (!model.images[kind()] && model.images.image) {
    form.elements.kind.value = "image";
    form.elements.kind[0].dispatchEvent(new Event("change", { bubbles: true }));
  }
  if (!model.images[kind()]) throw new FieldError(null, "this model takes no input image");
  await addImages([file]);
  byId("given").scrollIntoView({ block: "nearest" });
}

/** Add input images: the last ones where the model accepts fewer. */
export async function addImages(files) {
  const accepts = model?.images[kind()];
  if (!accepts) return;
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
  given = [...given, ...added].slice(-accepts.most);
  openBrush();
  showGiven();
}

function showGiven() {
  const accepts = model.images[kind()];
  const list = byId("images");
  byId("brush").hidden = !(accepts?.mask && given.length);
  byId("strength-field").hidden = !(accepts?.use === "start" && given.length);
  byId("drop").classList.toggle("small", given.length > 0);
  list.hidden = !given.length || Boolean(accepts?.mask);
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
  await addImages(event.target.files);
  event.target.value = "";
};
for (const name of ["dragover", "drop"]) {
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    if (name === "drop") addImages(event.dataTransfer.files);
  });
}
document.addEventListener("paste", (event) => { if (event.clipboardData.files.length) addImages(event.clipboardData.files); });

function press(erase) {
  brush.erasing(erase);
  byId("paint").setAttribute("aria-pressed", String(!erase));
  byId("erase").setAttribute("aria-pressed", String(erase));
}
byId("paint").onclick = () => press(false);
byId("erase").onclick = () => press(true);
byId("strength").oninput = () => { strengthChosen = true; };
byId("undo").onclick = () => brush.undo();
byId("clear").onclick = () => drop(0);
byId("brush-size").oninput = (event) => brush.resize(event.target.value / 100);
showStrength();
