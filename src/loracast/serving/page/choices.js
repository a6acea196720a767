// The list of adapters beside the question: a check box each, those that are checked answer.

import { byId, count, fill, h, plural } from "./dom.js";
import { ALL, state } from "./state.js";

const MANY = 8; // from so many on, the list has a filter

function about(adapter) {
  if (adapter.kind !== "document") return adapter.kind;
  return `${count(adapter.n_tokens)} tokens, ${plural(adapter.n_chunks, "chunk")}`;
}

function choice(value, name, explanation, title) {
  const box = h("input", { type: "checkbox", value, onchange: () => state.choose(value, box.checked) });
  box.checked = state.chosen.has(value);
  return h("li", {}, h("label", { title },
    box,
    h("span", { class: "name" }, name),
    h("span", { class: "about" }, explanation)));
}

function all() {
  return choice(ALL, "All documents", "each question finds its own");
}

function show() {
  const filter = byId("choose-filter");
  filter.hidden = state.adapters.length < MANY;
  const words = filter.hidden ? "" : filter.value.toLowerCase();
  const shown = state.adapters.filter((one) => `${one.name} ${one.title}`.toLowerCase().includes(words));
  const nothing = state.adapters.length ? "Nothing is called so." : "Nothing is learned yet. The plain base answers.";
  fill(byId("choices"),
    state.documents.length > 1 && !words && all(),
    shown.map((one) => choice(one.name, one.name, about(one), one.title)),
    !shown.length && h("li", { class: "empty" }, nothing));
}

/** Bring check boxes up to date in place, so that the one with the focus keeps it. */
function mark() {
  for (const box of byId("choices").querySelectorAll("input")) box.checked = state.chosen.has(box.value);
}

export function startChoosing() {
  byId("choose-filter").addEventListener("input", show);
  state.addEventListener("adapters", show);
  state.addEventListener("chosen", mark);
}
