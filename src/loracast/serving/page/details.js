// One adapter of the library: its facts, tags, versions, export and deletion.

import { call, fetchJson } from "./api.js";
import { confirmed } from "./dialog.js";
import { byId, bytes, count, day, fill, h } from "./dom.js";
import { guarded } from "./problem.js";
import { state } from "./state.js";

const DIGITS = 12; // of a version, by which people call it

const path = (name, rest = "") => `v1/adapters/${encodeURIComponent(name)}${rest}`;

/** What is open, or null. */
let open = null;

/** Show anew what is open, which may have changed or gone. */
export function refreshDetails() {
  if (open && state.adapter(open)) guarded(() => showDetails(open))();
  else close();
}

async function showDetails(name) {
  const adapter = await fetchJson(path(name));
  open = name;
  const section = byId("details");
  fill(section,
    h("header", {},
      h("h2", { tabindex: "-1" }, adapter.name),
      h("button", { type: "button", class: "quiet", "aria-label": "Close the details", onclick: close }, "Close")),
    h("p", { class: "hint" }, adapter.title),
    h("dl", { class: "facts" }, facts(adapter)),
    tags(adapter),
    versions(adapter),
    exporting(adapter),
    h("p", { class: "buttons" },
      h("button", { type: "button", class: "danger", onclick: guarded(() => remove(adapter.name)) }, "Delete …")));
  section.hidden = false;
  return section;
}

/** Show an adapter's details and go there. */
export async function openDetails(name) {
  const section = await showDetails(name);
  section.querySelector("h2").focus();
}

function close() {
  open = null;
  byId("details").hidden = true;
}

function facts(adapter) {
  const rows = [["From", adapter.source ?? adapter.kind], ["Learned", day(adapter.created)], ["Size", bytes(adapter.n_bytes)]];
  if (adapter.kind === "document") {
    rows.splice(1, 0, ["Length", `${count(adapter.n_tokens)} tokens, ${count(adapter.n_chunks)} chunks`]);
  }
  rows.push(["Base", adapter.base]);
  return rows.map(([label, value]) => h("div", {}, h("dt", {}, label), h("dd", {}, value)));
}

async function change(name, json) {
  await fetchJson(path(name), { method: "PATCH", json });
  await state.loadAdapters();
}

function tags(adapter) {
  const input = h("input", { "aria-label": "New tag", placeholder: "new tag", autocomplete: "off", maxlength: "64", required: true });
  const add = guarded(() => change(adapter.name, { tags: [...new Set([...adapter.tags, input.value.trim().toLowerCase()])] }));
  const chips = adapter.tags.map((tag) => {
    const drop = guarded(() => change(adapter.name, { tags: adapter.tags.filter((one) => one !== tag) }));
    return h("li", { class: "tag" }, tag, h("button", { type: "button", "aria-label": `Remove the tag ${tag}`, onclick: drop }, "×"));
  });
  return h("section", {},
    h("h3", {}, "Tags"),
    h("ul", { class: "chips" }, chips),
    h("form", { class: "joined", onsubmit: add }, input, h("button", {}, "Add")));
}

function versions(adapter) {
  return h("section", {},
    h("h3", {}, "Versions"),
    h("ul", { class: "versions" }, adapter.versions.map((one, i) => h("li", {},
      h("code", {}, one.version.slice(0, DIGITS)),
      h("span", {}, day(one.created)),
      h("span", { class: "note" }, i === 0 ? "newest" : "")))));
}

function exporting(adapter) {
  const select = h("select", { "aria-label": "Format" },
    state.settings.export_formats.map((one) => h("option", { value: one.name }, `${one.name} (${one.label})`)));
  const button = h("button", {}, "Export");
  const download = guarded(async () => {
    button.disabled = true;
    try {
      const response = await call(path(adapter.name, `/export?to=${encodeURIComponent(select.value)}`));
      save(await response.blob(), `${adapter.name}-${select.value}.zip`);
    } finally {
      button.disabled = false;
    }
  });
  return h("section", {}, h("h3", {}, "For other runtimes"), h("form", { class: "joined", onsubmit: download }, select, button));
}

/** Hand a file to the browser's downloads. */
function save(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

async function remove(name) {
  const text = "Its files and all its versions go. What it answered cannot be answered again without learning it anew.";
  if (!(await confirmed(`Delete ${name}?`, text, "Delete"))) return;
  await fetchJson(path(name), { method: "DELETE" });
  open = null;
  await state.loadAdapters();
}
