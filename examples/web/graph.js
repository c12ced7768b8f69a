// Slots of an adapter are optional inputs of the graph: an initializer of the same name is their default, an empty one.
// onnxruntime-web knows inputs without a default only, and refuses a feed for any other ("invalid input"). So the
// defaults are taken out of model.onnx before a session is made: the slots are then inputs like all others, and the
// base is fed what the defaults were. The file holds the graph alone (weights lie in model.onnx.data), so this is
// a walk over some ten kilobytes. Field numbers are those of onnx.proto.

const GRAPH = 7; // ModelProto.graph
const INITIALIZER = 5; // GraphProto.initializer
const NAME = 8; // TensorProto.name
const LENGTH_DELIMITED = 2;

/**
 * `model` without the initializers of these names, so that the inputs of the same names have to be fed.
 * @param {Uint8Array} model a ModelProto
 * @param {Set<string>} names
 * @returns {Uint8Array}
 */
export function withoutInitializers(model, names) {
  return rewrite(model, GRAPH, (graph) =>
    rewrite(graph, INITIALIZER, (tensor) => (names.has(nameOf(tensor)) ? null : tensor)),
  );
}

/** A message in which `change` has replaced the content of each field of a number; null removes the field. */
function rewrite(message, number, change) {
  const parts = [];
  for (const field of fields(message)) {
    if (field.number !== number) {
      parts.push(message.subarray(field.start, field.end));
      continue;
    }
    const content = change(field.content);
    if (content) parts.push(varint((number << 3) | LENGTH_DELIMITED), varint(content.length), content);
  }
  return joined(parts);
}

function nameOf(tensor) {
  for (const field of fields(tensor)) {
    if (field.number === NAME) return new TextDecoder().decode(field.content);
  }
  return "";
}

/** The fields of a protobuf message: where each lies, and what a length-delimited one holds. */
function* fields(message) {
  let at = 0;
  const next = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      if (at >= message.length || scale > 2 ** 63) throw new RangeError("model.onnx is no valid protobuf");
      const byte = message[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < message.length) {
    const start = at;
    const key = next();
    const kind = key % 8;
    let content = null;
    if (kind === LENGTH_DELIMITED) {
      const length = next();
      content = message.subarray(at, at + length);
      at += length;
    } else if (kind === 0) next();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else throw new RangeError(`model.onnx is no valid protobuf: wire type ${kind}`);
    if (at > message.length) throw new RangeError("model.onnx is no valid protobuf: it ends early");
    yield { number: Math.floor(key / 8), start, end: at, content };
  }
}

function varint(value) {
  const bytes = [];
  for (; value > 127; value = Math.floor(value / 128)) bytes.push((value % 128) | 128);
  return Uint8Array.from([...bytes, value]);
}

function joined(parts) {
  const whole = new Uint8Array(parts.reduce((total, part) => total + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}
