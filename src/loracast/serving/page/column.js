// One of the three columns: an answer as it streams, and its figures.

import { bytes, count, duration, fill, h } from "./dom.js";
import { state } from "./state.js";
import { streamChat } from "./stream.js";

const FIGURES = ["First token", "Prompt", "Memory", "Total"];

/** What a request keeps in memory: the base's cache of its tokens, and its LoRA. */
function memory(answer) {
  const n_tokens = answer.usage.prompt_tokens + answer.usage.completion_tokens;
  return n_tokens * state.settings.kv_bytes_per_token + answer.loracast.lora_bytes;
}

export class Column {
  constructor(id, title, explanation) {
    this.values = Object.fromEntries(FIGURES.map((name) => [name, h("dd", {}, "–")]));
    this.answer = h("div", { class: "answer", role: "status", "aria-live": "polite", "aria-atomic": "false" });
    this.note = h("p", { class: "note" });
    this.title = h("h2", { id: `column-${id}` }, title);
    this.explanation = h("p", { class: "hint" }, explanation);
    const figures = FIGURES.map((name) => h("div", {}, h("dt", {}, name), this.values[name]));
    this.element = h("section", { class: "column", id: `answer-${id}`, "aria-labelledby": `column-${id}` },
      this.title, this.explanation, this.answer, this.note, h("dl", { class: "figures" }, figures));
  }

  /** Empty the column; `waits` says that an answer is on its way. */
  clear(waits) {
    this.answer.replaceChildren();
    this.note.textContent = "";
    this.element.classList.toggle("waits", waits);
    this.element.classList.remove("failed");
    for (const value of Object.values(this.values)) value.textContent = "–";
  }

  /**
   * Stream an answer into the column. Gives the answer, or null where it failed (the column then says why).
   *
   * `onFirst` is called once, with the first piece or when the answer is over.
   */
  async run(body, signal, onFirst) {
    const started = performance.now();
    const onText = (piece) => {
      if (!this.answer.hasChildNodes()) {
        this.element.classList.remove("waits");
        this.values["First token"].textContent = duration(performance.now() - started);
        onFirst();
      }
      this.answer.append(piece);
    };
    try {
      const answer = await streamChat(body, { onText, signal });
      this.show(answer);
      return answer;
    } catch (error) {
      this.element.classList.add("failed");
      fill(this.note, error.name === "AbortError" ? "Stopped." : error.message);
      return null;
    } finally {
      this.element.classList.remove("waits");
      onFirst();
    }
  }

  show({ text, totalMs, usage, loracast }) {
    if (!text.trim()) fill(this.answer, h("em", {}, "(an empty answer)"));
    this.values["Total"].textContent = duration(totalMs);
    if (usage) {
      const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      this.values.Prompt.textContent = `${count(usage.prompt_tokens)} tokens`;
      this.values.Memory.textContent = bytes(memory({ usage, loracast }));
      if (2 * cached > usage.prompt_tokens) { // more than the template that all prompts begin with
        this.note.textContent = `${count(cached)} of the prompt's tokens were in the cache of an earlier question.`;
      }
    }
    if (loracast.adapters.length && !loracast.adapters.some((one) => one.is_used)) {
      this.note.textContent = "The question is not about this document, so the plain base answered.";
    }
    const cut = loracast.window;
    if (cut && cut.n_shown < cut.n_tokens) {
      this.note.textContent = `The window is full: it holds ${count(cut.n_shown)} of ${count(cut.n_tokens)} tokens.`;
    }
  }
}
