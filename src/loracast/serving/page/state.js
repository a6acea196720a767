// What all views share: the server's settings, the adapters of the library, and which of them answer.

import { fetchJson } from "./api.js";

const CHOSEN = "loracast.chosen";
/** The choice of all documents, of which each question finds its own; it stands alone. */
export const ALL = "*";

class State extends EventTarget {
  settings = null;
  adapters = [];
  /** Names of the adapters that answer, in the order in which they were chosen. */
  chosen = new Set(JSON.parse(localStorage.getItem(CHOSEN) ?? "[]"));

  /** What the chosen names meant when the adapters were loaded last. */
  #versions = null;

  async loadSettings() {
    this.settings = await fetchJson("v1/server");
    this.#tell("settings");
  }

  async loadAdapters() {
    this.adapters = (await fetchJson("v1/adapters")).data;
    const names = new Set(this.adapters.map((adapter) => adapter.name));
    for (const name of this.chosen) if (name !== ALL && !names.has(name)) this.chosen.delete(name);
    this.#tell("adapters");
    const versions = [...this.chosen].map((name) => `${name}@${this.adapter(name)?.version}`).join();
    if (versions !== this.#versions) this.#tell("chosen"); // else an answer keeps its highlights
    this.#versions = versions;
  }

  choose(name, isChosen) {
    if (isChosen && name === ALL) {
      this.chooseOnly(ALL);
      return;
    }
    if (isChosen) this.chosen.add(name).delete(ALL);
    else this.chosen.delete(name);
    this.#keepChoice();
  }

  chooseOnly(name) {
    this.chosen = new Set([name]);
    this.#keepChoice();
  }

  #keepChoice() {
    localStorage.setItem(CHOSEN, JSON.stringify([...this.chosen]));
    this.#tell("chosen");
  }

  adapter(name) {
    return this.adapters.find((one) => one.name === name);
  }

  /** Whether all documents are chosen, not some by name. */
  get isAll() {
    return this.chosen.has(ALL);
  }

  /** The adapters of documents. */
  get documents() {
    return this.adapters.filter((one) => one.kind === "document");
  }

  /** The documents that are chosen. */
  get chosenDocuments() {
    return this.isAll ? this.documents : this.documents.filter((one) => this.chosen.has(one.name));
  }

  /** The model that a request names: the chosen adapters joined with +, or the base. */
  get model() {
    return [...this.chosen].join("+") || this.settings.base;
  }

  #tell(type) {
    this.dispatchEvent(new Event(type));
  }
}

export const state = new State();
