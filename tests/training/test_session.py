"""A run that dies anywhere and goes on equals the run that never died: here in one process, where death is exact."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, product
from pathlib import Path

import dying
import pytest
import torch
from dying import LORA, StopAt, lines
from stage_runs import sit, survive, written

from uft.config.schema import Config
from uft.errors import BAD_REQUEST, FAILED, GOOD, INTERRUPTED, STOPPED, UftError
from uft.model import checkpoint, reference
from uft.runs import Run

UNEVEN = ("train.steps=7", *dying.UNEVEN)
CACHED = "reference.mode=cached"
EARLY = "train.early_stop=1"
RMSPROP = ("optim.name=rmsprop", "optim.momentum=0.9")


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """The reference cache of these few rows consists of several files."""
    monkeypatch.setattr(reference, "SEQUENCES_PER_FILE", 7)


# --- dying


@pytest.mark.parametrize(
    ("objective", "settings", "stride"),
    [
        ("dft", (CACHED, *RMSPROP), 46),
        pytest.param("uft", (CACHED, *LORA), 46, marks=pytest.mark.slow),
        pytest.param("dft", (CACHED, *LORA), 1, marks=pytest.mark.slow),
    ],
)
def test_death_at_any_moment_changes_nothing(objective, settings, stride, configure, death, tmp_path):
    config = configure(objective, *UNEVEN, *settings)
    expected = written(survive(tmp_path / "whole", config, death))
    moments = len(death.moments)
    assert moments > 100, death.moments
    for moment in range(0, moments, stride):
        assert written(survive(tmp_path / f"died-{moment}", config, death, moment)) == expected, moment


ALL = ("sft", "ift", "uft", "una", "dft", "dft2", "dpo")
TUNINGS = (LORA, (*LORA, "reference.mode=adapter_off"), ("optim.name=sgd", "optim.momentum=0.9", "optim.lr=0.05"))


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        pytest.param("ift", ("objective.lam_noise=0.5", "objective.lam_start=0.0"), marks=pytest.mark.slow),
        ("dft", ()),
        pytest.param("dpo", ("optim.weight_decay=0.1",), marks=pytest.mark.slow),
        pytest.param(
            "dpo",
            (*LORA, "model.lora.dora=true", "model.lora.lr_ratio=4", "train.neftune_alpha=5", "optim.schedule=wsd"),
            marks=pytest.mark.slow,
        ),
        pytest.param("sft", ("optim.name=muon", "optim.momentum=0.9", EARLY), marks=pytest.mark.slow),
        pytest.param("dpo", ("optim.name=adafactor",), marks=pytest.mark.slow),
        pytest.param("dpo", (*LORA, "model.quantize=nf4", "optim.name=adamw8bit"), marks=pytest.mark.slow),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in product(ALL, TUNINGS)),
    ],
)
def test_objectives_with_state_or_a_reference_go_on_where_they_were(objective, settings, configure, death, tmp_path):
    config = configure(objective, *UNEVEN, *settings)
    expected = written(survive(tmp_path / "whole", config, death))
    moments = len(death.moments)
    died = survive(tmp_path / "died", config, death, moments // 2, moments // 3)  # twice
    assert written(died) == expected


# --- being asked to stop


@pytest.mark.slow
@pytest.mark.parametrize(("stride", "objective"), [(40, "dft"), (1, "uft")])
def test_a_stop_at_any_safe_point_changes_nothing(stride, objective, configure, tmp_path):
    config = configure(objective, *UNEVEN, "reference.mode=cached")
    whole, watch = Run(tmp_path / "whole"), StopAt()
    assert sit(whole.path, config, watch) == GOOD
    expected = written(whole.path)
    assert watch.looks > 50
    for number in range(0, watch.looks - 1, stride):  # the last look: is it done? It is
        run = Run(tmp_path / f"stopped-{number}")
        assert sit(run.path, config, StopAt(number)) == STOPPED, number
        assert run.result()["status"] == "stopped"
        assert run.result()["steps"] == max((step for step, _ in run.checkpoints()), default=0)
        assert sit(run.path, config, StopAt(5)) == STOPPED  # again, in its preparation or its first evaluation
        assert run.result()["steps"] == max((step for step, _ in run.checkpoints()), default=0)
        assert sit(run.path, config) == GOOD
        assert written(run.path) == expected, number


@pytest.mark.slow
def test_an_owed_evaluation_is_written_once_even_if_paying_it_is_fatal(configure, death, tmp_path):
    """Stopped within the evaluation of step 4, then killed when its lines were written but in no checkpoint yet."""
    config = configure("sft", *UNEVEN)
    expected = written(survive(tmp_path / "whole", config, death))
    owing = next(run for run in stopped_at_every_look(config, tmp_path) if stands(run) == {"step": 4, "evaluated": 0})
    shutil.copytree(owing.path, tmp_path / "copy")
    survive(tmp_path / "copy", config, death)
    writing = [number for number, name in enumerate(death.moments) if name == "after _append"][:2]
    for moment in writing:  # the figures; the samples
        run = Run(Path(shutil.copytree(owing.path, tmp_path / f"died-{moment}")))
        with death.after(moment):
            sit(run.path, config)
        assert stands(run) == {"step": 4, "evaluated": 0}
        assert lines(run.metrics_file)[-1]["step"] == 4
        assert written(survive(run.path, config, death)) == expected


def stopped_at_every_look(config: Config, folder: Path) -> Iterator[Run]:
    for number in count(20):
        run = Run(folder / f"stopped-{number}")
        assert sit(run.path, config, StopAt(number)) == STOPPED
        yield run


def stands(run: Run) -> dict[str, int]:
    """Step and last evaluation of the newest checkpoint."""
    found = run.checkpoints()
    progress = checkpoint.read_state(found[-1][1])["progress"] if found else {"step": -1, "evaluated": -1}
    return {name: progress[name] for name in ("step", "evaluated")}


def test_an_interrupt_has_its_own_exit_code(configure, tmp_path):
    run = Run(tmp_path / "run")
    assert sit(run.path, configure("sft", *UNEVEN), StopAt(20, signal.SIGINT)) == INTERRUPTED
    assert run.result()["status"] == "stopped"
    assert run.checkpoints()


def test_a_stop_while_preparing_to_resume_tells_where_the_run_stands(configure, tmp_path):
    run, config = Run(tmp_path / "run"), configure("sft", *UNEVEN)
    watch = StopAt()
    sit(tmp_path / "whole", config, watch)
    assert sit(run.path, config, StopAt(watch.looks * 2 // 3)) == STOPPED
    before = run.result()
    assert before["steps"] >= 3
    assert sit(run.path, config, StopAt(0)) == STOPPED
    after = run.result()
    for name in ("steps", "rows", "tokens", "supervised_tokens", "seconds", "final", "best", "best_step", "status"):
        assert after[name] == before[name], name


# --- what a run says of itself


def test_a_run_of_a_finished_run_changes_nothing(configure, tmp_path):
    run, config = Run(tmp_path / "run"), configure("sft", *UNEVEN)
    sit(run.path, config)
    before = written(run.path)
    assert sit(run.path, config) == GOOD
    assert written(run.path) == before


def test_a_failure_while_preparing_is_a_failed_run(configure, tmp_path, monkeypatch):
    def out_of_memory(*arguments: object) -> None:
        raise MemoryError("no room for the model")

    run, config = Run(tmp_path / "run"), configure("sft", *UNEVEN)
    with monkeypatch.context() as patch:
        patch.setattr("uft.training.setup.load_policy", out_of_memory)
        assert sit(run.path, config) == FAILED
    assert run.result()["status"] == "failed"
    assert "no room for the model" in run.result()["error"]
    assert sit(run.path, config) == GOOD


def test_a_bad_request_goes_to_the_caller_and_leaves_the_last_result(configure, tmp_path):
    run, config = Run(tmp_path / "run"), configure("sft", *UNEVEN)
    sit(run.path, config, StopAt(20))
    before = run.result()
    elsewhere = replace(config, model=replace(config.model, path=str(tmp_path / "nowhere")))
    with pytest.raises(UftError) as problem:
        sit(run.path, elsewhere)
    assert problem.value.code == BAD_REQUEST
    assert run.result() == before


def test_rows_that_changed_since_the_run_began_are_refused(configure, files, tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text(files["demonstration"].read_text())
    config = configure("sft", *UNEVEN, sources={"mine": mine, "theirs": files["preference"]})
    run = Run(tmp_path / "run")
    assert sit(run.path, config, StopAt(20)) == STOPPED
    mine.write_text(files["demonstration"].read_text().replace("w3", "w4"))
    with pytest.raises(UftError, match="changed since the run began") as problem:
        sit(run.path, config)
    assert [p.what for p in problem.value.problems] == ["data.sources.mine"]
    mine.write_text(files["demonstration"].read_text())
    assert sit(run.path, config) == GOOD


def test_a_run_that_never_reached_a_checkpoint_may_begin_with_other_rows(configure, files, death, tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text(files["demonstration"].read_text())
    config = configure("sft", *UNEVEN, sources={"mine": mine})
    run = Run(tmp_path / "run")
    with death.after(len("some")):  # in its first steps
        sit(run.path, config)
    assert not run.checkpoints()
    mine.write_text(files["demonstration"].read_text().replace("w3", "w4"))
    assert sit(run.path, config) == GOOD


def test_a_curve_of_rows_that_give_nothing(configure, tmp_path):
    """One pair among many demonstrations: most of DPO's steps have nothing to learn from."""
    shown = [{"prompt": f"w{i}", "completion": "w5"} for i in range(3, 33)]
    pair = {"prompt": "w40", "chosen": "w41", "rejected": "w42"}
    sources = {}
    for name, rows in {"shown": shown, "pair": [pair]}.items():
        sources[name] = tmp_path / f"{name}.jsonl"
        sources[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configure(
        "dpo",
        *("data.unusable=drop", "train.batch_size=4", "train.steps=null", "train.log_every=1", "train.epochs=2"),
        sources=sources,
    )
    run = Run(tmp_path / "run")
    assert sit(run.path, config) == GOOD
    curve = lines(run.metrics_file)
    assert [line["rows"] for line in curve] == [*range(4, 62, 4), 62]
    assert sum("loss" in line for line in curve) == 2
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in curve if "loss" in line)
    assert run.result()["rows"] == 62
