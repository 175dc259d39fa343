// The stage: the picture, what is in work, and what one can do with it.

import { $, decoded, el } from "./dom.js";
import { altOf, release, urlOf } from "./pictures.js";

let shownPictures = [];
let room = 0; // for how many pictures the sheet is laid out
let turn = 0;

/** The pictures on the stage. */
export const current = () => shownPictures;

/** What the stage is for now: `empty`, `picture`, `compare` or `mask`. */
export const mode = () => $("figure").dataset.mode;

/** Sets what the stage is for; without a name, back to the picture. */
export function setMode(name = shownPictures.length ? "picture" : "empty") {
  $("figure").dataset.mode = name;
  $("masking").hidden = name !== "mask";
  $("caption").hidden = name !== "picture" || !$("caption").textContent;
  refreshActions();
}

/**
 * Shows pictures in place of those that are there: one large, several as a sheet. The old ones stay until the new
 * ones can be painted.
 * @param {object[]} pictures
 * @param {{size?: number, caption?: boolean, quiet?: boolean}} how: for how many there shall be room; whether to write
 *   the prompt beneath; whether a mask or a comparison on the stage stays there
 */
export async function show(pictures, { size = pictures.length, caption = false, quiet = false } = {}) {
  const mine = (turn += 1);
  const image = (picture) => decoded(urlOf(picture), altOf(picture)).catch(() => null);
  const images = await Promise.all(pictures.map(image));
  if (mine !== turn) return;
  for (const image of images) image?.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
  const before = shownPictures;
  const gone = before.filter((picture) => !picture.id && !pictures.includes(picture));
  shownPictures = [...pictures];
  const cells = images.map((image, index) => image && (size > 1 ? cell(image, pictures[index]) : image));
  const begins = before.every((picture, at) => picture === pictures[at]);
  const grows = size > 1 && size === room && gone.length === 0 && begins;
  if (!grows) $("sheet").replaceChildren();
  $("sheet").append(...cells.slice(grows ? before.length : 0).filter(Boolean));
  room = size;
  const columns = Math.ceil(Math.sqrt(size));
  $("sheet").style.setProperty("--columns", columns);
  $("sheet").style.setProperty("--rows", Math.ceil(size / columns));
  $("sheet").classList.toggle("several", size > 1);
  $("caption").textContent = caption ? pictures[0].prompt : "";
  for (const picture of gone) release(picture);
  if (quiet && ["mask", "compare"].includes(mode())) return;
  setMode();
  $("figure").dispatchEvent(new CustomEvent("shown"));
}

function cell(image, picture) {
  const button = el("button", { type: "button", className: "cell", title: "Show it alone" }, image);
  button.addEventListener("click", async () => {
    await show([picture]);
    $("figure").focus({ preventScroll: true });
  });
  return button;
}

/** Takes a picture from the stage that is kept no more. */
export function forget(picture) {
  if (shownPictures.includes(picture)) show(shownPictures.filter((each) => each !== picture), { size: 1 });
}

function refreshActions() {
  const [picture] = shownPictures;
  $("actions").hidden = mode() !== "picture" || shownPictures.length !== 1;
  for (const button of $("actions").children) {
    button.hidden = ["settings", "delete", "compare"].includes(button.dataset.act) && !picture?.id;
  }
}

/** Calls `act(name, picture)` for what people want of the picture on the stage. */
export function onAct(act) {
  $("actions").addEventListener("click", ({ target }) => {
    const name = target.closest("button")?.dataset.act;
    if (name && shownPictures.length === 1) act(name, shownPictures[0]);
  });
}

// What is in work: kept jobs before live drawing.

const work = { jobs: null, live: null };

/**
 * Says what is in work.
 * @param {"live" | "jobs"} who
 * @param {?{step: number, total: number, preview?: ?string, said?: string}} what null where it ended
 */
export function working(who, what) {
  work[who] = what;
  const now = work.jobs ?? work.live;
  $("working").hidden = !now;
  const preview = now?.preview ?? "";
  if (preview && $("preview").src !== preview) $("preview").src = preview;
  if (!preview) $("preview").removeAttribute("src");
  $("preview").hidden = !preview;
  $("figure").classList.toggle("previewing", Boolean(preview));
  if (!now) return;
  $("progress").max = now.total || 1;
  $("progress").value = now.step;
  $("step").textContent = now.said ?? (now.total ? `${now.step} of ${now.total}` : "");
}
