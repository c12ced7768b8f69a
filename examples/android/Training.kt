// Not run in CI: it needs an Android device. It takes the steps of ../python/train_bundle.py, which is.
//
// Training on a bundle from `edgetune export --with-training`: the loop of its training/training.json, for every linear
// that the inference graph has a slot for. ../python/write_windows.py says what a window is. On a thread of its own:
//
//     Trainer(File(filesDir, "bundle"), threads = 2).use { trainer ->
//         for (step in 0 until 50) println(trainer.step(listOf(windows[step % windows.size]), trainer.rate(step, 50)))
//         trainer.save(File(filesDir, "mine.safetensors"))
//     }
//
// To generate with it, write `withoutDefaults` of model.onnx as a file beside model.onnx.data, open that in place of
// model.onnx, and feed the tensors of mine.safetensors.

package dev.edgetune.example

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtLoggingLevel
import ai.onnxruntime.OrtSession
import android.system.Os
import java.io.File
import java.io.RandomAccessFile
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.LongBuffer
import java.nio.channels.FileChannel.MapMode
import kotlin.math.PI
import kotlin.math.cos
import kotlin.math.roundToInt
import kotlin.math.sqrt
import kotlin.random.Random
import org.json.JSONObject

/** Rows side by side, one number for each of T positions; `labels` are those of the next token, -100 where none. */
class Window(val inputIds: LongArray, val positionIds: LongArray, val segmentIds: LongArray, val labels: LongArray)

/** The graphs, the weights, which stay in the mapped file, and an adapter with its moments: all of them tensors. */
class Trainer(bundle: File, threads: Int, seed: Int = 0) : AutoCloseable {
    init {
        Os.setenv("ORT_DISABLE_TELEMETRY", "1", true) // first: see Bundle.kt
    }

    private val manifest = JSONObject(File(bundle, "edgetune.json").readText())
    private val said = JSONObject(File(bundle, "training/training.json").readText())

    init {
        for (json in listOf(manifest, said)) {
            val version = json.getInt("format_version")
            check(version == 1) { "$bundle has format_version $version. This client reads 1: take a newer one." }
        }
    }

    private val model = said.getJSONObject("model_config")
    private val defaults = said.getJSONObject("defaults")
    private val optimizer = said.getJSONObject("optimizers").getJSONObject(defaults.getString("optimizer"))
    private val moments = optimizer.getJSONArray("moments").let { all -> (0 until all.length()).map(all::getString) }
    private val rank = defaults.getInt("r")
    private val alpha = defaults.getDouble("lora_alpha")

    private val environment = OrtEnvironment.getEnvironment()
    private val options = OrtSession.SessionOptions().apply {
        setIntraOpNumThreads(threads)
        setSessionLogLevel(OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR)
        setCPUArenaAllocator(false) // it would keep for each graph what that needed once
    }
    private val graphs = said.getJSONObject("graphs").let { all ->
        all.keys().asSequence().associateWith { Graph(File(bundle, "training"), all.getJSONObject(it)) }
    }
    private val data = RandomAccessFile(File(bundle, said.getString("data_file")), "r").channel
    private val blocks = (0 until model.getInt("num_hidden_layers")).map { weights("forward", "model.layers.$it.") }
    private val outer = listOf("start", "head_start", "head_end").associateWith { weights(it, "") }
    private val tiles = (0 until model.getInt("vocab_size") step HEAD_ROWS).map(::tile)

    private val slots = manifest.getJSONArray("slots").let { all -> (0 until all.length()).map(all::getJSONObject) }
    private val adapter = HashMap<String, OnnxTensor>() // lora_A [in, r] and lora_B [r, out] of each linear
    private val state = HashMap<String, OnnxTensor>() // the moments, "exp_avg.<tensor>"
    private val firstBlock get() = adapter.keys.minOf { it.split(".")[2].toInt() }
    private val scaling = floats(floatArrayOf((alpha / rank).toFloat()), 1)
    private var updates = 0L

    init {
        val random = Random(seed)
        for (slot in slots) for ((linear, columns) in modules(slot)) {
            val rows = slot.getInt("in_features")
            val bound = 1 / sqrt(rows.toFloat())
            val start = FloatArray(rows * rank) { (2 * random.nextFloat() - 1) * bound }
            adapter["$linear.lora_A"] = floats(start, rows, rank)
            adapter["$linear.lora_B"] = floats(FloatArray(rank * columns), rank, columns)
        }
        for ((name, tensor) in adapter) for (kind in moments) {
            state["$kind.$name"] = floats(FloatArray(tensor.floatBuffer.capacity()), *shape(tensor))
        }
    }

    /** The rate of step 0 until steps: it rises over the warm-up, then falls as half a cosine. */
    fun rate(step: Int, steps: Int, peak: Double = optimizer.getDouble("learning_rate")): Double {
        val warmup = (defaults.getDouble("warmup_ratio") * steps).roundToInt()
        if (step < warmup) return peak * (step + 1) / warmup
        return peak * (1 + cos(PI * (step - warmup) / maxOf(1, steps - warmup))) / 2
    }

    /**
     * One step over its windows, each a micro-batch; the loss. Where that or the gradient is not finite, nothing is
     * updated: stop after 20 such steps in a row.
     */
    fun step(windows: List<Window>, learningRate: Double): Double {
        val scale = 1.0 / maxOf(1, windows.sumOf { window -> window.labels.count { it >= 0 } })
        val gradients = HashMap<String, FloatArray>()
        val loss = scale * windows.sumOf { microBatch(it, scale.toFloat(), gradients) }
        val norm = sqrt(gradients.values.sumOf { gradient -> gradient.sumOf { it.toDouble() * it } })
        if (loss.isFinite() && norm.isFinite() && gradients.isNotEmpty()) update(gradients, learningRate, norm)
        return loss
    }

    /** The loss summed over the labels of a window; `scale` times its gradients are added to `gradients`. */
    private fun microBatch(window: Window, scale: Float, gradients: MutableMap<String, FloatArray>): Double {
        val made = ArrayList<OnnxTensor>() // closed at the end
        fun <T : Map<String, OnnxTensor>> T.owned() = also { made += it.values }
        try {
            val ids = with(window) {
                mapOf("input_ids" to inputIds, "position_ids" to positionIds, "segment_ids" to segmentIds)
            }.mapValues { longs(it.value, 1, it.value.size) }.owned()
            val start = graphs.getValue("start").run(ids + outer.getValue("start")).owned()
            var x = start.getValue("x")
            val kept = blocks.mapIndexed { index, weights ->
                val kind = model.getJSONArray("layer_kinds").getInt(index)
                val shared = listOf("mask", "cos", "sin").associateWith { start.getValue("$it.$kind") }
                val taken = shared + weights + block(index) + mapOf("x" to x, "scaling" to scaling)
                x = graphs.getValue("forward").run(taken).owned().getValue("y")
                taken
            }
            val values = hashMapOf("x" to x, "labels" to longs(window.labels, window.labels.size))
            made += values.getValue("labels")
            values += graphs.getValue("head_start").run(values + outer.getValue("head_start")).owned()
            val (count, width) = shape(values.getValue("hidden"))
            if (count == 0) return 0.0
            values += mapOf(
                "highest" to floats(FloatArray(count) { Float.NEGATIVE_INFINITY }, count, 1),
                "total" to floats(FloatArray(count), count, 1), "of_target" to floats(FloatArray(count), count, 1),
                "weighted" to floats(FloatArray(count * width), count, width),
                "scale" to floats(floatArrayOf(scale), 1),
            ).owned()
            for (tile in tiles) {
                val next = graphs.getValue("head_tile").run(values + tile).owned()
                values += next.mapKeys { it.key.removeSuffix(".next") }
            }
            val end = graphs.getValue("head_end").run(values + outer.getValue("head_end")).owned()
            var dy = end.getValue("dx")
            for (index in kept.lastIndex downTo firstBlock) {
                val names = block(index).keys
                val wanted = names.mapTo(linkedSetOf("dx")) { "$it.gradient" }
                val found = graphs.getValue("backward").run(kept[index] + ("dy" to dy), wanted).owned()
                dy = found.getValue("dx")
                for (name in names) {
                    val gradient = found.getValue("$name.gradient").floatBuffer.array()
                    val sum = gradients.getOrPut("model.layers.$index.$name") { FloatArray(gradient.size) }
                    for (i in sum.indices) sum[i] += gradient[i]
                }
            }
            return (end.getValue("loss_sum").value as Float).toDouble()
        } finally {
            made.forEach(OnnxTensor::close)
        }
    }

    private fun update(gradients: Map<String, FloatArray>, learningRate: Double, norm: Double) {
        val numbers = mapOf(
            "learning_rate" to learningRate, "grad_norm" to norm,
            "weight_decay" to defaults.getDouble("weight_decay"),
            "max_grad_norm" to defaults.getDouble("max_grad_norm"),
        ).mapValues { floats(floatArrayOf(it.value.toFloat()), 1) }
        val shared = numbers + ("updates" to longs(longArrayOf(++updates), 1))
        val graph = graphs.getValue("optimizer.${defaults.getString("optimizer")}")
        for ((name, gradient) in gradients) {
            val parameter = adapter.getValue(name)
            val own = moments.associateWith { state.getValue("$it.$name") } + ("parameter" to parameter)
            val next = floats(gradient, *shape(parameter)).use { graph.run(shared + own + ("gradient" to it)) }
            own.values.forEach(OnnxTensor::close)
            adapter[name] = next.getValue("parameter.next")
            for (kind in moments) state["$kind.$name"] = next.getValue("$kind.next")
        }
        shared.values.forEach(OnnxTensor::close)
    }

    /** Write the adapter as a bundle carries it. */
    fun save(file: File) =
        saveAdapter(file, manifest, rank, alpha) { name -> adapter.getValue(name).floatBuffer.array() }

    override fun close() {
        val tensors = adapter.values + state.values + scaling + (blocks + outer.values + tiles).flatMap { it.values }
        tensors.forEach(OnnxTensor::close)
        graphs.values.forEach(Graph::close)
        options.close()
        data.close()
    }

    /** A block's adapter, by the names that its graphs have for it. */
    private fun block(index: Int): Map<String, OnnxTensor> {
        val prefix = "model.layers.$index."
        return adapter.filterKeys { it.startsWith(prefix) }.mapKeys { it.key.removePrefix(prefix) }
    }

    /** Those that a graph takes, in the shapes of its inputs, which are named without the prefix. */
    private fun weights(graph: String, prefix: String): Map<String, OnnxTensor> {
        val tensors = said.getJSONObject("tensors")
        val inputs = graphs.getValue(graph).inputs.filterKeys { tensors.has(prefix + it) }
        return inputs.mapValues { (name, shape) -> mapped(tensors.getJSONObject(prefix + name), shape) }
    }

    /** Rows of the head from `first` on. */
    private fun tile(first: Int): Map<String, OnnxTensor> {
        val rows = minOf(HEAD_ROWS, model.getInt("vocab_size") - first)
        val inputs = graphs.getValue("head_tile").inputs.filterKeys { it.substringBefore(".") == "head" }
        val parts = inputs.mapValues { (name, shape) ->
            val tensor = said.getJSONObject("tensors").getJSONObject(said.getString("head") + name.removePrefix("head"))
            mapped(tensor, listOf(rows) + shape.drop(1), first)
        }
        return parts + ("first_row" to longs(longArrayOf(first.toLong()), 1))
    }

    /** A tensor of the data file from a row on, in the shape that is asked for. It lies in the file's own pages. */
    private fun mapped(tensor: JSONObject, shape: List<Int>, firstRow: Int = 0): OnnxTensor {
        val rowBytes = tensor.getLong("nbytes") / tensor.getJSONArray("shape").getLong(0)
        val (offset, size) = tensor.getLong("offset") + firstRow * rowBytes to shape[0] * rowBytes
        val bytes = data.map(MapMode.READ_ONLY, offset, size).order(ByteOrder.nativeOrder())
        val wanted = shape.map(Int::toLong).toLongArray()
        return when (val type = tensor.getString("dtype")) {
            "float32" -> OnnxTensor.createTensor(environment, bytes.asFloatBuffer(), wanted)
            "uint8" -> OnnxTensor.createTensor(environment, bytes, wanted, OnnxJavaType.UINT8)
            else -> error("A weight is of type $type. This client knows float32 and uint8: take a newer one.")
        }
    }

    private fun shape(tensor: OnnxTensor): IntArray = tensor.info.shape.map(Long::toInt).toIntArray()

    private fun floats(values: FloatArray, vararg shape: Int): OnnxTensor =
        OnnxTensor.createTensor(environment, FloatBuffer.wrap(values), shape.map(Int::toLong).toLongArray())

    private fun longs(values: LongArray, vararg shape: Int): OnnxTensor =
        OnnxTensor.createTensor(environment, LongBuffer.wrap(values), shape.map(Int::toLong).toLongArray())

    /** A graph and its signature. An adapter's tensor that is not fed has rank 0. */
    private inner class Graph(folder: File, said: JSONObject) : AutoCloseable {
        private val signature =
            said.getJSONArray("inputs").let { all -> (0 until all.length()).map(all::getJSONObject) }

        /** Shapes by name; a dimension that is not fixed is 0. */
        val inputs = signature.associate { input ->
            val shape = input.getJSONArray("shape")
            input.getString("name") to (0 until shape.length()).map(shape::optInt)
        }
        private val session = environment.createSession(File(folder, said.getString("file")).path, options)
        private val empty = inputs.filterKeys { ".lora_" in it }
            .mapValues { (_, shape) -> floats(FloatArray(0), *shape.toIntArray()) }

        fun run(values: Map<String, OnnxTensor>, outputs: Set<String> = session.outputNames): Map<String, OnnxTensor> {
            val feeds = inputs.keys.associateWith { values[it] ?: empty[it] ?: error("$it is fed by nothing") }
            return session.run(feeds, outputs).associate { it.key to it.value as OnnxTensor } // closed one by one
        }

        override fun close() {
            empty.values.forEach(OnnxTensor::close)
            session.close()
        }
    }

    private companion object {
        const val HEAD_ROWS = 4096 // of the head at once: they exist as float32 while a tile runs
    }
}
