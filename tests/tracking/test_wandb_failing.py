"""A W&B that fails, is slow or dies: training goes on, and what happened is recorded as it was."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from records import SAMPLES, curve, load, segments
from standin import Standin

from uft.runs import Run
from uft.tracking import make_tracker


def test_a_server_that_never_answers_costs_bounded_time(open_wandb, server):
    server.deaf.set()
    said: list[str] = []
    began = time.monotonic()
    tracker = open_wandb("online", say=said.append, init_timeout=1)
    tracker.log(1, {"loss": 1.0})
    tracker.finish("finished", 0, {})
    assert time.monotonic() - began < 15
    assert tracker.mode == "offline"
    assert len(said) == 1
    assert said[0].startswith("W&B is offline: ")
    assert curve(load(segments(tracker.run)[0])["history"], "loss") == [(1, 1.0)]


def test_a_network_that_dies_during_training_costs_bounded_time(open_wandb, server):
    said: list[str] = []
    tracker = open_wandb("online", say=said.append, finish_timeout=1)
    server.deaf.set()
    for step in range(1, 50):
        tracker.log(step, {"loss": 1 / step})
    began = time.monotonic()
    tracker.finish("finished", 0, {})
    assert time.monotonic() - began < 15
    (folder,) = segments(tracker.run)
    assert len(said) == 1
    assert said[0].endswith(f"uft sync {tracker.run.path}")
    assert tracker.run.info()["wandb"]["unsent"] == [str(folder.relative_to(tracker.run.path))]
    assert len(load(folder)["history"]) == 49


# When things die


def test_a_failing_wandb_warns_once_and_never_stops_training(open_wandb, monkeypatch):
    said: list[str] = []
    tracker = open_wandb(say=said.append)
    tracker.log(1, {"loss": 1.0})

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("disk is full\nat length")

    monkeypatch.setattr(tracker._handle, "log", fail)
    tracker.log(2, {"loss": 0.5})
    tracker.log(3, {"loss": 0.25})
    tracker.samples(3, SAMPLES)
    assert said == ["W&B stopped taking metrics (disk is full); metrics.jsonl has everything."]
    tracker.finish("finished", 0, {})
    assert load(segments(tracker.run)[0])["exit"] == 0


def test_a_wandb_whose_service_was_killed_never_stops_training(open_wandb):
    said: list[str] = []
    tracker = open_wandb(say=said.append)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    (service,) = (child for child in children if "wandb-core" in Path(f"/proc/{child}/cmdline").read_text())
    os.kill(int(service), signal.SIGKILL)
    for step in range(1, 50):
        tracker.log(step, {"loss": 1 / step})
        time.sleep(0.005)
    tracker.finish("finished", 0, {})
    assert 1 <= len(said) <= 2


def test_a_wandb_that_cannot_start_never_stops_training(open_wandb):
    said: list[str] = []
    tracker = open_wandb(say=said.append, project="no/such name")
    tracker.log(1, {"loss": 1.0})
    tracker.finish("finished", 0, {})
    assert len(said) == 1
    assert said[0].startswith("W&B could not start (")
    assert tracker.description == "metrics.jsonl, no W&B"


PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
from uft.runs import Run
from uft.tracking import make_tracker
tracker = make_tracker(Run(Path(sys.argv[1])), json.loads(sys.argv[2]))
tracker.start()
for step in range(1, 301):
    tracker.log(step, {"loss": 1 / step})
"""


def execute(run: Run, config: Mapping[str, Any], ending: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM + ending, str(run.path), json.dumps(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_a_crash_is_recorded_as_a_crash(new_run, config):
    run = new_run()
    assert execute(run, config(), "raise RuntimeError('bug')").returncode == 1
    found = load(segments(run)[0])
    assert found["exit"] == 1
    assert len(found["history"]) == 300


def test_control_c_reaches_the_service_too_and_does_no_harm(new_run, config):
    """The kernel sends it to every process of the terminal's group."""
    ending = """
signal.signal(signal.SIGINT, lambda *_: None)
os.killpg(0, signal.SIGINT)
time.sleep(0.3)
tracker.log(301, {"loss": 0.5})
tracker.finish("stopped", 130, {})
"""
    run = new_run()
    done = execute(run, config(), ending, start_new_session=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = load(segments(run)[0])
    assert len(found["history"]) == 301
    assert found["exit"] == 130


def test_a_killed_and_resumed_offline_run_can_be_uploaded_whole(new_run, config, server):
    """A kill loses rows that wandb held in memory, and `wandb sync` gives up at the torn end that it leaves."""
    run = new_run()
    assert execute(run, config(), "os.kill(os.getpid(), signal.SIGKILL)").returncode == -signal.SIGKILL
    (first,) = segments(run)
    time.sleep(1)  # the service notices that its process died, and segments are ordered by their second
    file = next(first.glob("*.wandb"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])  # however much it had time to write
    reached = load(first)["history"][-1]["step"]
    assert 1 < reached < 290

    resumed = make_tracker(run, config(), resumed_step=290)
    resumed.start()
    for step in range(291, 321):
        resumed.log(step, {"loss": 1 / step})
    resumed.finish("finished", 0, {})

    command = [sys.executable, "-m", "wandb", "sync", *map(str, segments(run))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=run.path)
    assert done.returncode == 0
    assert not re.search("error|fail", done.stdout + done.stderr, re.IGNORECASE)
    uploaded = curve(server.history[run.info()["id"]], "loss")
    assert uploaded == [(step, 1 / step) for step in range(1, 321)]


def test_a_stand_in_keeps_what_it_is_sent():
    """The tests above are as good as the stand-in."""
    standin = Standin()
    try:
        message = {"files": {"wandb-history.jsonl": {"offset": 0, "content": ['{"step": 1}', '{"step": 2}']}}}
        standin.answer("/files/e/p/run1/file_stream", json.dumps(message).encode())
        message = {"files": {"wandb-history.jsonl": {"offset": 1, "content": ['{"step": 3}']}}, "complete": True}
        standin.answer("/files/e/p/run1/file_stream", json.dumps(message | {"exitcode": 1}).encode())
        assert standin.history == {"run1": [{"step": 1}, {"step": 3}]}
        assert standin.exits == {"run1": 1}
    finally:
        standin.close()
