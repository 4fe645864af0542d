"""Killed or asked to stop in any phase: in the end the run is the one to which nothing happened, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time

import pytest
from evidence import kinds, same, written
from planting import Fault
from sessions import LOOP, SINGLE

DEATHS = (
    ("kill", "before tokens._encode", "", 0),
    ("kill", "after reference.ReferenceColumn._compute", "", 0),
    ("kill", "after flush", "/.metrics.jsonl.seals", 0),  # a seal without its line
    ("half", "before write", "/metrics.jsonl", 1),
    ("kill", "before generate.complete", "", 0),
    ("half", "before write", "/state.json", 0),
    ("kill", "before os.replace", "/.step-000003.tmp", 0),
    ("kill", "before os.unlink", "tensors.safetensors", 0),  # an old checkpoint half deleted
    ("kill", "before os.replace", "/.model.tmp", 0),
    ("kill", "before open", "/.result.json", 0),
)
"""(what happens, moment, file, number) in the order in which a run meets them; `half` of what was to be written is
there. Every other kind of moment is in the long part."""

STOPS = (
    ("terminate", "before tokens._encode", ""),
    ("warn", "before reference.ReferenceColumn._compute", ""),
    ("terminate", "before generate.complete", ""),
    ("warn", "after step.all_reduce_terms", ""),
    ("terminate", "before os.replace", "/.step-000003.tmp"),
)


def test_killed_in_one_phase_after_the_other(bench, new_run, undisturbed, tmp_path):
    died = new_run("died", *SINGLE)
    for do, name, path, at in DEATHS:
        fault = Fault(do=do, name=name, path=path, at=at, roots=(str(tmp_path),))
        bench.sit(died.path, fault=fault, code=-signal.SIGKILL)
        assert died.status == "interrupted"
    bench.sit(died.path, code=0)
    assert died.status == "finished"
    same(died.path, undisturbed(*SINGLE))


@pytest.mark.slow
def test_asked_to_stop_in_one_phase_after_the_other(bench, new_run, undisturbed, tmp_path):
    """SIGTERM and SIGUSR1: exit code 75, and nothing is done that the next session would have to undo."""
    stopped = new_run("stopped", *SINGLE)
    for do, name, path in STOPS:
        bench.sit(stopped.path, fault=Fault(do=do, name=name, path=path, roots=(str(tmp_path),)), code=75)
        assert stopped.status == "stopped"
        assert stopped.result()["steps"] == stopped.steps
    bench.sit(stopped.path, code=0)
    same(stopped.path, undisturbed(*SINGLE))


# --- the long part


@pytest.mark.slow
@pytest.mark.parametrize("words", [SINGLE, LOOP], ids=["one training", "stages"])
def test_killed_at_every_kind_of_moment(bench, new_run, tmp_path, words):
    """Each of them once, in a run of its own, every write torn too; which of those that are alike is left to chance."""
    whole, log, roots = new_run("whole", *words), tmp_path / "moments", (str(tmp_path),)
    bench.sit(whole.path, fault=Fault(log=str(log), roots=roots), code=0)
    expected, chance, found = written(whole.path), random.Random(5), kinds(log)
    assert len(found) > 100
    hits = [(do, name, chance.choice(places)) for name, places in found.items() for do in ("kill", "half")]
    for number, (do, name, place) in enumerate(hits):
        if do == "half" and not name.startswith("before write"):
            continue
        run, own = new_run(f"died-{number}", *words), {"UFT_CACHE": str(tmp_path / f"cache-{number}")}
        ended = bench.sit(run.path, fault=Fault(do=do, at=place, roots=roots), **own)
        assert ended.code in (-signal.SIGKILL, 0), f"{name}\n{ended.said}"
        ended = bench.sit(run.path, **own)
        assert ended.code == 0, f"{name}\n{ended.said}"
        same(run.path, expected)
        shutil.rmtree(run.path)
        shutil.rmtree(own["UFT_CACHE"])


@pytest.mark.slow
def test_killed_at_random_moments(bench, new_run, tmp_path):
    """By the clock, wherever that may be; FAULT_KILLS of them, 60 unless it is set."""
    whole, kills = new_run("whole", *LOOP), int(os.environ.get("FAULT_KILLS", "60"))
    began = time.monotonic()
    bench.sit(whole.path, code=0)
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
