// Not run in CI: it needs an Android device. ../web/graph.js does the same, and that is run.
//
// Inputs that may be left out are an adapter's tensors. `OrtSession.run` of Java and Kotlin knows only inputs that have
// to be fed ("Unknown input name"), so their defaults are taken out of the graph's file before a session is made.

package dev.edgetune.example

import java.io.ByteArrayOutputStream

/**
 * A model whose inputs have no defaults, so that all of them are fed. A default is an initializer (field 5 of
 * GraphProto, which is field 7 of ModelProto) with the name of an input (field 11).
 */
fun withoutDefaults(model: ByteArray): ByteArray = rewrite(model, 7) { graph ->
    val inputs = fields(graph).filter { it.number == 11 }.map { text(it.content, 1) }.toSet()
    rewrite(graph, 5) { tensor -> tensor.takeIf { text(it, 8) !in inputs } }
}

private class Field(val number: Int, val whole: ByteArray, val content: ByteArray)

private fun text(message: ByteArray, number: Int): String =
    fields(message).first { it.number == number }.content.decodeToString()

private fun rewrite(message: ByteArray, number: Int, change: (ByteArray) -> ByteArray?): ByteArray {
    val out = ByteArrayOutputStream()
    fun varint(value: Int) {
        if (value > 127) out.write(value and 127 or 128).also { varint(value ushr 7) } else out.write(value)
    }
    for (field in fields(message)) {
        val content = if (field.number == number) change(field.content) ?: continue else null
        if (content == null) out.write(field.whole) else {
            varint(number shl 3 or 2)
            varint(content.size)
            out.write(content)
        }
    }
    return out.toByteArray()
}

/** The fields of a protobuf message, in order. */
private fun fields(message: ByteArray): List<Field> = buildList {
    var at = 0
    fun varint(): Long {
        var value = 0L
        for (shift in 0..63 step 7) {
            val byte = message[at++].toLong()
            value = value or (byte and 127 shl shift)
            if (byte >= 0) break
        }
        return value
    }
    while (at < message.size) {
        val start = at
        val key = varint().toInt()
        val length = when (key and 7) {
            0 -> varint().let { 0 }
            1 -> 8
            2 -> varint().toInt()
            5 -> 4
            else -> error("this is no model")
        }
        at += length
        add(Field(key ushr 3, message.copyOfRange(start, at), message.copyOfRange(at - length, at)))
    }
}
