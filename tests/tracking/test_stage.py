"""What a run of several stages adds: the stage in every line, and the ends of stages in the evaluation's table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uft.runs import Run
from uft.tracking.console import Console, evaluation_table
from uft.tracking.metrics import read_metrics


def test_a_stage_is_never_taken_for_a_number(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "nan", "loss": "nan"}\n')
    (line,) = read_metrics(Run(tmp_path))
    assert line["stage"] == "nan"
    assert line["loss"] != line["loss"]


def columns(**options: Any) -> list[str]:
    history = {step: {"eval/nll": 1.0 + step} for step in (0, 2, 4, 6)}
    return [str(column.header) for column in evaluation_table(6, history, **options).columns]


def test_the_ends_of_stages_stay_in_the_table() -> None:
    assert columns() == ["metric", "before (0)", "last (4)", "now (6)"]
    assert columns(marks={"after sft": 2}) == ["metric", "before (0)", "after sft (2)", "last (4)", "now (6)"]
    assert columns(marks={"after sft": 4}) == ["metric", "before (0)", "after sft (4)", "now (6)"]
    assert columns(marks={"after dpo": 6}) == columns()  # it is now


def test_a_stage_starts_its_line_afresh(capsys: Any) -> None:
    import sys

    console = Console(sys.stdout, interactive=False, total_steps=4)
    console.step(1, {"loss": 2.0, "objective/sft": 2.0})
    console.start("stage 2 of 2: dpo", [])
    console.step(2, {"loss": 0.7, "objective/dpo": 0.7})
    assert "sft" not in capsys.readouterr().out.splitlines()[-1]
