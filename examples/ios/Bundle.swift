// Not run in CI: it needs a Mac. It takes the steps of ../python/run_bundle.py, which is.
//
// A bundle with an adapter on iOS, with onnxruntime 1.24 or newer (Package.swift). Token ids in, token ids out. The
// bundle folder may stay among the app's resources: onnxruntime opens the graph by its path, so that the weights stay
// in the mapped file. Without the CoreML execution provider: it has no 4-bit kernels, and crashes on weights in a file
// of their own. There is no onnxruntime for watchOS; a watch asks its phone.
//
//     let client = try Client(TunedBundle(folder), adapter: "adapter", threads: 2)
//     let answer = try client.generate([1, 403, 407], maxNewTokens: 64)

import Foundation
import OnnxRuntimeBindings

public struct BundleError: LocalizedError {
    let message: String
    public var errorDescription: String? { message }

    init(_ message: String) { self.message = message }
}

/// What an adapter was trained on. A base of another hash, grid or tokenizer is another base.
struct Origin: Decodable, Equatable {
    let base: String
    let grid: String?
    let tokenizer: String?

    enum CodingKeys: String, CodingKey {
        case base = "base_sha256", grid, tokenizer = "tokenizer_sha256"
    }
}

struct Slot: Decodable {
    let name: String
    let rows: Int
    let columns: Int

    enum CodingKeys: String, CodingKey {
        case name, rows = "in_features", columns = "out_features"
    }
}

struct Model: Decodable {
    let layers: Int
    let heads: Int
    let headSize: Int
    let vocabulary: Int
    let context: Int
    let ends: [Int64]

    enum CodingKeys: String, CodingKey {
        case layers = "num_hidden_layers", heads = "num_key_value_heads", headSize = "head_dim"
        case vocabulary = "vocab_size", context = "max_position_embeddings", ends = "eos_token_ids"
    }
}

/// What an adapter's file says of itself beside its origin.
struct Binding: Decodable {
    let r: Int
    let slots: [String]
}

/// A tensor in the header of a safetensors file, or its metadata.
struct Entry: Decodable {
    let shape: [Int]?
    let offsets: [Int]?
    let edgetune: String?

    enum CodingKeys: String, CodingKey {
        case shape, offsets = "data_offsets", edgetune
    }
}

/// `edgetune.json` of a bundle folder.
public struct TunedBundle {
    private struct Manifest: Decodable {
        let version: Int
        let model: Model
        let slots: [Slot]

        enum CodingKeys: String, CodingKey {
            case version = "format_version", model, slots
        }
    }

    let folder: URL
    let model: Model
    private let origin: Origin
    private let slots: [String: Slot]

    public init(_ folder: URL) throws {
        let data = try Data(contentsOf: folder.appendingPathComponent("edgetune.json"))
        let manifest = try JSONDecoder().decode(Manifest.self, from: data)
        guard manifest.version == 1 else {
            throw BundleError("\(folder.path) has format_version \(manifest.version), this client reads 1")
        }
        self.folder = folder
        model = manifest.model
        origin = try JSONDecoder().decode(Origin.self, from: data)
        slots = Dictionary(uniqueKeysWithValues: manifest.slots.map { ($0.name, $0) })
    }

    /// The graph inputs of an adapter: `<slot>.lora_A` [in, n] and `<slot>.lora_B` [n, out], if it fits this bundle.
    ///
    /// A safetensors file is the length of its header in 8 bytes, the header as JSON, then the tensors. They are fed as
    /// inputs because the Objective-C API, which Swift calls, does not know onnxruntime's own adapters.
    func adapter(_ name: String) throws -> [String: ORTValue] {
        let file = try Data(contentsOf: folder.appendingPathComponent("\(name).safetensors"), options: .alwaysMapped)
        let length = file.prefix(8).reversed().reduce(0) { $0 << 8 | Int($1) }
        guard file.count >= 8, length > 0, length <= file.count - 8 else {
            throw BundleError("adapter \(name) is damaged")
        }
        let start = 8 + length
        var header = try JSONDecoder().decode([String: Entry].self, from: file.subdata(in: 8..<start))
        guard let bound = header.removeValue(forKey: "__metadata__")?.edgetune.map({ Data($0.utf8) }) else {
            throw BundleError("adapter \(name) does not say what it was trained on")
        }
        guard try JSONDecoder().decode(Origin.self, from: bound) == origin else {
            throw BundleError("adapter \(name) was trained on another base, grid or tokenizer")
        }
        let expected = try shapes(JSONDecoder().decode(Binding.self, from: bound), header)
        guard header.compactMapValues(\.shape) == expected else {
            throw BundleError("adapter \(name) does not have the tensors of its slots")
        }
        return try header.mapValues { entry in
            guard let shape = entry.shape, let offsets = entry.offsets, offsets.count == 2, offsets[0] >= 0,
                offsets[1] - offsets[0] == 4 * shape.reduce(1, *), offsets[1] <= file.count - start
            else { throw BundleError("adapter \(name) is damaged") }
            return try makeTensor(file.subdata(in: start + offsets[0]..<start + offsets[1]), .float, shape)
        }
    }

    /// Of the tensors of each slot. One that serves several linears holds r columns for each that is adapted.
    private func shapes(_ binding: Binding, _ header: [String: Entry]) throws -> [String: [Int]] {
        var shapes: [String: [Int]] = [:]
        for part in binding.slots {
            guard let slot = slots[part] else { throw BundleError("the graph has no slot \(part)") }
            let found = header["\(part).lora_A"]?.shape?.last ?? 0
            let rank = found > 0 && found % binding.r == 0 ? found : binding.r
            shapes["\(part).lora_A"] = [slot.rows, rank]
            shapes["\(part).lora_B"] = [rank, slot.columns]
        }
        return shapes
    }
}

/// One sequence on a bundle; a nil adapter is the base.
public final class Client {
    private static let chunk = 128  // tokens of a long prompt in one call

    private let model: Model
    private let environment: ORTEnv
    private let session: ORTSession
    private let adapter: [String: ORTValue]
    private let parts: [String]
    private let empty: ORTValue
    private var cache: [String: ORTValue] = [:]
    private var length = 0

    public init(_ bundle: TunedBundle, adapter name: String?, threads: Int32) throws {
        // First: from 1.29 on onnxruntime sends usage events to Microsoft unless told not to before it starts.
        setenv("ORT_DISABLE_TELEMETRY", "1", 1)
        model = bundle.model
        adapter = try name.map(bundle.adapter) ?? [:]  // refused before the graph is opened
        let options = try ORTSessionOptions()
        try options.setIntraOpNumThreads(threads)  // the performance cores
        try options.setLogSeverityLevel(.error)  // every optional input would be a warning
        environment = try ORTEnv(loggingLevel: .error)
        let graph = bundle.folder.appendingPathComponent("model.onnx").path
        session = try ORTSession(env: environment, modelPath: graph, sessionOptions: options)
        parts = (0..<model.layers).flatMap { ["\($0).key", "\($0).value"] }
        // An empty NSMutableData has no address; a longer one than the shape needs is allowed.
        empty = try makeTensor(Data(count: 4), .float, [1, model.heads, 0, model.headSize])
    }

    /// Greedy: the tokens that follow a prompt, up to and with one that ends the text.
    public func generate(_ prompt: [Int64], maxNewTokens: Int) throws -> [Int64] {
        reset()
        var tokens: [Int64] = []
        var pending = prompt
        while tokens.count < min(maxNewTokens, model.context - prompt.count) {
            let token = try Int64(mostLikely(forward(pending)))
            tokens.append(token)
            if model.ends.contains(token) { break }
            pending = [token]
        }
        return tokens
    }

    /// Append tokens; the logits that follow the last of them. Only those of a single token are read out.
    public func forward(_ ids: [Int64]) throws -> [Float] {
        guard let last = ids.last else { throw BundleError("there is no token to run") }
        for start in stride(from: 0, to: ids.count - 1, by: Self.chunk) {
            _ = try step(Array(ids[start..<min(start + Self.chunk, ids.count - 1)]), logits: false)
        }
        guard let logits = try step([last], logits: true) else { throw BundleError("the graph gave no logits") }
        return try withExtendedLifetime(logits) {
            try (logits.tensorData() as Data).withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
        }
    }

    public func reset() {
        cache = [:]
        length = 0
    }

    private func step(_ ids: [Int64], logits: Bool) throws -> ORTValue? {
        length += ids.count
        var inputs = adapter
        inputs["input_ids"] = try row(ids)
        inputs["attention_mask"] = try row(Array(repeating: 1, count: length))
        for part in parts { inputs["past_key_values.\(part)"] = cache["present.\(part)"] ?? empty }
        let names = Set(parts.map { "present.\($0)" } + (logits ? ["logits"] : []))
        var outputs = try session.run(withInputs: inputs, outputNames: names, runOptions: nil)
        let result = outputs.removeValue(forKey: "logits")
        cache = outputs
        return result
    }

    private func row(_ values: [Int64]) throws -> ORTValue {
        try makeTensor(values.withUnsafeBytes { Data($0) }, .int64, [1, values.count])
    }

    private func mostLikely(_ logits: [Float]) -> Int {
        logits.indices.max { logits[$0] < logits[$1] } ?? 0
    }
}

private func makeTensor(_ data: Data, _ type: ORTTensorElementDataType, _ shape: [Int]) throws -> ORTValue {
    try ORTValue(tensorData: NSMutableData(data: data), elementType: type, shape: shape.map { NSNumber(value: $0) })
}
