// Pictures that are drawn and kept: each is a job of its own, which outlives a closed tab and can be stopped alone.

import * as api from "./api.js";
import { stringify } from "./json.js";
import { patience } from "./link.js";
import { pictureOf } from "./pictures.js";
import { desk, dice, further, change, request } from "./state.js";
import { say } from "./status.js";
import { forgetJob, keepPicture, rememberedJobs, rememberJob } from "./store.js";

const PREVIEWS = 6;
/** Jobs in work and waiting, in the order in which they are drawn, with their `step`, `total` and `preview`. */
export const jobs = [];

/** What shows the work: `jobs()` after each change, and `kept(picture, notes)` for each picture. */
let show;
let following = false;
let watching = null; // the job that is followed, and what ends that
let round = 0; // counts what stopped everything
let lastDrawn = "";

/** Begins, and follows the jobs of the time before a reload. */
export async function start(view) {
  show = view;
  jobs.push(...(await rememberedJobs()));
  show.jobs();
  follow();
}

/**
 * Draws and keeps pictures.
 * @param {{batch: string, count: number, each?: (index: number) => object}} how the pictures say that they belong
 *   together, how many there are, and which fields differ in each
 */
export async function draw({ batch, count, each = null }) {
  const mine = round;
  const { image, mask } = desk;
  let body = await request({ previews: PREVIEWS });
  if (!each && !desk.locked && stringify(body) === lastDrawn) {
    change({ fields: { seed: dice() } }); // that picture is there already
    body = await request({ previews: PREVIEWS });
  }
  lastDrawn = stringify(body);
  for (let index = 0; index < count; index += 1) {
    const differing = each?.(index) ?? next(body, index);
    const job = await submitted({ ...body, ...differing });
    if (!job) return;
    if (mine !== round) return void api.cancel(job.id).catch(() => {});
    const { prompt, model } = body;
    const from = { batch, time: Date.now(), prompt, model, image, mask };
    jobs.push({ ...job, ...from, step: 0, total: 0, preview: null });
    await rememberJob(jobs.at(-1)).catch(() => {});
    show.jobs();
    follow();
  }
}

/** What makes the next one of several pictures another one: its seed, or among variations of one picture theirs. */
function next({ seed, variation_seed, variation_strength }, index) {
  if (!(variation_strength > 0)) return { seed: further(seed, index) };
  return { variation_seed: further(variation_seed ?? dice(), index) };
}

async function submitted(body) {
  for (;;) {
    try {
      return await api.submit(body);
    } catch (error) {
      if (!(error instanceof api.Problem)) throw error;
      if (!(await patience(error))) return null;
    }
  }
}

/** Stops one job. */
export async function stop(job) {
  try {
    await api.cancel(job.id);
  } catch {
    // it is over, or the server is away: either way nobody waits for it here
  }
  await drop(job);
}

/** Stops all jobs; true where there were some. */
export function stopAll() {
  round += 1;
  const all = [...jobs];
  for (const job of all.reverse()) stop(job); // the last one first, so that none of them begins
  return all.length > 0;
}

async function drop(job) {
  const index = jobs.indexOf(job);
  if (index < 0) return;
  jobs.splice(index, 1);
  if (watching?.job === job) watching.control.abort();
  show.jobs();
  await forgetJob(job.id).catch(() => {});
}

/** Follows the first job, and then the next one: a browser has only six connections to a server. */
async function follow() {
  if (following) return;
  following = true;
  try {
    while (jobs.length) await followFirst();
  } finally {
    following = false;
  }
}

async function followFirst() {
  const [job] = jobs;
  const control = new AbortController();
  watching = { job, control };
  try {
    await watch(job, control.signal);
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof api.Problem)) {
      reportError(error); // a mistake of this page: the next picture has nothing to do with it
      await drop(job);
    } else if (error.status === 404) {
      await lose(job, "A picture is gone: the server keeps finished pictures for ten minutes.");
    } else if (!(await patience(error))) {
      await drop(job);
    }
  }
}

/** Follows a job to its end. */
async function watch(job, signal) {
  let picture;
  for await (const { name, data } of api.events(job.id, signal)) {
    if (name === "queued") job.position = data.position;
    else if (name === "step") Object.assign(job, data);
    else if (name === "picture") {
      const { id, image, mask, model, batch } = job;
      const blob = await api.picture(data.url);
      picture = { ...pictureOf({ ...data, blob, image, mask, model, id, time: Date.now() }), batch };
    } else if (name === "done") return finish(job, picture, data);
    else if (name === "failed") return lose(job, api.sentence(data.error));
    else if (name === "cancelled") return drop(job);
    show.jobs();
  }
  throw new api.Problem("The server ended the answer early."); // asked again
}

async function finish(job, picture, { notes = [], seconds }) {
  if (picture) {
    picture.seconds = seconds;
    const unkept = await keepPicture(picture).then(() => [], () => ["the browser has no room to save it: download it"]);
    await show.kept(picture, [...notes, ...unkept]);
  }
  await drop(job);
}

async function lose(job, said) {
  say(said, { error: true });
  await drop(job);
}
