"""Two processes are one run: the same losses, gradients, batteries and objective states, step by step, to rounding."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import program
import pytest
from cases import CASES, SHARDED, write_files, write_untied
from outside import environment

EVERY = [*(("two", name) for name in CASES), *(("sharded", name) for name in SHARDED), ("offloaded", "sft")]
FAST = [
    *(("two", n) for n in ("sft_short_last", "sft_one_row", "sft_dry", "uft", "dft")),
    ("sharded", "dft"),
]
PAIRS = [pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow) for pair in EVERY]
PROGRAM = Path(__file__).with_name("cases.py")
CLOCKS = {"seconds", "tokens_per_second"}
EXACT = {"step", "rows", "tokens", "supervised_tokens", "epoch"}
Said = Callable[[str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, two: Callable[..., None]) -> Said:
    """said("two", name): the metric lines of a case on two processes ("one": on one).

    One start of the program for all fast cases, another for the others: importing costs more than a case.
    """
    folder = tmp_path_factory.mktemp("cases")
    write_files(folder)
    write_untied(folder)

    def run(pairs: list[tuple[str, str]]) -> None:
        two(folder, PROGRAM, str(folder), *(f"{way}:{name}" for way, name in pairs))
        names = dict.fromkeys(name for _, name in pairs if not (folder / f"one-{name}.json").exists())
        command = [sys.executable, str(PROGRAM), str(folder), *(f"one:{name}" for name in names)]
        program.run(command, env=environment(folder), check=True, timeout=1800, capture_output=True)

    def read(way: str, name: str) -> list[dict[str, Any]]:
        file = folder / f"{way}-{name}.json"
        if not file.exists():
            run([pair for pair in EVERY if (pair in FAST) == ((way, name) in FAST or way == "one")])
        return json.loads(file.read_text())["metrics"]

    return read


@pytest.mark.parametrize(("way", "name"), PAIRS)
def test_two_processes_say_what_one_says(said: Said, way: str, name: str) -> None:
    """Each with the whole model, and with half of it."""
    two, one = said(way, name), said("one", name)
    assert len(one) == len(two) >= 3
    for line, other in zip(one, two, strict=True):
        assert line.keys() == other.keys()
        ties = {"objective/accuracy"} if line["step"] == 1 else set()  # policy = reference: who is ahead is rounding
        for key in line.keys() - CLOCKS - ties:
            if key in EXACT:
                assert line[key] == other[key], (line["step"], key)
            else:
                assert other[key] == pytest.approx(line[key], rel=1e-5, abs=2e-5), (line["step"], key)


def test_the_cases_are_what_they_are_called(said: Said) -> None:
    """A short last batch, a source that ends the run early, steps in which a process has no row."""
    rows = {name: [line["rows"] for line in said("two", name)] for _, name in FAST}
    assert rows["sft_short_last"][-1] % 7 != 0
    assert rows["sft_dry"][-1] < 18  # of 9 + 9 rows, in shares of 3 : 1
    assert rows["sft_one_row"][-1] == 3
    assert all(line["grad_norm"] > 0 for name in rows for line in said("one", name) if "loss" in line)
