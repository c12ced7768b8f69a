"""What `doctor` reports, on this machine and on machines where things are missing or crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune import __version__, cgroup, doctor, host, memory


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return doctor.examine()


def test_the_report_is_plain_json_and_says_what_is_here(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report)) == report
    assert report["edgetune"] == __version__
    assert report["machine"]["usable_cores"] == host.threads()
    assert 0 < report["machine"]["memory_available_bytes"] <= report["machine"]["memory_total_bytes"]
    assert set(report["limits"]["cgroup"]) == {"version", "folder", "writable", "limit_bytes"}
    assert report["limits"]["rlimit_data_bytes"].keys() == {"soft", "hard"}
    assert report["enforcement"].keys() == {"governor", "rlimit", "cgroup"}
    assert report["enforcement"]["governor"] is None


def test_every_dependency_is_listed_with_its_version(report: dict[str, Any]) -> None:
    import numpy
    import torch

    assert report["libraries"]["numpy"] == {"version": numpy.__version__, "extra": None, "install": None}
    assert report["libraries"]["torch"] == {"version": torch.__version__, "extra": "train", "install": None}


def test_the_tests_of_training_pass_where_the_package_s_own_tests_do(report: dict[str, Any]) -> None:
    assert {name: test["passed"] for name, test in report["self_tests"].items()} == {
        "torch": True,
        "bitsandbytes": True,
    }
    assert report["can_run"]
    assert report["can_train"]


def test_kernels_are_those_that_onnxruntime_lists(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert report["kernels"] == dict.fromkeys(doctor.KERNELS, True)
    monkeypatch.setattr(doctor, "KERNELS", {"MatMulNBits": "", "NoSuchOperator": ""})
    assert doctor._kernels() == {"MatMulNBits": True, "NoSuchOperator": False}


def test_the_text_names_everything(report: dict[str, Any]) -> None:
    text = doctor.explain(report)
    for name in (*report["libraries"], *report["kernels"], *report["self_tests"]):
        assert name in text
    assert text.endswith("this machine can: run yes, train yes")


def test_the_text_of_a_device_without_extras(report: dict[str, Any]) -> None:
    missing = {"version": None, "extra": "train", "install": "pip install 'edgetune[train]'"}
    bare = report | {
        "libraries": report["libraries"] | {"torch": missing},
        "kernels": None,
        "self_tests": {"torch": {"passed": False, "detail": "not installed"}},
        "limits": report["limits"] | {"cgroup": {"version": 0, "folder": "", "writable": False, "limit_bytes": None}},
        "can_train": False,
    }
    text = doctor.explain(bare)
    for part in (
        "missing: pip install 'edgetune[train]'",
        "unknown: this onnxruntime does not list them",
        "cgroup        none",
    ):
        assert part in text
    assert text.endswith("run yes, train no")


def test_a_library_that_is_not_installed_comes_with_its_install_line() -> None:
    assert doctor._library("no-such-library", "hub") == {
        "version": None, "extra": "hub", "install": "pip install 'edgetune[hub]'"
    }  # fmt: skip
    assert doctor._library("no-such-library", None)["install"] == "pip install edgetune"
    assert doctor._self_test("no-such-library", "") == {"passed": False, "detail": "not installed"}


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("import os; os.kill(os.getpid(), 4)", "killed by SIGILL: built for a newer processor than this one"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("raise ImportError('libgomp.so.1 is missing')", "ImportError: libgomp.so.1 is missing"),
        ("import sys; sys.exit(3)", "ended with code 3"),
    ],
)  # fmt: skip
def test_a_self_test_that_crashes_is_a_finding(code: str, detail: str) -> None:
    assert doctor._self_test("numpy", code) == {"passed": False, "detail": detail}


def test_a_self_test_that_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SELF_TEST_SECONDS", 0.5)
    assert doctor._self_test("numpy", "import time; time.sleep(60)")["detail"] == "no answer within 0.5 s"


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ("nearest = np", "LEVELS = LEVELS[::-1].copy(); nearest = np", "codes are not the nearest level"),
        ("absmax = np.abs(blocks).max(1)", "absmax = np.abs(blocks).max(1) * 2", "absmax is not the largest value"),
    ],
)
def test_wrong_codes_fail_the_self_test(before: str, after: str, found: str) -> None:
    code = doctor._BITSANDBYTES_TEST.replace(before, after)
    assert code != doctor._BITSANDBYTES_TEST
    result = doctor._self_test("bitsandbytes", code)
    assert not result["passed"]
    assert found in result["detail"]


def test_levels_that_cannot_be_had_come_with_the_reason(
    report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system such as macOS: no /proc, no cgroups."""
    monkeypatch.setattr(memory, "_PROC", False)
    monkeypatch.setattr(cgroup, "cgroup_state", lambda: cgroup._NO_CGROUP)
    found = doctor._enforcement()
    assert found["governor"] is None
    text = doctor.explain(report | {"enforcement": found})
    for part in (
        "governor    can\n",
        "rlimit      CANNOT  this system has no RLIMIT_DATA that counts private memory\n",
        "cgroup      CANNOT  enforce = 'cgroup': this system has no cgroup that limits memory. Use --enforce rlimit or",
    ):
        assert part in text


def test_the_cgroup_s_limit_is_shown(report: dict[str, Any], tmp_path: Path) -> None:
    held = {"version": 2, "folder": str(tmp_path), "writable": False, "limit_bytes": 300 << 20}
    text = doctor.explain(report | {"limits": report["limits"] | {"cgroup": held}})
    assert "version 2, may not be set here, limit 300 MiB" in text
