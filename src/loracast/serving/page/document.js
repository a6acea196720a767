// The chosen documents, chunk by chunk, with what a question was given of them highlighted.

import { fetchJson } from "./api.js";
import { byId, count, fill, h, plural } from "./dom.js";
import { state } from "./state.js";

const LEAST_WEIGHT = 0.3; // of a sentence that is highlighted: most sentences of a chunk get a little weight
const KEPT = 8; // documents whose chunks stay in memory

const chunksOf = new Map(); // "name@version" -> its chunks
let shown = []; // the documents that are on the page, with their chunks

async function chunks(document) {
  const key = `${document.name}@${document.version}`;
  if (!chunksOf.has(key)) {
    const answer = await fetchJson(`v1/adapters/${encodeURIComponent(document.name)}/chunks`);
    if (chunksOf.size >= KEPT) chunksOf.delete(chunksOf.keys().next().value);
    chunksOf.set(key, answer.data);
  }
  return chunksOf.get(key);
}

const withChunks = (documents) => Promise.all(documents.map(async (one) => ({ ...one, chunks: await chunks(one) })));

/** Show the documents that are chosen by name, without highlights. */
export async function showChosen() {
  shown = await withChunks(state.isAll ? [] : state.chosenDocuments);
  render([]);
}

/** Highlight what a question gets of documents; `routes` is what the server says of each adapter. */
export async function showRoute(routes) {
  shown = await withChunks(routes.map((route) => state.adapter(route.adapter)).filter((one) => one?.kind === "document"));
  render(routes);
}

function render(routes) {
  const section = byId("document");
  section.hidden = shown.length === 0;
  if (section.hidden) return;
  const asked = routes.length > 0;
  const parts = shown.map((one) => ({ document: one, route: routes.find((route) => route.adapter === one.name) }));
  const pane = h("div", { class: asked ? "pages asked" : "pages", tabindex: "0", role: "region", "aria-label": "Text of the documents" },
    parts.map(({ document, route }) => pages(document, route)));
  fill(section,
    h("h2", { id: "document-title" }, asked ? "What the answer was given" : "What was learned"),
    h("p", { class: "hint" }, asked ? parts.map(said) : summary()),
    pane);
}

function summary() {
  const n_tokens = shown.reduce((sum, one) => sum + one.n_tokens, 0);
  const n_chunks = shown.reduce((sum, one) => sum + one.chunks.length, 0);
  return `${count(n_tokens)} tokens in ${plural(n_chunks, "chunk")}. Ask, and what a question is given is highlighted.`;
}

/** A sentence about a document's part in the answer, with links to the chunks that were used. */
function said({ document, route }) {
  if (!route || !route.chunks.length) {
    return h("span", { class: "said" }, `${document.name}: ${route?.reason ?? "nothing"}. `);
  }
  const links = route.chunks.map(({ chunk, weight }) =>
    h("a", { href: `#${anchor(document, chunk)}`, onclick: jump }, `chunk ${chunk + 1}`, h("small", {}, rounded(weight))));
  return h("span", { class: "said" }, h("b", {}, document.name), links);
}

const rounded = (weight) => (weight > 0 && weight < 0.005 ? "< 0.01" : weight.toFixed(2));

const anchor = (document, chunk) => `chunk-${document.name}-${chunk}`;

/** Go to a chunk without changing the address, which says which view is shown. */
function jump(event) {
  event.preventDefault();
  const target = byId(event.currentTarget.getAttribute("href").slice(1));
  target.closest("details")?.setAttribute("open", "");
  target.scrollIntoView({ block: "nearest" });
  target.focus();
}

function pages(document, route) {
  const used = new Map((route?.chunks ?? []).map((one) => [one.chunk, one]));
  const article = h("article", { "aria-label": document.title || document.name });
  let rest = []; // the chunks since the last one that was used
  const fold = () => {
    if (rest.length) article.append(folded(rest));
    rest = [];
  };
  for (const chunk of document.chunks) {
    const use = used.get(chunk.chunk);
    const shown = page(document, chunk, use);
    if (use || !used.size) {
      fold();
      article.append(shown);
    } else {
      rest.push(shown);
    }
  }
  fold();
  return article;
}

/** Chunks that a question was not given, behind a line that opens them. */
function folded(pages) {
  const [first, last] = [pages[0], pages.at(-1)].map((one) => one.dataset.number);
  const label = first === last ? `Chunk ${first}` : `Chunks ${first} to ${last}`;
  return h("details", { class: "rest" }, h("summary", {}, `${label}: not used`), pages);
}

function page(document, chunk, use) {
  const number = `Chunk ${chunk.chunk + 1}`;
  const label = use ? `${number}, used with weight ${rounded(use.weight)}` : number;
  return h("section", {
    class: use ? "chunk used" : "chunk",
    id: anchor(document, chunk.chunk),
    "data-number": chunk.chunk + 1,
    tabindex: "-1",
    "aria-label": label,
  },
    h("header", {},
      h("span", { class: "number" }, String(chunk.chunk + 1)),
      h("span", { class: "heading" }, chunk.heading),
      h("span", { class: "tokens" }, use ? `weight ${rounded(use.weight)}` : plural(chunk.n_tokens, "token"))),
    h("p", {}, marked(chunk.text, use?.sentences ?? [])));
}

/** A chunk's text, the sentences with weight in <mark>, the more weight the stronger; offsets count code points. */
function marked(text, sentences) {
  const letters = [...text];
  const cut = (start, end) => letters.slice(start, end).join("");
  const parts = [];
  let at = 0;
  for (const { start, end, weight } of sentences) {
    if (weight < LEAST_WEIGHT || start < at) continue;
    const mark = h("mark", { title: `weight ${rounded(weight)}` }, cut(start, end));
    mark.style.setProperty("--strength", weight ** 3); // so that the best stands out among many that match a little
    parts.push(cut(at, start), mark);
    at = end;
  }
  return [...parts, cut(at)];
}
