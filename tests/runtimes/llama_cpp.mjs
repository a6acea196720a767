// Greedy text and teacher-forced tokens of llama.cpp, through node-llama-cpp (npm). Called by test_llama_cpp.py.
//
//     node llama_cpp.mjs PACKAGE BASE.gguf ADAPTER.gguf ROWS.json
//
// PACKAGE is the folder of node-llama-cpp. ROWS.json holds [{prompt: [ids], answer: [ids]}]; the output, as JSON, for each row
// {text, free, forced}: what is generated with the adapter and without it, and the likeliest token at each place of the answer.
import fs from "fs";
import path from "path";
import {pathToFileURL} from "url";

const [, , folder, base, adapter, rowsFile] = process.argv;
const {getLlama, LlamaCompletion} = await import(pathToFileURL(path.join(folder, "dist", "index.js")));
// One thread: waiting threads spin, and beside other work that takes minutes in place of seconds.
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath: base});
const rows = JSON.parse(fs.readFileSync(rowsFile, "utf8"));

async function inContext(adapters, work) {
    const context = await model.createContext({contextSize: 2048, threads: 1, lora: {adapters}});
    const done = [];
    for (const row of rows) {
        const sequence = context.getSequence();
        done.push(await work(sequence, row));
        sequence.dispose();
    }
    await context.dispose();
    return done;
}

async function generated(sequence, row) {
    const completion = new LlamaCompletion({contextSequence: sequence});
    const text = await completion.generateCompletion(row.prompt, {temperature: 0, maxTokens: 24});
    completion.dispose();
    return text;
}

async function forced(sequence, row) {
    const input = [...row.prompt, ...row.answer.slice(0, -1)];
    const asked = input.map((token, i) => (i < row.prompt.length - 1 ? token : [token, {generateNext: {token: true}}]));
    const output = await sequence.controlledEvaluate(asked);
    return output.slice(row.prompt.length - 1).map((place) => place.next.token);
}

const withAdapter = [{filePath: adapter, scale: 1}];
const text = await inContext(withAdapter, generated);
const free = await inContext([], generated);
const likeliest = await inContext(withAdapter, forced);
console.log(JSON.stringify(rows.map((_, i) => ({text: text[i], free: free[i], forced: likeliest[i]}))));
process.exit(0);
