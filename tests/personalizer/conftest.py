"""Training graphs over a tiny base, without an export around them."""

from __future__ import annotations

from pathlib import Path

from edgetune.base import open_base
from edgetune.exporter.merging import BaseWeights
from edgetune.graphs.decoder import decoder_graph
from edgetune.graphs.training import head_name, training_graphs
from edgetune.personalizer.graphs import Description, Tensor

CONTEXT = 64


def describe(base: Path, folder: Path) -> Description:
    """The graphs of a base, written into `folder`."""
    folder.mkdir()
    source = BaseWeights(open_base(base))
    config, head = source.config, head_name(source.config)
    builder = decoder_graph(source, data_file="model.onnx.data", context_length=CONTEXT, slots=())
    builder.save(folder, "model.onnx")
    graphs = training_graphs(config, source.format_of, CONTEXT)
    for name, graph in graphs.items():
        graph.save_graph(folder / f"{name}.onnx")
    tensors = {name: Tensor(**value | {"shape": tuple(value["shape"])}) for name, value in builder.described().items()}
    files = {name: folder / f"{name}.onnx" for name in graphs}
    return Description(folder, config, CONTEXT, f"{head}.weight", tensors, files)
