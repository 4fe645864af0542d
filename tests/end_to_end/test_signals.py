"""Signals and kills, of the program or of its worker, in any phase: a checkpoint, a true result, and the same end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lifecycle import (
    LORA,
    STEPS,
    UNEVEN,
    at_step,
    begun,
    checkpoints_of,
    child_of,
    end,
    files_for,
    in_first_evaluation,
    kill_worker,
    last_step,
    result_of,
    same,
    wait_for,
)

Start = Callable[..., "subprocess.Popen[str]"]
Uft = Callable[..., "subprocess.CompletedProcess[str]"]
SLOW_EVALUATION = ("eval.max_new_tokens=200", "eval.rows=64")
CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}
PHASES: dict[str, Callable[[Path], Callable[[], bool]]] = {
    "preparation": begun,
    "evaluation": in_first_evaluation,
    "steps": lambda run: at_step(run, 4),
}


@pytest.fixture
def request_for(request_of: Callable[..., list[str]], tmp_path: Path, write: Callable[..., Path]) -> Callable[..., Any]:
    def make(objective: str, *more: str) -> list[str]:
        return request_of(objective, files_for(objective, tmp_path / "rows", write), *UNEVEN, *more)

    return make


def send(process: subprocess.Popen[str], number: signal.Signals, to: str) -> None:
    """To the program that the person started, or straight to its worker, as a scheduler might."""
    target = process.pid if to == "parent" else child_of(process.pid)
    assert target is not None
    os.kill(target, number)


def stopped(run: Path, steps: int | None = None) -> None:
    """Assert that the run says it was stopped, and where."""
    result, saved = result_of(run), checkpoints_of(run)
    assert result["status"] == "stopped"
    assert result["error"] is None
    assert result["steps"] == max(saved, default=0)
    assert steps is None or result["steps"] >= steps
    assert result["steps"] < STEPS


FAST = [("steps", signal.SIGTERM, "parent"), ("evaluation", signal.SIGINT, "worker")]
EVERY = [(phase, number, to) for phase in PHASES for number in CODES for to in ("parent", "worker")]


def cases() -> list[Any]:
    return [
        pytest.param(
            *case, id=f"{case[1].name}-to-{case[2]}-in-{case[0]}", marks=[] if case in FAST else pytest.mark.slow
        )
        for case in EVERY
    ]


@pytest.mark.parametrize(("phase", "number", "to"), cases())
def test_a_signal_stops_the_run_with_its_work_saved(
    start: Start, request_for: Any, tmp_path: Path, phase: str, number: signal.Signals, to: str
) -> None:
    run = tmp_path / "run"
    process = start("train", *request_for("sft", *SLOW_EVALUATION), f"run.dir={run}")
    wait_for(PHASES[phase](run), process)
    asked = time.monotonic()
    send(process, number, to)
    code, said = end(process)
    assert time.monotonic() - asked < 30
    assert code == CODES[number]
    assert "Traceback" not in said
    stopped(run, 4 if phase == "steps" else 0)
    assert f"uft resume {run.name}" in said  # from where it was started
    if phase == "evaluation":
        assert last_step(run) == -1  # nothing half measured is written


@pytest.mark.slow
def test_stopped_in_every_phase_the_run_ends_like_one_that_was_not(
    start: Start, uft: Uft, request_for: Any, tmp_path: Path
) -> None:
    request = request_for(
        "dpo", *SLOW_EVALUATION, "reference.mode=cached", "model.adapter=lora", "model.lora.dropout=0.2"
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    uft("train", *request, f"run.dir={whole}", env={"UFT_CACHE": str(tmp_path / "other-cache")})
    command = ["train", *request, f"run.dir={run}"]
    for phase, number, to in (
        ("preparation", signal.SIGTERM, "worker"),
        ("evaluation", signal.SIGINT, "parent"),
        ("steps", signal.SIGUSR1, "parent"),
    ):
        process = start(*command)
        wait_for(PHASES[phase](run), process)
        send(process, number, to)
        assert end(process)[0] == CODES[number]
        command = ["resume", str(run)]
    stopped(run, 4)
    uft("resume", str(run))
    same(run, whole)


@pytest.mark.slow
def test_killed_moved_and_resumed_twice(start: Start, uft: Uft, request_for: Any, tmp_path: Path) -> None:
    """One story: every command a person would type around a run that dies, and what each of them says."""
    request = request_for("uft", *LORA, "optim=rmsprop", "optim.momentum=0.9", "reference.mode=cached")
    whole, died, moved = tmp_path / "whole", tmp_path / "died", tmp_path / "elsewhere" / "run"
    uft("train", *request, f"run.dir={whole}", env={"UFT_CACHE": str(tmp_path / "other-cache")})

    process = start("train", *request, f"run.dir={died}")
    wait_for(at_step(died, 8), process)
    code, said = kill_worker(process)
    assert code == 1
    assert "killed by SIGKILL" in said
    assert not (died / "result.json").exists()

    moved.parent.mkdir()
    died.rename(moved)
    refused = uft("resume", str(moved), "optim.lr=0.5", "train.batch_size=7", code=2)
    assert "optim.lr" in refused.stderr
    assert "0.01 -> 0.5" in refused.stderr
    assert "6 -> 7" in refused.stderr

    process = start("resume", str(moved))
    wait_for(begun(moved), process)
    wait_for(at_step(moved, 16), process)
    second = uft("resume", str(moved), code=2)
    assert "another process is working in this run folder" in second.stderr
    assert kill_worker(process)[0] == 1

    uft("resume", str(moved), "train.log_every=2")
    same(moved, whole)
    again = uft("resume", str(moved))
    assert "finished already" in again.stdout
    same(moved, whole)
