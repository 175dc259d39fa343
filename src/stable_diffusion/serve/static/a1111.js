// The text of settings that AUTOMATIC1111's webui writes into pictures, and many programs with it.

/** Its names of what a request has. */
const NUMBERS = {
  Steps: "num_inference_steps",
  "CFG scale": "guidance_scale",
  "Denoising strength": "strength",
  "Variation seed strength": "variation_strength",
  "Hires upscale": "hires",
  Eta: "eta",
};
const SAMPLERS = { plms: "pndm" };
const SPACINGS = { uniform: "linspace", normal: "linspace", simple: "trailing", ddimuniform: "leading" };
const LINE = /^\s*Steps: \d+\s*,/;

/** Whether a text is one of settings. */
export function isParameters(text) {
  return text.split("\n").some((line) => LINE.test(line));
}

/**
 * Settings by our names: `{fields, unknown}`, of which `unknown` are sentences on what could not be taken.
 * @param {string} text
 * @param {{samplers: string[], spacings: string[]}} known our names
 */
export function readParameters(text, known) {
  const lines = text.replace(/\r/g, "").split("\n");
  const last = lines.findLastIndex((line) => LINE.test(line));
  const words = last < 0 ? lines : lines.slice(0, last);
  const said = last < 0 ? {} : pairs(lines.slice(last).join(", "));
  const negative = words.findIndex((line) => line.startsWith("Negative prompt:"));
  const fields = {
    prompt: (negative < 0 ? words : words.slice(0, negative)).join("\n").trim(),
    negative_prompt: negative < 0 ? "" : words.slice(negative).join("\n").slice("Negative prompt:".length).trim(),
    prompt_syntax: "a1111",
  };
  const unknown = [];
  for (const [key, name] of Object.entries(NUMBERS)) {
    if (said[key] !== undefined && Number.isFinite(Number(said[key]))) fields[name] = Number(said[key]);
  }
  for (const [key, name] of [["Seed", "seed"], ["Variation seed", "variation_seed"]]) {
    if (/^\d{1,19}$/.test(said[key])) fields[name] = said[key];
  }
  if (fields.hires > 1) {
    fields.hires_strength = fields.strength; // it writes one of the two, under the same name
    delete fields.strength;
  }
  const size = /^(\d+)x(\d+)$/.exec(said.Size);
  if (size) [fields.width, fields.height] = [Number(size[1]), Number(size[2])];
  if (said.Model) fields.model = said.Model;
  if (said.Sampler) {
    const [sampler, spacing] = samplerOf(said.Sampler, known);
    if (sampler) fields.sampler = sampler;
    else unknown.push(`the sampler ${said.Sampler} is not here`);
    const named = plain(said["Schedule type"] ?? "automatic");
    const ours = known.spacings.find((each) => plain(each) === (SPACINGS[named] ?? named));
    const spread = named === "automatic" ? spacing : ours;
    if (spread) fields.spacing = spread;
    else if (named !== "automatic") unknown.push(`the schedule ${said["Schedule type"]} is not here`);
  }
  return { fields, unknown };
}

/** Our names of a sampler and of the spacing that older versions write after it: "DPM++ 2M Karras". */
function samplerOf(label, { samplers, spacings }) {
  const name = plain(label);
  const named = (text) => samplers.find((each) => plain(each) === (SAMPLERS[text] ?? text));
  if (named(name)) return [named(name), null];
  const spacing = spacings.find((each) => name.endsWith(plain(each)));
  return spacing ? [named(name.slice(0, -plain(spacing).length)), spacing] : [undefined, null];
}

/** A name without what programs write differently: "DPM++ 2M" is dpmpp_2m. */
function plain(name) {
  return name.toLowerCase().replaceAll("+", "p").replace(/[^a-z0-9]/g, "");
}

/** "Key: value, Key: "quoted, value"" as an object. */
function pairs(line) {
  const found = {};
  for (const [, key, quoted, bare] of line.matchAll(/\s*([\w ./-]+):\s*(?:"((?:\\.|[^"\\])*)"|([^,]*))(?:,|$)/g)) {
    found[key.trim()] ??= quoted === undefined ? bare.trim() : quoted.replace(/\\(.)/g, "$1");
  }
  return found;
}
