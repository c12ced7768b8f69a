"""Weights as onnxruntime's kernels want them, kept on disk from the first launch on.

A kernel packs its weights when a session is made, into memory of its own: a 4-bit bundle of 82 MiB takes 109 MiB then.
onnxruntime can save the packed bytes beside an optimized graph and map them at the next launch: clean pages of a file
in the place of memory. They are those of one processor and one onnxruntime, so they are made on the device, and made
again when either changes, or the bundle does. They take more than twice the bundle's storage.

onnxruntime (1.31.1) writes packed bytes wherever the file ends, but for large tensors. Its kernels find the parts of a
buffer by rounding its address up, so bytes that were packed at a multiple of 64 and are mapped elsewhere are read
wrong, without an error, or beyond their end. `align` therefore places everything in the file anew.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any, BinaryIO

import onnxruntime

from edgetune import host
from edgetune.bundle import DATA, MODEL, AnyBundle
from edgetune.weights import sha256_file

MANIFEST = "prepacked.json"
_SAVE = {
    "session.optimized_model_external_initializers_file_name": DATA,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    "session.save_external_prepacked_constant_initializers": "1",
}
_ALIGNMENT = 4096  # a page; the kernels need 64
_BLOB = re.compile(r"(\d+);(\d+);(\d+)")  # offset; length; checksum, after the name of the kernel and a bar


def identity(bundle: AnyBundle[Any], *, fp32_compute: bool) -> dict[str, Any]:
    """What packed weights depend on."""
    files = bundle.manifest["files"]
    return {
        "bundle": {name: files[name]["sha256"] for name in (MODEL, DATA)}, "onnxruntime": onnxruntime.__version__,
        "isa": host.isa(), "fp32_compute": fp32_compute,
    }  # fmt: skip


def find(folder: Path, wanted: dict[str, Any]) -> Path | None:
    """The packed graph in a folder; None where there is none, it is another's, or a byte of it has changed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
        if manifest["identity"] == wanted and all(sha256_file(folder / name) == files[name] for name in files):
            return folder / MODEL if MODEL in files else None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def save_to(options: onnxruntime.SessionOptions, folder: Path) -> None:
    """Have the session that is made with these options write its graph and packed weights there."""
    options.optimized_model_filepath = str(folder / MODEL)
    for key, value in _SAVE.items():
        options.add_session_config_entry(key, value)


def align(folder: Path) -> None:
    """Let every tensor and every packed buffer of a saved graph begin at a multiple of 4096 bytes."""
    path, data = folder / MODEL, folder / DATA
    model = _model_proto()()
    model.ParseFromString(path.read_bytes())
    placed: dict[tuple[int, int], int] = {}
    temporary = data.with_name(f"{DATA}.aligned")
    with data.open("rb") as source, temporary.open("wb") as target:

        def move(offset: int, length: int) -> int:
            if (offset, length) not in placed:
                placed[offset, length] = _copy(source, target, offset, length)
            return placed[offset, length]

        for tensor in model.graph.initializer:
            place = {entry.key: entry for entry in tensor.external_data}
            if not place:
                continue
            place["offset"].value = str(move(int(place["offset"].value), int(place["length"].value)))
            for key, entry in place.items():
                if key.startswith("prepacked_"):
                    name, _, blobs = entry.value.partition("|")
                    moved = _BLOB.sub(lambda blob: f"{move(int(blob[1]), int(blob[2]))};{blob[2]};{blob[3]}", blobs)
                    entry.value = f"{name}|{moved}"
    temporary.replace(data)
    path.write_bytes(model.SerializeToString())


def _copy(source: BinaryIO, target: BinaryIO, offset: int, length: int) -> int:
    """Append a range of a file to another, at the next multiple of the alignment; where it lies there."""
    start = -(-target.tell() // _ALIGNMENT) * _ALIGNMENT
    source.seek(offset)
    target.seek(start)
    while length:
        piece = source.read(min(length, 1 << 20))
        target.write(piece)
        length -= len(piece)
    return start


@functools.cache
def _model_proto() -> Any:
    """The part of onnx.proto that says where bytes lie, as a message; it keeps all other fields as they are."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="edgetune_onnx.proto", package="onnx", syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in (
        ("StringStringEntryProto", [("key", 1, None), ("value", 2, None)]),
        ("TensorProto", [("external_data", 13, "StringStringEntryProto")]),
        ("GraphProto", [("initializer", 5, "TensorProto")]),
        ("ModelProto", [("graph", 7, "GraphProto")]),
    ):
        message = file.message_type.add(name=name)
        for key, number, inner in fields:
            many = key in ("external_data", "initializer")
            field = message.field.add(
                name=key, number=number, label=kinds.LABEL_REPEATED if many else kinds.LABEL_OPTIONAL,
                type=kinds.TYPE_MESSAGE if inner else kinds.TYPE_STRING,
            )  # fmt: skip
            if inner:
                field.type_name = f".onnx.{inner}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("onnx.ModelProto"))


def write_manifest(folder: Path, made_for: dict[str, Any]) -> None:
    """Name what a session has written, and what it goes with."""
    files = {path.name: sha256_file(path) for path in folder.iterdir()}
    (folder / MANIFEST).write_text(json.dumps({"identity": made_for, "files": files}, indent=1), encoding="utf-8")
