"""What the ort engine costs before any bundle: `python -m edgetune.personalizer.floor` prints its anonymous bytes.

It imports what a personalization imports and calls one graph of one node, because much is only loaded or reserved by
the first session and its first call. The graph is written out here, byte by byte, since a device has nothing that
writes graphs. `memory.measure_floor` runs it in a process of its own.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import jinja2.sandbox  # noqa: F401 - rows of chats need it
import numpy as np
import safetensors.numpy  # noqa: F401 - checkpoints need it

from edgetune.memory import anonymous_bytes, trim_allocator
from edgetune.personalizer import trainer as _trainer  # noqa: F401 - imported for what it costs
from edgetune.runtime.native import load_part

SIZE = 16
ARENA_BYTES = 1 << 20
_FLOAT = 1  # TensorProto.DataType
_IR_VERSION, _OPSET = 10, 23


def _field(number: int, value: int | bytes | str) -> bytes:
    """A field of a protobuf message: a number below 128, or a string or message that is shorter than that."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    payload = value.encode() if isinstance(value, str) else value
    return bytes([number << 3 | 2, len(payload)]) + payload


def _tensor(name: str) -> bytes:
    """ValueInfoProto of a float32 tensor [SIZE, SIZE]."""
    shape = _field(1, _field(1, SIZE)) * 2
    return _field(1, name) + _field(2, _field(1, _field(1, _FLOAT) + _field(2, shape)))


def tiny_graph() -> bytes:
    """A model of one node: y = x x."""
    node = _field(1, "x") * 2 + _field(2, "y") + _field(4, "MatMul")
    graph = _field(1, node) + _field(2, "floor") + _field(11, _tensor("x")) + _field(12, _tensor("y"))
    return _field(1, _IR_VERSION) + _field(7, graph) + _field(8, _field(2, _OPSET))


def first_call(folder: Path, threads: int) -> None:
    """Load the graph as the training graphs are loaded, and call it."""
    path = folder / "floor.onnx"
    path.write_bytes(tiny_graph())
    load_part(path, threads, ARENA_BYTES).run(["y"], {"x": np.ones((SIZE, SIZE), np.float32)})


def main(threads: int) -> None:
    """Make the call and print the bytes."""
    trim_allocator()
    with tempfile.TemporaryDirectory() as folder:
        first_call(Path(folder), threads)
    sys.stdout.write(f"{anonymous_bytes()}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
