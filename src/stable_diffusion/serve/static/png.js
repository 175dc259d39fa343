// What a PNG says of how it was made: the texts in its chunks.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const MOST_TEXT = 1 << 20;
const MOST_BYTES = 64 << 20;

/** A PNG's `{width, height, texts}`, or null for any other file. Damage ends the reading early. */
export async function readPng(blob) {
  if (blob.size > MOST_BYTES) return null;
  const bytes = new Uint8Array(await blob.arrayBuffer());
  if (SIGNATURE.some((byte, index) => bytes[index] !== byte) || bytes.length < 33) return null;
  const view = new DataView(bytes.buffer);
  const found = { width: view.getUint32(16), height: view.getUint32(20), texts: {} };
  let at = 8;
  while (at + 12 <= bytes.length) {
    const length = view.getUint32(at);
    const kind = latin(bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    if (data.length < length || kind === "IEND") break;
    if (/^(tEXt|zTXt|iTXt)$/.test(kind) && length < MOST_TEXT) {
      const [key, text] = await textOf(kind, data).catch(() => [null]);
      if (key && !(key in found.texts)) found.texts[key] = text;
    }
    at += length + 12;
  }
  return found;
}

/** The key and the text of a chunk (PNG specification, 11.3.3). */
async function textOf(kind, data) {
  const [key, rest] = split(data);
  if (kind === "tEXt") return [latin(key), latin(rest)];
  if (kind === "zTXt") return [latin(key), latin(await inflated(rest.subarray(1)))];
  const [, translated] = split(rest.subarray(2)); // after the language
  const [, content] = split(translated);
  return [latin(key), new TextDecoder().decode(rest[0] ? await inflated(content) : content)];
}

/** The bytes before the first zero, and those after it. */
function split(bytes) {
  const end = bytes.indexOf(0);
  if (end < 0) throw new RangeError("a chunk of text has no end of its key");
  return [bytes.subarray(0, end), bytes.subarray(end + 1)];
}

function latin(bytes) {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return text;
}

async function inflated(bytes) {
  const reader = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  const parts = [];
  for (let size = 0; ; ) {
    const { value, done } = await reader.read();
    if (done) break;
    size += value.length;
    if (size > MOST_TEXT) {
      await reader.cancel();
      throw new RangeError("too long a text");
    }
    parts.push(value);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}
