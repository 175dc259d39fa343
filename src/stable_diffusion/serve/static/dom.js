// Small helpers for the page's elements. Text goes in as text, never as markup.

export const $ = (id) => document.getElementById(id);

/** An element with properties, `dataset` and `aria` among them, and children. */
export function el(tag, { dataset = {}, aria = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, dataset);
  for (const [name, value] of Object.entries(aria)) element.setAttribute(`aria-${name}`, value);
  element.append(...children);
  return element;
}

/** One of the drawings at the foot of index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("icon");
  svg.append(use);
  return svg;
}

/** A picture that is shown only once it can be painted, so that nothing flickers. */
export async function decoded(url, alt) {
  const image = el("img", { src: url, alt, draggable: false });
  await image.decode();
  return image;
}

/** Shows how far a slider is: its stylesheet reads it. */
export function fill(slider) {
  slider.style.setProperty("--part", (slider.valueAsNumber - slider.min) / (slider.max - slider.min));
}

/** Calls the last of several calls, so many milliseconds after it. */
export function later(run, milliseconds) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(run, milliseconds, ...values);
  };
}

/** Saves a file under a name. */
export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
