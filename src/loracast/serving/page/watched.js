// The folders that the server watches: it learns what is put there and forgets what is taken away.

import { byId, fill, h, plural } from "./dom.js";
import { state } from "./state.js";

export function showWatched() {
  const folders = state.settings.watched;
  byId("watched").hidden = folders.length === 0;
  fill(byId("watched"),
    h("h2", { id: "watched-title" }, "Watched folders"),
    h("ul", {}, folders.map((one) => h("li", {},
      h("span", { class: "name" }, one.folder),
      h("span", { class: "note" }, one.error ?? said(one)),
      one.failed.length > 0 && h("details", {},
        h("summary", { class: "note failed" }, `${plural(one.failed.length, "file")} failed`),
        h("ul", {}, one.failed.map(([path, why]) => h("li", { class: "note" }, h("b", {}, path), ` ${why}`))))))));
}

const said = (one) => `${plural(one.n_documents, "document")}${one.is_learning ? ", learning …" : ""}`;
