// An image on a canvas and the mask that is painted over it. Strokes are kept as lines in shares of the image's width, so that undo
// is leaving one out, and the mask comes at the image's own size however large it was shown.

const SHOWN = 1024; // pixels of the longer side on the screen at most
const TINT = "#e0567a";

export function makeBrush(canvas, onChange) {
  const context = canvas.getContext("2d");
  const layer = document.createElement("canvas");
  let image = null, strokes = [], drawing = false, pointer = null, erase = false, size = 0.14;

  function draw(target, scale, colour) {
    target.lineCap = target.lineJoin = "round";
    for (const stroke of strokes) {
      target.globalCompositeOperation = stroke.erase ? "destination-out" : "source-over";
      target.strokeStyle = colour;
      target.lineWidth = stroke.size * scale;
      target.beginPath();
      stroke.points.forEach(([x, y]) => target.lineTo(x * scale, y * scale));
      if (stroke.points.length === 1) target.lineTo(stroke.points[0][0] * scale + 0.01, stroke.points[0][1] * scale);
      target.stroke();
    }
    target.globalCompositeOperation = "source-over";
  }

  function show() {
    if (!image) return;
    const { width, height } = canvas;
    context.drawImage(image, 0, 0, width, height);
    layer.width = width; layer.height = height; // empties it too
    draw(layer.getContext("2d"), width, TINT);
    context.globalAlpha = 0.6;
    context.drawImage(layer, 0, 0);
    context.globalAlpha = 1;
    if (!pointer) return;
    for (const [colour, wider] of [["#000a", 1.5], ["#fff", 0]]) {
      context.strokeStyle = colour;
      context.lineWidth = width / 256;
      context.beginPath();
      context.arc(pointer[0] * width, pointer[1] * width, size * width / 2 + wider, 0, 7);
      context.stroke();
    }
  }

  function begin() {
    drawing = true;
    strokes.push({ erase, size, points: [[...pointer]] });
    changed();
  }
  function move(x, y) {
    pointer = [x, y];
    if (drawing) strokes.at(-1).points.push([x, y]);
    show();
  }
  function changed() { show(); onChange(); }
  function place(event) {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.width];
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    pointer = place(event);
    begin();
  });
  canvas.addEventListener("pointermove", (event) => move(...place(event)));
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { drawing = false; });
  for (const gone of ["pointerleave", "blur"]) {
    canvas.addEventListener(gone, () => { if (!drawing || gone === "blur") { drawing = false; pointer = null; show(); } });
  }
  canvas.addEventListener("keydown", (event) => {
    const tall = canvas.height / canvas.width;
    const step = event.shiftKey ? 0.005 : size / 2;
    const [x, y] = pointer ?? [0.5, tall / 2];
    const to = { ArrowLeft: [x - step, y], ArrowRight: [x + step, y], ArrowUp: [x, y - step], ArrowDown: [x, y + step] }[event.key];
    if (to) move(Math.min(1, Math.max(0, to[0])), Math.min(tall, Math.max(0, to[1])));
    else if (event.key === " " && !event.repeat) { pointer = [x, y]; begin(); }
    else if (event.key === "z" && (event.ctrlKey || event.metaKey)) self.undo();
    else if (event.key === "[" || event.key === "]") self.resize(size + (event.key === "]" ? 0.02 : -0.02));
    else if (event.key !== " ") return;
    event.preventDefault();
  });
  canvas.addEventListener("keyup", (event) => { if (event.key === " ") drawing = false; });

  const self = {
    /** Begin with an image (anything that can be drawn), or with null. */
    open(given) {
      [image, strokes, pointer, drawing] = [given, [], null, false];
      if (image) {
        const scale = Math.min(1, SHOWN / Math.max(image.width, image.height));
        canvas.width = Math.round(image.width * scale);
        canvas.height = Math.round(image.height * scale);
      }
      changed();
    },
    undo() { strokes.pop(); drawing = false; changed(); },
    erasing(on) { erase = on; },
    resize(to) { size = Math.min(0.5, Math.max(0.02, to)); changed(); },
    get size() { return size; },
    get strokes() { return strokes.length; },
    /** The mask as a PNG, white where painted and black elsewhere; null where nothing is. */
    async mask() {
      if (!image || !strokes.some((stroke) => !stroke.erase)) return null;
      const white = new OffscreenCanvas(image.width, image.height);
      draw(white.getContext("2d"), image.width, "#fff");
      const whole = new OffscreenCanvas(image.width, image.height);
      const target = whole.getContext("2d");
      target.fillRect(0, 0, whole.width, whole.height);
      target.drawImage(white, 0, 0);
      return whole.convertToBlob({ type: "image/png" });
    },
  };
  return self;
}
