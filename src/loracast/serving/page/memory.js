// What a memory holds of earlier chats, shown on request, and taking a message out of it.

import { fetchJson } from "./api.js";
import { byId, fill, h } from "./dom.js";
import { guarded } from "./problem.js";

const path = (name, rest = "") => `v1/memories/${encodeURIComponent(name)}${rest}`;

const named = () => byId("memory")?.value.trim() ?? "";

/** Show the panel where a memory is named; what it holds is fetched when the panel is opened. */
function offer() {
  byId("remembered").hidden = !named();
  byId("remembered").open = false;
}

async function showMessages() {
  const name = named();
  const { data } = await fetchJson(path(name));
  const line = (text, i) => h("li", {}, h("span", {}, text), h("button", {
    type: "button",
    class: "quiet",
    "aria-label": `Forget: ${text}`,
    onclick: guarded(async () => {
      await fetchJson(path(name, `/${i + 1}`), { method: "DELETE" });
      await showMessages();
    }),
  }, "Forget"));
  fill(byId("messages-remembered"), data.length ? data.map(line) : h("li", { class: "empty" }, "Nothing yet."));
}

export function startRemembering() {
  byId("chat-options").addEventListener("change", offer);
  byId("remembered").addEventListener("toggle", guarded(async () => {
    if (byId("remembered").open) await showMessages();
  }));
}
