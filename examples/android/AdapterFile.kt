// Not run in CI: it needs an Android device. It does what ../python/bundle_adapter.py does, which is.

package dev.edgetune.example

import java.io.File
import java.io.FileOutputStream
import java.nio.ByteBuffer
import java.nio.ByteOrder
import org.json.JSONArray
import org.json.JSONObject

private class Values(val name: String, val shape: List<Int>, val values: FloatArray)

/**
 * Write the safetensors file of an adapter: a pair of tensors for each slot of the inference graph, bound to the base
 * of the bundle whose `edgetune.json` is given; whole or not at all. `tensor` is lora_A [in, r] or lora_B [r, out].
 */
fun saveAdapter(file: File, manifest: JSONObject, rank: Int, alpha: Double, tensor: (String) -> FloatArray) {
    val slots = manifest.getJSONArray("slots").let { all -> (0 until all.length()).map(all::getJSONObject) }
    val tensors = slots.flatMap { pair(it, rank, (alpha / rank).toFloat(), tensor) }
    check(tensors.all { it.values.all(Float::isFinite) }) {
        "The adapter holds NaN or infinity, so $file was not written. Train with a lower rate."
    }
    val binding = JSONObject().put("format_version", 1).put("r", rank).put("lora_alpha", alpha)
    for (key in listOf("base_sha256", "grid", "tokenizer_sha256")) binding.put(key, manifest.get(key))
    binding.put("slots", JSONArray(slots.map { it.getString("name") }))
    val header = JSONObject().put("__metadata__", JSONObject().put("edgetune", binding.toString()))
    var end = 0
    for (each in tensors) {
        val offsets = JSONArray(listOf(end, end + 4 * each.values.size))
        end += 4 * each.values.size
        val described = JSONObject().put("dtype", "F32").put("shape", JSONArray(each.shape))
        header.put(each.name, described.put("data_offsets", offsets))
    }
    val text = header.toString().toByteArray()
    val padding = ByteArray(Math.floorMod(-text.size, 8)) { ' '.code.toByte() }
    val bytes = ByteBuffer.allocate(8 + text.size + padding.size + end).order(ByteOrder.LITTLE_ENDIAN)
    bytes.putLong((text.size + padding.size).toLong()).put(text).put(padding)
    for (each in tensors) each.values.forEach(bytes::putFloat)
    val temporary = File("${file.path}.tmp")
    FileOutputStream(temporary).use {
        it.write(bytes.array())
        it.fd.sync()
    }
    check(temporary.renameTo(file)) { "$file could not be written. Choose a folder of this app." }
}

/** The linears of a slot, each with its number of outputs; Android's JSONObject keeps their order. */
fun modules(slot: JSONObject): List<Pair<String, Int>> =
    slot.getJSONObject("modules").let { all -> all.keys().asSequence().map { it to all.getInt(it) }.toList() }

/** A slot's tensors: lora_A of its linears side by side, lora_B times the scaling along the diagonal. */
private fun pair(slot: JSONObject, rank: Int, scaling: Float, tensor: (String) -> FloatArray): List<Values> {
    val (name, linears) = slot.getString("name") to modules(slot)
    val (rows, columns) = slot.getInt("in_features") to slot.getInt("out_features")
    val width = rank * linears.size
    val (a, b) = FloatArray(rows * width) to FloatArray(width * columns)
    var first = 0
    linears.forEachIndexed { index, (linear, outputs) ->
        val (ownA, ownB) = tensor("$linear.lora_A") to tensor("$linear.lora_B")
        for (row in 0 until rows) ownA.copyInto(a, row * width + index * rank, row * rank, (row + 1) * rank)
        for (row in 0 until rank) for (column in 0 until outputs) {
            b[(index * rank + row) * columns + first + column] = ownB[row * outputs + column] * scaling
        }
        first += outputs
    }
    return listOf(Values("$name.lora_A", listOf(rows, width), a), Values("$name.lora_B", listOf(width, columns), b))
}
