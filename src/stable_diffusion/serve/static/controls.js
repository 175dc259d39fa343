// The settings: every control that names a field of the request in `data-field` shows and sets it.

import { $, el, fill } from "./dom.js";
import { change, chooseModel, desk, dice, model, onChange, server, shown } from "./state.js";

/** What the server takes where neither the desk nor the model says anything. */
const USUAL = {
  ...{ guidance_rescale: 0, variance: "small", negative_prompt: "", variation_strength: 0 },
  ...{ mix_prompt: "", mix_strength: 0, hires: 1, hires_strength: 0.7 },
};
const MOST = 9;
const SEEDS = ["seed", "variation_seed"];
/** Not settings of the picture's making, or shown elsewhere. */
const APART = ["prompt", "negative_prompt", "seed", "strength", "lora"];

const controls = [...document.querySelectorAll("[data-field]")];

export function start() {
  for (const control of controls) {
    control.addEventListener("input", () => set(control.dataset.field, valueOf(control)));
  }
  $("seed").addEventListener("input", () => {
    if (/^\d+$/.test($("seed").value)) change({ fields: { seed: $("seed").value } });
  });
  $("seed").addEventListener("blur", render);
  $("dice").addEventListener("click", () => change({ fields: { seed: dice() } }));
  $("lock").addEventListener("click", () => change({ locked: !desk.locked }));
  $("live").addEventListener("change", () => change({ live: $("live").checked }));
  $("count").addEventListener("change", () => change({ count: Number($("count").value) }));
  $("model").addEventListener("change", () => chooseModel($("model").value));
  $("reset").addEventListener("click", () => chooseModel(model().name));
  const counts = Array.from({ length: MOST }, (_, index) => [index + 1, index ? `${index + 1} pictures` : "1 picture"]);
  choices($("count"), counts);
  if (/Mac|iP(hone|ad)/.test(navigator.platform)) $("drawKeys").textContent = "⌘ ↵";
  onChange((names) => {
    if (names.includes("model")) describe();
    render();
  });
  describe();
  render();
}

function valueOf(control) {
  if (control.type === "number" || control.type === "range") {
    return Number.isNaN(control.valueAsNumber) ? undefined : control.valueAsNumber;
  }
  if (SEEDS.includes(control.dataset.field)) return /^\d+$/.test(control.value) ? control.value : undefined;
  if (control.dataset.field === "prompt") return control.value;
  return control.value || undefined;
}

/** Sets a field; what the model takes anyway is not said. */
function set(name, value) {
  const fields = { [name]: value === own(name) ? undefined : value };
  if (name === "sampler") fields.spacing = undefined; // its own
  if (name === "variation_strength" && value && !desk.fields.variation_seed) fields.variation_seed = dice();
  if (name === "mix_prompt" && value && !desk.fields.mix_strength) fields.mix_strength = 0.5;
  change({ fields });
}

/** What is taken where the desk says nothing. */
function own(name) {
  if (name === "spacing" && "sampler" in desk.fields) return undefined; // the sampler's
  if (["width", "height"].includes(name) && desk.image) return undefined; // the picture's
  return model()[name] ?? USUAL[name];
}

/** Whether a field makes another picture than the model's own settings do. */
function differs(name) {
  return name in desk.fields && desk.fields[name] !== (model()[name] ?? USUAL[name] ?? null);
}

/** Shows what the server has: models, samplers, limits. */
function describe() {
  const { name, width, height } = model();
  const several = server.models.length > 1;
  $("modelChoice").hidden = !several;
  $("modelName").hidden = several;
  $("modelName").textContent = name;
  choices($("model"), server.models.map((each) => [each.name, each.name]));
  choices($("sampler"), server.samplers.map((each) => [each, each]));
  choices($("spacing"), [["", "default"], ...server.spacings.map((each) => [each, each])]);
  $("steps").max = server.limits.num_inference_steps;
  for (const side of ["width", "height"]) $(side).max = server.limits[side];
  $("sizeHint").textContent = `${width} × ${height} is native. Other sizes are generated near it, then scaled.`;
  for (const id of ["promptField", "promptLabel"]) $(id).hidden = model().reads_text === false;
  const loras = Object.entries(model().loras);
  $("loraField").hidden = !loras.length;
  $("loras").replaceChildren(...loras.map(([lora]) => loraSlider(lora)));
}

function choices(select, all) {
  select.replaceChildren(...all.map(([value, text]) => el("option", { value, textContent: text })));
}

function loraSlider(name) {
  const id = `lora-${name}`;
  const label = el("label", { htmlFor: id, textContent: name });
  const bounds = { min: -1, max: 2, step: 0.05, dataset: { lora: name } };
  const range = el("input", { type: "range", ...bounds, aria: { label: `${name}, as a slider` } });
  const number = el("input", { type: "number", ...bounds, min: -10, max: 10, id });
  for (const input of [range, number]) {
    input.addEventListener("input", () => {
      const weight = input.valueAsNumber;
      if (!Number.isNaN(weight)) change({ fields: { lora: { ...weights(), [name]: weight } } });
    });
  }
  return el("div", { className: "slider" }, label, range, number);
}

const weights = () => desk.fields.lora ?? model().loras;

function render() {
  for (const control of controls) {
    const name = control.dataset.field;
    put(control, shown(name) ?? USUAL[name] ?? "");
  }
  for (const side of ["width", "height"]) {
    put($(side), desk.fields[side] ?? "");
    $(side).placeholder = desk.image ? "the picture’s" : model()[side];
  }
  for (const input of $("loras").querySelectorAll("input")) put(input, weights()[input.dataset.lora] ?? 0);
  for (const row of document.querySelectorAll("[data-for]")) {
    row.hidden = !row.dataset.for.split(" ").includes(shown("sampler"));
  }
  for (const row of document.querySelectorAll("[data-when]")) row.hidden = !differs(row.dataset.when);
  if (document.activeElement !== $("seed")) put($("seed"), desk.fields.seed);
  $("lock").setAttribute("aria-pressed", desk.locked);
  $("live").checked = desk.live;
  put($("count"), desk.count);
  put($("model"), model().name);
  $("drawLabel").textContent = desk.count > 1 ? `Generate ${desk.count}` : "Generate";
  const names = new Set(controls.map((control) => control.dataset.field));
  const changed = Object.keys(desk.fields).filter((name) => names.has(name) && !APART.includes(name) && differs(name));
  const what = changed.length === 1 ? labelOf(changed[0]) : changed.length;
  $("changed").textContent = changed.length ? `${what} changed` : "";
}

/** What stands before a field's control. */
function labelOf(field) {
  const { labels } = controls.find((control) => control.dataset.field === field && control.labels.length);
  return labels[0].firstChild.textContent.trim();
}

/** Sets a control's value unless it says that already, so that no cursor moves while somebody types. */
function put(control, value) {
  const { type, valueAsNumber } = control;
  if (type === "number" ? valueAsNumber !== value : control.value !== String(value)) control.value = value;
  if (control.type === "range") fill(control);
}
