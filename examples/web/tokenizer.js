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
    const eos = [json("generation_config.json").eos_token_id, this.backend.token_to_id(this.special.eos_token)];
    /** Ids that end a text. */
    this.eosTokenIds = eos.flat().filter(Number.isInteger);
    let template = files.get("chat_template.jinja") ?? config.chat_template;
    if (Array.isArray(template)) template = template.find(({ name }) => name === "default")?.template;
    this.template = template ? new Template(template) : null;
  }

  /** Token ids of a text. */
  encode(text) {
    return this.backend.encode(text).ids;
  }

  /** Token ids of a conversation, up to where the assistant's answer begins: [{role, content}, …]. */
  encodeChat(messages) {
    if (!this.template) throw new BundleError("the bundle has no chat template, so its model takes text, not messages");
    const variables = { ...this.special, messages, tools: null, documents: null, add_generation_prompt: true };
    // A template writes the special tokens itself.
    return this.backend.encode(this.template.render(variables), { add_special_tokens: false }).ids;
  }

  /** The text of token ids; half a character at the end comes out as U+FFFD. */
  decode(ids) {
    return this.backend.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }
}
