// llama.cpp's throughput with several adapters at once, through node-llama-cpp (npm). Called by peers.py.
//
//     node peers_llama_cpp.mjs PACKAGE BASE.gguf < ASKED.json
//
// ASKED.json holds {adapters: [{file, prompts: [[ids]]}], tokens, threads}. A LoRA belongs to a context, so each adapter has
// one, in which its rows are one batch; all contexts run at the same time. Prints {tokens, tokens_per_s}.
import fs from "fs";
import path from "path";
import {pathToFileURL} from "url";

const [, , folder, base] = process.argv;
const {getLlama} = await import(pathToFileURL(path.join(folder, "dist", "index.js")));
const asked = JSON.parse(fs.readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: asked.threads});
const model = await llama.loadModel({modelPath: base});
const rows = [];
for (const {file, prompts} of asked.adapters) {
    const lora = {adapters: [{filePath: file, scale: 1}]};
    const context = await model.createContext({contextSize: 512, sequences: prompts.length, lora});
    for (const prompt of prompts)
        rows.push({sequence: context.getSequence(), prompt});
}

async function generated({sequence, prompt}) {
    let n = 0;
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        n += 1;
        if (n === asked.tokens)
            break;
    }
    await sequence.clearHistory();
    return n;
}

await generated(rows[0]);
const started = performance.now();
const counts = await Promise.all(rows.map(generated));
const tokens = counts.reduce((sum, n) => sum + n, 0);
console.log(JSON.stringify({tokens, tokens_per_s: tokens / (performance.now() - started) * 1000}));
process.exit(0);
