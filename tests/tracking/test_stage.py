"""What a run of several stages adds: the stage in every line, and the ends of stages in the evaluation's table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from uft.evaluation.evaluate import Sample
from uft.runs import Run
from uft.tracking.console import Console, evaluation_table
from uft.tracking.metrics import Files, read_metrics
from uft.tracking.wandb import Wandb, _table

SAMPLE = Sample("pairs", "pairs:0", "min : a b", "a", None, {"correct": 1.0})


def test_lines_and_samples_name_their_stage(tmp_path: Path) -> None:
    files = Files(Run(tmp_path))
    files.start()
    files.log(1, {"stage": "sft", "loss": 2.0})
    files.samples(1, [SAMPLE], "sft")
    files.samples(2, [SAMPLE])
    files.finish("finished", 0, {})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "stage": "sft", "loss": 2.0}\n'
    named, plain = ((tmp_path / "samples.jsonl").read_text()).splitlines()
    assert list(json.loads(named))[:3] == ["step", "stage", "source"]
    assert "stage" not in json.loads(plain)


def test_a_stage_is_never_taken_for_a_number(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "nan", "loss": "nan"}\n')
    (line,) = read_metrics(Run(tmp_path))
    assert line["stage"] == "nan"
    assert line["loss"] != line["loss"]


def test_a_table_of_samples_has_a_column_for_it() -> None:
    table = _table(3, [SAMPLE], "dpo")
    assert table.columns[:3] == ["step", "stage", "source"]
    assert table.data[0][:3] == [3, "dpo", "pairs"]
    assert "stage" not in _table(3, [SAMPLE], None).columns


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


def test_wandb_has_the_stage_as_a_field(new_run: Any, config: Any) -> None:
    """Two sessions of one run: one id, steps that run on, and the stage of every line."""
    from records import load

    run = new_run()
    for step, stage in ((1, "sft"), (2, "dpo")):
        tracker = Wandb(run, config("offline"), lambda line: None)
        tracker.start()
        tracker.log(step, {"stage": stage, "loss": float(step)})
        tracker.finish("stopped", 75, {"steps": step})
    found = [load(run.path / name) for name in run.info()["wandb"]["dirs"]]
    assert len({one["id"] for one in found}) == 1
    assert [(row["step"], row["stage"]) for one in found for row in one["history"]] == [(1, "sft"), (2, "dpo")]
