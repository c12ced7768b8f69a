"""The demo runs every verb on the packaged sample and reports what they measured; the README has its full figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.bundle import load_bundle
from edgetune.demo import demo, summary
from edgetune.errors import ConfigError, EdgetuneError
from edgetune.memory import MIB

STAGES = ("plan", "quantize", "train", "export", "bench", "judge_personal", "judge_own_intents", "all")


@pytest.mark.slow
def test_a_short_demo_goes_the_whole_way_and_keeps_its_figures_together(tmp_path: Path) -> None:
    lines: list[str] = []
    result = demo(out=tmp_path / "demo", max_steps=4, max_rows=6, say=lines.append)

    assert json.loads(json.dumps(result)) == result
    assert result["steps"] == 4
    assert result["stopped"] == "done"
    assert result["floor_bytes"] < result["predicted_peak_bytes"] <= result["budget_bytes"] == 307 * MIB
    assert result["measured_peak_bytes"] <= result["budget_bytes"]
    assert result["bundle_bytes"] == load_bundle(tmp_path / "demo" / "bundle").nbytes
    assert result["parity"]["top1_agreement"] >= 0.999
    assert result["generation_tokens_per_second"] > 0
    assert tuple(result["seconds"]) == STAGES
    for name in ("personal", "own_intents"):
        assert result[name]["total"] == 6
        assert 6 - result[name]["tuned"] == len(result[name]["misses"])
    # Four steps teach nothing, but the base knows its own requests and none of the personal ones.
    assert result["own_intents"]["base"] >= 4
    assert result["personal"]["base"] <= 1
    commands = [line for line in lines if line.startswith("\n$ edgetune ")]
    assert [command.split()[2] for command in commands] == ["plan", "quantize", "train", "export", "bench"]


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not empty"):
        demo(out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_verb_that_fails_ends_the_demo_with_its_own_message(tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match=r"`edgetune plan`: .*galaxy-wotch-7"):
        demo("galaxy-wotch-7", out=tmp_path / "demo", say=lambda line: None)


def test_without_a_folder_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(EdgetuneError):
        demo("no-such-device", say=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_the_summary_sets_base_beside_tuned_and_the_peak_beside_the_budget() -> None:
    judged: dict[str, Any] = {"total": 200, "misses": []}
    result = {
        "device": "galaxy-watch-7", "simulated": True, "measured_peak_bytes": 250 * MIB,
        "predicted_peak_bytes": 246 * MIB, "budget_bytes": 307 * MIB, "bundle_bytes": 3 * MIB,
        "adapter_bytes": MIB // 2,
        "generation_tokens_per_second": 1234.5, "seconds": {"plan": 5.0, "all": 99.9},
        "personal": judged | {"base": 1, "tuned": 181}, "own_intents": judged | {"base": 196, "tuned": 195},
    }  # fmt: skip
    text = " ".join(summary(result).split())
    assert "1/200 (0.5%) 181/200 (90.5%)" in text
    assert "196/200 (98.0%) 195/200 (97.5%)" in text
    assert "measured 250 MiB, predicted 246 MiB, budget 307 MiB of galaxy-watch-7, simulated on this machine" in text
    assert "1,234 tokens/s" in text
