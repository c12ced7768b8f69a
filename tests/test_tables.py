"""Every file that declares a NAME is in its folder's table under that name: nothing is written and then forgotten."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgetune import adapters, graphs, grids, models, objectives, optimizers, training
from edgetune.benchmark.prediction import BYTES_PER_WEIGHT
from edgetune.device import NBITS, WEIGHTS
from edgetune.planner.plans import STEP_RULES
from edgetune.training import rules

TABLES: list[tuple[ModuleType, dict[str, Any]]] = [
    (models, models.FAMILIES | models.ENCODERS),
    (grids, grids.GRIDS),
    (adapters, adapters.METHODS),
    (objectives, objectives.OBJECTIVES | objectives.ENCODER_OBJECTIVES),
    (optimizers, {info.rule.NAME: info.rule for info in optimizers.OPTIMIZERS.values()}),
    (training, rules.STEP_RULES),
    (graphs, graphs.FORMATS),
]


def declared_name(path: Path) -> str | None:
    """The module's NAME, read without importing it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["NAME"]:
            assert isinstance(node.value, ast.Constant), f"{path}: NAME must be a plain string"
            return str(node.value.value)
    return None


@pytest.mark.parametrize(("package", "table"), TABLES, ids=lambda value: getattr(value, "__name__", ""))
def test_every_file_is_in_its_table(package: ModuleType, table: dict[str, Any]) -> None:
    folder = Path(package.__file__ or "").parent
    declared = {path.stem: name for path in sorted(folder.glob("*.py")) if (name := declared_name(path))}
    assert declared, f"{folder} has no file with a NAME: does the test still look in the right place?"
    listed = {module.__name__.rpartition(".")[2]: key for key, module in table.items()}
    assert declared.items() <= listed.items(), f"add to the table of {folder}, under its NAME"


@pytest.mark.parametrize(("package", "table"), TABLES, ids=lambda value: getattr(value, "__name__", ""))
def test_every_key_is_the_name_of_its_module(package: ModuleType, table: dict[str, Any]) -> None:
    assert {key: module.NAME for key, module in table.items()} == {key: key for key in table}


def test_a_profile_may_name_every_format_of_weights() -> None:
    assert set(WEIGHTS) == graphs.FORMATS.keys()
    assert set(BYTES_PER_WEIGHT) == set(WEIGHTS) > set(NBITS)


def test_every_step_rule_can_be_planned() -> None:
    assert set(STEP_RULES) == rules.STEP_RULES.keys()
