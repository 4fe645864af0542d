"""Signals: to the program or to its worker, in any phase; a checkpoint, a true result, and the same end after all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lifecycle import (
    STEPS,
    UNEVEN,
    alive,
    at_step,
    begun,
    checkpoints_of,
    child_of,
    end,
    files_for,
    in_first_evaluation,
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
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_the_worker_does_not_outlive_a_killed_parent(start: Start, request_for: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("train", *request_for("sft"), "train.steps=100000", f"run.dir={run}")
    wait_for(at_step(run, 4), process)
    worker = child_of(process.pid)
    assert worker is not None
    process.kill()
    deadline = time.monotonic() + 60
    while alive(worker):
        assert time.monotonic() < deadline, "the worker goes on without its parent"
        time.sleep(0.05)
    result = result_of(run)
    assert result["status"] == "stopped"
    assert result["steps"] == max(checkpoints_of(run)) >= 4


@pytest.mark.slow
def test_generation_stops_and_goes_on(start: Start, uft: Uft, request_for: Any, tmp_path: Path) -> None:
    """Stopped in the middle, `uft generate` keeps whole lines, and the finished file is that of an unbroken job."""
    generating = ("generate.batch_size=2", "generate.limit=4", "generate.temperature=3", "generate.top_k=0")
    request = request_for("sft", *generating)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    uft("generate", *request, f"generate.out={whole}")
    process = start("generate", *request, f"generate.out={out}")
    wait_for(lambda: out.is_file() and out.stat().st_size > 0, process)
    process.send_signal(signal.SIGTERM)
    code, said = end(process)
    assert code == 75
    assert "Run the same command to continue" in said
    lines = out.read_text(encoding="utf-8").splitlines()
    assert 0 < len(lines) < len(whole.read_text(encoding="utf-8").splitlines())
    uft("generate", *request, f"generate.out={out}")
    assert out.read_text(encoding="utf-8") == whole.read_text(encoding="utf-8")
