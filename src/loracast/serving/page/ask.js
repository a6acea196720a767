// A question, and three answers side by side: with the adapters, of the plain base, with the documents in the window.

import { fetchJson } from "./api.js";
import { Column } from "./column.js";
import { addCost, showCost } from "./cost.js";
import { showChosen, showRoute } from "./document.js";
import { byId, fill, sendOnEnter } from "./dom.js";
import { guarded, hideProblem } from "./problem.js";
import { state } from "./state.js";

const MOST_TOKENS = 128;
const ADAPTER = "The text is in the weights, and kept beside them: both answer.";

const columns = {
  adapter: new Column("adapter", "Adapter", ADAPTER),
  base: new Column("base", "Plain base", "It never saw the text."),
  window: new Column("window", "Document in the window", "The text stands before the question."),
};

let running = null; // the AbortController of the question that is being answered

function nameColumns() {
  const names = [...state.chosen];
  const isTask = names.length > 0 && !state.chosenDocuments.length;
  columns.adapter.title.textContent = state.isAll ? "All documents" : names.join(" + ") || "Adapter";
  columns.adapter.explanation.textContent = names.length ? ADAPTER : "Choose or learn something.";
  columns.window.title.textContent = isTask ? "Description in the prompt" : "Document in the window";
  columns.window.explanation.textContent = state.isAll
    ? "Choose documents by name to compare."
    : "The text stands before the question.";
}

function body(question, fields) {
  return { messages: [{ role: "user", content: question }], max_tokens: MOST_TOKENS, ...fields };
}

/** The requests of a question, in the order in which they start. */
function requests(question) {
  const found = [];
  const isChosen = state.chosen.size > 0;
  if (isChosen) found.push(["adapter", body(question, { model: state.model })]);
  if (byId("with-base").checked || !isChosen) found.push(["base", body(question, { model: state.settings.base })]);
  if (byId("with-window").checked && isChosen && !state.isAll) {
    found.push(["window", body(question, { model: state.settings.base, window: [...state.chosen] })]);
  }
  return found;
}

/**
 * Answer a question in all columns. Each answer starts when the one before it has its first token, so that no column's
 * time to the first token holds another's reading of a prompt.
 */
async function ask(question) {
  running?.abort();
  const mine = new AbortController();
  running = mine;
  hideProblem();
  byId("columns").classList.add("asked");
  const wanted = requests(question);
  const inUse = new Set(wanted.map(([name]) => name));
  for (const [name, column] of Object.entries(columns)) column.clear(inUse.has(name));
  const names = [...state.chosen];
  if (names.length) showRouteOf(question, names, mine.signal);
  const answers = {};
  const ends = [];
  for (const [name, request] of wanted) {
    await new Promise((onFirst) => {
      ends.push(columns[name].run(request, mine.signal, onFirst).then((answer) => (answers[name] = answer)));
    });
    if (mine.signal.aborted) break;
  }
  await Promise.all(ends);
  if (running === mine) running = null;
  if (answers.adapter?.usage) addCost(answers.adapter.usage, answers.window?.usage);
}

/** Highlight what a question gets of the documents, while the answers stream. */
function showRouteOf(question, names, signal) {
  guarded(async () => {
    const routes = await fetchJson("v1/adapters/route", { json: { question, adapters: names }, signal });
    await showRoute(routes.adapters);
  })();
}

function stop() {
  running?.abort();
}

export function startAsking() {
  fill(byId("columns"), Object.values(columns).map((column) => column.element));
  sendOnEnter(byId("question"));
  byId("ask-form").addEventListener("submit", guarded(async () => {
    const question = byId("question").value.trim();
    if (question) await ask(question);
  }));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
  });
  state.addEventListener("chosen", () => {
    nameColumns();
    guarded(showChosen)();
  });
  showCost();
}
