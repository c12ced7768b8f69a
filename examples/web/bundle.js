// An edgetune bundle on onnxruntime-web: read, checked, opened, an adapter chosen, text generated greedily with the KV
// cache. Runs in a page, in a web worker and in Node.
//
//   const bundle = await openBundle(fromUrl("bundles/notes/"));
//   await bundle.useAdapter("adapter");                      // or null: the base alone
//   const answer = await bundle.answer([{ role: "user", content: "Good morning" }], { onText: console.log });
import { checkProbeChange, emptyAdapter, readAdapter } from "./adapter.js";
import { AdapterError, BundleError } from "./errors.js";
import { withoutInitializers } from "./graph.js";
import { ort } from "./libraries.js";
import { BundleTokenizer } from "./tokenizer.js";

export { AdapterError, BundleError };

const FORMAT_VERSION = 1;
const [MANIFEST, MODEL, DATA] = ["edgetune.json", "model.onnx", "model.onnx.data"];
const TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"];
// A longer prompt is read in pieces of this many tokens, so that logits and activations stay bounded.
const CHUNK = 128;

/**
 * A source of files: an async function from (name, nbytes, onBytes) to the bytes of a file of the bundle. `nbytes` is
 * its size where that is known; `onBytes` hears how many came with each piece. This one fetches below an address.
 * @param {string} folder with a closing slash, relative to the page or worker
 */
export function fromUrl(folder) {
  const base = new URL(folder, globalThis.location?.href);
  return async (name, nbytes, onBytes = () => {}) => {
    const response = await fetch(new URL(name, base));
    if (!response.ok) throw new BundleError(`${new URL(name, base)}: ${response.status} ${response.statusText}`);
    if (nbytes === undefined) return new Uint8Array(await response.arrayBuffer());
    const bytes = new Uint8Array(nbytes); // in place: weights are large, and a copy of them is as large
    let at = 0;
    const reader = response.body.getReader();
    for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
      if (at + piece.value.length > nbytes) throw new BundleError(`${name} has more than the ${nbytes} bytes it should`);
      bytes.set(piece.value, at);
      at += piece.value.length;
      onBytes(piece.value.length);
    }
    return bytes.subarray(0, at);
  };
}

/**
 * Read and check a bundle and open a session on it, with the adapter that the bundle names as its default.
 * @param {(name: string, nbytes?: number, onBytes?: (count: number) => void) => Promise<Uint8Array>} source
 * @param {{threads?: number, onProgress?: (share: number) => void}} options threads: by default what onnxruntime-web
 *   takes, which is one where the page is not cross-origin isolated; onProgress hears the share that was read, up to 1
 * @returns {Promise<Bundle>}
 * @throws {BundleError} a file is missing, damaged, or of a newer format
 */
export async function openBundle(source, { threads, onProgress = () => {} } = {}) {
  const manifest = readManifest(await source(MANIFEST));
  const wanted = [MODEL, DATA, ...TOKENIZER_FILES.filter((name) => name in manifest.files)];
  const total = wanted.reduce((sum, name) => sum + manifest.files[name].bytes, 0);
  let done = 0;
  const files = new Map();
  for (const name of wanted) {
    files.set(name, await readChecked(source, manifest, name, (count) => onProgress((done += count) / total)));
  }
  const texts = TOKENIZER_FILES.filter((name) => files.has(name));
  const decoder = new TextDecoder();
  const tokenizer = new BundleTokenizer(new Map(texts.map((name) => [name, decoder.decode(files.get(name))])));
  const slots = new Set(emptyAdapter(manifest.slots).keys());
  if (threads) ort.env.wasm.numThreads = threads;
  const session = await ort.InferenceSession.create(withoutInitializers(files.get(MODEL), slots), {
    executionProviders: ["wasm"],
    externalData: [{ path: DATA, data: files.get(DATA) }],
    enableMemPattern: false, // the past grows with every token, so no pattern is met twice
    logSeverityLevel: 3,
    // WebAssembly has no 4-bit kernels. This has `standard` weights widened to float32 at load, which multiplies fast.
    extra: { session: { disable_quant_qdq: "1" } },
  });
  const bundle = new Bundle(source, manifest, tokenizer, session);
  await bundle.useAdapter(manifest.default_adapter);
  return bundle;
}

/** An opened bundle and one sequence of tokens on it; `openBundle` makes it. */
export class Bundle {
  #source;
  #session;
  #past; // feeds of the cache, by the names of the graph's inputs
  #length = 0; // tokens in the cache
  #adapter; // feeds of the adapter
  #added = new Map(); // files of adapters that the bundle does not list

  constructor(source, manifest, tokenizer, session) {
    this.#source = source;
    this.#session = session;
    this.manifest = manifest;
    this.tokenizer = tokenizer;
    /** The adapter in use, or null for the base alone. */
    this.adapter = null;
    /** Its tensors by slot, of rank 0 for the base. */
    this.adapterTensors = new Map();
  }

  /** The names of the bundle's adapters, and of those that were added. */
  get adapters() {
    return [...Object.keys(this.manifest.adapters), ...this.#added.keys()];
  }

  /** The most tokens that prompt and answer may have together. */
  get contextLength() {
    return this.manifest.model.max_position_embeddings;
  }

  /**
   * Add an adapter for as long as the bundle is open.
   * @param {string} name
   * @param {Uint8Array} bytes its .safetensors file
   * @throws {AdapterError} the name is taken, or it does not fit the bundle
   */
  addAdapter(name, bytes) {
    if (this.adapters.includes(name)) throw new AdapterError(`the bundle has an adapter ${name} already`);
    readAdapter(bytes, this.manifest, name);
    this.#added.set(name, bytes);
  }

  /**
   * A file of the bundle.
   * @throws {BundleError} there is none of that name, or it is damaged
   */
  async read(name) {
    return readChecked(this.#source, this.manifest, name);
  }

  /**
   * Switch to another adapter of the bundle, or with null to the base. The weights stay loaded.
   * @throws {AdapterError} there is none of that name, or it does not fit; the one in use stays
   */
  async useAdapter(name) {
    let tensors = emptyAdapter(this.manifest.slots);
    if (name !== null) {
      if (!this.adapters.includes(name)) {
        throw new AdapterError(`the bundle has no adapter ${name}; it has ${this.adapters.join(", ") || "none"}`);
      }
      if (name in this.manifest.adapters) checkProbeChange(this.manifest.adapters[name], name);
      const bytes = this.#added.get(name) ?? (await this.read(`${name}.safetensors`));
      for (const [key, tensor] of readAdapter(bytes, this.manifest, name)) tensors.set(key, tensor);
    }
    this.adapterTensors = tensors;
    this.#adapter = Object.fromEntries(
      [...tensors].map(([key, { shape, data }]) => [key, new ort.Tensor("float32", data, shape)]),
    );
    this.adapter = name;
  }

  /**
   * The most likely tokens after `ids`, one at a time, from an empty cache, up to one that ends a text.
   * @param {number[]} ids
   * @returns {AsyncGenerator<number>}
   */
  async *generate(ids, { maxNewTokens = 128 } = {}) {
    const room = this.contextLength - ids.length;
    if (!ids.length || room < 1) {
      throw new RangeError(`the prompt has ${ids.length} tokens, expected 1 to ${this.contextLength - 1}`);
    }
    const stop = new Set([...this.manifest.model.eos_token_ids, ...this.tokenizer.eosTokenIds]);
    this.#reset();
    let pending = ids;
    for (let count = Math.min(maxNewTokens, room); count > 0; count--) {
      const token = largest(await this.#forward(pending));
      if (stop.has(token)) return;
      yield token;
      pending = [token];
    }
  }

  /**
   * Answer a conversation, or with a string continue a text.
   * @param {{role: string, content: string}[] | string} prompt
   * @param {{maxNewTokens?: number, onText?: (piece: string) => any, signal?: AbortSignal}} options onText is awaited
   *   after each token with the text that it made certain, which may be none; the pieces add up to `text`. A signal ends
   *   the answer where it is.
   * @returns {Promise<{text: string, tokenIds: number[], promptTokens: number, timeToFirstTokenMs: number,
   *   tokensPerSecond: number | null}>} tokensPerSecond counts the tokens after the first; null where there are none
   */
  async answer(prompt, { maxNewTokens = 128, onText = () => {}, signal } = {}) {
    const ids = typeof prompt === "string" ? this.tokenizer.encode(prompt) : this.tokenizer.encodeChat(prompt);
    const tokenIds = [];
    const start = performance.now();
    let [first, last, text] = [null, null, ""];
    const grow = async (whole) => {
      const piece = whole.slice(text.length);
      text = whole;
      await onText(piece);
    };
    for await (const token of this.generate(ids, { maxNewTokens })) {
      tokenIds.push(token);
      last = performance.now();
      first ??= last;
      const whole = this.tokenizer.decode(tokenIds);
      await grow(whole.endsWith("\ufffd") ? text : whole); // half a character: the next token brings the rest
      if (signal?.aborted) break;
    }
    await grow(this.tokenizer.decode(tokenIds));
    return {
      text,
      tokenIds,
      promptTokens: ids.length,
      timeToFirstTokenMs: (first ?? performance.now()) - start,
      tokensPerSecond: last > first ? (1e3 * (tokenIds.length - 1)) / (last - first) : null,
    };
  }

  /** Free the session's memory for the next one. */
  async close() {
    await this.#session.release();
  }

  #reset() {
    const { num_hidden_layers, num_key_value_heads, head_dim } = this.manifest.model;
    const empty = new ort.Tensor("float32", new Float32Array(0), [1, num_key_value_heads, 0, head_dim]);
    this.#past = {};
    for (let i = 0; i < num_hidden_layers; i++) {
      for (const kind of ["key", "value"]) this.#past[`past_key_values.${i}.${kind}`] = empty;
    }
    this.#length = 0;
  }

  /** Append tokens to the sequence; the logits that follow the last of them. */
  async #forward(ids) {
    let logits;
    for (let start = 0; start < ids.length; start += CHUNK) {
      const tokens = BigInt64Array.from(ids.slice(start, start + CHUNK), BigInt);
      const length = this.#length + tokens.length;
      const outputs = await this.#session.run({
        input_ids: new ort.Tensor("int64", tokens, [1, tokens.length]),
        attention_mask: new ort.Tensor("int64", new BigInt64Array(length).fill(1n), [1, length]),
        ...this.#past,
        ...this.#adapter,
      });
      for (const name of Object.keys(this.#past)) {
        this.#past[name] = outputs[name.replace("past_key_values", "present")];
      }
      this.#length = length;
      logits = outputs.logits.data.subarray(-this.manifest.model.vocab_size);
    }
    return logits;
  }
}

function largest(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

/** edgetune.json, checked as far as this module relies on it. */
function readManifest(bytes) {
  const manifest = JSON.parse(new TextDecoder().decode(bytes));
  if (manifest.format_version !== FORMAT_VERSION) {
    throw new BundleError(`${MANIFEST} has format_version ${manifest.format_version}, expected ${FORMAT_VERSION}`);
  }
  for (const key of ["files", "model", "slots", "adapters"]) {
    if (typeof manifest[key] !== "object" || manifest[key] === null) throw new BundleError(`${MANIFEST} has no ${key}`);
  }
  if ("pooling" in manifest.model) {
    throw new BundleError("this is the bundle of an encoder, which embeds a text and continues none");
  }
  for (const name of [MODEL, DATA, TOKENIZER_FILES[0]]) {
    if (!(name in manifest.files)) throw new BundleError(`${MANIFEST} does not list ${name}. Export the bundle again`);
  }
  return manifest;
}

/** A file of the bundle, refused unless size and SHA-256 are those that the manifest lists. */
async function readChecked(source, manifest, name, onBytes) {
  const entry = manifest.files[name];
  if (!entry) throw new BundleError(`${MANIFEST} does not list ${name}. Export the bundle again`);
  const bytes = await source(name, entry.bytes, onBytes);
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const sha256 = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (bytes.length !== entry.bytes || sha256 !== entry.sha256) {
    throw new BundleError(`${name} is damaged: it is not the file that ${MANIFEST} lists. Copy the bundle again`);
  }
  return bytes;
}
