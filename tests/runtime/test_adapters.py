"""Several adapters in one bundle: swapped in one session, added and removed whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from conftest import tiny_config, write_model
from tiny_bundle import SLOTS, Reference, bound, byte_ids, random_adapter, random_reference, sha256, write_bundle
from tiny_run import write_run

import edgetune as et
from edgetune.adapter_file import BoundAdapter, read_adapter, write_adapter
from edgetune.adapters.lora import LoraConfig
from edgetune.bundle import load_bundle
from edgetune.cli import verbs
from edgetune.errors import AdapterError, BundleError, EdgetuneWarning
from edgetune.runtime.adapters import (
    add_adapter,
    check_adapters,
    list_adapters,
    remove_adapter,
    set_default_adapter,
)
from edgetune.runtime.evaluate import exact_match
from edgetune.runtime.generate import Sampling, complete, generate
from edgetune.runtime.session import open_session
from edgetune.tokenizer import load_tokenizer

REPOSITORY = Path(__file__).parents[2]
PROMPT = "Dear diary,"
RANKS = {"adapter": 3, "mail": 1, "notes": 7}


def adapter_of(bundle: Path, seed: int, r: int = 3) -> BoundAdapter:
    return bound(random_adapter(seed, r), sha256(bundle / "tokenizer.json"))


def adapter_file(bundle: Path, folder: Path, name: str, adapter: BoundAdapter | None = None) -> Path:
    """A file outside of the bundle, as another bundle has it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, name, adapter or adapter_of(bundle, len(name), RANKS.get(name, 2)))
    return folder / f"{name}.safetensors"


@pytest.fixture(scope="module")
def reference() -> Reference:
    return random_reference()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, reference: Reference) -> Path:
    """A bundle with three adapters of three ranks."""
    folder = tmp_path_factory.mktemp("adapters")
    bundle = write_bundle(folder / "bundle", reference, random_adapter())
    for name in ("mail", "notes"):
        add_adapter(bundle, adapter_file(bundle, folder / "files", name))
    return bundle


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- swapping


def test_adapters_of_any_rank_swap_in_one_session(original: Path, reference: Reference) -> None:
    session, tokenizer, ids = open_session(original), load_tokenizer(original), byte_ids(PROMPT)
    sampling, seen = Sampling(max_new_tokens=16), {}
    for name in ("notes", "adapter", False, "mail", "notes", True, False, "mail"):
        session.use_adapter(name)
        tokens = complete(session, tokenizer, ids, sampling).token_ids
        fresh = generate(original, PROMPT, max_new_tokens=16, adapter=name).token_ids
        assert tokens == fresh, name
        tensors = load_bundle(original).adapter_tensors(None if name is True else name) if name else None
        assert list(tokens) == reference.greedy(ids, 16, tensors), name
        seen[name] = tokens
    assert seen[True] == seen["adapter"], "the exported adapter is the default"
    assert len(set(seen.values())) == 4, "each adapter answers in its own way"


def test_logits_after_a_swap_have_the_bits_of_a_fresh_session(original: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(3).integers(3, 259, 19)
    other = adapter_file(original, tmp_path, "other")
    session = open_session(original, adapter="mail")
    for adapter in ("notes", other, "mail", False, True):
        session.forward([7, 8, 9])
        session.use_adapter(adapter)
        np.testing.assert_array_equal(session.forward(ids), open_session(original, adapter=adapter).forward(ids))
        assert session.length == len(ids)


def test_feeds_have_the_bits_of_onnxruntime_s_own_adapter_files(original: Path) -> None:
    session = open_session(original, adapter="notes")
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(original / "notes.onnx_adapter"))
    options.add_active_adapter(adapter)
    tokens = np.array([[5, 6, 7]], np.int64)
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    feeds |= {name: value.numpy() for name, value in session._cache.items()}
    (native,) = session._native.run(["logits"], feeds, options)
    np.testing.assert_array_equal(next(iter(session.logits([5, 6, 7]))), native[0])


def test_a_refused_adapter_leaves_the_session_as_it_was(original: Path, tmp_path: Path) -> None:
    session = open_session(original, adapter="mail")
    wanted = session.forward([5, 6])
    nothing = {name: value * np.float32(1e-20) for name, value in random_adapter().items()}
    dead = adapter_file(original, tmp_path, "dead", bound(nothing, sha256(original / "tokenizer.json")))
    for adapter, message in (("nope", "has no adapter 'nope'; it has adapter, mail, notes"), (dead, "changes nothing")):
        with pytest.raises(AdapterError, match=message):
            session.use_adapter(adapter)
        if adapter is not dead:  # whose probe has forgotten the sequence
            session.reset()
        np.testing.assert_array_equal(session.forward([5, 6]), wanted)
    with pytest.raises(AdapterError, match=r"dead\.safetensors changes nothing: on the probe rows no output moves"):
        open_session(original, adapter=dead)


def test_a_session_keeps_what_it_loaded(bundle: Path) -> None:
    session = open_session(bundle, adapter="mail")
    wanted = session.forward([5, 6])
    remove_adapter(bundle, "mail")
    session.use_adapter(False)
    session.use_adapter("mail")
    np.testing.assert_array_equal(session.forward([5, 6]), wanted)


def test_a_file_of_the_user_s_is_read_again_each_time(original: Path, tmp_path: Path) -> None:
    session = open_session(original)
    for seed in (21, 22):
        file = adapter_file(original, tmp_path, "mine", adapter_of(original, seed))
        session.use_adapter(file)
        np.testing.assert_array_equal(session.forward([5, 6]), open_session(original, adapter=file).forward([5, 6]))


def test_a_file_that_was_changed_after_the_bundle_was_loaded_is_refused(bundle: Path, tmp_path: Path) -> None:
    session = open_session(bundle)
    remove_adapter(bundle, "mail")
    with pytest.raises(AdapterError, match=r"mail\.safetensors cannot be read"):
        session.use_adapter("mail")
    other = adapter_file(bundle, tmp_path / "files", "mail", adapter_of(bundle, 99, RANKS["mail"]))
    add_adapter(bundle, other)
    with pytest.raises(AdapterError, match=r"mail\.safetensors was changed after the bundle was loaded"):
        session.use_adapter("mail")
    assert open_session(bundle, adapter="mail").has_adapter


def test_evaluation_takes_a_name(original: Path) -> None:
    with pytest.raises(AdapterError, match=r"has no adapter 'nope'"):
        exact_match(original, [], adapter="nope")


# ---- adding


def test_what_is_listed(original: Path) -> None:
    found = list_adapters(original)
    assert found["default"] == "adapter"
    assert {name: figures["r"] for name, figures in found["adapters"].items()} == RANKS
    for name, figures in found["adapters"].items():
        sizes = [(original / f"{name}{suffix}").stat().st_size for suffix in (".safetensors", ".onnx_adapter")]
        assert (figures["bytes"], figures["slots"], figures["lora_alpha"]) == (sum(sizes), len(SLOTS), 5.0)


def test_the_probe_measures_the_largest_change_by_the_largest_logit(original: Path, reference: Reference) -> None:
    rows = load_bundle(original).probe_rows
    tensors = load_bundle(original).adapter_tensors("notes")
    base = [reference.logits(row.tolist()) for row in rows]
    tuned = [reference.logits(row.tolist(), tensors) for row in rows]
    change = max(np.abs(a - b).max() for a, b in zip(base, tuned, strict=True)) / max(np.abs(b).max() for b in base)
    assert list_adapters(original)["adapters"]["notes"]["probe_change"] == pytest.approx(change, rel=1e-4)


def test_adding_keeps_everything_else(bundle: Path, tmp_path: Path) -> None:
    before = files(bundle)
    made = add_adapter(bundle, adapter_file(bundle, tmp_path / "files", "work"), default=True)
    after = files(bundle)
    assert after.keys() - before.keys() == {"work.safetensors", "work.onnx_adapter"}
    assert all(after[name] == before[name] for name in before if name != "edgetune.json")
    assert (made, made.default_adapter) == (load_bundle(bundle), "work")
    measured, said = check_adapters(bundle)["adapters"], list_adapters(bundle)["adapters"]
    assert measured.pop("adapter").keys() == said.pop("adapter").keys()  # tiny_bundle makes its figure up
    assert measured == said
    assert (
        generate(bundle, PROMPT, max_new_tokens=8).token_ids
        == generate(bundle, PROMPT, max_new_tokens=8, adapter="work").token_ids
    )


def test_the_first_adapter_of_a_bundle_is_its_default(tmp_path: Path, reference: Reference) -> None:
    bundle = write_bundle(tmp_path / "bundle", reference)
    assert open_session(bundle).has_adapter is False
    add_adapter(bundle, adapter_file(bundle, tmp_path / "files", "mail"), name="first")
    assert (
        add_adapter(bundle, adapter_file(bundle, tmp_path / "files", "mail"), name="second").default_adapter == "first"
    )
    assert open_session(bundle).has_adapter is True


def bound_to(**changes: Any) -> Callable[[BoundAdapter], BoundAdapter]:
    return lambda adapter: BoundAdapter(replace(adapter.binding, **changes), adapter.tensors)


def scaled(factor: float) -> Callable[[BoundAdapter], BoundAdapter]:
    return lambda a: BoundAdapter(a.binding, {n: v * np.float32(factor) for n, v in a.tensors.items()})


NOTHING = {name: np.zeros_like(value) for name, value in random_adapter().items()}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda a: a, {"name": "mail"}, r"has an adapter mail already; .*`edgetune adapter remove .*bundle mail`"),
        (lambda a: a, {"name": "My Mail"}, "'My Mail' is no name for an adapter; give it one with --name"),
        (lambda a: a, {"name": "model"}, "'model' is no name"),
        (lambda a: a, {"name": "../x"}, "'../x' is no name"),
        (bound_to(base_sha256="f" * 64), {}, "trained on base ffffffffffff"),
        (bound_to(grid="nf4"), {}, "trained around nf4 weights"),
        (bound_to(tokenizer_sha256="e" * 64), {}, "tokenizer eeeeeeeeeeee"),
        (bound_to(slots=SLOTS[:1]), {}, "is not of a slot that the adapter"),
        (bound_to(slots=(*SLOTS, "lm_head")), {}, "no such slot"),
        (lambda a: BoundAdapter(a.binding, dict(list(a.tensors.items())[:-1])), {}, r"lora_B: is missing, expected \["),
        (lambda a: BoundAdapter(a.binding, a.tensors | {"more": np.ones(3, np.float32)}), {}, "more: is not of a slot"),
        (lambda a: BoundAdapter(a.binding, NOTHING), {}, r"has shape \[22, 3\], expected \[22, 2\]"),
        (lambda a: BoundAdapter(replace(a.binding, r=3), NOTHING), {}, "changes nothing: lora_A or lora_B of"),
        (scaled(1e-9), {},
         "work.safetensors changes nothing: on the probe rows no output moves by more than 0.0e"),
        (scaled(1e30), {},
         "makes outputs that are no numbers"),
        (scaled(np.inf), {},
         "holds NaN or infinity"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_an_adapter_that_must_not_be_added(
    bundle: Path,
    tmp_path: Path,
    change: Callable[[BoundAdapter], BoundAdapter],
    options: dict[str, Any],
    message: str,
) -> None:
    before = files(bundle)
    source = adapter_file(bundle, tmp_path / "files", "work", change(adapter_of(bundle, 4, 2)))
    with pytest.raises(AdapterError, match=message):
        add_adapter(bundle, source, **options)
    assert files(bundle) == before


def test_a_wrong_adapter_is_refused_before_onnxruntime_loads_anything(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of(bundle, 4)
    other = BoundAdapter(replace(adapter.binding, base_sha256="f" * 64), adapter.tensors)
    source = adapter_file(bundle, tmp_path / "files", "work", other)
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: pytest.fail("a session was made"))
    for act in (lambda: add_adapter(bundle, source), lambda: open_session(bundle, adapter=source)):
        with pytest.raises(AdapterError, match=r"was trained on base ffffffffffff"):
            act()


def test_no_bundle_and_no_source(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no edgetune\.json"):
        add_adapter(tmp_path, bundle / "mail.safetensors")
    with pytest.raises(AdapterError, match=r"nowhere is no adapter folder"):
        add_adapter(bundle, tmp_path / "nowhere")


def test_a_bundle_that_cannot_be_written_stays_as_it_was(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, before = adapter_file(bundle, tmp_path / "files", "work"), files(bundle)
    fsync, calls = os.fsync, iter(range(10))

    def full(number: int) -> Callable[[int], None]:
        """The disk is full at this call of fsync."""

        def act(descriptor: int) -> None:
            if next(calls) == number:
                raise OSError(28, "No space left on device")
            fsync(descriptor)

        return act

    for number in range(4):  # both files, the folder, the manifest
        calls = iter(range(10))
        monkeypatch.setattr(os, "fsync", full(number))
        with pytest.raises(BundleError, match=r"bundle cannot be written: No space left on device. It is as it was"):
            add_adapter(bundle, source)
        assert files(bundle) == before
    monkeypatch.setattr(os, "fsync", fsync)
    add_adapter(bundle, source)


KILLED = """
import os, sys
from pathlib import Path
from edgetune.runtime.adapters import add_adapter, remove_adapter

at, left = int(sys.argv[1]), 0
def point(name, real):
    def call(*words, **options):
        global left
        left += 1
        if left == at:
            os._exit(9)
        return real(*words, **options)
    return call
os.fsync = point("fsync", os.fsync)
Path.replace = point("replace", Path.replace)
Path.unlink = point("unlink", Path.unlink)
open_ = Path.open
Path.open = lambda self, mode="r", *words, **options: (
    point("open", open_) if "w" in mode else open_)(self, mode, *words, **options)
verb, bundle, word = sys.argv[2:]
(add_adapter if verb == "add" else remove_adapter)(bundle, word)
"""


@pytest.mark.parametrize("verb", ["add", "remove"])
def test_a_kill_at_any_write_leaves_one_bundle_or_the_other(original: Path, tmp_path: Path, verb: str) -> None:
    """SIGKILL's effect at the n-th open for writing, fsync, rename and unlink, for every n."""
    word = str(adapter_file(original, tmp_path / "files", "work")) if verb == "add" else "notes"
    seen, at = set(), 0
    while True:
        at += 1
        bundle = Path(shutil.copytree(original, tmp_path / f"bundle-{at}"))
        words = [sys.executable, "-c", KILLED, str(at), verb, str(bundle), word]
        code = subprocess.run(words, cwd=REPOSITORY, capture_output=True, timeout=120).returncode
        assert code in (0, 9)
        found = load_bundle(bundle)
        seen.add(tuple(found.adapters))
        if tuple(found.adapters) == ("adapter", "mail", "notes"):
            assert found.manifest == load_bundle(original).manifest
        check_adapters(bundle)
        if tuple(found.adapters) == ("adapter", "mail", "notes"):
            (add_adapter if verb == "add" else remove_adapter)(bundle, word)
        assert not list(bundle.glob(".*")), "what was unfinished is gone once the same is done again"
        if code == 0:
            break
    assert at > (10 if verb == "add" else 5), "nothing was killed: do the hooks still hook?"
    whole = ("adapter", "mail", "notes")
    assert seen == ({whole, (*whole, "work")} if verb == "add" else {whole, whole[:2]})


def test_edits_at_once_lose_nothing(bundle: Path, tmp_path: Path) -> None:
    names = ["one", "two", "three", "four"]
    sources = [adapter_file(bundle, tmp_path / "files", name) for name in names]
    threads = [threading.Thread(target=add_adapter, args=(bundle, source)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(load_bundle(bundle).adapters) == {"adapter", "mail", "notes", *names}


# ---- removing


def test_removing_the_default_leaves_the_base_alone(bundle: Path) -> None:
    made = remove_adapter(bundle, "adapter")
    assert (made.default_adapter, list(made.adapters)) == (None, ["mail", "notes"])
    assert not list(bundle.glob("adapter.*"))
    base = generate(bundle, PROMPT, max_new_tokens=8, adapter=False).token_ids
    assert generate(bundle, PROMPT, max_new_tokens=8).token_ids == base
    assert set_default_adapter(bundle, "notes").default_adapter == "notes"
    assert generate(bundle, PROMPT, max_new_tokens=8).token_ids != base
    assert set_default_adapter(bundle, None).default_adapter is None


def test_removing_another_keeps_the_default(bundle: Path) -> None:
    made = remove_adapter(bundle, "mail")
    assert (made.default_adapter, list(made.adapters)) == ("adapter", ["adapter", "notes"])
    assert {path.name for path in bundle.iterdir()} == {*made.manifest["files"], "edgetune.json"}


def test_a_damaged_adapter_can_be_removed(bundle: Path) -> None:
    path = bundle / "mail.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BundleError, match=r"mail.safetensors has .* bytes"):
        check_adapters(bundle)
    remove_adapter(bundle, "mail")
    assert list(check_adapters(bundle)["adapters"]) == ["adapter", "notes"]


def test_what_is_not_there_cannot_be_removed_or_chosen(bundle: Path) -> None:
    before = files(bundle)
    for act in (remove_adapter, set_default_adapter):
        with pytest.raises(AdapterError, match=r"has no adapter 'work'; it has adapter, mail, notes"):
            act(bundle, "work")
    assert files(bundle) == before


def test_a_manifest_cannot_make_remove_reach_outside(bundle: Path) -> None:
    manifest = json.loads((bundle / "edgetune.json").read_text(encoding="utf-8"))
    manifest["adapters"]["../mine"] = manifest["adapters"]["mail"]
    (bundle / "edgetune.json").write_text(json.dumps(manifest), encoding="utf-8")
    (bundle.parent / "mine.safetensors").write_text("x", encoding="utf-8")
    with pytest.raises(AdapterError, match=r"has no adapter '../mine'"):
        remove_adapter(bundle, "../mine")
    assert (bundle.parent / "mine.safetensors").exists()


def test_check_names_every_adapter_that_is_wrong(bundle: Path) -> None:
    manifest = json.loads((bundle / "edgetune.json").read_text(encoding="utf-8"))
    for name in ("mail", "notes"):
        manifest["adapters"][name]["binding"]["base_sha256"] = "f" * 64
        adapter = read_adapter(bundle / f"{name}.safetensors")
        moved = BoundAdapter(replace(adapter.binding, base_sha256="f" * 64), adapter.tensors)
        write_adapter(bundle, name, moved)
        for suffix in (".safetensors", ".onnx_adapter"):
            path = bundle / f"{name}{suffix}"
            manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (bundle / "edgetune.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(
        AdapterError, match=r"(?s)adapter mail was trained on base f.*adapter notes was trained on base f"
    ):
        check_adapters(bundle)


# ---- from runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, run/ and bundle/ of a tiny model, and run-mail/, another adapter of that base."""
    folder = tmp_path_factory.mktemp("trained")
    base = et.quantize(write_model(folder / "model", tiny_config("llama")), "int4", folder / "base")
    write_run(folder / "run", base)
    et.export(folder / "run", out=folder / "bundle")
    config = LoraConfig(r=5, lora_alpha=4, use_rslora=True, target_modules=("v_proj", "up_proj"))
    write_run(folder / "run-mail", base, config)
    return folder


def test_a_second_run_is_added_as_it_would_have_been_exported(trained: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(trained / "bundle", tmp_path / "bundle"))
    made = add_adapter(bundle, SimpleNamespace(folder=trained / "run-mail"))
    alone = et.export(trained / "run-mail", out=tmp_path / "alone")
    assert list(made.adapters) == ["adapter", "run-mail"]
    one, other = made.adapters["run-mail"], alone.adapters["adapter"]
    assert one.binding == other.binding
    assert (one.binding.r, one.binding.lora_alpha, len(one.binding.slots)) == (5, 4.0, 4)
    assert one.probe_change == pytest.approx(other.probe_change, rel=1e-4)
    for suffix in (".safetensors", ".onnx_adapter"):
        assert (bundle / f"run-mail{suffix}").read_bytes() == (tmp_path / "alone" / f"adapter{suffix}").read_bytes()
    tokens = [
        generate(folder, PROMPT, max_new_tokens=12, adapter=name).token_ids
        for folder, name in ((bundle, "run-mail"), (alone.folder, True), (bundle, True))
    ]
    assert tokens[0] == tokens[1] != tokens[2]
    again = et.export(trained / "run", out=bundle, force=True)
    assert list(again.adapters) == ["adapter"], "what edgetune added counts as its own"


@pytest.mark.parametrize("weights", ["int8", "nf4", "standard"])
def test_weights_rounded_to_another_kind_keep_the_base_that_adapters_are_bound_to(
    trained: Path, tmp_path: Path, weights: str
) -> None:
    bundle = et.export(trained / "run", out=tmp_path / "bundle", weights=weights, accept_loss=True)
    said = {key: bundle.manifest[key] for key in ("base_sha256", "grid")}
    assert said == {key: load_bundle(trained / "bundle").manifest[key] for key in said}
    alone = et.export(trained / "run-mail", out=tmp_path / "alone", weights=weights, accept_loss=True)
    rounding = bundle.manifest["rounding"]
    if weights == "standard":  # which is int4 in other operators
        assert rounding is None
        added = add_adapter(bundle, trained / "run-mail")
    else:
        by = f"{rounding['mean_relative_error']:.2%}"
        told = f"were rounded to {weights} by {by} on average. What that costs this adapter .* --weights int4 is exact"
        with pytest.warns(EdgetuneWarning, match=rf"run-mail was trained around int4 weights, and those of .* {told}"):
            added = add_adapter(bundle, trained / "run-mail")
    one, other = added.adapters["run-mail"], alone.adapters["adapter"]
    assert one.binding == other.binding
    # A session computes 4-bit products in fp32 here, the export those of 8 bits too.
    assert one.probe_change == pytest.approx(other.probe_change, rel=0.05 if weights == "int8" else 1e-4)
    assert list(check_adapters(bundle)["adapters"]) == ["adapter", "run-mail"]
    file = trained / "bundle" / "adapter.safetensors"
    with contextlib.nullcontext() if rounding is None else pytest.warns(EdgetuneWarning, match=r"adapter\.safetensors"):
        assert list(add_adapter(bundle, file, name="same").adapters) == ["adapter", "run-mail", "same"]
    requantized = et.quantize(trained / "model", "nf4", tmp_path / "base")
    with pytest.raises(AdapterError, match=r"mail was trained on base [0-9a-f]{12}, .*bundle holds"):
        add_adapter(bundle, write_run(tmp_path / "mail", requantized))


def test_a_run_says_what_it_was_trained_on(trained: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(trained / "bundle", tmp_path / "bundle"))
    manifest = load_bundle(bundle).manifest
    said = {key: manifest[key] for key in ("base_sha256", "grid", "tokenizer_sha256")}
    gone = write_run(tmp_path / "run", trained / "base", **said)
    summary = json.loads((gone / "summary.json").read_text(encoding="utf-8"))
    (gone / "summary.json").write_text(json.dumps(summary | {"base": "/nowhere"}), encoding="utf-8")
    assert add_adapter(bundle, gone, name="mail").adapters["mail"].binding.base_sha256 == manifest["base_sha256"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"base_sha256": "f" * 64}, "run was trained on base ffffffffffff"),
        ({"grid": "nf4"}, "run was trained around nf4 weights"),
        ({"tokenizer_sha256": "e" * 64}, "run was trained with tokenizer eeeeeeeeeeee"),
    ],
)
def test_a_run_of_something_else_is_refused(trained: Path, tmp_path: Path, said: dict[str, str], message: str) -> None:
    manifest = load_bundle(trained / "bundle").manifest
    ours = {key: manifest[key] for key in ("base_sha256", "grid", "tokenizer_sha256")}
    run = write_run(tmp_path / "run", trained / "base", **ours | said)
    with pytest.raises(AdapterError, match=message):
        add_adapter(trained / "bundle", run, name="mail")


def test_a_run_of_another_base_folder_is_refused(trained: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tiny_config("llama"), seed=1)
    run = write_run(tmp_path / "run", et.quantize(model, "int4", tmp_path / "base"))
    with pytest.raises(AdapterError, match=r"run was trained on base [0-9a-f]{12}, .*bundle holds"):
        add_adapter(trained / "bundle", run, name="mail")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(AdapterError, match=r"names the base .*base', and there is no such folder to compare"):
        add_adapter(trained / "bundle", run, name="mail")
    (run / "summary.json").write_text("{}", encoding="utf-8")
    with pytest.raises(
        AdapterError, match=r"summary.json does not say which base was trained on \(KeyError\('base'\)\)"
    ):
        add_adapter(trained / "bundle", run, name="mail")


def test_a_folder_that_peft_wrote_is_added_by_the_base_that_it_names(trained: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(trained / "bundle", tmp_path / "bundle"))
    run = Path(shutil.copytree(trained / "run-mail", tmp_path / "mail"))
    (run / "summary.json").unlink()
    assert list(add_adapter(bundle, run).adapters) == ["adapter", "mail"]


def test_what_was_merged_is_added_by_the_base_that_it_says(trained: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(trained / "bundle", tmp_path / "bundle"))
    merged = et.merge_adapters([trained / "run", trained / "run-mail"], [1, 0.5], out=tmp_path / "both")
    said = json.loads((merged / "merge.json").read_text(encoding="utf-8"))
    (merged / "merge.json").write_text(json.dumps(said | {"base": "moved"}), encoding="utf-8")
    entry = add_adapter(bundle, merged).adapters["both"]
    assert (entry.binding.r, entry.binding.lora_alpha, len(entry.binding.slots)) == (5, 5.0, 6)


def test_a_run_of_another_shape_is_refused_by_name(trained: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tiny_config("llama", hidden_size=64, num_hidden_layers=3))
    run = write_run(tmp_path / "run", et.quantize(model, "int4", tmp_path / "base"))
    with pytest.raises(AdapterError, match=r"adapts model\.layers\.2\..*, which is no linear of this model"):
        add_adapter(trained / "bundle", run, name="mail")


def test_a_merged_bundle_takes_no_adapter(trained: Path, tmp_path: Path) -> None:
    merged = et.export(trained / "run", out=tmp_path / "merged", merge=True)
    file = trained / "bundle" / "adapter.safetensors"
    with pytest.raises(AdapterError, match=r"is merged and takes no adapter"):
        add_adapter(merged, file, name="mail")


def test_adding_needs_no_torch(trained: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(trained / "bundle", tmp_path / "bundle"))
    code = (
        "import sys; from edgetune.runtime.adapters import add_adapter; add_adapter(*sys.argv[1:]);"
        "print([name for name in ('torch', 'onnx', 'onnx_ir', 'bitsandbytes') if name in sys.modules])"
    )
    words = [sys.executable, "-c", code, str(bundle), str(trained / "run-mail")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=REPOSITORY, timeout=120)
    assert done.stdout.strip() == "[]"


# ---- the command


def say(capsys: pytest.CaptureFixture[str], *words: str | Path, code: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        verbs.main([str(word) for word in ("adapter", *words)])
    shown = capsys.readouterr()
    assert (ended.value.code or 0) == code, shown.err
    return shown.err if code else shown.out


@pytest.mark.parametrize("rounding", [{"mean_relative_error": 0.0757}, {}])
def test_the_verb_warns_in_a_line_of_rounded_weights(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rounding: dict[str, float]
) -> None:
    manifest = json.loads((bundle / "edgetune.json").read_text(encoding="utf-8"))
    (bundle / "edgetune.json").write_text(json.dumps(manifest | {"rounding": rounding}), encoding="utf-8")
    with pytest.raises(SystemExit):
        verbs.main(["adapter", "add", str(bundle), str(adapter_file(bundle, tmp_path / "files", "work"))])
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("warning: ") and (" to fp32 by 7.57% on average. " if rounding else " to fp32. ") in told


def test_the_verb(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [line[:9] for line in say(capsys, "list", bundle).splitlines()[1:]] == [
        "* adapter",
        "  mail   ",
        "  notes  ",
    ]
    source = adapter_file(bundle, tmp_path / "files", "work")
    assert f"added work; use it with: edgetune run {bundle} --adapter work" in say(capsys, "add", bundle, source)
    assert "work" in json.loads(say(capsys, "list", bundle, "--json"))["adapters"]
    assert say(capsys, "remove", bundle, "mail").endswith("removed mail\n")
    removed = say(capsys, "remove", bundle, "adapter")
    assert "removed adapter, which was the default: without --adapter the base alone is used now" in removed
    assert f"Choose another with: edgetune adapter default {bundle} notes" in removed
    assert "* work" in say(capsys, "default", bundle, "work")
    assert "all of it is right" in say(capsys, "check", bundle)
    said = json.loads(say(capsys, "remove", bundle, "work", "--json"))
    assert (said["removed"], said["was_default"], said["default"]) == ("work", True, None)
    say(capsys, "remove", bundle, "notes")
    assert f"{bundle} has no adapter" in say(capsys, "list", bundle)
    made = say(capsys, "add", bundle, source, "--name", "first", "--default")
    assert made.endswith(f"added first; use it with: edgetune run {bundle}\n")
    assert "AdapterError: " in say(capsys, "remove", bundle, "mail", code=1)
    (bundle / "first.safetensors").unlink()
    assert "BundleError: " in say(capsys, "check", bundle, code=1)
