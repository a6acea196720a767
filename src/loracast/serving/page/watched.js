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
      h("span", { class: "note" }, `${plural(one.n_learned, "file")} learned, ${one.n_failed} failed`)))));
}
