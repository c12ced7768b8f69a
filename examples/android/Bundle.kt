// Not run in CI: it needs an Android device. It takes the steps of ../python/run_bundle.py, which is.
//
// A bundle with an adapter on Android, with onnxruntime-android 1.24 or newer (build.gradle.kts). Token ids in, token
// ids out. Copy the bundle folder out of the assets to `filesDir` first: onnxruntime opens the graph by its path, so
// that the weights stay in the mapped file, whose pages Android may drop at any time.
//
//     val bundle = Bundle(File(filesDir, "bundle"))
//     Client(bundle, bundle.defaultAdapter, threads = 4).use { it.generate(longArrayOf(1, 403, 407), 64) }

package dev.edgetune.example

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtLoggingLevel
import ai.onnxruntime.OrtLoraAdapter
import ai.onnxruntime.OrtSession
import android.system.Os
import java.io.File
import java.nio.FloatBuffer
import java.nio.LongBuffer
import java.security.MessageDigest
import org.json.JSONObject

/** `edgetune.json` of a bundle folder. */
class Bundle(private val folder: File) {
    private val manifest = JSONObject(File(folder, "edgetune.json").readText())
    private val model = manifest.getJSONObject("model")

    val layers = model.getInt("num_hidden_layers")
    val heads = model.getInt("num_key_value_heads")
    val headSize = model.getInt("head_dim")
    val vocabulary = model.getInt("vocab_size")
    val context = model.getInt("max_position_embeddings")
    val ends = model.getJSONArray("eos_token_ids").let { ids -> (0 until ids.length()).map(ids::getLong) }
    val base: String = manifest.getString("base_sha256")
    val defaultAdapter = if (manifest.isNull("default_adapter")) null else manifest.getString("default_adapter")
    val graph = File(folder, "model.onnx")

    init {
        val version = manifest.getInt("format_version")
        check(version == 1) { "$folder has format_version $version, this client reads 1" }
    }

    /** The file of an adapter, if it is the one that the manifest lists and was trained on this base. */
    fun adapter(name: String): File {
        val entry = manifest.getJSONObject("adapters").optJSONObject(name) ?: error("$folder has no adapter $name")
        val binding = entry.getJSONObject("binding")
        for (key in listOf("base_sha256", "grid", "tokenizer_sha256")) {
            check(binding.get(key) == manifest.get(key)) { "adapter $name was trained with another $key" }
        }
        val file = File(folder, "$name.onnx_adapter")
        val listed = manifest.getJSONObject("files").getJSONObject(file.name).getString("sha256")
        val digest = MessageDigest.getInstance("SHA-256").digest(file.readBytes())
        check(digest.joinToString("") { "%02x".format(it) } == listed) { "$file is not the file that the bundle lists" }
        return file
    }
}

/**
 * One sequence on a bundle; a null adapter is the base.
 *
 * The adapter is onnxruntime's own, from the `.onnx_adapter` file: the Java API refuses tensors that are fed for
 * optional inputs ("Unknown input name"), which other bindings take. Its object has to live as long as runs use it.
 */
class Client(private val bundle: Bundle, adapter: String?, threads: Int) : AutoCloseable {
    init {
        // First: from 1.29 on onnxruntime sends usage events to Microsoft unless told not to before it is loaded.
        Os.setenv("ORT_DISABLE_TELEMETRY", "1", true)
    }

    private val environment = OrtEnvironment.getEnvironment()
    private val lora = adapter?.let { OrtLoraAdapter.create(bundle.adapter(it).path) } // checked before the graph opens
    private val run = OrtSession.RunOptions().apply { lora?.let(::addActiveLoraAdapter) }
    private val options = OrtSession.SessionOptions().apply {
        setIntraOpNumThreads(threads) // the large cores; the small ones hold them up
        setSessionLogLevel(OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR) // every optional input would be a warning
    }
    private val session = environment.createSession(bundle.graph.path, options)

    private val parts = (0 until bundle.layers).flatMap { listOf("$it.key", "$it.value") }
    private val present = parts.mapTo(linkedSetOf()) { "present.$it" }
    private val empty = OnnxTensor.createTensor(
        environment, FloatBuffer.allocate(0), longArrayOf(1, bundle.heads.toLong(), 0, bundle.headSize.toLong())
    )
    private var last: OrtSession.Result? = null // owns the tensors of the cache
    private var length = 0

    init {
        val base = session.metadata.getCustomMetadataValue("edgetune.base_sha256").orElse(null)
        check(base == bundle.base) { "${bundle.graph} holds base $base, its manifest says ${bundle.base}" }
    }

    /** Greedy: the tokens that follow a prompt, up to and with one that ends the text. */
    fun generate(prompt: LongArray, maxNewTokens: Int): List<Long> {
        reset()
        val tokens = mutableListOf<Long>()
        var pending = prompt
        repeat(minOf(maxNewTokens, bundle.context - prompt.size)) {
            val token = argmax(forward(pending)).toLong()
            tokens += token
            if (token in bundle.ends) return tokens
            pending = longArrayOf(token)
        }
        return tokens
    }

    /** Append tokens; the logits that follow the last of them. Only those of a single token are copied out. */
    fun forward(ids: LongArray): FloatBuffer {
        ids.dropLast(1).chunked(CHUNK).forEach { step(it.toLongArray(), present) }
        val logits = step(longArrayOf(ids.last()), present + "logits").get("logits").get() as OnnxTensor
        return logits.floatBuffer
    }

    fun reset() {
        last?.close()
        last = null
        length = 0
    }

    override fun close() {
        reset()
        empty.close()
        session.close()
        options.close()
        run.close()
        lora?.close()
    }

    private fun step(ids: LongArray, outputs: Set<String>): OrtSession.Result {
        length += ids.size
        val cache = last
        val inputs = parts.associateTo(mutableMapOf()) {
            "past_key_values.$it" to (cache?.get("present.$it")?.get() as OnnxTensor? ?: empty)
        }
        val result = row(ids).use { tokens ->
            row(LongArray(length) { 1 }).use { mask ->
                session.run(inputs + mapOf("input_ids" to tokens, "attention_mask" to mask), outputs, run)
            }
        }
        cache?.close()
        last = result
        return result
    }

    private fun row(values: LongArray): OnnxTensor =
        OnnxTensor.createTensor(environment, LongBuffer.wrap(values), longArrayOf(1, values.size.toLong()))

    private fun argmax(logits: FloatBuffer): Int = (0 until bundle.vocabulary).maxBy(logits::get)

    private companion object {
        const val CHUNK = 128 // tokens of a long prompt in one call
    }
}
