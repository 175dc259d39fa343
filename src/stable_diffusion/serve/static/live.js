// Drawing while somebody types: one request at a time, and the last picture is of what stands there.

import * as api from "./api.js";
import { stringify } from "./json.js";
import { patience } from "./link.js";
import { blobOf, pictureOf } from "./pictures.js";
import { desk, hasSubject, onChange, request, server, shown } from "./state.js";

const PAUSE = 120;
/** A picture in work that needs no more than this, in milliseconds, is let finish before the next one begins. */
const NEARLY = 700;
/** Slower models show a sketch of fewer steps, but not of fewer than these. */
const SLOW = 4000;
const FEWEST = 4;

const IGNORED = ["count", "locked"];
let timer;
let flight = null;
let again = false;
const held = new Set();
let pace = 0; // milliseconds a step, of late
let last = ""; // what the last picture was drawn from

/** What shows the work: `begin()`, `step(data)`, `picture(picture)`, `done(picture, notes)`, `end()`. */
let show;

export function start(view) {
  show = view;
  onChange((names) => {
    if (names.some((name) => !IGNORED.includes(name))) touch();
  });
}

/** Draws soon, as something changed. */
export function touch() {
  clearTimeout(timer);
  if (held.size) return;
  if (!desk.live || !hasSubject()) return stop();
  timer = setTimeout(fire, PAUSE);
}

/** Draws nothing while there is a reason: a letter is being composed, or a mask is painted. */
export function hold(reason, there) {
  if (there) held.add(reason);
  else held.delete(reason);
  if (there) clearTimeout(timer);
  else touch();
}

/** Ends what is in work; true where something was. */
export function stop() {
  clearTimeout(timer);
  again = false;
  last = "";
  flight?.control.abort();
  return flight !== null;
}

function fire() {
  if (!flight) return void run();
  again = true;
  if (remaining() > NEARLY) flight.control.abort();
}

/** Milliseconds until the picture in work is there, as far as one can tell. */
function remaining() {
  const { began, step, total } = flight;
  if (!pace) return 0;
  return step ? (total - step) * pace : total * pace - (performance.now() - began);
}

/** How many steps to take: all, unless they last too long. */
function steps() {
  const wanted = shown("num_inference_steps");
  if (wanted > server.limits.num_inference_steps) return wanted; // the server says what is wrong
  return pace && wanted * pace > SLOW ? Math.min(wanted, Math.max(FEWEST, Math.floor(SLOW / pace))) : wanted;
}

async function run() {
  const taken = steps();
  const control = new AbortController();
  flight = { control, began: performance.now(), step: 0, total: taken };
  again = false;
  let retry = false;
  try {
    const fewer = taken < shown("num_inference_steps") ? { num_inference_steps: taken } : {};
    const body = await request({ ...fewer, previews: taken * pace > 1500 ? 4 : 0 });
    const wanted = stringify({ ...body, prompt: body.prompt.trim(), previews: 0 });
    if (wanted !== last && !control.signal.aborted) {
      show.begin();
      await follow(body, control.signal);
      last = wanted;
    }
  } catch (error) {
    show.end();
    if (error instanceof api.Problem) retry = (await patience(error)) && !control.signal.aborted;
    else if (error.name !== "AbortError") throw error;
  } finally {
    flight = null;
    show.end();
    if (again || (retry && desk.live && hasSubject() && !held.size)) run();
  }
}

async function follow(body, signal) {
  const { image, mask } = desk;
  let picture;
  let began = performance.now();
  for await (const { name, data } of api.live(body, signal)) {
    if (name === "step") {
      const now = performance.now();
      if (flight.step && data.step > flight.step) {
        const each = (now - began) / (data.step - flight.step);
        pace = pace ? 0.7 * pace + 0.3 * each : each;
      }
      began = now;
      Object.assign(flight, { step: data.step, total: data.total });
      show.step(data);
    } else if (name === "picture") {
      picture = pictureOf({ ...data, blob: blobOf(data.png), image, mask, model: body.model });
      await show.picture(picture);
    } else if (name === "done" && picture) {
      picture.seconds = data.seconds;
      show.done(picture, data.notes);
    } else if (name === "failed") {
      throw new api.Problem(api.sentence(data.error), { status: data.status ?? 500 });
    }
  }
}
