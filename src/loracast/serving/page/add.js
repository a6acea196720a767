// Learning: files and folders that are dropped or picked, and descriptions of tasks, become jobs with progress.

import { byId } from "./dom.js";
import { runJob } from "./jobs.js";
import { guarded } from "./problem.js";
import { ALL, state } from "./state.js";

const ARROW = "=>";

/** Learn files one after another: a folder of hundreds does not fill the server's queue at once. */
async function learn(files) {
  const wanted = files.filter((one) => !one.name.startsWith("."));
  let learned = null;
  for (const file of wanted) {
    const made = await runJob(byId("jobs"), file.name, "v1/adapters", (replace) => {
      const form = new FormData();
      form.append("file", file, file.name);
      form.append("replace", replace);
      return { form };
    });
    learned = made ?? learned;
  }
  if (learned) state.chooseOnly(wanted.length > 1 ? ALL : learned);
}

/** The files of what was dropped, those in folders too. */
async function filesOf(transfer) {
  const found = [];
  const walk = async (entry) => {
    if (entry.isFile) {
      found.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
      return;
    }
    const reader = entry.createReader();
    for (;;) { // a reader gives a hundred entries at a time
      const entries = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!entries.length) return;
      for (const one of entries) await walk(one);
    }
  };
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  for (const entry of entries) await walk(entry);
  return found;
}

/** Lines `input => output` as examples. */
function examplesOf(text) {
  return text.split("\n").filter((line) => line.trim()).map((line) => {
    const [input, ...output] = line.split(ARROW);
    const example = { input: input.trim(), output: output.join(ARROW).trim() };
    if (!example.input || !example.output) throw new Error(`"${line}" is no example: write input ${ARROW} output`);
    return example;
  });
}

function startDropping() {
  const zone = byId("drop");
  const isFiles = (event) => [...event.dataTransfer.types].includes("Files");
  // The whole page takes a drop, so that a file that misses the zone does not replace the page.
  document.addEventListener("dragover", (event) => {
    if (!isFiles(event)) return;
    event.preventDefault();
    zone.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) zone.classList.remove("over");
  });
  document.addEventListener("drop", (event) => {
    if (!isFiles(event)) return;
    zone.classList.remove("over");
    guarded(async () => learn(await filesOf(event.dataTransfer)))(event);
  });
}

export function startAdding() {
  startDropping();
  for (const [button, input] of [["pick-files", "files"], ["pick-folder", "folder"]]) {
    byId(button).addEventListener("click", () => byId(input).click());
    byId(input).addEventListener("change", guarded(async () => {
      const files = [...byId(input).files];
      byId(input).value = "";
      await learn(files);
    }));
  }
  byId("task-form").addEventListener("submit", guarded(async () => {
    const description = byId("task").value.trim();
    const examples = examplesOf(byId("examples").value);
    if (!description && !examples.length) return;
    const given = [byId("task").value, byId("examples").value];
    byId("task-form").reset();
    const title = description || `${examples[0].input} ${ARROW} ${examples[0].output}`;
    const made = await runJob(byId("jobs"), title, "v1/adapters", (replace) => ({ json: { description, examples, replace } }));
    if (made) state.chooseOnly(made);
    else if (!byId("task").value && !byId("examples").value) [byId("task").value, byId("examples").value] = given;
  }));
}
