"""A run that dies anywhere and goes on equals the run that never died: here in one process, where death is exact."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from typing import Any

import dying
import pytest
import torch
from dying import LORA, Death, StopAt, lines
from stage_runs import sit, survive, written

from uft.config.schema import Config
from uft.errors import BAD_REQUEST, FAILED, GOOD, INTERRUPTED, STOPPED, UftError
from uft.model import reference
from uft.runs import Run
from uft.training import checkpoint

UNEVEN = ("train.steps=7", *dying.UNEVEN)
TUNINGS: dict[str, tuple[str, ...]] = {"full": (), "lora": LORA}
MOMENTUM = {
    "adamw": ("optim.name=adamw", "optim.weight_decay=0.1"),
    "rmsprop": ("optim.name=rmsprop", "optim.momentum=0.9"),
    "sgd": ("optim.name=sgd", "optim.momentum=0.9", "optim.lr=0.05"),
}
EXTRAS = {"ift": ("objective.lam_noise=0.5", "objective.lam_start=0.0")}
ALL = ("sft", "ift", "uft", "una", "dft", "dft2", "dpo")
WITHOUT_REFERENCE = ("sft", "ift", "dft2")


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference cache of these few rows consists of several files."""
    monkeypatch.setattr(reference, "SEQUENCES_PER_FILE", 7)


# --- dying


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        pytest.param("dft", MOMENTUM["rmsprop"], id="full"),
        pytest.param("uft", LORA, id="lora", marks=pytest.mark.slow),
    ],
)
def test_death_at_any_moment_changes_nothing(
    objective: str, settings: tuple[str, ...], configure: Callable[..., Config], death: Death, tmp_path: Path
) -> None:
    config = configure(objective, *UNEVEN, "reference.mode=cached", *settings)
    expected = written(survive(tmp_path / "whole", config, death))
    moments = len(death.moments)
    assert moments > 100, death.moments
    for moment in range(0, moments, 46):
        assert written(survive(tmp_path / f"died-{moment}", config, death, moment)) == expected, moment


@pytest.mark.slow
def test_death_at_every_single_moment_changes_nothing(
    configure: Callable[..., Config], death: Death, tmp_path: Path
) -> None:
    config = configure("dft", *UNEVEN, "reference.mode=cached", *LORA)
    expected = written(survive(tmp_path / "whole", config, death))
    for moment in range(len(death.moments)):
        assert written(survive(tmp_path / f"died-{moment}", config, death, moment)) == expected, moment


def variants(ways: Iterable[tuple[str, str]], optimisers: Iterable[str], objectives: Iterable[str] = ALL) -> list[Any]:
    """These objectives under these (tuning, reference mode) and optimisers."""
    found = []
    for (tuning, way), objective, optimiser in product(ways, objectives, optimisers):
        if objective in WITHOUT_REFERENCE and way == "cached":
            continue
        settings = (*TUNINGS[tuning], *MOMENTUM[optimiser], *EXTRAS.get(objective, ()), f"reference.mode={way}")
        found.append(pytest.param(objective, settings, id=f"{objective}-{tuning}-{way}-{optimiser}"))
    return found


@pytest.mark.parametrize(("objective", "settings"), variants([("full", "copy")], ["adamw"], ("ift", "dft", "dpo")))
def test_objectives_with_state_or_a_reference_go_on_where_they_were(
    objective: str, settings: tuple[str, ...], configure: Callable[..., Config], death: Death, tmp_path: Path
) -> None:
    config = configure(objective, *UNEVEN, *settings)
    expected = written(survive(tmp_path / "whole", config, death))
    moments = len(death.moments)
    died = survive(tmp_path / "died", config, death, moments // 2, moments // 3)  # twice
    assert written(died) == expected


WAYS = (("full", "copy"), ("full", "cached"), ("lora", "copy"), ("lora", "cached"), ("lora", "adapter_off"))


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "settings"), variants(WAYS, MOMENTUM))
def test_every_combination_goes_on_where_it_was(
    objective: str, settings: tuple[str, ...], configure: Callable[..., Config], death: Death, tmp_path: Path
) -> None:
    config = configure(objective, *UNEVEN, *settings)
    expected = written(survive(tmp_path / "whole", config, death))
    moments = len(death.moments)
    for number, share in enumerate((0.1, 0.3, 0.6, 0.97)):
        deaths = (int(share * moments), moments // 5)
        assert written(survive(tmp_path / f"died-{number}", config, death, *deaths)) == expected, share


# --- being asked to stop


@pytest.mark.parametrize(("stride", "objective"), [(40, "dft"), pytest.param(1, "uft", marks=pytest.mark.slow)])
def test_a_stop_at_any_safe_point_changes_nothing(
    stride: int, objective: str, configure: Callable[..., Config], tmp_path: Path
) -> None:
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
def test_an_owed_evaluation_is_written_once_even_if_paying_it_is_fatal(
    configure: Callable[..., Config], death: Death, tmp_path: Path
) -> None:
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


def test_an_interrupt_has_its_own_exit_code(configure: Callable[..., Config], tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert sit(run.path, configure("sft", *UNEVEN), StopAt(20, signal.SIGINT)) == INTERRUPTED
    assert run.result()["status"] == "stopped"
    assert run.checkpoints()


def test_a_stop_while_preparing_to_resume_tells_where_the_run_stands(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
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


def test_a_run_of_a_finished_run_changes_nothing(configure: Callable[..., Config], tmp_path: Path) -> None:
    run, config = Run(tmp_path / "run"), configure("sft", *UNEVEN)
    sit(run.path, config)
    before = written(run.path)
    assert sit(run.path, config) == GOOD
    assert written(run.path) == before


def test_a_failure_while_preparing_is_a_failed_run(
    configure: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*arguments: object) -> None:
        raise MemoryError("no room for the model")

    run, config = Run(tmp_path / "run"), configure("sft", *UNEVEN)
    with monkeypatch.context() as patch:
        patch.setattr("uft.training.setup.load_policy", out_of_memory)
        assert sit(run.path, config) == FAILED
    assert run.result()["status"] == "failed"
    assert "no room for the model" in run.result()["error"]
    assert sit(run.path, config) == GOOD


def test_a_bad_request_goes_to_the_caller_and_leaves_the_last_result(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    run, config = Run(tmp_path / "run"), configure("sft", *UNEVEN)
    sit(run.path, config, StopAt(20))
    before = run.result()
    elsewhere = replace(config, model=replace(config.model, path=str(tmp_path / "nowhere")))
    with pytest.raises(UftError) as problem:
        sit(run.path, elsewhere)
    assert problem.value.code == BAD_REQUEST
    assert run.result() == before


def test_rows_that_changed_since_the_run_began_are_refused(
    configure: Callable[..., Config], files: dict[str, Path], tmp_path: Path
) -> None:
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


def test_a_run_that_never_reached_a_checkpoint_may_begin_with_other_rows(
    configure: Callable[..., Config], files: dict[str, Path], death: Death, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text(files["demonstration"].read_text())
    config = configure("sft", *UNEVEN, sources={"mine": mine})
    run = Run(tmp_path / "run")
    with death.after(len("some")):  # in its first steps
        sit(run.path, config)
    assert not run.checkpoints()
    mine.write_text(files["demonstration"].read_text().replace("w3", "w4"))
    assert sit(run.path, config) == GOOD


def test_a_curve_of_rows_that_give_nothing(configure: Callable[..., Config], tmp_path: Path) -> None:
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
