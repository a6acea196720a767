// The page's start: views by the address's hash, keys that work everywhere, the server's state.

import { startAdding } from "./add.js";
import { startAsking } from "./ask.js";
import { startChat } from "./chat.js";
import { startChoosing } from "./choices.js";
import { byId, fill, h } from "./dom.js";
import { startLibrary } from "./library.js";
import { startRemembering } from "./memory.js";
import { showProblem } from "./problem.js";
import { state } from "./state.js";

const VIEWS = ["ask", "chat", "library"];

function showView() {
  const wanted = location.hash.slice(1);
  if (wanted && !VIEWS.includes(wanted)) return; // the skip link
  const current = wanted || "ask";
  for (const view of VIEWS) {
    byId(`view-${view}`).hidden = view !== current;
    const link = document.querySelector(`nav a[href="#${view}"]`);
    if (view === current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  byId("sources").hidden = current === "library";
  document.title = current === "ask" ? "loracast" : `loracast: ${current}`;
}

function onKey(event) {
  const isTyping = event.target.matches("input:not([type=checkbox], [type=range]), textarea, select");
  if (event.key !== "/" || isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  const inputs = { ask: "question", chat: "message", library: "library-search" };
  event.preventDefault();
  byId(inputs[location.hash.slice(1) || "ask"] ?? "question").focus();
}

function showServer() {
  fill(byId("server"), h("span", { class: "dot", "aria-hidden": "true" }), state.settings.base);
}

async function start() {
  window.addEventListener("hashchange", showView);
  document.addEventListener("keydown", onKey);
  byId("fold").open = matchMedia("(min-width: 60rem)").matches;
  showView();
  startAdding();
  startChoosing();
  startAsking();
  startChat();
  startRemembering();
  startLibrary();
  state.addEventListener("settings", showServer);
  try {
    await state.loadSettings();
    await state.loadAdapters();
  } catch (error) {
    showProblem(error);
  }
}

start();
