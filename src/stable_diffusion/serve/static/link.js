// Whether the server answers; after it was away, work goes on by itself.

import { health } from "./api.js";
import { say } from "./status.js";

const FIRST = 1000;
const LONGEST = 8000;
let waiting = null;

/** Resolves when the server answers again; says that it does not until then. */
export function back() {
  waiting ??= ask().finally(() => (waiting = null));
  return waiting;
}

async function ask() {
  say("The server does not answer. Trying again.", { error: true });
  for (let pause = FIRST; ; pause = Math.min(2 * pause, LONGEST)) {
    await new Promise((resolve) => {
      setTimeout(resolve, pause);
      addEventListener("online", resolve, { once: true });
    });
    try {
      await health();
      return say("The server answers again.");
    } catch {
      // still away
    }
  }
}

/** Waits until it is worth to ask again after a problem; false where asking again gives the same. */
export async function patience(problem) {
  if (problem.status === 0 || [502, 504].includes(problem.status)) {
    await back();
    return true;
  }
  if (problem.status === 429 || problem.status === 503) {
    const seconds = Math.min(problem.after ?? 5, 600);
    say(problem.message, { error: true, notes: ["trying again"] });
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
    return true;
  }
  say(problem.message, { error: true });
  return false;
}
