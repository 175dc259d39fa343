// The server's native API: JSON goes out, JSON or a stream of events comes back.

import { parse, stringify } from "./json.js";

/** What went wrong, in a sentence for people; `status` is HTTP's, or 0 where the server does not answer. */
export class Problem extends Error {
  constructor(message, { status = 0, field = null, after = null } = {}) {
    super(message);
    this.status = status;
    this.field = field;
    this.after = after;
  }
}

/** Of this page, so that the server lets clients take turns. */
export const CLIENT = Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16)).join("");

const SILENT = "The server does not answer.";

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(new URL(path.replace(/^\//, ""), document.baseURI), options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Problem(SILENT);
  }
  if (!answer.ok) throw await problemOf(answer);
  return answer;
}

async function problemOf(answer) {
  const { status } = answer;
  let said = {};
  try {
    said = parse(await answer.text()).error ?? {};
  } catch {
    // no JSON: a proxy's page, say
  }
  const message = said.message ?? `The server answers with an error, ${status}.`;
  const after = Number(answer.headers.get("Retry-After")) || null;
  return new Problem(sentence(message), { status, field: said.field ?? null, after });
}

/** What the page calls a field. */
const NAMES = {
  num_inference_steps: "steps",
  guidance_scale: "guidance scale",
  guidance_rescale: "guidance rescale",
  mask_image: "the mask",
};

/** A message of the server's as a sentence for people. */
export function sentence(message) {
  const text = message.replace(/\w+/g, (word) => (Object.hasOwn(NAMES, word) ? NAMES[word] : word));
  const end = /[.!?…]$/.test(text) ? "" : ".";
  return text && text[0].toUpperCase() + text.slice(1) + end;
}

function sending(body, signal) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: stringify(body), signal };
}

/** Yields the events of a stream as `{name, data}`. */
async function* read(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const event = eventOf(block);
        if (event) yield event;
      }
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new Problem(SILENT);
  } finally {
    reader.cancel().catch(() => {});
  }
}

function eventOf(block) {
  let name = "message";
  const data = [];
  for (const line of block.split(/\r?\n/)) {
    const [, key, value] = /^(\w+): ?(.*)$/.exec(line) ?? [];
    if (key === "event") name = value;
    if (key === "data") data.push(value);
  }
  return data.length ? { name, data: parse(data.join("\n")) } : null;
}

export async function models() {
  return parse(await (await ask("api/models")).text());
}

/** Draws at once; yields the events. Ending the loop, or the signal, cancels. */
export async function* live(body, signal) {
  yield* read(await ask("api/live", sending(body, signal)));
}

/** Puts a job into the queue: `{id, status, position}`. */
export async function submit(body) {
  return parse(await (await ask("api/jobs", sending(body))).text());
}

/** Yields a job's events, from its beginning; ending the loop leaves the job as it is. */
export async function* events(id, signal) {
  yield* read(await ask(`api/jobs/${encodeURIComponent(id)}/events`, { signal }));
}

export async function cancel(id) {
  await ask(`api/jobs/${encodeURIComponent(id)}`, { method: "DELETE", keepalive: true });
}

/** A picture's file. */
export async function picture(url) {
  return (await ask(url)).blob();
}

export async function health() {
  await ask("health", { cache: "no-store" });
}
