// How much memory the runtime holds. Weights, caches and activations of onnxruntime-web are all in one WebAssembly
// memory, which only grows; the library has no call that tells its size, so it is caught where it is made. Import this
// before a session is opened. (performance.measureUserAgentSpecificMemory says the same, some 20 seconds later, and
// not in Firefox or Safari.)

const made = [];

WebAssembly.Memory = class extends WebAssembly.Memory {
  constructor(descriptor) {
    super(descriptor);
    made.push(this);
  }
};

/** The bytes of all WebAssembly memories so far; memory that was taken is never given back, so this is the peak. */
export function memoryBytes() {
  return made.reduce((total, memory) => total + memory.buffer.byteLength, 0);
}
