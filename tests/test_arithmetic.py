"""Merging adapters, held against PEFT's `add_weighted_adapter` on the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config, write_model
from peft import PeftModel
from tiny_run import write_run
from transformers import AutoModelForCausalLM

from edgetune.adapters.base import load_adapter
from edgetune.adapters.ln_tuning import LnTuningConfig
from edgetune.adapters.lora import LoraConfig, merge
from edgetune.arithmetic import COMBINATION_TYPES, merge_adapters, read_merge
from edgetune.base import open_any_base
from edgetune.cli import verbs
from edgetune.errors import AdapterError, ConfigError

WEIGHTS = (0.7, -0.4, 1.5)
CONFIGS = (
    LoraConfig(r=3, lora_alpha=5, target_modules=("q_proj", "down_proj")),
    LoraConfig(r=3, lora_alpha=4, target_modules=("q_proj", "up_proj")),
    LoraConfig(r=3, lora_alpha=6, target_modules=("q_proj", "down_proj"), use_rslora=True),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("arithmetic") / "model", tiny_config("llama"))


def runs(folder: Path, base: Path, configs: tuple[LoraConfig, ...] = CONFIGS) -> list[Path]:
    """Runs on this base with tensors that are not those of each other."""
    made = []
    for index, config in enumerate(configs):
        made.append(write_run(folder / f"run-{index}", base, config))
        path = made[-1] / "adapter_model.safetensors"
        raw = bytearray(path.read_bytes())
        values = np.frombuffer(raw, np.float32, offset=8 + int.from_bytes(raw[:8], "little"))
        values[:] = np.roll(values, 17 * index) * (1 + index)
        path.write_bytes(raw)
    return made


def changes(folder: Path, base: Path) -> dict[str, np.ndarray]:
    """Linear -> what the adapter adds to its weight."""
    config, tensors = load_adapter(folder, open_any_base(base).config)
    found = {}
    for name, shape in open_any_base(base).config.linears().items():
        if f"{name}.lora_A" in tensors:
            own = {key: tensors[f"{name}.{key}"] for key in ("lora_A", "lora_B")}
            found[name] = merge(np.zeros(shape, np.float32), own, slice(None), config)
    return found


def pefts(folders: list[Path], base: Path, **options: Any) -> dict[str, np.ndarray]:
    """The same of what PEFT merges."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, folders[0], adapter_name="0")
    for index, folder in enumerate(folders[1:], 1):
        peft.load_adapter(folder, adapter_name=str(index))
    peft.add_weighted_adapter([str(i) for i in range(len(folders))], list(WEIGHTS[: len(folders)]), "merged", **options)
    found = {}
    for name, module in peft.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "merged" in module.lora_A:
            with torch.no_grad():
                found[name] = module.get_delta_weight("merged").numpy()
    return found


@pytest.mark.parametrize(
    ("kind", "method"),
    [*((kind, "total") for kind in COMBINATION_TYPES), *((k, "frequency") for k in COMBINATION_TYPES if "ties" in k)],
)
def test_it_is_what_peft_makes(
    kind: str, method: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What dare leaves out is drawn here and handed to PEFT, in the order in which it asks for it."""
    options: dict[str, Any] = {"combination_type": kind, "majority_sign_method": method}
    if kind not in ("cat", "svd", "linear"):
        options["density"] = 0.6
    folders = runs(tmp_path, base)
    drawn: list[np.ndarray] = []
    default_rng = np.random.default_rng

    class Recorded:
        def __init__(self, seed: list[int]) -> None:
            self.rng = default_rng(seed)

        def random(self, shape: tuple[int, ...]) -> np.ndarray:
            drawn.append(self.rng.random(shape))
            return drawn[-1]

    monkeypatch.setattr(np.random, "default_rng", Recorded)
    merged = merge_adapters(folders, WEIGHTS, out=tmp_path / "merged", seed=3, **options)
    monkeypatch.undo()
    assert bool(drawn) == kind.startswith("dare")
    # PEFT walks q, up, down of a block; here the linears come as the adapters have them.
    masks = {linear: drawn[at : at + count] for linear, at, count in where_drawn(folders, base, kind)} if drawn else {}
    queue = [mask for linear in open_any_base(base).config.linears() for mask in masks.get(linear, [])]
    monkeypatch.setattr(
        torch, "bernoulli", lambda input: torch.from_numpy(queue.pop(0) < 0.6).to(input.dtype).view(input.shape)
    )
    wanted = pefts(folders, base, **options)
    found = changes(merged, base)
    assert found.keys() == wanted.keys() and not queue
    assert len(found) == 6, "the linears of any of the adapters, in both blocks"
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)
        assert np.abs(value).max() > 0.05


def where_drawn(folders: list[Path], base: Path, kind: str) -> list[tuple[str, int, int]]:
    """(linear, first mask, how many) in the order of `merge_adapters`: for A and B each, or for the change."""
    each = [list(changes(folder, base)) for folder in folders]
    found, at = [], 0
    for linear in dict.fromkeys(name for names in each for name in names):
        count = sum(linear in names for names in each) * (1 if kind.endswith("svd") else 2)
        found.append((linear, at, count))
        at += count
    return found


def test_adapters_of_any_rank_add_up_and_one_is_subtracted(base: Path, tmp_path: Path) -> None:
    ranks = (CONFIGS[0], LoraConfig(r=5, lora_alpha=4, target_modules=("q_proj",), layers_to_transform=(1,)))
    first, second = runs(tmp_path, base, ranks)
    both = merge_adapters([first, second], [2, 0.5], out=tmp_path / "both", combination_type="cat")
    assert read_merge(both)["r"] == 8 and read_merge(both)["relative_distance"] < 1e-6
    one, other = changes(first, base), changes(second, base)
    for name, value in changes(both, base).items():
        np.testing.assert_allclose(value, 2 * one[name] + 0.5 * other.get(name, 0), atol=1e-5)
    back = merge_adapters([both, second], [1, -0.5], out=tmp_path / "back", combination_type="svd", svd_rank=3)
    for name, value in changes(back, base).items():
        np.testing.assert_allclose(value, 2 * one[name], atol=1e-5)
    assert read_merge(back)["relative_distance"] < 1e-6


def test_svd_says_what_the_rank_cost(base: Path, tmp_path: Path) -> None:
    folder = merge_adapters(runs(tmp_path, base)[:1], [1], out=tmp_path / "less", svd_rank=2)
    off = total = 0.0
    for name, value in changes(tmp_path / "run-0", base).items():
        singular = np.linalg.svd(value, compute_uv=False)
        off, total = off + (singular[2:] ** 2).sum(), total + (singular**2).sum()
        assert np.linalg.matrix_rank(changes(folder, base)[name], tol=1e-5) == 2
    assert read_merge(folder)["relative_distance"] == pytest.approx((off / total) ** 0.5, rel=1e-4)


def test_dare_keeps_the_mean(base: Path, tmp_path: Path) -> None:
    folder = runs(tmp_path, base)[:1]
    exact = changes(folder[0], base)
    mean = dict.fromkeys(exact, 0.0)
    for seed in range(50):
        out = tmp_path / "dare"
        merge_adapters(
            folder, [1], out=out, combination_type="dare_linear_svd", density=0.5, svd_rank=72, seed=seed, force=True
        )
        for name, value in changes(out, base).items():
            mean[name] = mean[name] + value / 50
    for name, value in exact.items():
        assert np.abs(mean[name] - value).max() < np.abs(value).max(), name
        assert np.abs(mean[name] - value).mean() < 0.2 * np.abs(value).mean(), name


def test_what_does_not_go_together_is_refused(base: Path, tmp_path: Path) -> None:
    first, second, _ = runs(tmp_path, base)
    wide = write_run(tmp_path / "wide", base, LoraConfig(r=5, target_modules=("q_proj",)))
    other_base = write_model(tmp_path / "other", tiny_config("llama"), seed=1)
    other = write_run(tmp_path / "other-run", other_base)
    out = tmp_path / "merged"

    def refused(error: type[Exception], message: str, *adapters: Path, weights: Any = (1, 1), **options: Any) -> None:
        with pytest.raises(error, match=message):
            merge_adapters(adapters, weights, out=out, **options)
        assert not out.exists()

    refused(ConfigError, "there is no adapter", weights=())
    refused(ConfigError, r"weights = \[1\]; one number for each of 2", first, second, weights=(1,))
    refused(
        ConfigError, "combination_type = 'mean'; choose from cat, dare_linear", first, second, combination_type="mean"
    )
    refused(ConfigError, "density = None; ties keeps a share", first, second, combination_type="ties")
    refused(ConfigError, "density = 1.5; ties", first, second, combination_type="ties", density=1.5)
    refused(ConfigError, "density = 0.5 is not for cat", first, second, combination_type="cat", density=0.5)
    refused(ConfigError, "svd_rank = 2 is not for cat", first, second, combination_type="cat", svd_rank=2)
    refused(ConfigError, "svd_rank = 0; at least 1", first, second, svd_rank=0)
    refused(ConfigError, "majority_sign_method = 'sum'; choose total", first, second, majority_sign_method="sum")
    refused(AdapterError, "linear needs adapters of one rank, and these have 3, 5", first, wide,
            combination_type="linear")  # fmt: skip
    refused(AdapterError, "other-run was trained on another base than .*run-0: base_sha256", first, other)
    refused(AdapterError, "is no adapter folder", first, tmp_path / "nothing")
    norms = write_run(tmp_path / "norms", base, LnTuningConfig())
    refused(AdapterError, r"norms is of the method ln_tuning; what is merged has LoRA's form", first, norms)
    said = json.loads((first / "summary.json").read_text())
    shape = write_model(tmp_path / "narrow", tiny_config("llama", intermediate_size=40))
    same_hash = write_run(
        tmp_path / "narrow-run", shape, CONFIGS[0], **dict.fromkeys(("base_sha256", "grid", "tokenizer_sha256"), "a")
    )
    (first / "summary.json").write_text(json.dumps(said | {"base_sha256": "a", "grid": "a", "tokenizer_sha256": "a"}))
    refused(AdapterError, r"down_proj of shape \[72, 40\]; \[72, 88\] was expected", first, same_hash)


def test_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(folder) for folder in runs(tmp_path, base)[:2]]
    out = tmp_path / "merged"
    words = ["adapter", "merge", *folders, "--weights", "0.7,-0.3", "--combination-type", "ties", "--density", "0.5"]
    with pytest.raises(SystemExit) as ended:
        verbs.main([*words, "--out", str(out), "--json"])
    assert ended.value.code == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["weights"] == [0.7, -0.3] and answer["r"] == 3 and answer["linears"] == 6
    assert answer["base"] == str(base)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    with pytest.raises(SystemExit) as ended:
        verbs.main([*words[:4], "--weights", "0.7;0.3", "--out", str(out)])
    assert ended.value.code == 2 and "is not a list of numbers" in capsys.readouterr().err
