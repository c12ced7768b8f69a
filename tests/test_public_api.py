"""What `import edgetune` promises: these names, loaded when used, and a core that needs no torch."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import tiny_config, write_model

import edgetune
from edgetune import errors, extras

REPOSITORY = Path(__file__).parents[1]
ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and kind.__module__ == errors.__name__}


def python(*words: str, blocked: Path | None = None, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with `words` as its arguments; `blocked` is a folder from `without_extras`."""
    path = os.pathsep.join(str(p) for p in (blocked, REPOSITORY) if p is not None)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, cwd=cwd, timeout=300
    )


@pytest.fixture(scope="module")
def without_extras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that, on the path, makes every extra look as if it were not installed."""
    folder = tmp_path_factory.mktemp("blocked")
    names = [*extras.EXTRAS, "transformers", "peft", "ml_dtypes"]
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({names!r}))\n")
    return folder


def test_all_is_sorted_and_complete() -> None:
    assert edgetune.__all__ == sorted(edgetune.__all__), "sort __all__"
    eager = {name for name in edgetune.__all__ if name not in edgetune._HOME}
    assert eager == ERRORS, "every error is public, and nothing else is imported eagerly"
    assert set(edgetune._HOME) <= set(edgetune.__all__), "every lazy name is public"
    assert set(edgetune.__all__) <= set(dir(edgetune))


@pytest.mark.parametrize("name", edgetune.__all__)
def test_every_name_is_what_its_module_has(name: str) -> None:
    value = getattr(edgetune, name)
    assert callable(value)
    assert value.__name__ == name
    assert getattr(edgetune, name) is value, "the second access must give the same object as the first"


def test_onnxruntime_is_told_to_send_no_usage_events_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import ctypes, edgetune.runtime.session; print(ctypes.CDLL(None).getenv(b'ORT_DISABLE_TELEMETRY') != 0)"
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    result = python("-c", code)
    assert result.stdout == "True\n", result.stderr
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    assert python("-c", "import os, edgetune; print(os.environ['ORT_DISABLE_TELEMETRY'])").stdout == "0\n"


def test_no_module_shares_a_public_name() -> None:
    clashes = [name for name in edgetune.__all__ if importlib.util.find_spec(f"edgetune.{name}")]
    assert not clashes, f"rename the modules {clashes}: after they are imported, `edgetune.{clashes[:1]}` is the module"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'finetune'"):
        edgetune.finetune  # noqa: B018 - the access is the test


def imported(code: str, names: Iterable[str]) -> list[str]:
    """Which of `names` a fresh interpreter has imported after `code`."""
    result = python("-c", f"{code}\nimport sys\nprint(*sorted({set(names)!r} & set(sys.modules)))")
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_importing_imports_nothing_heavy() -> None:
    assert imported("import edgetune", ["numpy", "onnxruntime", *extras.EXTRAS]) == []
    assert imported("import edgetune; edgetune.load_device", ["numpy", *extras.EXTRAS]) == []


@pytest.mark.parametrize(
    "module",
    [
        "cli.chat",
        "cli.launch",
        "cli.personalizing",
        "cli.verbs",
        "runtime.evaluate",
        "benchmark",
        "personalizer",
        "planner",
        "doctor",
        "calibration",
        "report",
        "speed",
    ],
)
def test_the_core_imports_no_extra(module: str) -> None:
    assert imported(f"import edgetune.{module}", [*extras.EXTRAS, "transformers", "peft"]) == []


def test_the_core_works_where_no_extra_is_installed(without_extras: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tiny_config("llama"))
    for words in (["--help"], ["devices"], ["plan", str(model), "--device", "galaxy-watch-7"]):
        result = python("-m", "edgetune", *words, blocked=without_extras)
        assert result.returncode == 0, f"{words}: {result.stderr}"


@pytest.mark.parametrize("verb", ["train", "quantize", "export"])
def test_a_missing_extra_is_named_with_its_install_line(verb: str, without_extras: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tiny_config("llama"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one two three"}\n' * 20)
    words = {
        "train": ["--device", "host", "--grid", "int4", "--data", str(rows), "--out", str(tmp_path / "run")],
        "quantize": ["--grid", "nf4", "--out", str(tmp_path / "base")],
        "export": ["--out", str(tmp_path / "bundle")],
    }[verb]
    result = python("-m", "edgetune", verb, str(model), *words, "--json", blocked=without_extras)
    assert result.returncode == 1
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["error"] == "MissingExtraError"
    assert answer["message"].endswith("is not installed. It comes with an extra: pip install 'edgetune[train]'")
    assert "Traceback" not in result.stderr


def test_a_missing_extra_is_named_in_python_too(without_extras: Path) -> None:
    code = "import edgetune as et\ntry: et.train\nexcept et.MissingExtraError as e: print(e.module, e.extra)"
    assert python("-c", code, blocked=without_extras).stdout.split() == ["torch", "train"]


def test_a_module_that_is_simply_missing_is_not_called_an_extra() -> None:
    assert extras.missing_extra(ModuleNotFoundError("No module named 'numpi'", name="numpi")) is None


def test_extras_are_those_of_the_package() -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for module, extra in extras.EXTRAS.items():
        assert any(line.startswith(module) for line in project["optional-dependencies"][extra]), module


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), "."]
    result = python(*command)
    assert result.returncode == 0, result.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_has_devices_sample_and_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    devices = {f"edgetune/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / "devices").rglob("*.toml")}
    sample = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "edgetune" / "sample").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wanted = devices | sample | {"edgetune/py.typed", "edgetune/report/page.html.jinja"}
    assert len(devices) >= 12
    assert wanted <= names, f"missing: {sorted(wanted - names)}"
    assert not [name for name in names if name.startswith(("tests/", "devices/", "benchmarks/"))]
    assert wheel.stat().st_size <= 7 << 20, "the sample may add 6 MB, the code little"


def test_the_wheel_finds_its_devices(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import edgetune; print(edgetune.__file__, len(edgetune.list_devices()), edgetune.__version__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.stdout.split() == [
        str(tmp_path / "edgetune" / "__init__.py"),
        str(len(list((REPOSITORY / "devices").glob("*.toml")))),
        edgetune.__version__,
    ], result.stderr
    assert edgetune.__version__ in wheel.name
