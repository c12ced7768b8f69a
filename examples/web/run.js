// Answers prompts on a bundle from Node, one JSON object for each: node run.js BUNDLE ADAPTER|- PROMPT [PROMPT …]
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { openBundle } from "./bundle.js";

const [folder, adapter, ...prompts] = process.argv.slice(2);
if (prompts.length === 0) {
  console.error('usage: node run.js BUNDLE ADAPTER PROMPT [PROMPT …]   ADAPTER is one of the bundle, or "-" for the base');
  process.exit(2);
}
try {
  const bundle = await openBundle((name) => readFile(join(folder, name)), { threads: 1 });
  await bundle.useAdapter(adapter === "-" ? null : adapter);
  for (const content of prompts) {
    const prompt = bundle.tokenizer.template ? [{ role: "user", content }] : content;
    console.log(JSON.stringify(await bundle.answer(prompt)));
  }
} catch (error) {
  console.error(`${error.name}: ${error.message}`);
  process.exitCode = 1;
}
