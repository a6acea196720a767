// Several adapters added up into a new one, each with a weight that a slider sets.

import { byId, fill, h } from "./dom.js";
import { runJob } from "./jobs.js";
import { guarded } from "./problem.js";

const scales = new Map(); // name -> weight, kept while the selection changes

function slider(name) {
  const value = h("output", {}, (scales.get(name) ?? 1).toFixed(1));
  const input = h("input", {
    type: "range", min: "-1", max: "2", step: "0.1", "aria-label": `Weight of ${name}`,
    oninput: () => {
      scales.set(name, Number(input.value));
      value.textContent = Number(input.value).toFixed(1);
    },
  });
  input.value = scales.get(name) ?? 1;
  return h("li", {}, h("span", { class: "name" }, name), input, value);
}

/** Offer to combine these adapters; below two, say how to choose them. */
export function showCombine(names) {
  if (names.length < 2) {
    fill(byId("combine"), h("p", { class: "hint" }, "Check two or more adapters in the table to add them up into a new one."));
    return;
  }
  fill(byId("combine"),
    h("form", { id: "combine-form" },
      h("ul", { class: "sliders" }, names.map(slider)),
      h("label", {}, "Name ", h("input", {
        id: "combine-name", required: true, autocomplete: "off", maxlength: "64", pattern: "[a-z0-9][a-z0-9._\\-]*",
        title: "Small letters, digits, dots, dashes and underscores",
      })),
      h("button", { class: "primary" }, "Combine")));
  byId("combine-form").addEventListener("submit", guarded(async () => {
    const parts = names.map((name) => ({ id: name, scale: scales.get(name) ?? 1 }));
    const name = byId("combine-name").value.trim();
    await runJob(byId("combine-jobs"), name, "v1/adapters/combine", (replace) => ({ json: { parts, name, replace } }));
  }));
}
