// A picture and all that is known of it, as the stage and the history have it.

const urls = new WeakMap();

/**
 * A picture: `blob` is its file, `settings` what made it, `image` and `mask` the files that it began from, `model` the
 * name under which its model was served; `id` and `time` are there once it is kept.
 */
export function pictureOf({ blob, settings, seed, width, height, seconds = 0, image = null, mask = null, ...more }) {
  const prompt = [settings.prompt].flat().join("\n");
  const { id = null, time = 0, model = null } = more;
  return { id, time, model, blob, settings, prompt, seed: String(seed), width, height, seconds, image, mask };
}

/** An address for a picture's file, for as long as the file is kept. */
export function urlOf({ blob }) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

/** Frees the memory of a picture that is shown no more. */
export function release({ blob }) {
  if (urls.has(blob)) URL.revokeObjectURL(urls.get(blob));
  urls.delete(blob);
}

/** What a picture is called where it is read aloud. */
export function altOf({ prompt }) {
  return prompt.trim() || "A picture without a prompt";
}

/** The file of a data URI, which the page's rules forbid to fetch. */
export function blobOf(uri) {
  const [head, content] = uri.split(",");
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: /^data:([^;]*)/.exec(head)?.[1] ?? "" });
}

/** A file's name for a picture. */
export function fileName({ prompt, seed }) {
  const words = prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["picture"];
  return `${words.join("-").slice(0, 60)}-${seed}.png`;
}
