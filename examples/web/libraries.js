// The three libraries, by path: a page without a build step has nothing that finds bare names, and import maps do not
// reach web workers. In an app with a bundler these are "onnxruntime-web/wasm", "@huggingface/tokenizers" and
// "@huggingface/jinja".
export * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
export { Tokenizer } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs";
export { Template } from "./node_modules/@huggingface/jinja/dist/index.js";
