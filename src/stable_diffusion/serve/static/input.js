// Pictures that people bring: dropped, pasted or chosen. All three ways are one.

import { $ } from "./dom.js";
import * as live from "./live.js";
import { isParameters } from "./a1111.js";
import { pictureOf } from "./pictures.js";
import { ofText, restore, settingsOf } from "./restore.js";
import { show } from "./stage.js";
import { change, desk, onChange } from "./state.js";
import { say } from "./status.js";

const READ = ["image/png", "image/jpeg", "image/webp"];
/** Larger ones are made smaller here: they travel with each request. */
const LONGEST = 2048;
const HEAVY = 8 << 20;

export function start() {
  $("choose").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    take($("file").files);
    $("file").value = "";
  });
  addEventListener("paste", onPaste);
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    $("landing").hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) $("landing").hidden = true;
  });
  addEventListener("drop", (event) => {
    $("landing").hidden = true;
    if (!hasFiles(event)) return;
    event.preventDefault();
    take(event.dataTransfer.files);
  });
  $("remove").addEventListener("click", () => {
    change({ image: null, mask: null });
    $("choose").focus();
  });
  onChange((names) => {
    if (names.includes("image") || names.includes("mask")) render();
  });
  render();
}

const hasFiles = (event) => event.dataTransfer?.types.includes("Files");

function onPaste(event) {
  const { files } = event.clipboardData;
  const text = event.clipboardData.getData("text");
  if (files.length) {
    event.preventDefault();
    take(files);
  } else if (event.target === $("prompt") && isParameters(text)) {
    event.preventDefault();
    live.stop();
    say("The settings of that text are restored.", { notes: restore(ofText(text)) });
  }
}

/** Takes the first picture of some files: one that holds settings brings them back, another one begins a picture. */
async function take(files) {
  const file = [...files].find(({ type }) => type.startsWith("image/")) ?? files[0];
  if (!file) return;
  const found = await settingsOf(file);
  if (!found) return begin(file);
  const notes = restore(found);
  live.stop(); // the picture is there already
  const { settings, width, height } = found;
  const size = { width: settings.width ?? width, height: settings.height ?? height };
  const picture = { blob: file, settings: { ...settings, ...size }, seed: desk.fields.seed, width, height };
  await show([pictureOf(picture)]).catch(() => {});
  say(`The settings of ${file.name || "this picture"} are restored, and the seed is locked.`, {
    notes,
    action: { label: "Use it as input", run: () => begin(file) },
  });
}

/** Lets the next pictures begin from a file. */
export async function begin(file) {
  try {
    const image = await prepared(file);
    change({ image, mask: null });
    say("The next pictures start from this one.");
  } catch {
    say("This file cannot be read as a picture: use PNG, JPEG or WebP.", { error: true });
  }
}

/** The file itself, or, where the server could not take it, what the browser makes of it. */
async function prepared(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && READ.includes(file.type) && file.size < HEAVY) return file;
  const canvas = new OffscreenCanvas(Math.round(bitmap.width * scale), Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const type = file.type === "image/jpeg" ? "image/jpeg" : "image/png";
  return canvas.convertToBlob({ type, quality: 0.95 });
}

const shownUrls = { image: null, mask: null };

function render() {
  const { image, mask } = desk;
  $("choose").hidden = Boolean(image);
  $("begun").hidden = !image;
  $("paintLabel").textContent = mask ? "Edit the mask" : "Paint a mask";
  for (const name of ["image", "mask"]) {
    if (shownUrls[name]) URL.revokeObjectURL(shownUrls[name]);
    shownUrls[name] = desk[name] && URL.createObjectURL(desk[name]);
  }
  if (image) $("startImage").src = shownUrls.image;
  $("startMask").hidden = !mask;
  $("startMask").style.maskImage = mask ? `url(${shownUrls.mask})` : "";
}
