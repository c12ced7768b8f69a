"""`export_module`: the codes of training in the file, the adapter as inputs or merged, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_module import ImageNet2d, SensorNet, SmallNet, drawn, seeded
from torch import nn

import edgetune as et
from edgetune.bundle import load_any_bundle
from edgetune.modules.bundle import ModuleBundle, load_module_bundle
from edgetune.modules.forms import feeds_of

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch.nn's own


def initializers(folder: Path) -> dict[str, np.ndarray]:
    model = onnx.load(folder / "model.onnx")
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def exact_session(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("mlas.qnbit.force_fp32", "1")
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


ROWS = torch.randn(4, 3, 40, generator=torch.Generator().manual_seed(2))
OTHERS = torch.randn(7, 3, 40, generator=torch.Generator().manual_seed(3))  # as many as the export did not see


def small_net(grid: str = "int4", r: int = 3) -> et.AttachedModule:
    return drawn(et.attach(seeded(SmallNet), et.LoraConfig(r=r, lora_alpha=5), grid=grid))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModuleBundle:
    return et.export_module(small_net(), ROWS, out=tmp_path_factory.mktemp("exported") / "b")


def check_graph(attached: et.AttachedModule, bundle: ModuleBundle) -> None:
    """The file holds the codes of training, and its graph computes on other rows what the network does."""
    written = initializers(bundle.folder)
    for name, layer in attached.frozen_layers().items():
        for key, array in layer.frozen.arrays().items():
            np.testing.assert_array_equal(written[f"{name}.{key}"], array, err_msg=f"{name}.{key}")
    operators = {node.op_type for node in onnx.load(bundle.model_path).graph.node}
    assert ("MatMulNBits" if attached.grid == "int4" else "MatMulBnb4") in operators
    assert not operators & {"Constant", "ConstantOfShape"}, "a 32-bit ARM runtime crashes on them"
    session = exact_session(bundle.folder)
    expected = attached(OTHERS).detach().numpy()
    found = session.run(None, {"x": OTHERS.numpy(), **bundle.adapter_feeds()})[0]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    with attached.disable_adapter():
        base = attached(OTHERS).detach().numpy()
    np.testing.assert_allclose(session.run(None, {"x": OTHERS.numpy()})[0], base, atol=2e-5)
    assert np.abs(base - expected).max() > 1e-2


def test_the_graph_computes_what_was_trained_from_its_codes(bundle: ModuleBundle) -> None:
    check_graph(small_net(), bundle)
    other = small_net(r=6)  # the same graph takes an adapter of another rank
    feeds = {
        f"{name}.{key}": value.numpy()
        for name, layer in other.frozen_layers().items()
        for key, value in feeds_of(layer).items()
    }
    found = exact_session(bundle.folder).run(None, {"x": OTHERS.numpy(), **feeds})[0]
    np.testing.assert_allclose(found, other(OTHERS).detach().numpy(), atol=2e-5)


def test_so_does_that_of_nf4(tmp_path: Path) -> None:
    attached = small_net("nf4")
    check_graph(attached, et.export_module(attached, ROWS, out=tmp_path / "b"))


def test_attention_recurrence_and_statistics_are_exported(tmp_path: Path) -> None:
    attached = drawn(et.attach(seeded(SensorNet), modules_to_save=["head"])).train()
    bundle = et.export_module(attached, ROWS, out=tmp_path / "b")
    assert attached.training and not attached.module.norm.training, "the network is as it was before"
    check_graph(attached.eval(), bundle)


def test_a_merged_bundle_has_no_inputs_but_the_networks_own(tmp_path: Path) -> None:
    attached = drawn(et.attach(seeded(ImageNet2d), et.LoraConfig(target_modules=("0", "b"))))
    x = torch.randn(3, 2, 13, 11)
    bundle = et.export_module(attached, x, out=tmp_path / "b", merge=True)
    session = exact_session(bundle.folder)
    assert [value.name for value in session.get_inputs()] == ["x"]
    assert bundle.adapter_feeds() == {} and set(bundle.manifest["files"]) == {"model.onnx", "model.onnx.data"}
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], attached(x).detach().numpy(), atol=2e-5)
    merged = attached.frozen_layers()["b"].weight.detach().numpy()
    np.testing.assert_array_equal(initializers(bundle.folder)["b.weight"], merged)
    assert bundle.manifest["parity"]["max_abs"] < 2e-5 and bundle.manifest["parity"]["argmax_agreement"] == 1


def test_nothing_of_this_machine_is_in_the_file(bundle: ModuleBundle) -> None:
    content = bundle.model_path.read_bytes()
    assert b".py" not in content and str(Path(__file__).parents[2]).encode() not in content


def test_sizes_that_stay_free_are_the_users_choice(tmp_path: Path) -> None:
    shapes = ({0: "batch", 2: "time"},)
    bundle = et.export_module(small_net(), ROWS, out=tmp_path / "b", dynamic_shapes=shapes)
    assert bundle.manifest["inputs"][0]["shape"] == ["batch", 3, "time"]
    assert exact_session(bundle.folder).run(None, {"x": np.zeros((5, 3, 77), np.float32)})[0].shape == (5, 5)


def test_it_is_measured_in_a_process_of_its_own(bundle: ModuleBundle) -> None:
    found = et.bench_module(bundle, runs=5, threads=1)
    assert 0 < found["p50_ms"] <= found["p90_ms"] <= found["p99_ms"]
    assert 0 < found["floor_bytes"] < found["peak_memory_bytes"] < 100 << 20, "no torch is in there"
    assert found["bundle_bytes"] == sum(path.stat().st_size for path in bundle.folder.iterdir())
    with pytest.raises(et.ConfigError, match="runs = 0"):
        et.bench_module(bundle, runs=0)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(40, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y if y.sum() > 0 else -y


class Counting(Branching):
    """What it gives is not a function of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.count = itertools.count()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + next(self.count)


class Wordy(Branching):
    def forward(self, x: torch.Tensor) -> str:
        return "walking"


def test_what_cannot_be_exported_leaves_nothing(tmp_path: Path) -> None:
    out, x = tmp_path / "b", torch.randn(3, 40)
    with pytest.raises(
        et.ExportError, match=r"cannot follow the network.*in the place of `if` on a tensor use torch\.where"
    ):
        et.export_module(et.attach(Branching()), x, out=out)
    attached = et.attach(nn.Sequential(nn.Linear(40, 40)))
    with pytest.raises(et.ExportError, match=r"does not take the example of shape \[3, 41\]"):
        et.export_module(attached, torch.randn(3, 41), out=out)
    for example in ([], np.zeros((3, 40)), torch.tensor(1.0), x[:0]):
        with pytest.raises(et.ExportError, match="the network's input was expected"):
            et.export_module(attached, example, out=out)  # type: ignore[arg-type]
    with pytest.raises(et.ExportError, match="the network returns str; tensors were expected"):
        et.export_module(et.attach(Wordy()), x, out=out)
    with pytest.raises(et.ParityError, match=r"outputs differ by up to .* random numbers in forward\(\)"):
        et.export_module(et.attach(Counting()), x, out=out)
    assert list(tmp_path.iterdir()) == []


def test_onnxscript_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(et.MissingExtraError, match=r"onnxscript is not installed.*edgetune\[train\]"):
        et.export_module(small_net(), ROWS, out=tmp_path / "b")


def test_damaged_bundles_are_refused(bundle: ModuleBundle, tmp_path: Path) -> None:
    bundle = ModuleBundle(Path(shutil.copytree(bundle.folder, tmp_path / "b")), bundle.manifest)
    with pytest.raises(et.BundleError, match="bundle of a network of its user's own"):
        load_any_bundle(bundle.folder)
    with pytest.raises(et.ConfigError, match="exists and is not empty"):
        et.export_module(small_net(), ROWS, out=tmp_path / "b")
    manifest = bundle.folder / "edgetune.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(values | {"base_sha256": "0" * 64}))
    with pytest.raises(et.AdapterError, match="trained around other weights"):
        load_module_bundle(bundle.folder).adapter_feeds()
    manifest.write_text(json.dumps(values | {"files": {"../b/model.onnx": values["files"]["model.onnx"]}}))
    with pytest.raises(et.BundleError, match="is no file of this folder"):
        load_module_bundle(bundle.folder)
    manifest.write_text(json.dumps(values | {"format_version": 2}))
    with pytest.raises(et.BundleError, match="format_version 2; 'module' and 1 were expected"):
        load_module_bundle(bundle.folder)
    manifest.write_text(json.dumps(values))
    with (bundle.folder / "model.onnx.data").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(et.BundleError, match=r"model\.onnx\.data is not what"):
        load_module_bundle(bundle.folder)
    with pytest.raises(et.BundleError, match="is no bundle of a network"):
        load_module_bundle(tmp_path)
