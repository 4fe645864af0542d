"""Two processes are one run: the same losses, gradients, batteries and objective states, step by step, to rounding."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import CASES, SHARDED, write_files, write_untied
from conftest import environment

PAIRS = [*(("two", name) for name in CASES), *(("sharded", name) for name in SHARDED), ("offloaded", "sft")]
PROGRAM = Path(__file__).with_name("cases.py")
CLOCKS = {"seconds", "tokens_per_second"}
EXACT = {"step", "rows", "tokens", "supervised_tokens", "epoch"}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, two: Callable[..., None]) -> Callable[[str, str], Any]:
    """said("two", name): what a case said on two processes ("one": on one)."""
    folder = tmp_path_factory.mktemp("cases")
    write_files(folder)
    write_untied(folder)
    two(folder, PROGRAM, str(folder), *(f"{way}:{name}" for way, name in PAIRS))
    command = [sys.executable, str(PROGRAM), str(folder), *(f"one:{name}" for name in CASES)]
    subprocess.run(command, env=environment(folder), check=True, timeout=900, capture_output=True)
    return lambda where, name: json.loads((folder / f"{where}-{name}.json").read_text())


@pytest.mark.parametrize(("way", "name"), PAIRS)
def test_two_processes_say_what_one_says(said: Callable[[str, str], Any], way: str, name: str) -> None:
    """Each with the whole model, and with half of it."""
    one, two = said("one", name)["metrics"], said(way, name)["metrics"]
    assert len(one) == len(two) >= 3
    for line, other in zip(one, two, strict=True):
        assert line.keys() == other.keys()
        ties = {"objective/accuracy"} if line["step"] == 1 else set()  # policy = reference: who is ahead is rounding
        for key in line.keys() - CLOCKS - ties:
            if key in EXACT:
                assert line[key] == other[key], (line["step"], key)
            else:
                assert other[key] == pytest.approx(line[key], rel=1e-5, abs=2e-5), (line["step"], key)


def test_the_cases_are_what_they_are_called(said: Callable[[str, str], Any]) -> None:
    """A short last batch, a source that ends the run early, steps in which a process has no row."""
    rows = {name: [line["rows"] for line in said("two", name)["metrics"]] for name in CASES}
    assert rows["sft_short_last"][-1] % 7 != 0
    assert rows["sft_dry"][-1] < 18  # of 9 + 9 rows, in shares of 3 : 1
    assert rows["sft_one_row"][-1] == 3
    assert all(line["grad_norm"] > 0 for name in CASES for line in said("one", name)["metrics"] if "loss" in line)
