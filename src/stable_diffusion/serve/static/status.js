// The status line: one sentence on what is, which screen readers hear.

import { $ } from "./dom.js";
import { sentence } from "./api.js";

let act = null;

/**
 * Says a sentence in place of the last one.
 * @param {{error?: boolean, notes?: string[], action?: {label: string, run: () => void}}} more
 */
export function say(text, { error = false, notes = [], action = null } = {}) {
  const line = [notes.length ? sentence(text) : text, ...notes.map(sentence)].filter(Boolean).join(" ");
  if ($("status").textContent !== line) $("status").textContent = line;
  $("line").classList.toggle("error", error);
  act = action;
  $("action").hidden = !action;
  $("action").textContent = action?.label ?? "";
}

$("action").addEventListener("click", () => {
  const run = act?.run;
  say("");
  run?.();
});

/** What a picture is like, for the line beneath it. */
export function described({ settings, seed, width, height, seconds }) {
  const parts = [];
  if (seconds) parts.push(seconds < 10 ? `${seconds.toFixed(1)} s` : `${Math.round(seconds)} s`);
  parts.push(`seed ${seed}`);
  if (settings.num_inference_steps) {
    parts.push(settings.num_inference_steps === 1 ? "1 step" : `${settings.num_inference_steps} steps`);
  }
  const [wide, high] = [settings.width, settings.height].map((side) => Math.round(side * (settings.hires ?? 1)));
  const drawn = `${wide} × ${high}`;
  const scaled = wide !== width || high !== height;
  parts.push(scaled ? `generated at ${drawn}, scaled to ${width} × ${height}` : drawn);
  return parts.map((part) => part.replaceAll(" ", "\u00a0")).join(" · ");
}
