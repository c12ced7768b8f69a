// Trains an adapter from Node, one JSON object for each step and around them for the held-out rows:
//   node train.js BUNDLE ROWS --max-steps N [--out FILE] …
// The other flags are those of `edgetune personalize`; what is left out is as training.json has it.
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { memoryBytes } from "./memory.js"; // before the runtime: it has to see its memory made
import { openBundle } from "./bundle.js";
import { readRows } from "./rows.js";
import { openTraining } from "./training.js";

// prettier-ignore
const SETTINGS = [
  "r", "lora-alpha", "optimizer", "learning-rate", "lr-scheduler-type", "warmup-ratio", "weight-decay", "max-grad-norm",
  "eval-fraction", "seed",
];
const FLAGS = ["max-steps", "batch-size", "gradient-accumulation-steps", "max-seq-length", "out", ...SETTINGS];

function readArguments() {
  const options = Object.fromEntries(FLAGS.map((name) => [name, { type: "string" }]));
  const { positionals, values } = parseArgs({ options, allowPositionals: true });
  if (positionals.length !== 2 || !(values["max-steps"] > 0)) throw new TypeError("wanted: BUNDLE ROWS --max-steps N");
  const read = (name) => (Number.isNaN(Number(values[name])) ? values[name] : Number(values[name]));
  const given = (names) => Object.fromEntries(names.filter((name) => name in values).map((name) => [name, read(name)]));
  return { positionals, flags: given(FLAGS), settings: given(SETTINGS) };
}

const withUnderscores = (flags) =>
  Object.fromEntries(Object.entries(flags).map(([name, value]) => [name.replaceAll("-", "_"), value]));

async function train({ positionals: [folder, file], flags, settings }) {
  const bundle = await openBundle((name) => readFile(join(folder, name)), { threads: 1 });
  const training = await openTraining(bundle, withUnderscores(settings));
  const length = flags["max-seq-length"] ?? training.contextLength;
  const [rows, heldOut] = training.holdOut(readRows(await readFile(file, "utf8"), bundle.tokenizer, length));
  console.log(JSON.stringify({ evalLoss: await training.meanLoss(heldOut) }));
  const steps = training.train(rows, {
    maxSteps: flags["max-steps"],
    batchSize: flags["batch-size"],
    gradientAccumulationSteps: flags["gradient-accumulation-steps"],
  });
  for await (const step of steps) console.log(JSON.stringify(step));
  console.log(JSON.stringify({ evalLoss: await training.meanLoss(heldOut), memoryBytes: memoryBytes() }));
  if (flags.out) await writeFile(flags.out, training.adapter());
}

let given;
try {
  given = readArguments();
} catch (error) {
  console.error(`usage: node train.js BUNDLE ROWS --max-steps N [--out FILE] [--learning-rate …]; ${error.message}`);
  process.exit(2);
}
try {
  await train(given);
} catch (error) {
  console.error(`${error.name}: ${error.message}`);
  process.exitCode = 1;
}
