// The bundle in a worker of its own, so that the page stays responsive while the model computes. A message is
// {id, method, argument}, its answer {id, result} or {id, error}; {progress}, {text} and {step} come in between.
import { memoryBytes } from "./memory.js"; // first: it has to see the runtime's memory made
import { byLinear } from "./adapter.js";
import { fromUrl, openBundle } from "./bundle.js";
import { readRows } from "./rows.js";
import { openTraining } from "./training.js";

const MAX_NEW_TOKENS = 256;
const METHODS = { open, useAdapter, answer, personalize, stop };

let bundle;
let stopping;

addEventListener("message", async ({ data: { id, method, argument } }) => {
  try {
    postMessage({ id, result: { ...(await METHODS[method](argument)), memoryBytes: memoryBytes() } });
  } catch (error) {
    postMessage({ id, error: error.message });
  }
});

async function open(folder) {
  const start = performance.now();
  bundle = await openBundle(fromUrl(folder), { onProgress: (progress) => postMessage({ progress }) });
  const { adapters, adapter, manifest } = bundle;
  const nbytes = Object.values(manifest.files).reduce((sum, file) => sum + file.bytes, 0);
  const chat = bundle.tokenizer.template !== null;
  const trains = "training/training.json" in manifest.files;
  return { adapters, adapter, weights: manifest.weights, nbytes, chat, trains, loadMs: performance.now() - start };
}

async function useAdapter(name) {
  await bundle.useAdapter(name);
}

async function answer(prompt) {
  stopping = new AbortController();
  const onText = (text) => {
    postMessage({ text });
    return messagesCome();
  };
  return bundle.answer(prompt, { maxNewTokens: MAX_NEW_TOKENS, onText, signal: stopping.signal });
}

/** Trains on rows up to `stop` or the last step; uses the new adapter unless held-out rows speak for the old one. */
async function personalize({ text, maxSteps, learningRate }) {
  stopping = new AbortController();
  const training = await openTraining(bundle, learningRate ? { learning_rate: learningRate } : {});
  try {
    const [rows, heldOut] = training.holdOut(readRows(text, bundle.tokenizer, training.contextLength));
    const tensors = byLinear(bundle.adapterTensors, bundle.manifest.slots);
    const before = await training.meanLoss(heldOut, { tensors });
    for await (const step of training.train(rows, { maxSteps })) {
      postMessage({ step });
      await messagesCome();
      if (stopping.signal.aborted) break;
    }
    const after = await training.meanLoss(heldOut);
    const [name, file] = [freeName(), training.adapter()];
    bundle.addAdapter(name, file);
    if (!heldOut.length || after <= before) await bundle.useAdapter(name);
    return { name, isUsed: bundle.adapter === name, file, before, after };
  } finally {
    await training.close();
  }
}

/** trained-1, or with the next number that no adapter of the bundle has. */
function freeName() {
  let number = 1;
  while (bundle.adapters.includes(`trained-${number}`)) number++;
  return `trained-${number}`;
}

function stop() {
  stopping?.abort();
}

/** Resolves once waiting messages, `stop` above all, have been heard; setTimeout would take 4 ms for each token. */
function messagesCome() {
  const { port1, port2 } = new MessageChannel();
  return new Promise((resolve) => {
    port1.onmessage = () => resolve(port1.close());
    port2.postMessage(null);
  });
}
