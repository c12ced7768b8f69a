// An adapter of a bundle: its safetensors file, parsed, and checked against the bundle before anything runs. One of
// another base with the same shapes would run without an error and answer nonsense.
import { AdapterError } from "./errors.js";

const FORMAT_VERSION = 1;
const MAX_HEADER_BYTES = 2 ** 20;
const MIN_PROBE_CHANGE = 1e-6; // of the largest logit; less cannot be told from the rounding of float32

/**
 * The tensors of an adapter by the names of the graph's inputs.
 * @param {Uint8Array} bytes the .safetensors file
 * @param {object} manifest edgetune.json of the bundle
 * @param {string} name
 * @returns {Map<string, {shape: number[], data: Float32Array}>} for each slot `NAME.lora_A` [in, n], `.lora_B` [n, out]
 */
export function readAdapter(bytes, manifest, name) {
  const { metadata, tensors } = readSafetensors(bytes, name);
  const binding = JSON.parse(metadata.edgetune ?? "{}");
  for (const key of ["base_sha256", "grid", "tokenizer_sha256"]) {
    if (binding[key] !== manifest[key]) {
      throw new AdapterError(`adapter ${name} was trained for ${key} ${binding[key]}, the bundle has ${manifest[key]}`);
    }
  }
  const problems = [...tensorProblems(tensors, binding, manifest.slots)];
  if (problems.length) throw new AdapterError(`adapter ${name} does not fit the bundle: ${problems.join("; ")}`);
  return tensors;
}

/** Refuse an adapter that a bundle lists by what it did to the bundle's probe rows when it was added. */
export function checkProbeChange({ probe_change: change }, name) {
  if (!(change > MIN_PROBE_CHANGE)) {
    throw new AdapterError(`adapter ${name} changes nothing: on the probe rows no logit moves. Train it longer`);
  }
}

/**
 * The file of an adapter, as `readAdapter` and `edgetune adapter add` take it.
 * @param {Map<string, {shape: number[], data: Float32Array}>} tensors for each linear `NAME.lora_A` [in, r], and
 *   `.lora_B` [r, out] times its scaling
 * @param {{r: number, lora_alpha: number}} settings
 * @param {object} manifest edgetune.json of the bundle that it was trained on
 * @returns {Uint8Array} .safetensors
 */
export function writeAdapter(tensors, { r, lora_alpha }, manifest) {
  const { base_sha256, grid, tokenizer_sha256 } = manifest;
  const slots = manifest.slots.filter(({ modules }) => adapted(modules, tensors).length);
  const binding = { base_sha256, grid, tokenizer_sha256, r, lora_alpha, slots: slots.map(({ name }) => name) };
  return writeSafetensors(new Map(slots.flatMap((slot) => bySlot(tensors, slot))), {
    edgetune: JSON.stringify({ format_version: FORMAT_VERSION, ...binding }),
  });
}

/**
 * The two tensors of a slot, whose linears have their outputs side by side: lora_A side by side, lora_B along the
 * diagonal. y = [x Wq, x Wk, x Wv] + x [Aq, Ak, Av] diag(Bq, Bk, Bv)
 */
function bySlot(tensors, { name, in_features, out_features, modules }) {
  const names = adapted(modules, tensors);
  const rank = names.reduce((sum, module) => sum + tensors.get(`${module}.lora_A`).shape[1], 0);
  const a = new Float32Array(in_features * rank);
  const b = new Float32Array(rank * out_features);
  let [row, start] = [0, 0];
  for (const [module, outputs] of Object.entries(modules)) {
    if (names.includes(module)) {
      const [from, to] = ["lora_A", "lora_B"].map((kind) => tensors.get(`${module}.${kind}`));
      const r = from.shape[1];
      for (let i = 0; i < in_features; i++) a.set(from.data.subarray(i * r, (i + 1) * r), i * rank + row);
      for (let i = 0; i < r; i++) {
        b.set(to.data.subarray(i * outputs, (i + 1) * outputs), (row + i) * out_features + start);
      }
      row += r;
    }
    start += outputs;
  }
  return [
    [`${name}.lora_A`, { shape: [in_features, rank], data: a }],
    [`${name}.lora_B`, { shape: [rank, out_features], data: b }],
  ];
}

/**
 * An adapter of a bundle for each linear on its own, at the rank of its whole slot: the inverse of `bySlot` in effect.
 * @param {Map<string, {shape: number[], data: Float32Array}>} tensors by slot, as `readAdapter` gives them
 */
export function byLinear(tensors, slots) {
  const found = new Map();
  for (const { name, out_features, modules } of slots) {
    const [a, b] = ["lora_A", "lora_B"].map((kind) => tensors.get(`${name}.${kind}`));
    let start = 0;
    for (const [module, outputs] of Object.entries(modules)) {
      const rank = b.shape[0];
      const data = new Float32Array(rank * outputs);
      for (let i = 0; i < rank; i++) {
        data.set(b.data.subarray(i * out_features + start, i * out_features + start + outputs), i * outputs);
      }
      found.set(`${module}.lora_A`, a).set(`${module}.lora_B`, { shape: [rank, outputs], data });
      start += outputs;
    }
  }
  return found;
}

const adapted = (modules, tensors) => Object.keys(modules).filter((module) => tensors.has(`${module}.lora_A`));

/** What stands in for an adapter where there is none: rank 0, which computes the base exactly. */
export function emptyAdapter(slots) {
  const data = new Float32Array(0);
  return new Map(
    slots.flatMap(({ name, in_features, out_features }) => [
      [`${name}.lora_A`, { shape: [in_features, 0], data }],
      [`${name}.lora_B`, { shape: [0, out_features], data }],
    ]),
  );
}

function* tensorProblems(tensors, binding, slots) {
  const known = new Map(slots.map((slot) => [slot.name, slot]));
  const expected = new Map();
  for (const name of binding.slots) {
    const slot = known.get(name);
    if (!slot) {
      yield `${name}: the graph has no such slot`;
      continue;
    }
    // A slot of several linears holds r columns for each of them that is adapted.
    const columns = tensors.get(`${name}.lora_A`)?.shape[1] ?? 0;
    const rank = columns > 0 && columns % binding.r === 0 ? columns : binding.r;
    expected.set(`${name}.lora_A`, [slot.in_features, rank]);
    expected.set(`${name}.lora_B`, [rank, slot.out_features]);
  }
  for (const [name, shape] of expected) {
    const tensor = tensors.get(name);
    if (!tensor) yield `${name} is missing`;
    else if (`${tensor.shape}` !== `${shape}`) yield `${name} has shape [${tensor.shape}], expected [${shape}]`;
    else if (!tensor.data.every(Number.isFinite)) yield `${name} holds NaN or infinity`;
  }
  for (const name of tensors.keys()) if (!expected.has(name)) yield `${name} is not of a slot that the adapter names`;
}

/** A safetensors file of float32 tensors: its metadata and its tensors by name. */
function readSafetensors(bytes, name) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const length = bytes.length < 8 ? Infinity : Number(view.getBigUint64(0, true));
  if (length > Math.min(MAX_HEADER_BYTES, bytes.length - 8)) throw new AdapterError(`adapter ${name} is damaged`);
  const { __metadata__: metadata = {}, ...infos } = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  const tensors = new Map();
  const data = bytes.byteOffset + 8 + length;
  for (const [key, { dtype, shape, data_offsets: [start, end] }] of Object.entries(infos)) {
    const count = shape.reduce((product, n) => product * n, 1);
    if (dtype !== "F32" || end - start !== 4 * count || start < 0 || 8 + length + end > bytes.length) {
      throw new AdapterError(`adapter ${name}: ${key} is no float32 tensor of shape [${shape}] inside the file`);
    }
    // A copy, because a Float32Array has to start at a multiple of 4.
    tensors.set(key, { shape, data: new Float32Array(bytes.buffer.slice(data + start, data + end)) });
  }
  return { metadata, tensors };
}

function writeSafetensors(tensors, metadata) {
  const header = { __metadata__: metadata };
  let end = 0;
  for (const [key, { shape, data }] of tensors) {
    header[key] = { dtype: "F32", shape, data_offsets: [end, (end += data.byteLength)] };
  }
  const text = JSON.stringify(header);
  const encoded = new TextEncoder().encode(text.padEnd(text.length + ((8 - (text.length % 8)) % 8)));
  const bytes = new Uint8Array(8 + encoded.length + end);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(encoded.length), true);
  bytes.set(encoded, 8);
  let at = 8 + encoded.length;
  for (const { data } of tensors.values()) {
    bytes.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), at);
    at += data.byteLength;
  }
  return bytes;
}
