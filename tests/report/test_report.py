"""The page, from a real short run of the packaged sample, its bundle and a benchmark of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import random_adapter, random_reference, write_bundle
from tiny_encoder import encoder_hf, write_encoder

import edgetune as et
from edgetune import charts, sample
from edgetune.benchmark import bench
from edgetune.benchmark.results import load_results, results_path, save_results
from edgetune.charts import Chart, Line, Rule
from edgetune.memory import MIB, format_mib
from edgetune.report import render, report_path, write_report
from edgetune.report.artifacts import read_artifacts
from edgetune.report.training import MOST_POINTS

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Refuses a page whose tags do not close in order; collects text and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]} at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of four steps, and its bundle with a benchmark beside it."""
    folder = tmp_path_factory.mktemp("report")
    config = et.TrainConfig(max_steps=4, batch_size=2)
    plan = et.plan(sample.BASE, "galaxy-watch-7", data=sample.PERSONAL_TRAIN, config=config, budget=200)
    base = et.quantize(sample.BASE, grid=plan.grid, out=folder / "base")
    run = et.train(plan, base, data=sample.PERSONAL_TRAIN, out=folder / "run", enforce="none")
    bundle = et.export(run, out=folder / "bundle")
    result = bench(bundle, "pixel-9", prompt_tokens=[4, 9], new_tokens=3, runs=1, soak=0.5, compare=bundle)
    save_results(result, results_path(bundle.folder))
    return folder / "run", bundle.folder


@pytest.fixture
def run(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made[0], tmp_path / "run")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", random_reference(), random_adapter())


def page(*folders: Path) -> Page:
    return Page(render(read_artifacts(folders)))


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(read(path) | values), encoding="utf-8")


# ---- what is on it


def test_the_page_has_the_figures_of_the_files(made: tuple[Path, Path]) -> None:
    run, bundle = made
    text, summary, result = page(*made).text, read(run / "summary.json"), load_results(results_path(bundle))
    for size in ("budget_bytes", "predicted_peak_bytes", "measured_peak_bytes", "adapter_bytes"):
        assert format_mib(summary[size]) in text, size
    for name, size in summary["parts"].items():
        assert f"{name} {format_mib(size)} {size / summary['predicted_peak_bytes']:.1%}" in text, name
    assert f"training loss, last steps {summary['train_loss']:.4f}" in text
    assert f"held-out loss, best {summary['eval_loss']:.4f}" in text
    assert f"adapter taken from step {summary['best_step']}" in text
    assert "nothing held it: it was measured alone" in text, "the level of enforcement"
    assert f"{read(bundle / 'edgetune.json')['parity']['top1_agreement']:.2%}" in text
    assert f"{result['generation_tokens_per_second']:,.1f} tokens/s" in text
    assert result["machine"]["cpu"] in text and result["machine"]["onnxruntime"] in text
    assert summary["versions"]["torch"] in text and summary["base_sha256"] in text
    for concession in summary["concessions"]:
        concession = {name: value.replace(",", ", ") for name, value in concession.items()}
        assert f"{concession['setting']} {concession['wanted']} {concession['given']}" in text
    if not summary["concessions"]:
        assert "Nothing: the plan trains with every setting as it was wished." in text


def test_measured_and_predicted_are_marked(made: tuple[Path, Path]) -> None:
    text = render(read_artifacts(made))
    labels = re.findall(r'<div class="label">(.*?)</div>.*?class="detail">(.*?)</div>', text)
    bases = [(label, *re.findall(r'class="basis (\w+)"', detail)) for label, detail in labels]
    assert ("Peak memory", "predicted") in bases and ("Peak memory", "measured") in bases


def test_charts_are_drawn_and_named(made: tuple[Path, Path]) -> None:
    found = page(*made)
    titles = {value for name, value in found.attributes if name == "aria-label"}
    assert titles == {
        "Anonymous + swap memory over the run", "Parts of the predicted peak", "Loss, nats per token",
        "Tokens per second", "Time of a generated token", "Memory while it is measured", "Memory during the soak",
        next(title for title in titles if title and "without a pause" in title),
    }  # fmt: skip


def test_the_page_asks_the_network_for_nothing(made: tuple[Path, Path]) -> None:
    text, found = render(read_artifacts(made)), page(*made)
    assert not re.search(r"https?:|url\(|@import|//\w+\.", text)
    assert found.tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"})
    assert {name for name, _ in found.attributes}.isdisjoint({"src", "href", "xlink:href", "srcset", "onload"})
    assert "default-src 'none'" in text
    assert "prefers-color-scheme:dark" in text and "max-width:720px" in text


def test_text_of_the_user_is_escaped(made: tuple[Path, Path], tmp_path: Path) -> None:
    evil = '<img src=x onerror="alert(1)">&amp;\'{{ 7 * 7 }}'
    run = shutil.copytree(made[0], tmp_path / evil)
    edit(run / "plan.json", model=evil, concessions=[dict.fromkeys(("setting", "wanted", "given", "reason"), evil)])
    edit(run / "summary.json", versions={evil: evil}, stopped=evil, enforcement=evil)
    found = page(run)
    assert "img" not in found.tags and "onerror" not in {name for name, _ in found.attributes}
    assert found.text.count(evil) >= 8, "and it is shown as it is"


def test_long_runs_are_thinned_to_means(run: Path) -> None:
    line = {"grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 100, "now_bytes": 170 << 20}
    lines = [line | {"step": i, "loss": float(i % 2), "seconds": 0.5} for i in range(1, 7 * MOST_POINTS + 1)]
    head = {"format_version": 1}
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (head, *lines)), encoding="utf-8")
    found = page(run)
    assert "Training losses are means of 7 steps." in found.text
    points = [len((value or "").split()) for name, value in found.attributes if name == "points"]
    assert max(points) == MOST_POINTS


def test_lines_have_the_numbers_of_the_steps(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str | None, tuple[Sequence[Line], Sequence[Rule]]] = {}

    def line_chart(title: str, lines: Sequence[Line], *, rules: Sequence[Rule] = (), **named: Any) -> Chart | None:
        drawn[title] = lines, rules
        return charts.line_chart(title, lines, rules=rules, **named)

    monkeypatch.setattr("edgetune.report.training.line_chart", line_chart)
    line = {"tokens": 100, "seconds": 0.5, "now_bytes": 170 * MIB}
    lines = [line | {"step": i, "loss": float(i * i)} for i in range(1, MOST_POINTS + 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    edit(run / "summary.json", measured_peak_bytes=190 * MIB)
    page(run)
    (loss,), _ = drawn["Loss, nats per token"]
    assert (loss.xs[0], loss.ys[0], loss.xs[-1], loss.ys[-1]) == (1.5, 2.5, MOST_POINTS + 1, (MOST_POINTS + 1) ** 2)
    (speed,), _ = drawn["Tokens per second"]
    assert set(speed.ys) == {200}
    memory, rules = drawn["Anonymous + swap memory over the run"]
    plan = read(run / "plan.json")
    assert [one.ys[-1] for one in memory] == [170, 190, plan["predicted_peak_bytes"] / MIB]
    assert rules == [Rule("budget", plan["budget_bytes"] / MIB)]


@pytest.mark.parametrize("times", [3, 15])
def test_a_budget_far_above_the_peak_is_told_and_not_drawn(run: Path, times: int) -> None:
    peak = read(run / "plan.json")["predicted_peak_bytes"]
    edit(run / "plan.json", budget_bytes=times * peak)
    edit(run / "summary.json", measured_peak_bytes=peak)
    lines = [{"step": i, "loss": 1.0, "tokens": 9, "seconds": 0.5, "now_bytes": peak * 0.9} for i in range(1, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    text, far = render(read_artifacts((run,))), times > 3
    start = text.index('aria-label="Anonymous + swap memory over the run"')
    heights = re.findall(r'points="[\d.]+,([\d.]+)', text[start : text.index("</svg>", start)])
    apart = float(heights[0]) - float(heights[1])  # what is in use, and the peak that is a tenth above it
    assert (apart > 0.3 * charts.HEIGHT) is far, "the range that was measured fills the drawing"
    assert text.count("(dashed)") == (0 if far else 1)
    assert text.count('class="rule"') == (0 if far else 2)
    assert text.count(f"The budget is not drawn: {format_mib(15 * peak)}, 15 times the peak.") == (2 if far else 0)


def test_the_peak_is_judged_by_the_budget_and_the_prediction_by_the_peak(run: Path) -> None:
    plan = read(run / "plan.json")
    peak = plan["predicted_peak_bytes"] * 4 // 5
    for measured, tone, said in (
        (peak, "good", r"inside the budget .* \+25\.0 % off"),
        (plan["budget_bytes"] + 1, "bad", "BEYOND"),
    ):
        edit(run / "summary.json", measured_peak_bytes=measured)
        assert re.search(rf'<p class="{tone}">The measured peak of .* is {said}', render(read_artifacts([run])))
    assert "measured on this machine" in page(run).text.replace(", on", " on")
    edit(run / "summary.json", emulated=True, best_step=0)
    assert "measured, emulating galaxy-watch-7" in page(run).text
    assert "adapter taken from step 0" in page(run).text


@pytest.mark.parametrize(("ratio", "tone"), [(0.5, "good"), (2.0, "bad")])
def test_parity_and_rounding_are_those_of_the_manifest(bundle: Path, ratio: float, tone: str) -> None:
    parity = {"top1_agreement": 1.0, "kl": 0.01, "fast": {"top1_agreement": 0.5, "kl": 0.25}}
    rounding = {"max_error_over_delta": ratio, "worst_layer": "up_proj"}
    edit(bundle / "edgetune.json", parity=parity, rounding=rounding)
    text = page(bundle).text
    assert "likeliest token is the same 100.00% 50.00% –" in text and "KL divergence 0.01 0.25 –" in text
    assert f'<p class="{tone}">Rounding moved up_proj {ratio:.2f} times' in render(read_artifacts([bundle]))
    sizes = [file["bytes"] for file in read(bundle / "edgetune.json")["files"].values()]
    assert f"Bundle {format_mib(sum(sizes))}" in text


# ---- what is missing is said, with the command that makes it


def test_a_run_alone_says_how_to_get_the_rest(run: Path) -> None:
    text = page(run).text
    assert "No bundle was named" in text
    assert f"edgetune export {run} --out bundle/ && edgetune bench bundle/ --device galaxy-watch-7" in text


def test_a_bundle_alone_says_how_to_get_the_rest(bundle: Path) -> None:
    text = page(bundle).text
    assert f"edgetune report RUN {bundle}" in text
    assert f"The bundle has not been benched. edgetune bench {bundle} --device host" in text
    assert "The manifest has no parity." in text


def test_an_encoder_is_reported_by_its_cosine_and_not_asked_to_be_benched(tmp_path: Path) -> None:
    bundle = et.export(write_encoder(tmp_path / "model", encoder_hf()), out=tmp_path / "bundle")
    text = page(bundle.folder).text
    assert f"least cosine of an embedding {bundle.manifest['parity']['min_cosine']:.6f}" in text
    assert "likeliest token" not in text and "edgetune bench" not in text


def test_a_benchmark_without_a_soak_and_one_of_an_older_bundle_say_so(bundle: Path) -> None:
    save_results(bench(bundle, "host", prompt_tokens=4, new_tokens=2, runs=1), results_path(bundle))
    text = page(bundle).text
    assert f"edgetune bench {bundle} --device host --soak 600" in text
    assert "has changed since" not in text
    edit(bundle / "edgetune.json", edgetune_version="1")
    assert "The bundle has changed since." in page(bundle).text


def test_a_run_that_has_not_ended_has_no_certificate(run: Path) -> None:
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')
    text = page(run).text
    assert "it has no certificate yet" in text and f"edgetune train --resume {run}" in text
    assert "measured peak of" not in text
    (run / "metrics.jsonl").unlink()
    assert "No step has been made yet." in page(run).text


def test_what_the_governor_gave_up_is_listed(run: Path) -> None:
    event = {"step": 3, "recompute_layers": 5, "recompute_layers_before": 2, "now_bytes": 190 << 20}
    edit(run / "summary.json", shrunk=[event], measured_peak_bytes=400 << 20)
    text = page(run).text
    assert "Given up near the budget" in text and "3 2 5 190 MiB" in text
    assert "The measured peak of 400 MiB is BEYOND the budget of 200 MiB" in text


# ---- where it is written


def test_a_report_replaces_a_report_and_nothing_else(run: Path, tmp_path: Path) -> None:
    path = write_report(run)
    assert path == report_path(run) == tmp_path / "run-report.html"
    assert write_report(run) == path
    assert write_report(run, out=tmp_path / "new" / "r.html").is_file()
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(et.ConfigError, match="is no report of edgetune, so it is not replaced"):
        write_report(run)
    link = tmp_path / "link.html"
    link.symlink_to(tmp_path / "elsewhere.html")
    with pytest.raises(et.ConfigError, match="is not replaced"):
        write_report(run, out=link)


# ---- errors


def test_folders_that_make_no_report(run: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(et.ConfigError, match="there is nothing to report on"):
        write_report()
    with pytest.raises(et.ConfigError, match=r"holds neither plan\.json nor edgetune\.json"):
        write_report(tmp_path)
    with pytest.raises(et.ConfigError, match=r"gone does not exist\. Check the path"):
        write_report(tmp_path / "gone")
    with pytest.raises(et.ConfigError, match="are of one kind"):
        write_report(run, run)
    with pytest.raises(et.ConfigError, match="are of one kind"):
        write_report(bundle, bundle)
    with pytest.raises(et.ConfigError, match="do not belong together"):
        write_report(run, bundle)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("plan.json", "{}", r"plan\.json: this is not a plan"),
        ("plan.json", "[1]", "holds a list, expected an object"),
        ("plan.json", '{"format_version": 99}', "format_version 99 is newer"),
        ("summary.json", "{", "is not valid JSON"),
        ("summary.json", '{"format_version": 99}', "format_version 99 is newer"),
    ],
)
def test_a_damaged_run_is_named(run: Path, name: str, text: str, message: str) -> None:
    (run / name).write_text(text, encoding="utf-8")
    with pytest.raises(et.CheckpointError, match=message):
        write_report(run)


def test_numbers_that_are_none_are_left_out(run: Path) -> None:
    odd: dict[str, Any] = dict.fromkeys(("measured_peak_bytes", "eval_loss", "tokens_per_second", "steps"), "many")
    edit(run / "summary.json", **odd, shrunk="x", versions=3, best_step=None)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "loss": NaN, "tokens": "x", "seconds": 0, "now_bytes": true}\n[1]\n"x"\n')
    assert "many" not in page(run).text


def test_a_damaged_bundle_or_benchmark_is_named(bundle: Path) -> None:
    result = bench(bundle, "host", prompt_tokens=4, new_tokens=2, runs=1)
    save_results({key: value for key, value in result.items() if key != "lengths"}, results_path(bundle))
    with pytest.raises(et.BundleError, match=r"bundle-bench\.json is damaged \(KeyError: 'lengths'\)"):
        write_report(bundle)
    results_path(bundle).unlink()
    edit(bundle / "edgetune.json", files={"x": {"bytes": 1}}, model={})
    with pytest.raises(et.BundleError, match=r"edgetune\.json or .* is damaged"):
        write_report(bundle)
