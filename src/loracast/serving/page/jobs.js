// Jobs of the server that make adapters: started, waited for, and shown with their progress.

import { ApiError, call, events, fetchJson } from "./api.js";
import { fill, h } from "./dom.js";
import { state } from "./state.js";

const TAKEN = 409; // the status of a name that has an adapter already
const SHOWN_S = 8; // a job that is done leaves the list after so long

/** A line in the list of jobs. */
class JobLine {
  constructor(list, title) {
    this.bar = h("progress", { "aria-label": `Progress of ${title}` });
    this.note = h("span", { class: "note" }, "waiting");
    this.line = h("li", {}, h("span", { class: "name" }, title), this.note, this.bar);
    list.append(this.line);
  }

  show(job) {
    if (job.total) {
      this.bar.max = job.total;
      this.bar.value = job.done;
    }
    const said = { queued: "waiting", running: job.total ? `chunk ${job.done} of ${job.total}` : "reading" };
    this.note.textContent = said[job.status] ?? "";
  }

  done(note) {
    this.note.textContent = note;
    this.bar.remove();
    setTimeout(() => this.line.remove(), 1000 * SHOWN_S);
  }

  /** Say what went wrong; `again`, where it is given, replaces the adapter that has the name. */
  fail(message, again) {
    this.bar.remove();
    this.line.classList.add("failed");
    const close = () => this.line.remove();
    const replace = () => {
      close();
      again();
    };
    fill(this.note, message, h("span", { class: "buttons" },
      again && h("button", { type: "button", onclick: replace }, "Replace it"),
      h("button", { type: "button", onclick: close }, "Close")));
  }
}

/**
 * Start a job, wait where the server's queue is full, and follow its events. Gives the name of the adapter that it
 * made, or null where it failed (the list then says why).
 *
 * `list` is where its progress is shown, `body(replace)` gives the request's json or form.
 */
export async function runJob(list, title, path, body, replace = false) {
  const line = new JobLine(list, title);
  try {
    let job = await started(path, () => body(replace));
    line.show(job);
    for await (const event of events(await call(`v1/jobs/${encodeURIComponent(job.id)}/events`))) {
      job = event;
      line.show(job);
    }
    if (job.status !== "completed") throw new ApiError(job.error?.message ?? "The job was given up.");
    line.done("done");
    await state.loadAdapters();
    return job.adapter;
  } catch (error) {
    const again = () => runJob(list, title, path, body, true);
    if (error.status === TAKEN && !replace) line.fail("Another adapter has this name.", again);
    else line.fail(error.message);
    return null;
  }
}

async function started(path, body) {
  for (;;) {
    try {
      return await fetchJson(path, body());
    } catch (error) {
      if (error.status !== 429) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000 * (error.retryAfterS || 1)));
    }
  }
}
