// Settings of a picture, ours or a stranger's, put back on the desk.

import { isParameters, readParameters } from "./a1111.js";
import { parse } from "./json.js";
import { readPng } from "./png.js";
import { change, desk, model, server } from "./state.js";

/** Chosen where the server starts, or files: data of a picture never say them. */
const LEFT_OUT = ["model", "prediction_type", "variant", "ema", "vae", "text_encoder", "embedding"];
const PICTURES = ["image", "mask_image", "latents"];
const COUNT = "num_images_per_prompt";

/** What a file says of how it was made, `{settings, kind, unknown, width, height}`; null where it says nothing. */
export async function settingsOf(file) {
  const png = await readPng(file);
  if (!png) return null;
  const { width, height, texts } = png;
  try {
    const settings = texts.minisd && parse(texts.minisd);
    if (settings && typeof settings === "object" && typeof settings.prompt === "string") {
      return { settings, kind: "minisd", unknown: [], width, height };
    }
  } catch {
    // a damaged chunk: the other one may be whole
  }
  return texts.parameters && isParameters(texts.parameters) ? { ...ofText(texts.parameters), width, height } : null;
}

/** The same of a text that people copy out of other programs. */
export function ofText(text) {
  const { fields, unknown } = readParameters(text, server);
  return { settings: fields, kind: "a1111", unknown };
}

/**
 * Puts settings on the desk, the seed locked, and gives the notes on what could not be taken.
 * @param found what `settingsOf` gave; the picture's own size is the one that was asked for
 * @param more the picture to begin with, the mask and the model's name, where they are known, and whether the seed is
 *   locked
 */
export function restore(found, { image = null, mask = null, locked = true, model: made = found.settings.model } = {}) {
  const { settings, kind, unknown, width, height } = found;
  const notes = [...unknown];
  const fields = Object.fromEntries(Object.keys(desk.fields).map((name) => [name, undefined]));
  for (const [name, value] of Object.entries(settings)) {
    if ([...LEFT_OUT, ...PICTURES, COUNT, "lora"].includes(name) || !isPlain(value)) continue;
    if (server.settings.includes(name)) fields[name] = value;
    else notes.push(`this server has no setting ${name}`);
  }
  for (const name of ["seed", "variation_seed"]) if (fields[name] != null) fields[name] = String(fields[name]);
  fields.prompt ??= "";
  fields.seed = /^\d+$/.test(fields.seed) ? fields.seed : desk.fields.seed;
  fields.prompt_syntax ??= "plain"; // what the library takes where nothing is said
  const packaged = kind === "minisd" && made === null;
  const chosen = server.models.find((each) => (packaged ? each.packaged : [made, servedAs(made)].includes(each.name)));
  if (made && !chosen) notes.push(`another model made it: ${made}`);
  const used = chosen ?? model();
  if (kind === "a1111") {
    takeLoras(fields, used, notes);
    const own = fields.sampler === used.sampler && !fields.spacing;
    if (own) delete fields.sampler; // and with it the model's own spacing, which that text has no name for
  } else {
    const given = settings.lora && typeof settings.lora === "object" ? Object.entries(settings.lora) : [];
    fields.lora = Object.fromEntries(given.filter(([name]) => name in used.loras));
    const missing = given.map(([name]) => name).filter((name) => !(name in used.loras));
    if (missing.length) notes.push(`not served here: ${missing.join(", ")}`);
  }
  if (!Object.keys(used.loras).length) delete fields.lora;
  const enlarged = Number(fields.hires) || 1;
  if (width) [fields.width, fields.height] = [width, height].map((side) => Math.round(side / enlarged));
  if (fields.width === used.width && fields.height === used.height && !image) {
    [fields.width, fields.height] = [undefined, undefined];
  }
  if ("strength" in settings && !image) {
    notes.push("it started from another picture, which the file does not hold: add that one too");
  }
  if (settings.embedding || settings.vae) notes.push("its files of weights are chosen when the server starts");
  change({ fields, model: used.name, image, mask, locked });
  return notes;
}

/** The name under which a model that was read from a path is served (`_name` of cli/serve.py). */
function servedAs(path) {
  const parts = String(path ?? "").split(/[\\/]+/).filter(Boolean);
  if (parts.length > 1 && parts.at(-1) === "model") parts.pop();
  return parts.at(-1)?.replace(/\.(safetensors|ckpt)$/, "");
}

/** Numbers, texts, and lists of numbers: all that a setting can be. */
function isPlain(value) {
  const list = Array.isArray(value) && value.length <= 8 && value.every((each) => typeof each === "number");
  return value === null || list || ["string", "number", "boolean"].includes(typeof value);
}

/** Moves `<lora:name:0.8>` from the prompt to where we have LoRAs. */
function takeLoras(fields, used, notes) {
  const lora = {};
  fields.prompt = fields.prompt
    .replace(/\s*<lora:([^:<>]+)(?::([^<>]*))?>/g, (_, name, weight) => {
      if (name in used.loras) lora[name] = (lora[name] ?? 0) + (Number.parseFloat(weight) || (weight ? 0 : 1));
      else notes.push(`the LoRA ${name} is not served here`);
      return "";
    })
    .trim();
  fields.lora = lora;
}
