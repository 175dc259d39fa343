// Light or dark: the system's choice, or the person's.

import { $ } from "./dom.js";

const THEMES = ["system", "light", "dark"];

export function start() {
  render();
  $("theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(current()) + 1) % THEMES.length];
    if (next === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    try {
      if (next === "system") localStorage.removeItem("minisd.theme");
      else localStorage.setItem("minisd.theme", next);
    } catch {
      // storage is forbidden: the choice lasts as long as the page
    }
    render();
  });
}

const current = () => document.documentElement.dataset.theme ?? "system";

function render() {
  $("themeName").textContent = `Theme: ${current()}`;
}
