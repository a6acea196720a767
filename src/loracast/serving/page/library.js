// The library: search, tags, the table of adapters; one of them with its details; several combined.

import { fetchJson } from "./api.js";
import { showCombine } from "./combine.js";
import { openDetails, refreshDetails } from "./details.js";
import { byId, bytes, count, day, fill, h } from "./dom.js";
import { guarded } from "./problem.js";
import { state } from "./state.js";
import { showWatched } from "./watched.js";

const SEARCH_AFTER_MS = 200; // of no typing

let picked = new Set(); // names that are to be combined
let found = [];

const HEADS = [["", "pick"], ["Name", ""], ["From", ""], ["Title", "title"], ["Tokens", "number count"], ["Chunks", "number count"],
  ["Size", "number"], ["Learned", "when"], ["Tags", "tags"]];

function row(one) {
  const pick = h("input", {
    type: "checkbox",
    "aria-label": `Combine ${one.name}`,
    onchange: (event) => {
      if (event.target.checked) picked.add(one.name);
      else picked.delete(one.name);
      showCombine([...picked]);
    },
  });
  pick.checked = picked.has(one.name);
  const isDocument = one.kind === "document";
  const open = h("button", { type: "button", class: "link", onclick: guarded(() => openDetails(one.name)) }, one.name);
  const versions = one.n_versions > 1 && h("small", {}, ` ${one.n_versions} versions`);
  return h("tr", {},
    h("td", { class: "pick" }, pick),
    h("th", { scope: "row" }, open, versions),
    h("td", {}, one.kind),
    h("td", { class: "title" }, one.title),
    h("td", { class: "number count" }, isDocument ? count(one.n_tokens) : ""),
    h("td", { class: "number count" }, isDocument ? count(one.n_chunks) : ""),
    h("td", { class: "number" }, bytes(one.n_bytes)),
    h("td", { class: "when" }, day(one.created)),
    h("td", { class: "tags" }, one.tags.map((tag) => h("span", { class: "tag" }, tag))));
}

function showTable() {
  const isFiltered = byId("library-search").value || byId("library-tag").value;
  if (!found.length) {
    const text = isFiltered ? "Nothing in the library fits." : "The library is empty. Drop a file beside “Ask” to learn it.";
    fill(byId("library-table"), h("p", { class: "empty" }, text));
    return;
  }
  const heads = HEADS.map(([label, name]) =>
    h("th", { scope: "col", class: name }, label || h("span", { class: "unseen" }, "Combine")));
  fill(byId("library-table"), h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, found.map(row))));
}

function showTags() {
  const select = byId("library-tag");
  const before = select.value;
  const tags = [...new Set(state.adapters.flatMap((one) => one.tags))].sort();
  fill(select, h("option", { value: "" }, "any"), tags.map((tag) => h("option", { value: tag }, tag)));
  select.value = tags.includes(before) ? before : "";
}

async function search() {
  const query = new URLSearchParams();
  if (byId("library-search").value.trim()) query.set("q", byId("library-search").value.trim());
  if (byId("library-tag").value) query.set("tag", byId("library-tag").value);
  found = query.size ? (await fetchJson(`v1/adapters?${query}`)).data : state.adapters;
  showTable();
}

export function startLibrary() {
  let timer = 0;
  byId("library-search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(guarded(search), SEARCH_AFTER_MS);
  });
  byId("library-tag").addEventListener("change", guarded(search));
  byId("filters").addEventListener("submit", guarded(search));
  showCombine([]);
  state.addEventListener("settings", showWatched);
  state.addEventListener("adapters", () => {
    const there = new Set([...picked].filter((name) => state.adapter(name)));
    if (there.size !== picked.size) showCombine([...there]);
    picked = there;
    showTags();
    refreshDetails();
    guarded(search)();
  });
}
