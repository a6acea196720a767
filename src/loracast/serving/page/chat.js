// A chat with its history: answered with the chosen adapters, and with a memory and a style where the server has them.

import { addCost } from "./cost.js";
import { byId, count, duration, fill, h, sendOnEnter } from "./dom.js";
import { guarded, hideProblem } from "./problem.js";
import { state } from "./state.js";
import { streamChat } from "./stream.js";

const CHAT = "loracast.chat";
const MOST_TOKENS = 256;

let messages = JSON.parse(sessionStorage.getItem(CHAT) ?? "[]");
let running = null; // the AbortController of the reply that streams
let exchange = Promise.resolve(); // the message and its reply that are under way

function keep() {
  sessionStorage.setItem(CHAT, JSON.stringify(messages));
}

function bubble({ role, content, note }) {
  const who = role === "user" ? "You" : "Answer";
  const text = h("p", { class: "text" }, content);
  const foot = h("p", { class: "note" }, note ?? "");
  byId("messages").append(h("li", { class: role }, h("span", { class: "unseen" }, `${who}: `), text, foot));
  return { text, foot };
}

function showAll() {
  fill(byId("messages"));
  if (!messages.length) {
    fill(byId("messages"), h("li", { class: "empty" }, "What is chosen beside the chat answers, and nothing of it stands in the prompt."));
  }
  messages.forEach(bubble);
}

function toEnd() {
  byId("messages").scrollTop = byId("messages").scrollHeight;
}

/** The fields of a request beside its messages: memory and style where they are chosen. */
function extras() {
  const chosen = (id) => byId(id)?.value.trim() || undefined;
  return { memory: chosen("memory"), style: chosen("style") };
}

/** Where a source stands in its document: the last part of "Manual / Warranty", or what else it is called by. */
const section = (source) => source.heading.split(" / ").pop() || source.title || source.adapter;

/** Send a message. A reply that still streams is stopped, and what there is of it stays in the history. */
async function send(content) {
  running?.abort();
  await exchange;
  exchange = answered(content);
  await exchange;
}

async function answered(content) {
  hideProblem();
  const mine = new AbortController();
  running = mine;
  byId("messages").querySelector(".empty")?.remove();
  const turn = { role: "user", content };
  bubble(turn);
  const { text, foot } = bubble({ role: "assistant", content: "" });
  text.classList.add("waits");
  toEnd();
  const history = [...messages, turn].map(({ role, content: said }) => ({ role, content: said }));
  const body = { model: state.model, messages: history, max_tokens: MOST_TOKENS, ...extras() };
  const onText = (piece) => {
    text.classList.remove("waits");
    text.append(piece);
    toEnd();
  };
  try {
    const answer = await streamChat(body, { onText, signal: mine.signal });
    const used = [...new Set(answer.loracast.sources.map(section))];
    const figures = [`${count(answer.usage.prompt_tokens)} prompt tokens`];
    if (answer.firstMs !== null) figures.unshift(`first token ${duration(answer.firstMs)}`);
    foot.textContent = [...figures, ...used.slice(0, 2)].join(" · ");
    messages.push(turn, { role: "assistant", content: answer.text, note: foot.textContent });
    addCost(answer.usage);
  } catch (error) {
    foot.textContent = error.name === "AbortError" ? "Stopped." : error.message;
    foot.classList.add("failed");
    if (text.textContent) messages.push(turn, { role: "assistant", content: text.textContent, note: foot.textContent });
  } finally {
    text.classList.remove("waits");
    if (running === mine) running = null;
    keep();
    toEnd();
  }
}

/** The choice of a memory and of a style, as far as the server has them. */
function showOptions() {
  const { has_memory: hasMemory, has_styles: hasStyles } = state.settings;
  const options = [];
  if (hasStyles) {
    const styles = state.adapters.filter((one) => one.kind === "task").map((one) => h("option", { value: one.name }, one.name));
    options.push(h("label", {}, "Style ", h("select", { id: "style" }, h("option", { value: "" }, "none"), styles)));
  }
  if (hasMemory) {
    options.push(h("label", {}, "Memory ", h("input", {
      id: "memory", autocomplete: "off", placeholder: "off", maxlength: "64", pattern: "[a-z0-9][a-z0-9._\\-]*",
      title: "A name: what you tell is kept under it",
    })));
  }
  const before = extras();
  fill(byId("chat-options"), options);
  for (const [id, value] of Object.entries(before)) if (value && byId(id)) byId(id).value = value;
}

export function startChat() {
  showAll();
  sendOnEnter(byId("message"));
  byId("chat-form").addEventListener("submit", guarded(async () => {
    const content = byId("message").value.trim();
    if (!content) return;
    byId("message").value = "";
    await send(content);
  }));
  byId("new-chat").addEventListener("click", async () => {
    running?.abort();
    await exchange;
    messages = [];
    keep();
    showAll();
    byId("message").focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  state.addEventListener("adapters", showOptions);
}
