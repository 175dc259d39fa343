// A mask as a list of strokes on a canvas: what is painted is repainted by the model.

const COLOUR = "#d4147a";
const MOST = 500; // strokes that can be undone

/** The mask of a picture, on a canvas of the picture's pixels. */
export class Mask {
  #canvas;
  #context;
  #base = null; // a mask from before, beneath all strokes
  #strokes = [];

  constructor(canvas) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d", { willReadFrequently: true });
  }

  /** Begins anew for a picture of that size, on a mask of it where there is one. */
  async open(width, height, mask) {
    this.#strokes = [];
    this.#base = null;
    Object.assign(this.#canvas, { width, height });
    if (mask) this.#base = await layerOf(mask, width, height);
    this.#paintAll();
  }

  get width() {
    return this.#canvas.width;
  }

  get height() {
    return this.#canvas.height;
  }

  /** Whether there is something to undo. */
  get changed() {
    return this.#strokes.length > 0;
  }

  /** Begins a stroke of that thickness; points are in the picture's pixels. */
  begin(x, y, thickness, erases) {
    if (this.#strokes.length >= MOST) this.#flatten();
    this.#strokes.push({ kind: "line", thickness, erases, points: [[x, y]] });
    this.#part(this.#strokes.at(-1), 0);
  }

  /** Goes on with the stroke. */
  move(x, y) {
    const stroke = this.#strokes.at(-1);
    stroke.points.push([x, y]);
    this.#part(stroke, stroke.points.length - 1);
  }

  clear() {
    this.#do({ kind: "clear" });
  }

  invert() {
    this.#do({ kind: "invert" });
  }

  undo() {
    this.#strokes.pop();
    this.#paintAll();
  }

  /** The mask as a PNG, white on black; null where nothing is painted. */
  async toBlob() {
    const { width, height } = this;
    const pixels = this.#context.getImageData(0, 0, width, height);
    let painted = false;
    for (let at = 0; at < pixels.data.length; at += 4) {
      const white = pixels.data[at + 3] > 127;
      painted ||= white;
      pixels.data.fill(white ? 255 : 0, at, at + 3);
      pixels.data[at + 3] = 255;
    }
    if (!painted) return null;
    const canvas = new OffscreenCanvas(width, height);
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    return canvas.convertToBlob({ type: "image/png" });
  }

  #do(stroke) {
    this.#strokes.push(stroke);
    this.#paint(stroke);
  }

  #paintAll() {
    const { width, height } = this;
    this.#context.globalCompositeOperation = "source-over";
    this.#context.clearRect(0, 0, width, height);
    if (this.#base) this.#context.drawImage(this.#base, 0, 0);
    for (const stroke of this.#strokes) this.#paint(stroke);
  }

  #paint(stroke) {
    const { width, height } = this;
    if (stroke.kind === "line") return stroke.points.forEach((_, at) => this.#part(stroke, at));
    this.#context.fillStyle = COLOUR;
    this.#context.globalCompositeOperation = stroke.kind === "clear" ? "destination-out" : "xor";
    this.#context.fillRect(0, 0, width, height);
  }

  /** A part of a stroke: its beginning, or the way to a later point. Repainting it gives the same pixels. */
  #part({ thickness, erases, points }, at) {
    const context = this.#context;
    context.globalCompositeOperation = erases ? "destination-out" : "source-over";
    Object.assign(context, { strokeStyle: COLOUR, lineWidth: thickness, lineCap: "round" });
    const [[x, y], [toX, toY]] = [points[Math.max(0, at - 1)], points[at]];
    context.beginPath();
    context.moveTo(x, y);
    context.lineTo(toX + 0.01, toY); // a line of no length may be left out
    context.stroke();
  }

  #flatten() {
    this.#base = new OffscreenCanvas(this.width, this.height);
    this.#base.getContext("2d").drawImage(this.#canvas, 0, 0);
    this.#strokes = [];
  }
}

/** A stored mask, white on black, as a layer: opaque where it is white. */
async function layerOf(mask, width, height) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.drawImage(await createImageBitmap(mask), 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height);
  for (let at = 0; at < pixels.data.length; at += 4) pixels.data[at + 3] = pixels.data[at] > 127 ? 255 : 0;
  context.putImageData(pixels, 0, 0);
  context.globalCompositeOperation = "source-in";
  context.fillStyle = COLOUR;
  context.fillRect(0, 0, width, height);
  return canvas;
}
