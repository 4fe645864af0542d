"""Killed or asked to stop in any phase: in the end the run is the one to which nothing happened, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evidence import kinds, same, written
from planting import Fault
from requests_of import LOOP, SINGLE
from sessions import Bench

from uft.runs import Run

NewRun = Callable[..., Run]
Undisturbed = Callable[..., dict[str, Any]]


def watched(tmp_path: Path, **fault: object) -> Fault:
    return Fault(roots=(str(tmp_path),), **fault)  # type: ignore[arg-type]


def sit_to_the_end(bench: Bench, run: Run, fault: Fault | None = None) -> None:
    ended = bench.sit(run.path, fault=fault)
    assert ended.code == 0, ended.said
    assert run.status == "finished"


DEATHS = (
    ("before tokens._encode", ""),
    ("before os.rename", ""),  # of the tokens' folder
    ("after reference.ReferenceColumn._compute", ""),
    ("after flush", "/.metrics.jsonl.seals"),  # a seal without its line
    ("before generate.complete", ""),
    ("after step.all_reduce_terms", ""),
    ("before os.replace", "/.step-000003.tmp"),
    ("after evaluate.evaluate", ""),
    ("after os.replace", "/.step-000004.tmp"),
    ("before os.unlink", "tensors.safetensors"),  # an old checkpoint half deleted
    ("before export.plain_model", ""),
    ("before os.replace", "/.model.tmp"),
    ("before open", "/.result.json"),
)
"""(moment, file) in the order in which a run meets them."""


def test_killed_in_one_phase_after_the_other(
    bench: Bench, new_run: NewRun, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    died = new_run("died", *SINGLE)
    for name, path in DEATHS:
        ended = bench.sit(died.path, fault=watched(tmp_path, do="kill", name=name, path=path))
        assert ended.code == -signal.SIGKILL, f"{name} {path}\n{ended.said}"
        assert died.status == "interrupted"
    sit_to_the_end(bench, died)
    same(died.path, undisturbed(*SINGLE))


TORN = (
    ("/metrics.jsonl", 1),
    ("/state.json", 0),
    ("/.samples.jsonl.seals", 0),
    ("/SHA256SUMS", 1),
    ("/console.log", 3),
)


@pytest.mark.parametrize("torn", [TORN[:2], pytest.param(TORN[2:], marks=pytest.mark.slow)], ids=["two", "others"])
def test_killed_in_the_middle_of_a_write(
    bench: Bench, new_run: NewRun, undisturbed: Undisturbed, tmp_path: Path, torn: tuple[tuple[str, int], ...]
) -> None:
    """Half of what was to be written is in the file."""
    died = new_run("died", *SINGLE)
    for file, number in torn:
        ended = bench.sit(died.path, fault=watched(tmp_path, do="half", name="before write", path=file, at=number))
        assert ended.code == -signal.SIGKILL, f"{file}\n{ended.said}"
    sit_to_the_end(bench, died)
    same(died.path, undisturbed(*SINGLE))


STOPS = (
    ("terminate", "before tokens._encode", ""),
    ("warn", "before reference.ReferenceColumn._compute", ""),
    ("terminate", "before generate.complete", ""),
    ("warn", "after step.all_reduce_terms", ""),
    ("terminate", "before os.replace", "/.step-000003.tmp"),
    ("warn", "before write", "/metrics.jsonl"),
)


def test_asked_to_stop_in_one_phase_after_the_other(
    bench: Bench, new_run: NewRun, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """SIGTERM and SIGUSR1: exit code 75, and nothing is done that the next session would have to undo."""
    stopped = new_run("stopped", *SINGLE)
    for do, name, path in STOPS:
        ended = bench.sit(stopped.path, fault=watched(tmp_path, do=do, name=name, path=path))
        assert ended.code == 75, f"{do} {name}\n{ended.said}"
        assert stopped.status == "stopped"
        assert stopped.result()["steps"] == stopped.steps
    sit_to_the_end(bench, stopped)
    same(stopped.path, undisturbed(*SINGLE))


# --- the long part


@pytest.mark.slow
@pytest.mark.parametrize("request_", [SINGLE, LOOP], ids=["one training", "stages"])
def test_killed_at_every_kind_of_moment(
    bench: Bench, new_run: NewRun, tmp_path: Path, request_: tuple[str, ...]
) -> None:
    """Each of them once, in a run of its own; which of those that are alike is left to chance."""
    whole, log = new_run("whole", *request_), tmp_path / "moments"
    sit_to_the_end(bench, whole, watched(tmp_path, log=str(log)))
    expected, chance = written(whole.path), random.Random(5)
    found = dict(kinds(log))
    assert len(found) > 100
    for number, (name, places) in enumerate(found.items()):
        run = new_run(f"died-{number}", *request_)
        own = {"UFT_CACHE": str(tmp_path / f"cache-{number}")}
        fault = watched(tmp_path, do="kill", at=chance.choice(places))
        ended = bench.start(run.path, fault=fault, **own).wait()
        assert ended.code in (-signal.SIGKILL, 0), f"{name}\n{ended.said}"
        ended = bench.start(run.path, **own).wait()
        assert ended.code == 0, f"{name}\n{ended.said}"
        same(run.path, expected)
        shutil.rmtree(run.path)
        shutil.rmtree(own["UFT_CACHE"])


@pytest.mark.slow
def test_killed_at_random_moments(bench: Bench, new_run: NewRun, tmp_path: Path) -> None:
    """By the clock, wherever that may be; FAULT_KILLS of them, 60 unless it is set."""
    whole, kills = new_run("whole", *LOOP), int(os.environ.get("FAULT_KILLS", "60"))
    began = time.monotonic()
    sit_to_the_end(bench, whole)
    length, expected, chance, runs = time.monotonic() - began, written(whole.path), random.Random(6), 0
    shutil.rmtree(tmp_path / "cache")
    while kills > 0:
        runs += 1
        run = new_run(f"died-{runs}", *LOOP)
        while run.status != "finished":
            session = bench.start(run.path)
            if kills > 0:
                time.sleep(chance.uniform(0, 1.2 * length))
                kills -= session.process.poll() is None
                session.process.kill()
            session.wait()
        same(run.path, expected)
        shutil.rmtree(run.path)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
