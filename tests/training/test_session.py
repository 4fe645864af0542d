"""A run that dies anywhere and goes on equals the run that never died: here in one process, where death is exact."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from uft.config.schema import Config
from uft.errors import GOOD, STOPPED, UftError
from uft.runs import Run, create_run
from uft.tracking.files import Files
from uft.training import checkpoints, session, trainer
from uft.training.signals import Stop

CLOCKS = ("seconds", "tokens_per_second")
UNEVEN = (
    "train.steps=11",
    "train.batch_size=6",
    "train.micro_batch_tokens=48",
    "train.log_every=2",
    "train.checkpoint_every=3",
    "train.eval_every=4",
    "train.keep_last=1",
    "data.holdout=0.2",
    "eval.rows=4",
    "eval.samples=1",
    "eval.max_new_tokens=3",
)
"""Lines, batteries, checkpoints and the end all fall on different steps."""
LORA = ("model.adapter=lora", "model.lora.rank=2", "model.lora.dropout=0.2")
MOMENTUM = {
    "adamw": ("optim.name=adamw", "optim.weight_decay=0.1"),
    "rmsprop": ("optim.name=rmsprop", "optim.momentum=0.9"),
    "sgd": ("optim.name=sgd", "optim.momentum=0.9", "optim.lr=0.05"),
}
EXTRAS = {"ift": ("objective.lam_noise=0.5", "objective.lam_start=0.0")}
WITH_REFERENCE = ("uft", "una", "dft", "dpo")


class Killed(BaseException):
    """SIGKILL as seen from inside: nothing that catches exceptions notices it."""


class Death:
    """Kills at the n-th of the moments where something was just about to be, or has just been, made permanent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moments: list[str] = []
        self.at: int | None = None
        for owner, name in (
            (os, "replace"),
            (checkpoints, "save_file"),
            (checkpoints.shutil, "rmtree"),
            (Files, "_append"),
            (trainer, "optimiser_step"),
            (session, "battery"),
            (session, "write_json"),
            (session, "export"),
        ):
            monkeypatch.setattr(owner, name, self._mortal(name, getattr(owner, name)))

    def _mortal(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self._moment(f"before {name}")
            value = real(*arguments, **keywords)
            self._moment(f"after {name}")
            return value

        return call

    def _moment(self, name: str) -> None:
        self.moments.append(name)
        if self.at is not None and len(self.moments) > self.at:
            raise Killed(name)

    @contextlib.contextmanager
    def after(self, moments: int | None) -> Iterator[None]:
        self.moments, self.at = [], moments
        with contextlib.suppress(Killed):
            yield


@pytest.fixture
def death(monkeypatch: pytest.MonkeyPatch) -> Death:
    return Death(monkeypatch)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def written(run: Run) -> dict[str, Any]:
    """Everything a finished run says but the time it took; metric names in the order in which they were written."""
    curve = [[(k, v) for k, v in line.items() if k not in CLOCKS] for line in lines(run.metrics_file)]
    result = {k: v for k, v in run.result().items() if "seconds" not in k and "second" not in k and "memory" not in k}
    return {
        "curve": curve,
        "samples": run.samples_file.read_text(),
        "model": (run.model_dir / "model.safetensors").read_bytes(),
        "result": result,
        "checkpoints": [path.name for path in sorted(run.checkpoints_dir.iterdir())],
    }


def new_run(folder: Path) -> Run:
    return create_run(folder, "{}\n", [])


def sit(run: Run, config: Config, stop: Stop | None = None) -> int:
    return session.train(run, config, stop or Stop())


def survive(run: Run, config: Config, death: Death, *deaths: int) -> Run:
    """Die at each of these moments in turn, then go on to the end."""
    for moment in deaths:
        with death.after(moment):
            sit(run, config)
    with death.after(None):
        assert sit(run, config) == GOOD
    return run


# --- dying


@pytest.mark.parametrize("lora", [(), LORA], ids=["full", "lora"])
def test_death_at_any_moment_changes_nothing(
    lora: tuple[str, ...], configure: Callable[..., Config], death: Death, tmp_path: Path
) -> None:
    config = configure("dft", *UNEVEN, *MOMENTUM["rmsprop"], *lora)
    whole = survive(new_run(tmp_path / "whole"), config, death)
    moments = len(death.moments)
    assert moments > 150, death.moments
    expected = written(whole)
    stride = 23 if lora else 11
    for moment in range(0, moments, stride):
        run = survive(new_run(tmp_path / f"died-{moment}"), config, death, moment)
        assert written(run) == expected, moment


def variants(objectives: tuple[str, ...], optimisers: tuple[str, ...]) -> list[Any]:
    """Every objective, full and LoRA, under every way to have the reference and these optimisers."""
    found = []
    for objective in objectives:
        for tuning, adapter in (("full", ()), ("lora", LORA)):
            ways = ("copy", "cached", *(["adapter_off"] if adapter else [])) if objective in WITH_REFERENCE else (None,)
            for way in ways:
                for optimiser in optimisers:
                    settings = (*adapter, *MOMENTUM[optimiser], *EXTRAS.get(objective, ()))
                    settings += (f"reference.mode={way}",) if way else ()
                    name = "-".join(filter(None, (objective, tuning, way, optimiser)))
                    found.append(pytest.param(objective, settings, id=name))
    return found


ALL = ("sft", "ift", "uft", "una", "dft", "dft2", "dpo")


@pytest.mark.parametrize(("objective", "settings"), variants(ALL, ("adamw",)))
def test_every_objective_goes_on_where_it_was(
    objective: str, settings: tuple[str, ...], configure: Callable[..., Config], death: Death, tmp_path: Path
) -> None:
    config = configure(objective, *UNEVEN, *settings)
    expected = written(survive(new_run(tmp_path / "whole"), config, death))
    moments = len(death.moments)
    died = survive(new_run(tmp_path / "died"), config, death, moments // 2, moments // 3)  # twice
    assert written(died) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "settings"), variants(ALL, ("adamw", "rmsprop", "sgd")))
def test_every_combination_goes_on_where_it_was(
    objective: str, settings: tuple[str, ...], configure: Callable[..., Config], death: Death, tmp_path: Path
) -> None:
    config = configure(objective, *UNEVEN, *settings)
    expected = written(survive(new_run(tmp_path / "whole"), config, death))
    moments = len(death.moments)
    for number, share in enumerate((0.1, 0.25, 0.4, 0.6, 0.8, 0.97)):
        deaths = (int(share * moments), moments // 5)
        assert written(survive(new_run(tmp_path / f"died-{number}"), config, death, *deaths)) == expected, share
