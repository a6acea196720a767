// Calls of the server's API: JSON in and out, streams of server-sent events, errors as sentences.

import { byId } from "./dom.js";

const KEY = "loracast.key";

const SENTENCES = {
  401: "The server does not know this key.",
  403: "This key may not do that.",
  404: "The server does not have that.",
  413: "That is larger than the server takes.",
  429: "The server is busy. Try again in a moment.",
  503: "The server is not ready yet. Try again in a moment.",
};

/** What a call failed with; the message is a sentence for people. */
export class ApiError extends Error {
  constructor(message, status = 0, retryAfterS = 0) {
    super(message);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

function sentence(text) {
  const trimmed = text.trim();
  const capital = trimmed.charAt(0).toUpperCase() + trimmed.slice(1);
  return /[.!?]$/.test(capital) ? capital : `${capital}.`;
}

/** The error that an answer of the server tells of. */
async function errorOf(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    // No body of OpenAI's form: the status has to do.
  }
  const told = message || SENTENCES[response.status] || `The server answered with an error (${response.status}).`;
  return new ApiError(sentence(told), response.status, Number(response.headers.get("Retry-After")) || 0);
}

let asking = null;

/** Ask for the API key, once for all calls that wait for it. */
function askForKey() {
  const dialog = byId("key-dialog");
  asking ??= new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      asking = null;
      if (dialog.returnValue === "ok") sessionStorage.setItem(KEY, byId("key").value);
      resolve(dialog.returnValue === "ok");
    }, { once: true });
    dialog.returnValue = "";
    dialog.showModal();
  });
  return asking;
}

/**
 * Call the API and give its response. A refused key is asked for, and the call tried again.
 *
 * Takes `json` or `form` as the body, `method` (POST where there is a body) and a `signal` that ends the call.
 */
export async function call(path, { json, form, method, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (json !== undefined) headers["Content-Type"] = "application/json";
  const body = json === undefined ? form : JSON.stringify(json);
  let response;
  try {
    response = await fetch(path, { method: method ?? (body ? "POST" : "GET"), headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?");
  }
  if (response.status === 401 && (await askForKey())) return call(path, { json, form, method, signal });
  if (!response.ok) throw await errorOf(response);
  return response;
}

/** The JSON that a call answers with. */
export async function fetchJson(path, options) {
  const response = await call(path, options);
  return response.status === 204 ? null : response.json();
}

/** The JSON of each server-sent event of a response, up to OpenAI's [DONE]; an event with an error raises it. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer += value.replaceAll("\r", "");
      const blocks = buffer.split("\n\n");
      buffer = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n").filter((line) => line.startsWith("data:"));
        if (!lines.length) continue;
        const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error?.message) throw new ApiError(sentence(event.error.message));
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw new ApiError("The connection to the server broke.");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}
