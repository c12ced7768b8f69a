"""An adapted network in; a bundle folder for stock onnxruntime out, whole or not at all.

The network is traced by torch.onnx.export with its frozen layers in their ONNX forms (`forms`). `optimize=True` would
take additions of less than 1e-8 for zero, so it stays off. Afterwards the adapter's tensors become optional inputs with
a symbolic rank, and what the trace knows of this machine (stack traces with paths) is removed.

The gate compares torch with onnxruntime on the example, whole and its first row alone, with the adapter and without:
in float32 compute the outputs may differ by 1e-3 of their spread. What the kernels with int8 activations add, which a
device runs, is reported beside it, with how often the largest output is the same one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.passes import common as passes
from torch import nn
from torch.utils import _pytree as pytree

from edgetune import __version__
from edgetune.adapter_file import Binding, BoundAdapter, write_adapter
from edgetune.bundle import ADAPTER, DATA, MANIFEST, MODEL
from edgetune.errors import ExportError, MissingExtraError, ParityError
from edgetune.exporter.parity import allowed_difference, session_options
from edgetune.graphs.builder import OPSET
from edgetune.modules.attached import AttachedModule
from edgetune.modules.bundle import FORMAT_VERSION, KIND, ModuleBundle, load_module_bundle
from edgetune.modules.forms import TracedLayer, feeds_of
from edgetune.output import folder_in_progress
from edgetune.weights import sha256_file

_PAGE_BYTES, _PAGE_THRESHOLD, _EXTERNAL_BYTES = 16384, 65536, 256  # as `graphs.builder` places weights
Feeds = dict[str, np.ndarray]


def export_module(
    attached: AttachedModule,
    example: torch.Tensor | Sequence[torch.Tensor],
    *,
    out: str | Path,
    merge: bool = False,
    dynamic_shapes: Any = None,
    force: bool = False,
) -> ModuleBundle:
    """Write a network as a bundle folder; `manifest["parity"]` has the gate's figures.

    Args:
        attached: what `attach` gave.
        example: the network's inputs, one tensor or several, with some rows of its data: the gate compares on them.
        out: the folder to write.
        merge: fold the adapter into its layers, which are then stored in float32. Otherwise the codes of training
            ship, and the adapter as inputs that may be left out.
        dynamic_shapes: as of `torch.onnx.export`; None makes the first dimension of every input free.
        force: replace an existing bundle.

    Raises:
        ExportError: the example is none, or the network cannot be traced (it branches on values, for instance).
        ParityError: the graph does not compute what the network does; nothing is written.
        MissingExtraError: onnxscript is not installed.
        ConfigError: `out` cannot be written.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise MissingExtraError("onnxscript", "train")
    inputs = _inputs(example)
    modes = [(part, part.training) for part in attached.modules()]
    attached.eval()
    try:
        with folder_in_progress(Path(out), MANIFEST, force=force) as folder:
            expected = _run_torch(attached, inputs)
            feeds = {} if merge else _adapter_feeds(attached)
            model = _traced(attached, inputs, dynamic_shapes, merge=merge)
            _finish_graph(model, feeds)
            _save(model, folder)
            parity = _check(attached, inputs, expected, feeds, folder, free_rows=dynamic_shapes is None)
            base = attached.base_sha256
            if feeds:
                layers = tuple(dict.fromkeys(name.rpartition(".")[0] for name in feeds))
                config = attached.config
                binding = Binding(base, attached.grid, None, config.rank, float(config.lora_alpha or 0), layers)
                write_adapter(folder, ADAPTER, BoundAdapter(binding, feeds))
            _write_manifest(attached, model, inputs, folder, parity, base, merged=not feeds)
    finally:
        for part, mode in modes:
            part.training = mode
    return load_module_bundle(out)


def _inputs(example: Any) -> tuple[torch.Tensor, ...]:
    """Raises ExportError."""
    inputs = (example,) if isinstance(example, torch.Tensor) else tuple(example) if _is_row(example) else ()
    if not inputs or not all(isinstance(value, torch.Tensor) and value.dim() and len(value) for value in inputs):
        raise ExportError(
            f"example is a {type(example).__name__}; the network's input was expected, as a tensor [rows, …] with one "
            f"row at least, or several of them in a tuple."
        )
    return inputs


def _is_row(example: Any) -> bool:
    return isinstance(example, (tuple, list))


def _run_torch(attached: AttachedModule, inputs: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """The outputs in order. Raises ExportError where the network does not take the example or gives no tensors."""
    try:
        with torch.no_grad():
            outputs = pytree.tree_leaves(attached(*inputs))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(list(value.shape)) for value in inputs)
        raise ExportError(
            f"the network does not take the example of shape {shapes}: {_first_line(error)}. Give what its forward() "
            f"takes, in order."
        ) from error
    if not outputs or not all(isinstance(value, torch.Tensor) for value in outputs):
        found = ", ".join(type(value).__name__ for value in outputs) or "nothing"
        raise ExportError(f"the network returns {found}; tensors were expected, alone or in a tuple, list or dict.")
    return [value.numpy() for value in outputs]


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300].rstrip(".") or type(error).__name__


def _adapter_feeds(attached: AttachedModule) -> Feeds:
    return {
        f"{name}.{key}": value.numpy()
        for name, layer in attached.frozen_layers().items()
        if layer.adapted
        for key, value in feeds_of(layer).items()
    }


@contextlib.contextmanager
def _in_traced_form(attached: AttachedModule, *, merge: bool) -> Iterator[None]:
    """The network with its frozen layers in the form that is exported, while the body runs."""
    forms: dict[nn.Module, nn.Module] = {
        layer: TracedLayer(layer, merge=merge) for layer in attached.frozen_layers().values()
    }
    places = [(parent, key) for parent in attached.module.modules() for key in parent._modules]
    before = [(parent, key, parent._modules[key]) for parent, key in places]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole encoder layer, past its linears
        for parent, key, child in before:
            if child in forms:
                parent._modules[key] = forms[child]
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for parent, key, child in before:
            parent._modules[key] = child


def _traced(
    attached: AttachedModule, inputs: tuple[torch.Tensor, ...], dynamic_shapes: Any, *, merge: bool
) -> ir.Model:
    """The graph of the network. Raises ExportError where torch.export does not follow it."""
    if dynamic_shapes is None:
        dynamic_shapes = tuple({0: "batch"} for _ in inputs)
        inputs = tuple(value.repeat_interleave(2, 0) if len(value) == 1 else value for value in inputs)  # 1 is no size
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # torchvision's operators, which nobody asked for
    try:
        with _in_traced_form(attached, merge=merge), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                attached.module, inputs, dynamo=True, optimize=False, opset_version=OPSET, verbose=False,
                dynamic_shapes=dynamic_shapes,
            )  # fmt: skip
    except Exception as error:  # every pass of torch.export has exceptions of its own
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(
            f"torch.export cannot follow the network: {type(cause).__name__}: {_first_line(cause)}. What runs may "
            f"depend on shapes, not on values: in the place of `if` on a tensor use torch.where or torch.cond. Where a "
            f"size has to be fixed, say so with dynamic_shapes."
        ) from error
    finally:
        logger.setLevel(level)
    assert program is not None
    return program.model


def _finish_graph(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> None:
    """Adapter tensors as optional inputs, outputs by name, no Constant nodes and nothing of this machine."""
    graph = model.graph
    for node in graph:
        for value in node.outputs:
            if value not in graph.outputs:
                value.shape = None  # those of the example's rank are wrong for another one
    for name in feeds:
        value = graph.initializers[name]
        axis = 1 if name.endswith(".lora_A") else 0
        sizes = [0 if at == axis else int(size) for at, size in enumerate(feeds[name].shape)]
        value.const_value = ir.tensor(np.zeros(sizes, np.float32), name=name)
        value.shape = ir.Shape([size or "r" for size in sizes])
        graph.inputs.append(value)
    for index, value in enumerate(graph.outputs):
        value.name = "output" if len(graph.outputs) == 1 else f"output_{index}"
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = "edgetune", __version__


def _save(model: ir.Model, folder: Path) -> None:
    """Raises ParityError where onnx's checker refuses the file."""
    weights = model.graph.initializers
    for value in sorted(weights.values(), key=lambda value: -_item_bytes(value)):
        weights[str(value.name)] = weights.pop(str(value.name))  # so each lies at a multiple of its element's size
    ir.save(
        model, folder / MODEL, external_data=DATA, size_threshold_bytes=_EXTERNAL_BYTES, alignment=_PAGE_BYTES,
        align_threshold=_PAGE_THRESHOLD,
    )  # fmt: skip
    (folder / DATA).touch()  # nothing of a small network may be above the threshold
    try:
        onnx.checker.check_model(str(folder / MODEL))
    except onnx.checker.ValidationError as error:
        raise ParityError(f"onnx's checker refuses the graph: {_first_line(error)}. Nothing was written.") from error


def _item_bytes(value: ir.Value) -> float:
    assert value.const_value is not None
    return value.const_value.dtype.itemsize


def _check(
    attached: AttachedModule, inputs: Sequence[torch.Tensor], expected: list[np.ndarray], adapter: Feeds,
    folder: Path, *, free_rows: bool,
) -> dict[str, Any]:  # fmt: skip
    """The gate's figures. Raises ParityError where the graph computes something else."""
    session = _session(folder, fp32_compute=True)
    found = _run_graph(session, inputs, adapter)
    figures: dict[str, Any] = {"max_abs": _difference(expected, found), "argmax_agreement": _agreement(expected, found)}
    pairs = [(expected, found)]
    if free_rows:
        first = [value[:1] for value in inputs]
        pairs.append((_run_torch(attached, first), _run_graph(session, first, adapter)))
    if adapter:
        with attached.disable_adapter():
            pairs.append((_run_torch(attached, inputs), _run_graph(session, inputs, {})))
    for (wanted, got), what in zip(pairs, ("", " of the first row alone", " without the adapter"), strict=False):
        allowed = min(allowed_difference(float(value.std())) for value in wanted if value.dtype.kind == "f")
        difference = _difference(wanted, got)
        if not difference <= allowed:
            raise ParityError(
                f"the exported graph does not compute what the network does: outputs{what} differ by up to "
                f"{difference:.2e}, allowed is {allowed:.1e}. Nothing was written. A layer that behaves differently in "
                f"training, or random numbers in forward(), do that too."
            )
    fast = _run_graph(_session(folder, fp32_compute=False), inputs, adapter)
    figures["fast"] = {"max_abs": _difference(expected, fast), "argmax_agreement": _agreement(expected, fast)}
    return figures | {"rows": len(inputs[0])}


def _session(folder: Path, *, fp32_compute: bool) -> onnxruntime.InferenceSession:
    options = session_options(folder, fp32_compute=fp32_compute)
    try:
        return onnxruntime.InferenceSession(folder / MODEL, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the exceptions of onnxruntime share no other base
        raise ParityError(
            f"onnxruntime {onnxruntime.__version__} does not take the graph: {_first_line(error)}. Nothing was written."
        ) from error


def _run_graph(
    session: onnxruntime.InferenceSession, inputs: Sequence[torch.Tensor], adapter: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    names = [value.name for value in session.get_inputs()]
    own = dict(zip(names, (value.numpy() for value in inputs), strict=True))
    found: list[np.ndarray] = session.run(None, own | dict(adapter))
    return found


def _difference(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """The largest; infinity where a shape differs or one is no number."""
    pairs = list(zip(expected, found, strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    worst = max(float(np.abs(a - b).max(initial=0)) for a, b in pairs)
    return worst if np.isfinite(worst) else float("inf")


def _agreement(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Share of the rows of the first output whose largest number is the same one."""
    return float((expected[0].argmax(-1) == found[0].argmax(-1)).mean())


def _write_manifest(
    attached: AttachedModule, model: ir.Model, inputs: Sequence[torch.Tensor], folder: Path,
    parity: Mapping[str, Any], base_sha256: str, *, merged: bool,
) -> None:  # fmt: skip
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(folder.iterdir())
    }
    manifest = {
        "format_version": FORMAT_VERSION, "edgetune_version": __version__, "kind": KIND,
        "grid": attached.grid, "merged": merged, "base_sha256": base_sha256,
        "inputs": [
            {"name": value.name, "dtype": str(example.numpy().dtype), "shape": _shape(value),
             "example_shape": list(example.shape)}
            for value, example in zip(model.graph.inputs, inputs, strict=False)
        ],
        "outputs": [{"name": value.name, "shape": _shape(value)} for value in model.graph.outputs],
        "layers": [asdict(layer) for layer in attached.layers],
        "parity": dict(parity), "files": files,
        "versions": {
            "onnxruntime": onnxruntime.__version__, "onnx_ir": ir.__version__, "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _shape(value: ir.Value) -> list[int | str | None]:
    return [] if value.shape is None else [size if isinstance(size, int) else size.value for size in value.shape]
