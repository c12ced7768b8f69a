// Rows of JSON Lines to micro-batches, with the ids and labels that `edgetune train` gives them. A row is {"text"},
// {"prompt", "completion"} or {"messages"}, of which the assistant's are learned. Each row, or turn of a chat, is a
// window of its own here; edgetune puts several side by side into one, which is the same loss with less padding.
import { RowError } from "./errors.js";

const IGNORED = -100; // the label of a position that is not learned

/**
 * The rows of a file.
 * @param {string} text JSON Lines
 * @param {BundleTokenizer} tokenizer
 * @param {number} maxLength tokens of a row; a longer text is cut, any other longer row is refused
 * @returns {{ids: number[], labels: number[]}[]} labels are not shifted: those of the position itself
 * @throws {RowError} a line cannot be used
 */
export function readRows(text, tokenizer, maxLength) {
  if (!text.trim()) throw new RowError('the file has no rows; expected one JSON object in each line: {"text": "…"}');
  return text.trimEnd().split("\n").flatMap((line, index) => {
    try {
      return encodeRow(JSON.parse(line), tokenizer, maxLength);
    } catch (error) {
      throw new RowError(`line ${index + 1}: ${error.message}`);
    }
  });
}

/**
 * A micro-batch of rows, padded to the longest.
 * @returns {{shape: number[], input_ids: BigInt64Array, position_ids: BigInt64Array, segment_ids: BigInt64Array,
 *   labels: BigInt64Array}} labels are those of the next token
 */
export function stackRows(rows) {
  const length = Math.max(...rows.map(({ ids }) => ids.length));
  const filled = (padding, value) => {
    const values = new BigInt64Array(rows.length * length).fill(BigInt(padding));
    rows.forEach((row, r) => row.ids.forEach((_, i) => (values[r * length + i] = BigInt(value(row, i)))));
    return values;
  };
  return {
    shape: [rows.length, length],
    input_ids: filled(0, ({ ids }, i) => ids[i]),
    position_ids: filled(0, (_, i) => i),
    segment_ids: filled(-1, () => 0),
    labels: filled(IGNORED, ({ labels }, i) => labels[i + 1] ?? IGNORED),
  };
}

function encodeRow(row, tokenizer, maxLength) {
  if (isText(row?.text)) return cutText(ended(tokenizer.encode(row.text), tokenizer), maxLength);
  let made;
  if (typeof row?.prompt === "string" && isText(row.completion)) {
    made = [encodePair(row.prompt, row.completion, tokenizer, true)];
  } else if (Array.isArray(row?.messages)) made = encodeTurns(row.messages, tokenizer);
  else throw new Error('expected an object with a "text", with "prompt" and "completion", or with "messages"');
  for (const { ids } of made) {
    if (ids.length > maxLength) throw new Error(`has ${ids.length} tokens, expected at most ${maxLength}`);
  }
  return made;
}

const isText = (value) => typeof value === "string" && value.trim() !== "";

/** A long text in windows; a last one of a single token, which predicts nothing, gets one more from that before. */
function cutText(ids, maxLength) {
  if (ids.length < 2) throw new Error("has a single token, so that nothing can be predicted");
  const rows = [];
  for (let start = 0, end; start < ids.length; start = end) {
    end = Math.min(start + maxLength, ids.length);
    if (ids.length - end === 1) end--;
    rows.push({ ids: ids.slice(start, end), labels: ids.slice(start, end) });
  }
  return rows;
}

/** A row for each message of the assistant, behind the prompt that generation would begin with. */
function encodeTurns(messages, tokenizer) {
  const rows = messages.flatMap(({ role, weight = 1 }, turn) => {
    if (role !== "assistant" || !weight) return [];
    const prompt = tokenizer.render(messages.slice(0, turn), true);
    const text = tokenizer.render(messages.slice(0, turn + 1), false);
    if (!text.startsWith(prompt)) {
      throw new Error(`messages[${turn}] is not rendered as a continuation of the prompt before it`);
    }
    return [encodePair(prompt, untilEnd(text.slice(prompt.length), tokenizer), tokenizer, false)];
  });
  if (!rows.length) throw new Error("has no message of the assistant to learn");
  return rows;
}

/** An answer up to and with its end token: what a template writes behind it, nobody generates. */
function untilEnd(answer, tokenizer) {
  for (const token of tokenizer.eosTokenIds.map((id) => tokenizer.decode([id], { skipSpecial: false }))) {
    const at = answer.lastIndexOf(token);
    if (at >= 0 && !answer.slice(at + token.length).trim()) return answer.slice(0, at + token.length);
  }
  return answer;
}

/** A prompt and what is learned behind it. */
function encodePair(prompt, completion, tokenizer, special) {
  const before = tokenizer.encode(prompt, { special });
  const ids = ended(continued(before, prompt, completion, tokenizer, special), tokenizer);
  const differs = ids.findIndex((id, i) => id !== before[i]);
  const kept = differs < 0 ? ids.length : differs;
  if (Math.max(kept, 1) >= ids.length) throw new Error("leaves nothing to learn");
  return { ids, labels: ids.map((id, i) => (i < kept ? IGNORED : id)) };
}

/**
 * Ids of prompt and completion, which go on from the prompt's as they are where that is possible, because generation
 * does. A tokenizer may merge characters across the seam, or put a space before a piece that stands alone. Then the
 * completion is encoded alone, and behind a line break that is taken off again.
 */
function continued(before, prompt, completion, tokenizer, special) {
  const whole = tokenizer.encode(prompt + completion, { special });
  if (before.every((id, i) => id === whole[i])) return whole;
  const wanted = tokenizer.decode(whole, { skipSpecial: false });
  for (const anchor of ["", "\n"]) {
    const skipped = anchor ? tokenizer.encode(anchor, { special: false }).length : 0;
    const joined = [...before, ...tokenizer.encode(anchor + completion, { special: false }).slice(skipped)];
    if (tokenizer.decode(joined, { skipSpecial: false }) === wanted) return joined;
  }
  return whole;
}

function ended(ids, tokenizer) {
  const [end] = tokenizer.eosTokenIds;
  return end === undefined || tokenizer.eosTokenIds.includes(ids.at(-1)) ? ids : [...ids, end];
}
