// The line that tells of an error which belongs to no other place on the page.

import { byId, fill, h } from "./dom.js";

/** Show an error's sentence until it is closed or the next one comes; a call that was ended by the user is none. */
export function showProblem(error) {
  if (error.name === "AbortError") return;
  const line = byId("problem");
  fill(line, error.message, h("button", { type: "button", "aria-label": "Close the message", onclick: hideProblem }, "Close"));
  line.hidden = false;
}

export function hideProblem() {
  byId("problem").hidden = true;
}

/** A listener that does its work and shows what fails. */
export const guarded = (work) => async (event) => {
  event?.preventDefault();
  try {
    await work(event);
  } catch (error) {
    showProblem(error);
  }
};
