// Two pictures in one place, and a slider that says how much of each is seen.

import { $, decoded, el, fill } from "./dom.js";
import { altOf, urlOf } from "./pictures.js";
import { setMode } from "./stage.js";

/** Shows two pictures on the stage. */
export async function compare(left, right) {
  const [under, over] = await Promise.all([left, right].map((each) => decoded(urlOf(each), altOf(each))));
  over.classList.add("over");
  const line = el("span", { className: "cut", aria: { hidden: "true" } });
  const pair = el("div", { className: "pair" }, under, over, line);
  const slider = el("input", { type: "range", min: 0, max: 100, value: 50, id: "cut" });
  slider.setAttribute("aria-label", "How much of the left picture is seen, in percent");
  const move = () => {
    pair.style.setProperty("--cut", `${slider.value}%`);
    fill(slider);
  };
  const drag = (event) => {
    if (!event.buttons) return;
    const { left: start, width } = pair.getBoundingClientRect();
    slider.value = (100 * (event.clientX - start)) / width;
    move();
  };
  slider.addEventListener("input", move);
  pair.addEventListener("pointermove", drag);
  pair.addEventListener("pointerdown", (event) => {
    pair.setPointerCapture(event.pointerId);
    drag(event);
  });
  pair.style.setProperty("--ratio", under.naturalWidth / under.naturalHeight);
  move();
  $("compare").replaceChildren(pair, slider);
  setMode("compare");
  slider.focus();
}
