// Training in the browser: the loop that the bundle's training.json describes, on the plain inference graphs beside it.
// Bundles have them from `edgetune export --with-training`. Weights are inputs of these graphs, so they lie once, in
// JavaScript's memory, and the runtime holds those of the one graph that runs.
//
//   const training = await openTraining(bundle);
//   const [rows, heldOut] = training.holdOut(readRows(text, bundle.tokenizer, training.contextLength));
//   for await (const { step, loss } of training.train(rows, { maxSteps: 100 })) console.log(step, loss);
//   console.log(await training.meanLoss(heldOut));
//   bundle.addAdapter("mine", training.adapter());
//   await training.close();
import { writeAdapter } from "./adapter.js";
import { BundleError } from "./errors.js";
import { ort } from "./libraries.js";
import { stackRows } from "./rows.js";

const FORMAT_VERSION = 1;
const FOLDER = "training/";
const GRAPHS = ["start", "forward", "backward", "head_start", "head_tile", "head_end", "loss_tile", "loss_end"];
const ARRAYS = { float32: Float32Array, uint8: Uint8Array };
const HEAD_TILE_WEIGHTS = 2 ** 18; // 1 MiB of float32 at once: the memory of WebAssembly never shrinks
const MAX_SKIPPED_IN_A_ROW = 20;

// From the share of the steps after the warm-up that lie behind, 0..1, to a factor of the learning rate.
const SCHEDULES = {
  cosine: (progress) => 0.5 * (1 + Math.cos(Math.PI * progress)),
  linear: (progress) => 1 - progress,
  constant: () => 1,
};

/**
 * Open the training graphs of a bundle, with a new adapter on every linear.
 * @param {Bundle} bundle
 * @param {object} settings what differs from the `defaults` of training.json: r, lora_alpha, optimizer, learning_rate,
 *   lr_scheduler_type, warmup_ratio, weight_decay, max_grad_norm, eval_fraction, seed
 * @returns {Promise<Training>}
 * @throws {BundleError} the bundle has no training graphs, or they are damaged or of a newer format
 * @throws {RangeError} there is no such optimizer or schedule
 */
export async function openTraining(bundle, settings = {}) {
  if (!(`${FOLDER}training.json` in bundle.manifest.files)) {
    throw new BundleError("the bundle has no training graphs. Export it with --with-training");
  }
  const description = JSON.parse(new TextDecoder().decode(await bundle.read(`${FOLDER}training.json`)));
  if (description.format_version !== FORMAT_VERSION) {
    throw new BundleError(`training.json has format_version ${description.format_version}, expected ${FORMAT_VERSION}`);
  }
  const wanted = { ...description.defaults, ...settings };
  checkKnown("optimizer", wanted.optimizer, description.optimizers);
  checkKnown("lr_scheduler_type", wanted.lr_scheduler_type, SCHEDULES);
  wanted.learning_rate ??= description.optimizers[wanted.optimizer].learning_rate;
  checkSlots(description.graphs.forward, bundle.manifest.slots);
  const weights = readWeights(await bundle.read(description.data_file), description.tensors);
  const graphs = {};
  for (const name of [...GRAPHS, `optimizer.${wanted.optimizer}`]) {
    const { file, inputs, outputs } = description.graphs[name];
    graphs[name.split(".")[0]] = await Graph.open(await bundle.read(FOLDER + file), inputs, outputs);
  }
  return new Training(bundle.manifest, description, wanted, graphs, weights);
}

/** A new adapter of a bundle, and what trains it; `openTraining` makes it. */
export class Training {
  #manifest;
  #graphs;
  #blocks; // weights of each block, by the names of the graphs' inputs
  #outer; // of the other graphs
  #tiles; // ranges of the head's rows
  #scaling;
  #moments = new Map(); // of each tensor of the adapter, by the optimizer's names
  #updates = 0;
  #random;

  constructor(manifest, description, settings, graphs, weights) {
    const { num_hidden_layers: layers, layer_kinds: kinds, hidden_size: width } = description.model_config;
    this.#manifest = manifest;
    this.#graphs = graphs;
    this.#blocks = Array.from({ length: layers }, (_, i) => ({
      kind: kinds[i],
      prefix: inBlock(i, ""),
      weights: graphs.forward.weights(weights, inBlock(i, "")),
    }));
    this.#outer = Object.fromEntries(["start", "head_start", "head_end"].map((g) => [g, graphs[g].weights(weights)]));
    this.#tiles = [...headTiles(graphs.head_tile, weights, description.head, Math.floor(HEAD_TILE_WEIGHTS / width))];
    this.#scaling = floats([settings.lora_alpha / settings.r]);
    this.#random = random(settings.seed);
    /** What it trains with. */
    this.settings = settings;
    /** The most tokens that a row may have. */
    this.contextLength = description.context_length;
    /** The adapter's tensors by name, lora_A [in_features, r] and lora_B [r, out_features]. */
    this.tensors = this.#initial();
    const { moments } = description.optimizers[settings.optimizer];
    for (const [name, { dims }] of this.tensors) {
      this.#moments.set(name, Object.fromEntries(moments.map((kind) => [kind, zeros(dims)])));
    }
  }

  /** Rows in two parts: those to learn from, and the share `eval_fraction`, at least one, to judge by. */
  holdOut(rows) {
    const { eval_fraction: share } = this.settings;
    const count = share ? Math.min(Math.max(roundHalfEven(share * rows.length), 1), rows.length - 1) : 0;
    const order = this.#shuffled(rows);
    return [order.slice(count), order.slice(0, count)];
  }

  /**
   * Train on rows, in an order that is new in each epoch. Leaving the loop early is fine: the adapter is as good as it
   * is then.
   * @param {{ids: number[], labels: number[]}[]} rows those of `readRows`
   * @param {{maxSteps: number, batchSize?: number, gradientAccumulationSteps?: number}} options a step learns from
   *   `batchSize` rows at once, so many times
   * @returns {AsyncGenerator<{step: number, loss: number, gradNorm: number, learningRate: number, skipped: boolean}>}
   *   loss is the mean of a learned token, in nats, before the step
   * @throws {RangeError} loss or gradients were not finite 20 times in a row
   */
  async *train(rows, { maxSteps, batchSize = 8, gradientAccumulationSteps = 1 }) {
    const warmupSteps = roundHalfEven(this.settings.warmup_ratio * maxSteps);
    const order = this.#endless(rows);
    let skippedInARow = 0;
    for (let step = 0; step < maxSteps; step++) {
      const batches = Array.from({ length: gradientAccumulationSteps }, () =>
        stackRows(Array.from({ length: batchSize }, () => order.next().value)),
      );
      const { loss, gradNorm, gradients } = await this.#gradient(batches);
      const skipped = !Number.isFinite(loss) || !Number.isFinite(gradNorm);
      skippedInARow = skipped ? skippedInARow + 1 : 0;
      if (skippedInARow === MAX_SKIPPED_IN_A_ROW) {
        throw new RangeError(`loss or gradients were not finite in ${skippedInARow} steps. Take a lower learning rate`);
      }
      const learningRate = this.#learningRate(step, warmupSteps, maxSteps);
      if (!skipped) await this.#update(gradients, gradNorm, learningRate);
      yield { step: step + 1, loss, gradNorm, learningRate, skipped };
    }
  }

  /**
   * Loss of a learned token, in nats; NaN where there are no rows.
   * @param {{ids: number[], labels: number[]}[]} rows
   * @param {{tensors?: Map<string, {shape: number[], data: Float32Array}>, batchSize?: number}} options tensors: an
   *   adapter by `byLinear` to judge in the place of this one, its scaling in lora_B
   */
  async meanLoss(rows, { tensors, batchSize = 8 } = {}) {
    const adapter = tensors && new Map([...tensors].map(([name, { shape, data }]) => [name, floats(data, shape)]));
    const scaling = tensors ? floats([1]) : this.#scaling;
    let [lossSum, supervised] = [0, 0];
    for (let start = 0; start < rows.length; start += batchSize) {
      const batch = stackRows(rows.slice(start, start + batchSize));
      const x = await this.#forward(batch, (prefix) => this.#adapterOf(prefix, adapter, scaling));
      const sums = await this.#sums(x, batch.labels, "loss_tile");
      lossSum += (await this.#graphs.loss_end.run(sums)).loss_sum.data[0];
      supervised += count(batch);
    }
    return lossSum / supervised;
  }

  /** The adapter as it is now, as a file that bundles of this base take: see `Bundle.addAdapter`. */
  adapter() {
    const scaling = this.#scaling.data[0];
    const tensors = new Map();
    for (const [name, { dims, data }] of this.tensors) {
      tensors.set(name, { shape: dims, data: name.endsWith("lora_B") ? data.map((value) => value * scaling) : data });
    }
    return writeAdapter(tensors, this.settings, this.#manifest);
  }

  /** Free the sessions' memory. */
  async close() {
    for (const graph of Object.values(this.#graphs)) await graph.session.release();
  }

  /** Loss, norm of the gradients and the gradients by tensor, of all micro-batches of a step. */
  async #gradient(batches) {
    const supervised = batches.reduce((sum, batch) => sum + count(batch), 0); // every row has some
    const gradients = new Map();
    let lossSum = 0;
    for (const batch of batches) {
      const kept = [];
      const x = await this.#forward(batch, (prefix) => this.#adapterOf(prefix), kept);
      const sums = await this.#sums(x, batch.labels, "head_tile");
      const end = await this.#graphs.head_end.run({ ...this.#outer.head_end, ...sums, scale: floats([1 / supervised]) });
      lossSum += end.loss_sum.data[0];
      await this.#backward(end.dx, kept, gradients);
    }
    let squares = 0;
    for (const gradient of gradients.values()) for (const value of gradient) squares += value * value;
    return { loss: lossSum / supervised, gradNorm: Math.sqrt(squares), gradients };
  }

  /** The last block's output; what each block took goes into `kept`. */
  async #forward({ shape, input_ids, position_ids, segment_ids }, adapterOf, kept = []) {
    const ids = Object.entries({ input_ids, position_ids, segment_ids });
    const feeds = Object.fromEntries(ids.map(([name, data]) => [name, new ort.Tensor("int64", data, shape)]));
    const shared = await this.#graphs.start.run({ ...this.#outer.start, ...feeds });
    let x = shared.x;
    for (const { kind, prefix, weights } of this.#blocks) {
      const attention = ["mask", "cos", "sin"].map((name) => [name, shared[`${name}.${kind}`]]);
      const taken = { x, ...Object.fromEntries(attention) };
      kept.push(taken);
      x = (await this.#graphs.forward.run({ ...taken, ...weights, ...adapterOf(prefix) })).y;
    }
    return x;
  }

  /** What the end of the loss takes: running sums over the vocabulary, which `tile` adds in ranges. */
  async #sums(x, data, tile) {
    const labels = new ort.Tensor("int64", data, [data.length]);
    const { hidden, targets } = await this.#graphs.head_start.run({ ...this.#outer.head_start, x, labels });
    const column = [hidden.dims[0], 1];
    const sums = { highest: zeros(column, -Infinity), total: zeros(column), of_target: zeros(column) };
    sums.weighted = zeros(hidden.dims); // for the gradient
    for (const rows of this.#tiles) {
      const made = await this.#graphs[tile].run({ hidden, targets, ...sums, ...rows });
      for (const [name, value] of Object.entries(made)) sums[name.replace(/\.next$/, "")] = value;
    }
    return { x, labels, targets, ...sums };
  }

  /** Adds to the gradients, from the last block down. */
  async #backward(dy, kept, gradients) {
    for (const { prefix, weights } of this.#blocks.toReversed()) {
      const feeds = { ...kept.pop(), dy, ...weights, ...this.#adapterOf(prefix) };
      const { dx, ...made } = await this.#graphs.backward.run(feeds);
      dy = dx;
      for (const [name, { data }] of Object.entries(made)) {
        const tensor = prefix + name.replace(/\.gradient$/, "");
        const sum = gradients.get(tensor);
        if (sum) data.forEach((value, i) => (sum[i] += value));
        else gradients.set(tensor, data);
      }
    }
  }

  /** The optimizer's step, tensor by tensor. */
  async #update(gradients, gradNorm, learningRate) {
    this.#updates++;
    const { weight_decay, max_grad_norm } = this.settings;
    const numbers = { learning_rate: learningRate, weight_decay, grad_norm: gradNorm, max_grad_norm };
    const feeds = Object.fromEntries(Object.entries(numbers).map(([name, value]) => [name, floats([value])]));
    feeds.updates = wholes([this.#updates]);
    for (const [name, parameter] of this.tensors) {
      const gradient = floats(gradients.get(name), parameter.dims);
      const moments = this.#moments.get(name);
      const made = await this.#graphs.optimizer.run({ ...feeds, parameter, gradient, ...moments });
      this.tensors.set(name, made["parameter.next"]);
      for (const kind of Object.keys(moments)) moments[kind] = made[`${kind}.next`];
    }
  }

  /** The adapter's tensors of a block, by the names of the graphs' inputs; of rank 0 where it has none. */
  #adapterOf(prefix, tensors = this.tensors, scaling = this.#scaling) {
    const found = this.#graphs.forward.adapter.map(({ name, shape }) => [
      name,
      tensors.get(prefix + name) ?? zeros(shape.map((size) => (Number.isInteger(size) ? size : 0))),
    ]);
    return { scaling, ...Object.fromEntries(found) };
  }

  /** lora_A uniform in ±1/sqrt(in_features), lora_B zero. */
  #initial() {
    const tensors = new Map();
    for (const { prefix } of this.#blocks) {
      for (const { name, shape } of this.#graphs.forward.adapter) {
        const tensor = zeros(shape.map((size) => (Number.isInteger(size) ? size : this.settings.r)));
        const bound = name.endsWith("lora_A") ? 1 / Math.sqrt(shape[0]) : 0;
        if (bound) tensor.data.forEach((_, i, data) => (data[i] = bound * (2 * this.#random() - 1)));
        tensors.set(prefix + name, tensor);
      }
    }
    return tensors;
  }

  *#endless(rows) {
    for (;;) yield* this.#shuffled(rows);
  }

  #shuffled(rows) {
    const order = [...rows];
    for (let i = order.length - 1; i > 0; i--) {
      const j = Math.floor(this.#random() * (i + 1));
      [order[i], order[j]] = [order[j], order[i]];
    }
    return order;
  }

  /** The rate of step 0..maxSteps-1: it rises over the warm-up; neither the first nor the last is zero. */
  #learningRate(step, warmupSteps, maxSteps) {
    const { learning_rate: peak, lr_scheduler_type: schedule } = this.settings;
    if (step < warmupSteps) return (peak * (step + 1)) / warmupSteps;
    return peak * SCHEDULES[schedule]((step - warmupSteps) / Math.max(1, maxSteps - warmupSteps));
  }
}

/** A session that takes the weights it is given. */
class Graph {
  static async open(bytes, inputs, outputs) {
    const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"], logSeverityLevel: 3 });
    return new Graph(session, inputs, outputs);
  }

  constructor(session, inputs, outputs) {
    this.session = session;
    this.inputs = inputs;
    /** Those of the inputs that are an adapter's. */
    this.adapter = inputs.filter(({ name }) => /\.lora_[AB]$/.test(name));
    this.outputs = outputs.map(({ name }) => name);
  }

  /** The outputs by name; `values` may have more than the graph takes. */
  async run(values) {
    return this.session.run(Object.fromEntries(this.inputs.map(({ name }) => [name, values[name]])), this.outputs);
  }

  /** The weights that this graph takes, in the shapes of its inputs, which are named without the prefix. */
  weights(weights, prefix = "") {
    const found = this.inputs.filter(({ name }) => weights.has(prefix + name));
    return Object.fromEntries(
      found.map(({ name, dtype, shape }) => [name, new ort.Tensor(dtype, weights.get(prefix + name), shape)]),
    );
  }
}

/** The weights of the data file by name, as views into it. */
function readWeights(data, tensors) {
  return new Map(
    Object.entries(tensors).map(([name, { dtype, offset, nbytes }]) => {
      const Array = ARRAYS[dtype];
      if (!Array) throw new BundleError(`training.json: ${name} is ${dtype}, expected one of ${Object.keys(ARRAYS)}`);
      return [name, new Array(data.buffer, data.byteOffset + offset, nbytes / Array.BYTES_PER_ELEMENT)];
    }),
  );
}

/** The feeds of head_tile that are rows of the head, for one range of so many rows after the other. */
function* headTiles(graph, weights, head, step) {
  const parts = graph.inputs.filter(({ name }) => weights.has(name.replace(/^head/, head)));
  const widths = parts.map(({ shape }) => shape.slice(1).reduce((product, n) => product * n, 1));
  const matrices = parts.map(({ name }) => weights.get(name.replace(/^head/, head)));
  const count = matrices[0].length / widths[0];
  for (let start = 0; start < count; start += step) {
    const end = Math.min(start + step, count);
    const rows = parts.map(({ name, dtype, shape }, i) => {
      const data = matrices[i].subarray(start * widths[i], end * widths[i]);
      return [name, new ort.Tensor(dtype, data, [end - start, ...shape.slice(1)])];
    });
    yield { first_row: wholes([start]), ...Object.fromEntries(rows) };
  }
}

const floats = (values, dims = [values.length]) => new ort.Tensor("float32", Float32Array.from(values), dims);
const wholes = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [values.length]);
const zeros = (dims, value = 0) =>
  new ort.Tensor("float32", new Float32Array(dims.reduce((product, n) => product * n, 1)).fill(value), dims);

/** Positions of a micro-batch that have a label. */
const count = ({ labels }) => labels.filter((label) => label >= 0n).length;

/** Every linear is trained, so each needs a place in the inference graph; `export --slots adapter` leaves some out. */
function checkSlots({ inputs }, slots) {
  const known = slots.flatMap(({ modules }) => Object.keys(modules));
  const missing = inputs.find(({ name }) => name.endsWith(".lora_A") && !known.includes(inBlock(0, name.slice(0, -7))));
  if (missing) {
    throw new BundleError(`the bundle has no slot for ${missing.name.slice(0, -7)}. Export it without --slots adapter`);
  }
}

const inBlock = (index, name) => `model.layers.${index}.${name}`;

function checkKnown(name, value, known) {
  if (!(value in known)) throw new RangeError(`${name} is ${value}, expected ${Object.keys(known).join(", ")}`);
}

/** Python's `round`, so that a run here warms up for as many steps as there. */
function roundHalfEven(value) {
  const rounded = Math.round(value);
  return rounded - value === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}

/** Numbers in 0..1 that follow from a seed: mulberry32, as JavaScript's own generator takes none. */
function random(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}
