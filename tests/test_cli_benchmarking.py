"""`edgetune bench` and `edgetune report` on the command line: exit codes, files, the last line of stdout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_bundle import random_adapter, random_reference, write_bundle

from edgetune.cli import verbs

QUICK = ("--device", "host", "--prompt-tokens", "4,9", "--new-tokens", "3", "--runs", "1")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", random_reference(), random_adapter())


def call(*words: str | Path) -> int:
    """The command in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        verbs.main([str(word) for word in words])
    return int(ended.value.code or 0)


def test_bench_leaves_its_json_where_report_finds_it(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bundle.parent
    files = sorted(path.name for path in bundle.iterdir())
    words = ("--markdown", folder / "bench.md", "--plots", folder / "plots", "--json")
    assert call("bench", bundle, *QUICK, "--fail-if", "p50_ms<0", *words) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [length["prompt_tokens"] for length in said["lengths"]] == [4, 9]
    assert said == json.loads((folder / "bundle-bench.json").read_text(encoding="utf-8"))
    assert sorted(path.name for path in bundle.iterdir()) == files, "the bundle itself is left as it was exported"
    assert (folder / "bench.md").read_text(encoding="utf-8").startswith(f"# {bundle} (fp32, ")
    assert (folder / "plots" / "latency.svg").is_file()

    assert call("report", bundle, "--json") == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["report"] == str(folder / "bundle-report.html")
    assert said["report_bytes"] == (folder / "bundle-report.html").stat().st_size
    assert call("report", bundle, "--out", folder / "r.html") == 0
    assert capsys.readouterr().out == f"{folder / 'r.html'}\n"


def test_a_failed_gate_is_exit_code_1_with_the_figures_and_a_sentence(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = bundle.parent / "elsewhere" / "bench.json"
    gates = ("--fail-if", "load_ms > 0", "--fail-if", "p99_ms<0", "--out", out)
    assert call("bench", bundle, *QUICK, *gates, "--json") == 1
    captured = capsys.readouterr()
    said = json.loads(captured.out.splitlines()[-1])
    assert said["error"] == "GateError"
    assert said["message"].startswith(f"1 of 2 gates of {bundle} failed:\n  load_ms is ")
    assert [gate["failed"] for gate in said["gates"]] == [True, False]
    assert said["generation_tokens_per_second"] > 0, "what was measured is there too"
    assert captured.err.rstrip().endswith("`load_ms>0` was to fail")
    assert "Traceback" not in captured.err
    assert out.is_file()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--prompt-tokens", "16,x"), 2, "'16,x' is not a list of lengths"),
        (("--prompt-tokens", ""), 2, "is not a list of lengths"),
        (("--fail-if", "speed<20"), 1, "there is no figure 'speed'"),
        (("--fail-if", "soak.sustained_ratio<1"), 1, "needs a figure of --soak"),
        (("--compare", "nowhere"), 1, "nowhere does not exist. Check the path"),
        (("--soak", "-1"), 1, "soak is -1"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(
    bundle: Path, words: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("bench", bundle, "--device", "host", "--new-tokens", "3", *words) == code
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (bundle.parent / "bundle-bench.json").exists()


def test_report_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("report", tmp_path) == 1
    assert capsys.readouterr().err.startswith(f"ConfigError: {tmp_path} holds neither plan.json nor edgetune.json")
