// What stands on the desk: all that the next picture is made of. It survives a reload.

import { CLIENT } from "./api.js";
import { loadBlobs, saveBlob } from "./store.js";

const KEY = "minisd.desk";
/** Fields that belong to the person, not to the model: they stay when another model is chosen. */
const OWN = ["prompt", "negative_prompt", "seed"];

/** What the server has: `models`, `samplers`, `spacings`, names of `settings`, `limits`. */
export const server = { models: [], samplers: [], spacings: [], settings: [], limits: {} };

export const desk = {
  /** The name of the model. */
  model: null,
  /** Fields of the request that differ from the model's own, by their names; seeds are strings of digits. */
  fields: { prompt: "", seed: dice() },
  /** Whether the seed stays when pictures are drawn. */
  locked: false,
  /** How many pictures to draw and keep. */
  count: 1,
  /** Whether to draw while somebody types. */
  live: true,
  /** The picture to begin with, and what of it to repaint (white): files. */
  image: null,
  mask: null,
};

const listeners = new Set();

/** Calls `listener(names)` after each change, with the names of the fields and settings that changed. */
export function onChange(listener) {
  listeners.add(listener);
}

/** Changes the desk; of `fields` those that are named, where undefined takes the model's own. */
export function change({ fields = {}, ...rest }) {
  const names = [];
  for (const [name, value] of Object.entries(fields)) {
    if (same(desk.fields[name], value)) continue;
    if (value === undefined) delete desk.fields[name];
    else desk.fields[name] = value;
    names.push(name);
  }
  for (const [name, value] of Object.entries(rest)) {
    if (desk[name] === value) continue;
    desk[name] = value;
    names.push(name);
    if (name === "image" || name === "mask") saveBlob(name, value);
  }
  if (!names.length) return;
  save();
  for (const listener of listeners) listener(names);
}

function same(one, other) {
  return one === other || JSON.stringify(one) === JSON.stringify(other);
}

function save() {
  const { image, mask, ...plain } = desk;
  try {
    localStorage.setItem(KEY, JSON.stringify(plain));
  } catch {
    // storage is full or forbidden: the desk lasts as long as the page
  }
}

/** Takes the desk of the last time. */
export async function recall() {
  try {
    const stored = JSON.parse(localStorage.getItem(KEY)) ?? {};
    for (const name of ["model", "fields", "locked", "count", "live"]) {
      if (typeof stored[name] === typeof desk[name] || name === "model") desk[name] = stored[name] ?? desk[name];
    }
  } catch {
    // what is stored is damaged: begin anew
  }
  const blobs = await loadBlobs(["image", "mask"]);
  desk.image = blobs.image ?? null;
  desk.mask = desk.image && (blobs.mask ?? null);
}

/** The model in use, as the server describes it. */
export function model() {
  return server.models.find((each) => each.name === desk.model) ?? server.models[0];
}

/** Chooses a model; what another one's settings were is left behind. */
export function chooseModel(name) {
  const fields = {};
  for (const field of Object.keys(desk.fields)) if (!OWN.includes(field)) fields[field] = undefined;
  change({ model: name, fields });
}

/** A field's value, or what the model takes where nothing is said. */
export function shown(name) {
  if (name in desk.fields) return desk.fields[name];
  if (name === "spacing" && "sampler" in desk.fields) return null; // then it is the sampler's own
  return model()?.[name];
}

/** A new seed. */
export function dice() {
  return String(crypto.getRandomValues(new Uint32Array(1))[0]);
}

/** The seed that is so many further. */
export function further(seed, count) {
  return String((BigInt(seed) + BigInt(count)) % 2n ** 63n);
}

/** Whether there is something to draw from. */
export function hasSubject() {
  return Boolean(desk.fields.prompt?.trim() || desk.image || model()?.reads_text === false);
}

/** The request that stands on the desk, as the server reads it. */
export async function request(changes = {}) {
  const body = { prompt: "", ...desk.fields, model: model().name, client: CLIENT };
  if (Object.keys(model().loras).length) body.lora = shown("lora") ?? model().loras;
  if (!desk.image) delete body.strength;
  if (!body.mix_prompt) delete body.mix_strength;
  if (desk.image) body.image = await dataUri(desk.image);
  if (desk.image && desk.mask) body.mask_image = await dataUri(desk.mask);
  return { ...body, ...changes };
}

const uris = new WeakMap();

function dataUri(blob) {
  if (!uris.has(blob)) {
    uris.set(
      blob,
      new Promise((resolve, reject) => {
        const reader = new FileReader();
        reader.onload = () => resolve(reader.result);
        reader.onerror = () => reject(reader.error);
        reader.readAsDataURL(blob);
      }),
    );
  }
  return uris.get(blob);
}
