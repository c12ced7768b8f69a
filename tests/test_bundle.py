"""Bundles are read strictly: whatever does not fit is named before anything native opens a file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config, write_model
from safetensors.numpy import save_file
from tiny_run import write_run

from edgetune.adapter_file import (
    AdapterSlot,
    Binding,
    BoundAdapter,
    check_probe_change,
    is_name,
    read_adapter,
    write_adapter,
)
from edgetune.bundle import Bundle, check_adapter, load_adapter_tensors, load_bundle
from edgetune.errors import AdapterError, BundleError
from edgetune.exporter import export
from edgetune.quantizer import quantize


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("exported")
    base = quantize(write_model(folder / "model", tiny_config("llama")), "int4", folder / "base")
    return export(write_run(folder / "run", base), out=folder / "bundle")


@pytest.fixture
def copy(exported: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported.folder, tmp_path / "bundle"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = folder / "edgetune.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def test_a_bundle_knows_its_model_slots_and_size(exported: Bundle) -> None:
    bundle = load_bundle(exported.folder)
    assert bundle == exported
    model = bundle.model
    assert (model.model_type, model.vocab_size, model.hidden_size, model.num_hidden_layers) == ("llama", 301, 72, 2)
    assert (model.num_attention_heads, model.num_key_value_heads, model.head_dim) == (9, 3, 8)
    assert (model.max_position_embeddings, model.bos_token_id, model.eos_token_ids) == (256, 1, (2,))
    assert len(bundle.slots) == 8
    attention, down = "model.layers.1.self_attn", "model.layers.1.mlp.down_proj"
    parts = {f"{attention}.q_proj": 72, f"{attention}.k_proj": 24, f"{attention}.v_proj": 24}
    assert AdapterSlot(f"{attention}.qkv_proj", 72, 120, parts) in bundle.slots
    assert AdapterSlot(down, 88, 72, {down: 72}) in bundle.slots
    assert bundle.nbytes == sum(path.stat().st_size for path in bundle.folder.iterdir())
    assert bundle.has_adapter
    tensors = bundle.adapter_tensors()
    assert {name: value.shape for name, value in tensors.items() if "layers.0" in name} == {
        "model.layers.0.self_attn.qkv_proj.lora_A": (72, 3), "model.layers.0.self_attn.qkv_proj.lora_B": (3, 120),
        "model.layers.0.mlp.down_proj.lora_A": (88, 3), "model.layers.0.mlp.down_proj.lora_B": (3, 72),
    }  # fmt: skip
    summary = bundle.summary()
    assert summary["bundle_bytes"] == bundle.nbytes
    assert summary["weights"] == "int4"
    assert summary["parity"]["rows"] >= 1000


def test_reading_a_bundle_imports_nothing_heavy(exported: Bundle) -> None:
    code = (
        "import sys; from edgetune.bundle import load_bundle; load_bundle(sys.argv[1]).adapter_tensors();"
        "print([name for name in ('torch', 'onnx', 'onnx_ir', 'bitsandbytes', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(exported.folder)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no edgetune.json, so it is no bundle"):
        load_bundle(tmp_path)
    with pytest.raises(
        BundleError, match=r"gone does not exist\. Check the path; `edgetune export run/ --out bundle/`"
    ):
        load_bundle(tmp_path / "gone")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\udc80"])
def test_a_manifest_that_is_no_object(copy: Path, text: str) -> None:
    (copy / "edgetune.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleError, match=r"edgetune\.json (is not valid JSON|holds a list)"):
        load_bundle(copy)


def test_a_newer_format_is_refused_by_name(copy: Path) -> None:
    # A newer format may well have other keys: the version is what has to be named.
    with pytest.raises(BundleError, match="format_version 2 is newer than 1; upgrade edgetune"):
        load_bundle(edit(copy, lambda manifest: manifest.update(format_version=2, extra=1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version="1"), "format_version is '1', expected 1"),
        (lambda m: m.update(format_version=None), "format_version is None, expected 1"),
        (lambda m: m.pop("slots"), r"missing keys \['slots'\], unknown keys \[\]"),
        (lambda m: m.update(colour=1), r"missing keys \[\], unknown keys \['colour'\]"),
        (lambda m: m.update(merged=1), "merged is 1, expected bool"),
        (lambda m: m.update(peak_rss_bytes=True), "peak_rss_bytes is True, expected int"),
        (lambda m: m.update(grid=4), "grid is 4, expected str or null"),
        (lambda m: m.update(model=[]), r"model is \[\], expected dict"),
        (lambda m: m["model"].pop("head_dim"), r"model: missing keys \['head_dim'\]"),
        (lambda m: m["model"].update(head_dim="8"), "model: head_dim is '8', expected int"),
        (lambda m: m["model"].update(vocab_size=-1), "model: vocab_size is -1, expected no negative number"),
        (lambda m: m["model"].update(eos_token_ids=[2, "3"]), "model: eos_token_ids is .* expected no negative number"),
        (lambda m: m["slots"].append(3), r"slots\[8\] is 3, expected an object"),
        (lambda m: m["slots"][0]["modules"].update(x=-1), r"slots\[0\]: modules is .*, expected no negative number"),
        (lambda m: m["slots"][0].update(extra=1), r"slots\[0\]: missing keys \[\], unknown keys \['extra'\]"),
        (lambda m: m["files"].pop("model.onnx"), "files does not list model.onnx"),
        (lambda m: m["files"].pop("model.onnx.data"), "files does not list model.onnx.data"),
        (lambda m: m["files"].update({"model.onnx": 5}), r"files\['model.onnx'\] is 5, expected an object"),
        (lambda m: m["files"]["model.onnx"].pop("sha256"), r"files\['model.onnx'\]: missing keys \['sha256'\]"),
        (lambda m: m["files"]["model.onnx"].update(bytes=1), "model.onnx has .* bytes, edgetune.json says 1"),
        (lambda m: m["files"].update(gone={"bytes": 1, "sha256": "0"}), "gone is listed in edgetune.json but missing"),
    ],
)
def test_a_wrong_manifest_is_refused(copy: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        load_bundle(edit(copy, change))


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "..\\outside", ""])
def test_a_path_that_leaves_the_folder_is_refused(copy: Path, name: str) -> None:
    (copy.parent / "outside").write_text("x", encoding="utf-8")
    with pytest.raises(BundleError, match="points outside of the bundle"):
        load_bundle(edit(copy, lambda manifest: manifest["files"].update({name: {"bytes": 1, "sha256": "0"}})))


def test_a_link_that_leaves_the_folder_is_refused(copy: Path) -> None:
    moved = (copy / "tokenizer.json").rename(copy.parent / "elsewhere.json")
    (copy / "tokenizer.json").symlink_to(moved)
    with pytest.raises(BundleError, match=r"tokenizer\.json is a link that leaves the bundle"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "adapter.safetensors", "tokenizer.json"])
def test_one_flipped_bit_is_found(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name} has SHA-256 .* Copy the bundle again"):
        load_bundle(copy)


def qkv_proj(bundle: Bundle, rank: int = 3, **binding: Any) -> BoundAdapter:
    """A random adapter of one slot, bound to this bundle unless told otherwise."""
    rng = np.random.default_rng(0)
    tensors = {
        A: rng.normal(size=(72, rank)).astype(np.float32),
        B: rng.normal(size=(rank, 120)).astype(np.float32),
    }
    manifest = bundle.manifest
    ours = {key: manifest[key] for key in ("base_sha256", "grid", "tokenizer_sha256")}
    return BoundAdapter(Binding(**{**ours, "r": rank, "lora_alpha": 5.0, "slots": (SLOT,), **binding}), tensors)


SLOT = "model.layers.0.self_attn.qkv_proj"
A, B = f"{SLOT}.lora_A", f"{SLOT}.lora_B"
UP = "model.layers.0.mlp.gate_up_proj"


@pytest.mark.parametrize("rank", [1, 3, 64])
@pytest.mark.parametrize("adapted", [1, 2, 3])
def test_adapters_of_any_rank_fit(exported: Bundle, rank: int, adapted: int) -> None:
    """For one, two or all three of the linears that the slot serves."""
    check_adapter(exported, qkv_proj(exported, adapted * rank, r=rank))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.clear(), rf"{B}: is missing, expected \[3, 120\]"),
        (lambda t: t.pop(B), rf"1 of its tensors are wrong:\n  {B}: is missing, expected \[3, 120\]"),
        (lambda t: t.update(extra=np.ones(3, np.float32)), "extra: is not of a slot that the adapter names"),
        (lambda t: t.update({f"{UP}.lora_A": t[A]}), "gate_up_proj.lora_A: is not of a slot that the adapter names"),
        (lambda t: t.update({A: t[A].astype(np.float16)}), "lora_A: is float16, expected float32"),
        (lambda t: t.update({A: t[A][:71]}), r"lora_A: has shape \[71, 3\], expected \[72, 3\]"),
        (lambda t: t.update({A: t[A].T.copy()}), r"lora_A: has shape \[3, 72\], expected \[72, 72\]"),
        (lambda t: t.update({B: t[B][:2]}), r"lora_B: has shape \[2, 120\], expected \[3, 120\]"),
        (lambda t: t.update({A: t[A][:, :2], B: t[B][:2]}), r"lora_A: has shape \[72, 2\], expected \[72, 3\]"),
        (lambda t: t.update({A: t[A][:, 0]}), r"lora_A: has shape \[72\], expected \[72, 3\]"),
        (lambda t: t[B].__setitem__((1, 5), np.nan), "lora_B: holds NaN or infinity"),
        (lambda t: t[A].__setitem__((0, 0), -np.inf), "lora_A: holds NaN or infinity"),
        (lambda t: t[B].fill(0), "notes changes nothing: lora_A or lora_B of every slot is zero"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    exported: Bundle, change: Callable[[dict[str, np.ndarray]], Any], message: str
) -> None:
    adapter = qkv_proj(exported)
    change(adapter.tensors)
    with pytest.raises(AdapterError, match=message):
        check_adapter(exported, adapter, origin="notes")


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ({"base_sha256": "f" * 64}, "notes was trained on base ffffffffffff, .* holds [0-9a-f]{12}; use the bundle of"),
        ({"grid": "nf4"}, "notes was trained around nf4 weights, those of .* are int4"),
        ({"grid": None}, "notes was trained around dense weights, those of .* are int4"),
        ({"tokenizer_sha256": "e" * 64}, "notes was trained with tokenizer eeeeeeeeeeee, .*: the same text would be"),
        ({"tokenizer_sha256": None}, "notes was trained with tokenizer None"),
        ({"slots": (SLOT, "lm_head")}, "lm_head: the graph has no such slot"),
        ({"slots": (SLOT, UP)}, r"up_proj.lora_A: is missing, expected \[72, 3\]\n  .*lora_B: is missing"),
        ({"slots": ()}, "it names no slot"),
        ({"r": 4}, r"lora_A: has shape \[72, 3\], expected \[72, 4\]"),
    ],
)
def test_an_adapter_of_something_else_is_refused(exported: Bundle, binding: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        check_adapter(exported, qkv_proj(exported, **binding), origin="notes")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (0.0, "notes changes nothing: on the probe rows no output moves by more than 0.0e\\+00 of the largest"),
        (1e-6, "notes changes nothing"),
        (float("nan"), "notes makes outputs that are no numbers"),
        (float("inf"), "notes makes outputs that are no numbers"),
    ],
)
def test_an_adapter_that_changes_nothing_is_refused(change: float, message: str) -> None:
    check_probe_change(1.1e-6)
    with pytest.raises(AdapterError, match=message):
        check_probe_change(change, origin="notes")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m, e: e.pop("probe_change"), BundleError, r"adapters\['adapter'\]: probe_change: missing"),
        (lambda m, e: e["binding"].update(r="3"), BundleError, "binding.r: found '3'; expected an integer from 0"),
        (lambda m, e: e["binding"].pop("slots"), BundleError, "binding.slots: missing"),
        (lambda m, e: m["adapters"].update(notes=3), BundleError, r"adapters\['notes'\]: is 3, expected an object"),
        (lambda m, e: m["adapters"].update(Notes=e), BundleError, r"adapters\['Notes'\] is no name"),
        (lambda m, e: m["adapters"].update({"../x": e}), BundleError, r"adapters\['../x'\] is no name"),
        (lambda m, e: m["adapters"].update(notes=e), BundleError, "files does not list notes.safetensors"),
        (lambda m, e: m.update(default_adapter="x"), BundleError, "default_adapter is 'x', which is none of its"),
        (lambda m, e: m.update(probe_rows=[[301]]), BundleError, r"probe_rows has \[301\], expected a list of token"),
        (lambda m, e: m.update(probe_rows=[[]]), BundleError, r"probe_rows has \[\]"),
        (lambda m, e: m.update(probe_rows=[]), BundleError, "probe_rows is empty"),
        (lambda m, e: e["binding"].update(r=4), AdapterError, "says something else of itself than edgetune.json does"),
        (lambda m, e: e.update(probe_change=0), AdapterError, "adapter adapter changes nothing"),
        (lambda m, e: m.update(base_sha256="f" * 64), AdapterError, "adapter adapter was trained on base"),
        (lambda m, e: m.update(grid="nf4"), AdapterError, "adapter adapter was trained around int4 weights"),
        (lambda m, e: m["slots"].pop(0), AdapterError, "qkv_proj: the graph has no such slot"),
    ],
)
def test_a_manifest_and_its_adapter_must_agree(
    copy: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any], error: type[Exception], message: str
) -> None:
    edit(copy, lambda manifest: change(manifest, manifest["adapters"]["adapter"]))
    with pytest.raises(error, match=message):
        load_bundle(copy).adapter_tensors()


def test_an_adapter_that_the_bundle_does_not_have(exported: Bundle) -> None:
    with pytest.raises(AdapterError, match=r"has no adapter 'mail'; it has adapter. `edgetune adapter add`"):
        exported.adapter_tensors("mail")


def test_an_adapter_file_says_what_it_belongs_to(exported: Bundle, tmp_path: Path) -> None:
    adapter = qkv_proj(exported)
    write_adapter(tmp_path, "notes", adapter)
    assert read_adapter(tmp_path / "notes.safetensors").binding == adapter.binding
    loaded = load_adapter_tensors(exported, tmp_path / "notes.safetensors")
    assert all(np.array_equal(loaded[name], value) for name, value in adapter.tensors.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.onnx_adapter", "notes.safetensors"]


def test_a_damaged_adapter_file_is_refused(exported: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    write_adapter(tmp_path, "adapter", qkv_proj(exported))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterError, match=r"adapter\.safetensors"):
        load_adapter_tensors(exported, path)
    with pytest.raises(AdapterError, match="cannot be read"):
        load_adapter_tensors(exported, tmp_path / "none.safetensors")


GOOD = {"format_version": 1, "base_sha256": "0", "grid": None, "tokenizer_sha256": None, "r": 3, "lora_alpha": 5.0}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "does not say which base it was trained on, so it cannot be checked. `edgetune adapter add`"),
        ({"format": "pt"}, "does not say which base"),
        ({"edgetune": "{"}, "what it says of its base is damaged"),
        ({"edgetune": "[]"}, "what it says of its base is damaged"),
        ({"edgetune": json.dumps(GOOD | {"format_version": 2})}, "format_version 2, this edgetune reads 1. Upgrade"),
        ({"edgetune": json.dumps(GOOD)}, "is wrong: slots: missing"),
        ({"edgetune": json.dumps(GOOD | {"slots": [], "x": 1})}, "is wrong: x: unknown key"),
    ],
)
def test_a_file_that_does_not_say_so_is_refused(
    exported: Bundle, tmp_path: Path, metadata: dict[str, str] | None, message: str
) -> None:
    save_file(qkv_proj(exported).tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(AdapterError, match=message):
        load_adapter_tensors(exported, tmp_path / "x.safetensors")


@pytest.mark.parametrize(("name", "good"), [
    ("notes", True), ("0-a_b", True), ("a" * 63, True), ("a" * 64, False), ("Notes", False), ("model", False),
    ("", False), (".hidden", False), ("a.b", False), ("a/b", False), ("..", False), ("-a", False), ("naïve", False),
])  # fmt: skip
def test_names_are_files_on_every_system(name: str, good: bool) -> None:
    assert is_name(name) is good
