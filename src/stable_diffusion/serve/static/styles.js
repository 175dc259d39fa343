// What the model knows to do: its styles and its example prompts, as buttons.

import { $, el } from "./dom.js";
import { change, desk, model, onChange } from "./state.js";

let more = false;

export function start() {
  onChange((names) => {
    if (names.includes("model")) build();
    else if (names.includes("fields") || names.includes("prompt")) mark();
  });
  build();
}

function build() {
  const { prompts, styles } = model();
  $("examples").replaceChildren(...prompts.map(example));
  $("prompt").placeholder = prompts[0] ?? "a lighthouse at night";
  const words = [...new Set([...styles.words, ...(styles.default ? [styles.default] : [])])];
  $("styleField").hidden = !words.length;
  const short = words.filter((word) => word.endsWith(" style"));
  const seen = short.length ? short : words;
  const chips = [...seen, ...words.filter((word) => !seen.includes(word))].map((word, index) => {
    const button = chip(word.replace(/ style$/, ""), () => toggle(word));
    Object.assign(button.dataset, { word, more: index >= seen.length });
    button.setAttribute("aria-label", word);
    if (word === styles.default) button.title = "Taken where the prompt names no style";
    return button;
  });
  if (chips.length > seen.length) {
    const button = chip("more", () => {
      more = !more;
      mark();
    });
    button.id = "moreStyles";
    chips.splice(seen.length, 0, button);
  }
  $("styles").replaceChildren(...chips);
  mark();
}

function chip(text, run) {
  const button = el("button", { type: "button", className: "chip" }, el("span", { textContent: text }));
  button.addEventListener("click", run);
  return button;
}

function example(prompt) {
  const button = el("button", { type: "button", className: "example", textContent: prompt });
  button.addEventListener("click", () => {
    change({ fields: { prompt } });
    $("prompt").focus();
  });
  return el("li", {}, button);
}

/** Shows which styles the prompt names. */
function mark() {
  const { prompt } = desk.fields;
  const chips = [...$("styles").querySelectorAll("[data-word]")];
  const named = chips.filter(({ dataset }) => pattern(dataset.word).test(prompt));
  for (const button of chips) {
    button.setAttribute("aria-pressed", named.includes(button));
    button.classList.toggle("taken", !named.length && button.dataset.word === model().styles.default);
    button.hidden = button.dataset.more === "true" && !more && !named.includes(button);
  }
  if ($("moreStyles")) {
    $("moreStyles").firstChild.textContent = more ? "fewer" : "more";
    $("moreStyles").setAttribute("aria-expanded", more);
  }
}

/** A style in a prompt, with what binds it to the rest: ", noto style" and "a 3d render of". */
function pattern(word) {
  const text = word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&").replace(/\s+/g, "\\s+");
  return new RegExp(`(?:^|,\\s*|\\s+)(?:an?\\s+|the\\s+)?(?<!\\w)${text}(?!\\w)(?:\\s+of(?!\\w))?`, "iu");
}

/** Puts a style into the prompt in place of the one that it names, or takes it out. */
function toggle(word) {
  const { words, default: usual } = model().styles;
  const had = pattern(word).test(desk.fields.prompt);
  let prompt = desk.fields.prompt;
  for (const each of [...words, usual]) if (each) prompt = prompt.replace(pattern(each), "");
  prompt = prompt.replace(/^[\s,]+|[\s,]+$/g, "");
  if (!had) prompt = prompt ? `${prompt}, ${word}` : word;
  change({ fields: { prompt } });
}
