// The page: its parts, and what happens between them.

import * as api from "./api.js";
import { compare } from "./compare.js";
import * as controls from "./controls.js";
import { $, download, later } from "./dom.js";
import * as drawing from "./draw.js";
import * as history from "./history.js";
import * as input from "./input.js";
import { patience } from "./link.js";
import * as live from "./live.js";
import * as painter from "./painter.js";
import { altOf, fileName } from "./pictures.js";
import { restore } from "./restore.js";
import * as stage from "./stage.js";
import { change, desk, dice, hasSubject, onChange, recall, server, shown } from "./state.js";
import { described, say } from "./status.js";
import * as theme from "./theme.js";
import * as styles from "./styles.js";

const VARIATION = 0.25;
const VARIATIONS = 4;

/** The batch that the stage follows; null once something else is shown. */
let followed = null;
/** The picture that waits for a second one to be compared with. */
let picking = null;

async function main() {
  theme.start();
  await recall();
  await learn();
  const typed = $("prompt").value; // while the page was loading
  if (typed) change({ fields: { prompt: typed } });
  controls.start();
  styles.start();
  input.start();
  painter.start();
  live.start({ begin, step, picture, done, end });
  await history.start(open, remove);
  wire();
  document.documentElement.dataset.ready = "true";
  await greet();
  await drawing.start({ jobs: showJobs, kept });
}

/** Asks what the server has, until it answers. */
async function learn() {
  for (;;) {
    try {
      Object.assign(server, await api.models());
      return;
    } catch (error) {
      if (!(error instanceof api.Problem)) throw error;
      if (!(await patience(error))) await new Promise((resolve) => setTimeout(resolve, 5000));
    }
  }
}

/** Shows again what was there before a reload. */
async function greet() {
  say("");
  const newest = history.newest();
  if (newest && (newest.prompt === desk.fields.prompt || !desk.live)) await stage.show([newest]);
  else if (hasSubject()) live.touch();
  if (matchMedia("(hover: hover)").matches) $("prompt").focus({ preventScroll: true });
}

function wire() {
  $("draw").addEventListener("click", draw);
  $("stop").addEventListener("click", stop);
  $("prompt").addEventListener("compositionstart", () => live.hold("letter", true));
  $("prompt").addEventListener("compositionend", () => live.hold("letter", false));
  addEventListener("keydown", onKey);
  stage.onAct((name, picture) => ACTS[name](picture));
  $("figure").addEventListener("shown", () => history.mark(stage.current()));
  $("sheet").addEventListener("click", () => (followed = null));
  onChange((names) => {
    if (names.includes("image")) painter.leave();
  });
  document.addEventListener("visibilitychange", later(() => document.hidden || history.refresh(), 300));
}

function onKey(event) {
  if (event.isComposing) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    draw();
  } else if (event.key === "Escape") {
    if (painter.isOpen()) painter.close();
    else if (stage.mode() === "compare") endComparison();
    else if (!stop() && picking) endComparison();
  }
}

async function draw() {
  if (!hasSubject()) {
    say("Write a prompt first.");
    return $("prompt").focus();
  }
  await painter.close();
  live.stop();
  followed = batchOf(desk.count);
  await drawing.draw(followed);
}

/** Pictures that are drawn together, as the stage follows them. */
function batchOf(count) {
  return { batch: `${Date.now()}-${dice()}`, count, pictures: [] };
}

/** Ends all that is in work; true where something was. */
function stop() {
  const lively = live.stop();
  const stopped = drawing.stopAll() || lively;
  if (stopped) say("Stopped.");
  return stopped;
}

// Live drawing.

function begin() {
  stage.working("live", { step: 0, total: shown("num_inference_steps") });
}

function step(data) {
  stage.working("live", data);
}

async function picture(drawn) {
  followed = null;
  picking = null;
  await stage.show([drawn], { quiet: painter.isOpen() });
}

function done(drawn, notes) {
  const wanted = shown("num_inference_steps");
  const sketch = drawn.settings.num_inference_steps < wanted ? ["a preview of fewer steps: Generate takes all of them"] : [];
  say(`Preview · ${described(drawn)}`, { notes: [...sketch, ...(notes ?? [])] });
}

function end() {
  stage.working("live", null);
}

// Pictures that are kept.

function showJobs() {
  history.showJobs();
  const [job] = drawing.jobs;
  if (!job) return stage.working("jobs", null);
  const rest = drawing.jobs.length > 1 ? `, ${drawing.jobs.length - 1} more` : "";
  const waits = job.position ? `${job.position} before it` : "waits";
  stage.working("jobs", { ...job, said: `${job.total ? `${job.step} of ${job.total}` : waits}${rest}` });
}

async function kept(drawn, notes) {
  history.add(drawn);
  if (followed && followed.batch === drawn.batch) {
    followed.pictures.push(drawn);
    await stage.show(followed.pictures, { size: followed.count, quiet: true });
  }
  say(`Saved · ${described(drawn)}`, { notes });
}

async function open(chosen) {
  await painter.close();
  followed = null;
  live.stop();
  if (picking && picking !== chosen) return contrast(picking, chosen);
  picking = null;
  await stage.show([chosen], { caption: true });
  $("figure").scrollIntoView({ block: "nearest" });
  say(described(chosen));
}

async function remove(gone) {
  const bringBack = await history.forget(gone);
  stage.forget(gone);
  say("Deleted.", { action: { label: "Undo", run: bringBack } });
  if (document.activeElement === document.body) $("action").focus({ preventScroll: true });
}

async function contrast(left, right) {
  picking = null;
  await compare(left, right);
  $("figure").scrollIntoView({ block: "nearest" });
  say(`Left: ${altOf(left)}, seed ${left.seed}. Right: ${altOf(right)}, seed ${right.seed}.`, {
    action: { label: "Close the comparison", run: endComparison },
  });
}

function endComparison() {
  picking = null;
  stage.setMode();
  say("");
  $("figure").focus({ preventScroll: true });
}

const ACTS = {
  begin: ({ blob }) => input.begin(blob),

  async vary(chosen) {
    const { locked, count } = desk;
    restore({ ...chosen, kind: "minisd", unknown: [] }, { ...chosen, locked });
    live.stop();
    const many = count > 1 ? count : VARIATIONS;
    followed = batchOf(many);
    const variation_strength = desk.fields.variation_strength || VARIATION;
    await drawing.draw({ ...followed, each: () => ({ variation_seed: dice(), variation_strength }) });
  },

  settings(chosen) {
    const notes = restore({ ...chosen, kind: "minisd", unknown: [] }, chosen);
    live.stop();
    say("Its settings are restored, and the seed is locked.", { notes });
  },

  compare(left) {
    picking = left;
    say("Choose the other picture in the history.", { action: { label: "Cancel", run: endComparison } });
    $("kept").querySelector("[tabindex='0']")?.focus();
  },

  download: (chosen) => download(chosen.blob, fileName(chosen)),

  delete: remove,
};

main();
