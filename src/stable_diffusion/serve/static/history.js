// The history: pictures that are kept in this browser, and before them the jobs in work.

import { $, el, icon } from "./dom.js";
import { jobs, stop } from "./draw.js";
import { altOf, urlOf } from "./pictures.js";
import { dropPicture, keepPicture, keptPictures } from "./store.js";

const PAGE = 60;
let pictures = [];
let room = PAGE;
let open; // what opens a picture
let remove; // what is told of the Delete key
const running = new Map();

/** Begins: `onOpen(picture)` is called for the one that somebody chooses, `onDelete(picture)` for Delete. */
export async function start(onOpen, onDelete) {
  open = onOpen;
  remove = onDelete;
  $("kept").addEventListener("click", ({ target }) => chosen(target.closest("[role=option]")));
  $("kept").addEventListener("keydown", onKey);
  $("older").addEventListener("click", () => {
    room += PAGE;
    render();
  });
  await refresh();
}

/** Reads what is kept, by other tabs too. */
export async function refresh() {
  const known = new Map(pictures.map((picture) => [picture.id, picture]));
  pictures = (await keptPictures().catch(() => [])).map((picture) => known.get(picture.id) ?? picture);
  render();
}

export const newest = () => pictures[0];

/** Puts a new picture at the head. */
export function add(picture) {
  if (pictures.some(({ id }) => id === picture.id)) return;
  pictures.unshift(picture);
  render();
}

/** Deletes a picture; gives what brings it back. */
export async function forget(picture) {
  pictures = pictures.filter((each) => each !== picture);
  render();
  await dropPicture(picture.id);
  return async () => {
    await keepPicture(picture);
    await refresh();
  };
}

/** Marks the pictures that are on the stage. */
export function mark(shown) {
  const ids = new Set(shown.map(({ id }) => id));
  for (const option of options()) {
    const seen = ids.has(option.dataset.id);
    option.classList.toggle("shown", seen);
    option.setAttribute("aria-selected", seen && ids.size === 1);
  }
}

const options = () => [...$("kept").children];

/** Brings the tiles up to date and leaves those that are right as they are. */
function render() {
  const seen = pictures.slice(0, room);
  const ids = new Set(seen.map(({ id }) => id));
  for (const option of options()) {
    if (ids.has(option.dataset.id)) continue;
    const next = option.nextElementSibling ?? option.previousElementSibling;
    if (option === document.activeElement) next?.focus();
    option.remove();
  }
  seen.forEach((picture, index) => {
    const there = $("kept").children[index];
    if (there?.dataset.id !== picture.id) $("kept").insertBefore(optionOf(picture), there ?? null);
  });
  if (!$("kept").querySelector("[tabindex='0']") && seen.length) options()[0].tabIndex = 0;
  $("older").hidden = pictures.length <= room;
  $("history").hidden = !pictures.length;
}

function optionOf(picture) {
  const image = el("img", { alt: altOf(picture), src: urlOf(picture), loading: "lazy", draggable: false });
  const { id, prompt } = picture;
  const option = el("div", { className: "tile", tabIndex: -1, title: prompt, dataset: { id } }, image);
  option.setAttribute("role", "option");
  option.setAttribute("aria-selected", "false");
  return option;
}

function pictureIn(option) {
  return pictures.find(({ id }) => id === option?.dataset.id);
}

function chosen(option) {
  if (!option) return;
  focus(option);
  open(pictureIn(option));
}

function focus(option) {
  for (const each of options()) each.tabIndex = each === option ? 0 : -1;
  option.focus();
}

function onKey(event) {
  const all = options();
  const at = all.indexOf(event.target);
  if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const columns = all.filter(({ offsetTop }) => offsetTop === all[0].offsetTop).length;
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
  const moves = { ...steps, Home: -at, End: all.length - 1 - at };
  if (event.key in moves) {
    focus(all[Math.max(0, Math.min(all.length - 1, at + moves[event.key]))]);
  } else if (event.key === "Enter" || event.key === " ") {
    chosen(event.target);
  } else if (event.key === "Delete") {
    remove(pictureIn(event.target));
  } else {
    return;
  }
  event.preventDefault();
}

/** Brings the tiles of the jobs in work up to date. */
export function showJobs() {
  for (const [id, tile] of running) {
    if (jobs.some((job) => job.id === id)) continue;
    tile.element.remove();
    running.delete(id);
  }
  for (const job of jobs) {
    if (!running.has(job.id)) running.set(job.id, jobTile(job));
    running.get(job.id).update();
  }
  $("running").hidden = jobs.length < 2;
}

function jobTile(job) {
  const image = el("img", { alt: "", hidden: true, draggable: false });
  const bar = el("span", { className: "done", aria: { hidden: "true" } });
  const aria = { label: `Stop: ${altOf(job)}` };
  const button = el("button", { type: "button", title: "Stop this one", aria }, icon("i-close"));
  button.addEventListener("click", () => stop(job));
  const element = el("li", {}, image, bar, button);
  $("running").append(element);
  const update = () => {
    if (job.preview && image.src !== job.preview) image.src = job.preview;
    image.hidden = !job.preview;
    bar.style.setProperty("--done", job.total ? job.step / job.total : 0);
  };
  return { element, update };
}
