"""No death and no stop changes anything of a run of several stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dying import LORA, StopAt
from stage_runs import sit, survive, written

from uft.errors import FAILED, GOOD, STOPPED
from uft.evaluation.evaluate import Evaluation
from uft.runs import Run
from uft.training import session


@pytest.mark.parametrize(
    ("tuning", "stride"),
    [
        pytest.param(("reference.mode=cached",), 122, marks=pytest.mark.slow),
        pytest.param(LORA, 61, marks=pytest.mark.slow),
        pytest.param((), 1, marks=pytest.mark.slow),
    ],
)
def test_death_at_any_moment_changes_nothing(tuning, stride, two, death, tmp_path):
    whole = tmp_path / "whole"
    survive(whole, two(*tuning), death)
    expected, moments = written(whole), list(death.moments)
    assert len(moments) > 150
    boundary = [n for n, name in enumerate(moments) if name in ("before export", "after export")]
    boundary += [n for n, name in enumerate(moments[:-2]) if name.endswith("write_json") and n > boundary[0]][:4]
    for moment in sorted({*range(30, len(moments), stride), *boundary[:2]}):
        survive(tmp_path / f"died-{moment}", two(*tuning), death, moment)
        assert written(tmp_path / f"died-{moment}") == expected, (moment, moments[moment])


@pytest.mark.slow
@pytest.mark.parametrize("stride", [46, 1])
def test_a_stop_at_any_safe_point_changes_nothing(stride, finished, two, tmp_path):
    (whole, looks), config = finished, two()
    expected = written(whole)
    assert looks > 50
    for number in range(0, looks - 1, stride):
        folder = tmp_path / f"stopped-{number}"
        assert sit(folder, config, StopAt(number)) == STOPPED, number
        result = Run(folder).result()
        assert result["status"] == "stopped"
        assert result["steps"] == on_disk(folder)
        assert sit(folder, config) == GOOD
        assert written(folder) == expected, number


def on_disk(folder: Path) -> int:
    """Steps of finished stages and of the newest checkpoint of the one after them."""
    steps = 0
    for name in ("1-sft", "2-dpo"):
        stage = Run(folder / "stages" / name)
        done = stage.result().get("steps")
        steps += max((step for step, _ in stage.checkpoints()), default=0) if done is None else done
        if done is None:
            break
    return steps


def test_a_finished_stage_is_never_run_again(two, tmp_path):
    folder, config = tmp_path / "run", two()
    assert sit(folder, config) == GOOD
    before = written(folder)
    stamp = (folder / "stages/1-sft/model/model.safetensors").stat().st_mtime_ns
    (folder / "result.json").unlink()
    assert sit(folder, config) == GOOD  # killed right before the last word
    assert written(folder) == before
    assert (folder / "stages/1-sft/model/model.safetensors").stat().st_mtime_ns == stamp


def test_a_failure_in_a_later_stage_keeps_what_the_earlier_ones_did(two, tmp_path, monkeypatch):
    folder, config = tmp_path / "run", two()
    real = session.evaluate

    def failing(*arguments: Any, **keywords: Any) -> Evaluation:
        if (folder / "stages/1-sft/result.json").exists():
            raise RuntimeError("no more")
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(session, "evaluate", failing)
        assert sit(folder, config) == FAILED
    result = Run(folder).result()
    assert (result["status"], result["error"]) == ("failed", "RuntimeError: no more")
    assert list(result["stages"]) == ["sft"]
    assert sit(folder, config) == GOOD


@pytest.mark.slow
def test_a_damaged_checkpoint_of_a_later_stage_costs_its_steps_and_no_line(two, tmp_path):
    """The stage goes on from the checkpoint before it, and what the run wrote after that is written once."""
    whole, folder, config, watch = tmp_path / "whole", tmp_path / "run", two("train.keep_last=2"), StopAt()
    assert sit(whole, config, watch) == GOOD
    assert sit(folder, config, StopAt(watch.looks - 3)) == STOPPED  # in the last evaluation
    (folder / "stages/2-dpo/checkpoints/step-000005/tensors.safetensors").write_bytes(b"rust")
    assert sit(folder, config) == GOOD
    assert written(folder) == written(whole)
