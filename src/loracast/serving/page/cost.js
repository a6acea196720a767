// The cost counter: the prompt tokens of all questions so far, beside what they are with the documents in the window.

import { byId, count, fill, h, plural } from "./dom.js";
import { state } from "./state.js";

const COST = "loracast.cost";

const none = { questions: 0, spent: 0, windowed: 0 };
let cost = { ...none, ...JSON.parse(localStorage.getItem(COST) ?? "{}") };

/**
 * Count a question that the chosen documents' adapters answered.
 *
 * Takes the usage of its answer, and that of the answer with the documents in the window; where there is none, their
 * tokens stand for it, as many as the window holds.
 */
export function addCost(usage, windowUsage) {
  const documents = state.chosenDocuments;
  if (!documents.length) return;
  const length = documents.reduce((sum, one) => sum + one.n_tokens, usage.prompt_tokens);
  cost.questions += 1;
  cost.spent += usage.prompt_tokens;
  cost.windowed += windowUsage?.prompt_tokens ?? Math.min(length, state.settings.window);
  keep();
}

function keep() {
  localStorage.setItem(COST, JSON.stringify(cost));
  showCost();
}

function line(label, n_tokens, className) {
  const bar = h("span", { class: `bar ${className}`, "aria-hidden": "true" });
  bar.style.setProperty("--share", n_tokens / Math.max(cost.windowed, 1));
  return [h("dt", {}, label), h("dd", { class: "number" }, count(n_tokens)), h("dd", { class: "track" }, bar)];
}

export function showCost() {
  byId("cost").hidden = cost.questions === 0;
  const times = cost.windowed / Math.max(cost.spent, 1);
  fill(byId("cost"),
    h("h2", { id: "cost-title" }, "Prompt tokens so far"),
    h("dl", {}, line("with adapters", cost.spent, "ours"), line("with the documents in the window", cost.windowed, "theirs")),
    h("p", { class: "hint" },
      `${plural(cost.questions, "question")}, ${times.toFixed(times < 10 ? 1 : 0)} times fewer tokens to read. `,
      h("button", { type: "button", class: "quiet", onclick: () => { cost = { ...none }; keep(); } }, "Start over")));
}
