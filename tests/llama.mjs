// What llama.cpp makes of a GGUF file: ids of texts, and a greedy continuation of some ids.
//   node llama.mjs JOB.json ANSWER.json     beside node_modules/node-llama-cpp
import fs from "node:fs";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const [job, answer] = process.argv.slice(2);
const {modelPath, texts, prompt, steps} = JSON.parse(fs.readFileSync(job));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath});
const ids = texts.map((text) => model.tokenize(text));
const context = await model.createContext({
  contextSize: model.trainContextSize,
  threads: 1, // two on busy cores wait for each other by spinning
  flashAttention: false,
  experimentalKvCacheKeyType: "F32", // by default float16, which decides near ties otherwise
  experimentalKvCacheValueType: "F32",
});
const greedy = [];
const sampling = {temperature: 0, yieldEogToken: true};
for await (const id of context.getSequence().evaluate(prompt, sampling)) {
  greedy.push(id);
  if (greedy.length === steps) break;
}
fs.writeFileSync(answer, JSON.stringify({ids, greedy}));
await llama.dispose();
