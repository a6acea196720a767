// One chat completion that streams: its pieces of text as they come, and what it cost.

import { call, events } from "./api.js";

/**
 * Stream an answer to `body` (a chat request without the fields of streaming).
 *
 * `onText(piece)` gets each piece. Gives {text, firstMs, totalMs, usage, loracast}: times since the request was sent,
 * OpenAI's usage, and the server's account of LoRA, window and sources.
 */
export async function streamChat(body, { onText, signal }) {
  const started = performance.now();
  const answer = { text: "", firstMs: null, totalMs: null, usage: null, loracast: { adapters: [], sources: [], lora_bytes: 0 } };
  const json = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await call("v1/chat/completions", { json, signal });
  for await (const event of events(response)) {
    const piece = event.choices?.[0]?.delta?.content ?? "";
    if (piece) {
      answer.firstMs ??= performance.now() - started;
      answer.text += piece;
      onText(piece);
    }
    if (event.usage) answer.usage = event.usage;
    if (event.loracast) answer.loracast = event.loracast;
  }
  answer.totalMs = performance.now() - started;
  return answer;
}
