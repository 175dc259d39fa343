// Painting a mask on the stage: by mouse, touch and pen, and by keys.

import { $, fill } from "./dom.js";
import { hold } from "./live.js";
import { Mask } from "./mask.js";
import { setMode } from "./stage.js";
import { change, desk } from "./state.js";

let mask;
let url = null;
let pointer = null; // the pointer that paints
let place = [0.5, 0.5]; // of the brush, as parts of the width and the height
let spaceHeld = false;

export function start() {
  mask = new Mask($("layer"));
  $("paint").addEventListener("click", openPainter);
  $("painted").addEventListener("click", close);
  $("erase").addEventListener("click", toggleErase);
  for (const name of ["undo", "clear", "invert"]) $(name).addEventListener("click", () => edit(name));
  $("brushSize").addEventListener("input", showBrush);
  const layer = $("layer");
  layer.addEventListener("pointerdown", onDown);
  layer.addEventListener("pointermove", onMove);
  layer.addEventListener("pointerleave", () => $("easel").classList.remove("near"));
  for (const name of ["pointerup", "pointercancel"]) layer.addEventListener(name, onUp);
  layer.addEventListener("keydown", onKey);
  layer.addEventListener("keyup", (event) => {
    if (event.key === " ") spaceHeld = false;
  });
  layer.addEventListener("focus", showBrush);
  new ResizeObserver(showBrush).observe(layer);
}

export const isOpen = () => $("figure").dataset.mode === "mask";

async function openPainter() {
  hold("mask", true);
  if (url) URL.revokeObjectURL(url);
  $("below").src = url = URL.createObjectURL(desk.image);
  await $("below").decode();
  const { naturalWidth: width, naturalHeight: height } = $("below");
  $("easel").style.setProperty("--ratio", width / height);
  await mask.open(width, height, desk.mask);
  setMode("mask");
  refresh();
  $("layer").focus({ preventScroll: true });
  $("figure").scrollIntoView({ block: "nearest" });
}

/** Ends the painting; what is painted becomes the mask. */
export async function close() {
  if (!isOpen()) return;
  const blob = await mask.toBlob();
  // A painted part changes wholly, unless somebody said how much.
  const fields = blob && !desk.mask && desk.fields.strength === undefined ? { strength: 1 } : {};
  change({ mask: blob, fields });
  leave();
  $("paint").focus({ preventScroll: true });
}

/** Ends the painting without a mask: the picture is gone. */
export function leave() {
  if (!isOpen()) return;
  [pointer, spaceHeld] = [null, false];
  setMode();
  hold("mask", false);
}

function edit(name) {
  if (pointer !== null || spaceHeld) return; // a stroke is not done yet
  mask[name]();
  refresh();
}

function refresh() {
  $("undo").disabled = !mask.changed;
  showBrush();
}

function toggleErase() {
  $("erase").setAttribute("aria-pressed", !erases());
}

const erases = () => $("erase").getAttribute("aria-pressed") === "true";

/** The brush's thickness in the picture's pixels. */
const thickness = () => (Number($("brushSize").value) / 100) * Math.max(mask.width, mask.height);

/** Where a pointer is, in the picture's pixels, however large the picture is shown. */
function pointOf(event) {
  const { left, top, width, height } = $("layer").getBoundingClientRect();
  place = [(event.clientX - left) / width, (event.clientY - top) / height];
  return pixel();
}

const pixel = () => [place[0] * mask.width, place[1] * mask.height];

function showBrush() {
  if (!mask.width) return;
  fill($("brushSize"));
  const { width } = $("layer").getBoundingClientRect();
  const style = $("brush").style;
  style.setProperty("--size", `${(thickness() * width) / mask.width}px`);
  style.setProperty("--x", `${100 * place[0]}%`);
  style.setProperty("--y", `${100 * place[1]}%`);
  const [left, top] = place.map((part) => Math.round(100 * part));
  $("brushPlace").textContent = `The brush is at ${left} % from the left, ${top} % from the top.`;
}

function onDown(event) {
  if (pointer !== null || event.button > 0 && event.button !== 5) return;
  pointer = event.pointerId;
  $("layer").setPointerCapture(pointer);
  $("layer").focus({ preventScroll: true });
  const turned = event.button === 5; // a pen's other end
  mask.begin(...pointOf(event), thickness(), erases() || turned);
  refresh();
  event.preventDefault();
}

function onMove(event) {
  $("easel").classList.add("near");
  if (event.pointerId === pointer) {
    const all = event.getCoalescedEvents?.() ?? [];
    for (const each of all.length ? all : [event]) mask.move(...pointOf(each));
  } else if (pointer === null) {
    pointOf(event);
  }
  showBrush();
}

function onUp(event) {
  if (event.pointerId === pointer) pointer = null;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey) {
    if (event.key.toLowerCase() !== "z") return;
    edit("undo");
    return event.preventDefault();
  }
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (event.key in moves) {
    // Half a brush, so that one dot meets the next; with Shift a pixel.
    const step = event.shiftKey ? 1 : Math.max(1, thickness() / 2);
    const [x, y] = moves[event.key];
    place = [place[0] + (x * step) / mask.width, place[1] + (y * step) / mask.height];
    place = place.map((part) => Math.max(0, Math.min(1, part)));
    if (spaceHeld) mask.move(...pixel());
  } else if (event.key === " ") {
    if (!spaceHeld) mask.begin(...pixel(), thickness(), erases());
    spaceHeld = true;
  } else if (event.key === "[" || event.key === "]") {
    $("brushSize").valueAsNumber += event.key === "[" ? -2 : 2;
  } else if (event.key.toLowerCase() === "e") {
    toggleErase();
  } else if (event.key.toLowerCase() === "u") {
    edit("undo");
  } else {
    return;
  }
  refresh();
  event.preventDefault();
}
