"""docs/objectives.md says what the code does."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "objectives.md"


def script():
    spec = importlib.util.spec_from_file_location("objectives_table", ROOT / "scripts" / "objectives_table.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_current():
    page = PAGE.read_text(encoding="utf-8")
    assert script().written(page) == page, "run: python scripts/objectives_table.py"


def test_every_objective_is_in_the_table_with_its_cost():
    lines = {line[0].strip("`"): line for line in script().methods()}
    assert lines.keys() >= {file.stem for file in (ROOT / "conf" / "objective").glob("*.yaml")}
    costs = {name: lines[name][4] for name in ("sft", "dpo", "kto", "ift", "simpo", "f_sft", "uft")}
    assert costs == {
        "sft": "3",
        "dpo": "8 / 6 for 2 sequences",
        "kto": "6 / 4",
        "ift": "4",
        "simpo": "6 for 2 sequences",
        "f_sft": "4 / 3",
        "uft": "4 / 3",
    }


def test_the_example_of_a_new_loss_has_the_number_it_claims():
    assert f"{math.log1p(math.exp(0.5 - 0.1 * 0.8)):.6f}" in PAGE.read_text(encoding="utf-8")
