// Text to token ids and back, and messages to text, from the tokenizer files of a bundle.
import { BundleError } from "./errors.js";
import { Template, Tokenizer } from "./libraries.js";

export class BundleTokenizer {
  /** @param {Map<string, string>} files the texts of the tokenizer files that the bundle has, by name */
  constructor(files) {
    const json = (name) => JSON.parse(files.get(name) ?? "{}");
    const config = json("tokenizer_config.json");
    this.backend = new Tokenizer(json("tokenizer.json"), config);
    this.special = {};
    for (const [key, value] of Object.entries(config)) {
      const text = value?.content ?? value;
      if (key.endsWith("_token") && typeof text === "string") this.special[key] = text;
    }
    const eos = [this.backend.token_to_id(this.special.eos_token), json("generation_config.json").eos_token_id];
    /** Ids that end a text; the first one is put behind what is learned. */
    this.eosTokenIds = eos.flat().filter(Number.isInteger);
    let template = files.get("chat_template.jinja") ?? config.chat_template;
    if (Array.isArray(template)) template = template.find(({ name }) => name === "default")?.template;
    this.template = template ? new Template(template) : null;
  }

  /** Token ids of a text; one that a template made has its special tokens already. */
  encode(text, { special = true } = {}) {
    return this.backend.encode(text, { add_special_tokens: special }).ids;
  }

  /** Token ids of a conversation, up to where the assistant's answer begins: [{role, content}, …]. */
  encodeChat(messages) {
    return this.encode(this.render(messages, true), { special: false });
  }

  /** The text of a conversation; with `addGenerationPrompt` it ends where the assistant's answer begins. */
  render(messages, addGenerationPrompt) {
    if (!this.template) throw new BundleError("the bundle has no chat template, so its model takes text, not messages");
    const variables = { ...this.special, messages, tools: null, documents: null };
    return this.template.render({ ...variables, add_generation_prompt: addGenerationPrompt });
  }

  /** The text of token ids; half a character at the end comes out as U+FFFD. */
  decode(ids, { skipSpecial = true } = {}) {
    return this.backend.decode(ids, { skip_special_tokens: skipSpecial, clean_up_tokenization_spaces: false });
  }
}
