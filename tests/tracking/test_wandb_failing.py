"""A W&B that fails, is slow or dies: training goes on, and `uft sync` sends the rest exactly once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from records import SAMPLES, curve

from uft.runs import write_json
from uft.tracking.metrics import Files
from uft.tracking.trackers import Trackers, make_tracker
from uft.tracking.wandb import WAITING, Wandb, unsent, upload, upload_state


@pytest.mark.slow
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
    assert unsent(tracker.run)


@pytest.mark.slow
def test_a_network_that_dies_during_training_costs_bounded_time_and_sync_sends_the_rest(new_run, config, server):
    said: list[str] = []
    run = new_run()
    tracker = Trackers(Files(run), Wandb(run, config(), said.append, finish_timeout=2))
    tracker.start()
    server.deaf.set()
    began = time.monotonic()
    for step in range(1, 50):
        tracker.log(step, {"loss": 1 / step})
        if step == 20:
            tracker.samples(step, SAMPLES)  # a table, which wandb uploads before it returns
    assert time.monotonic() - began < 1
    tracker.finish("finished", 0, {})
    assert time.monotonic() - began < 15
    assert len(said) == 1
    assert said[0].endswith(f"uft sync {run.path}")
    write_json(run.path / "result.json", {"status": "finished", "steps": 49})
    write_json(run.config_file, config())
    assert upload_state(run) == "due"

    server.deaf.clear()
    assert upload(run) == (49, "")
    rows = server.history[run.info()["id"]]
    assert curve(rows, "loss") == [(step, 1 / step) for step in range(1, 50)]
    assert [step for step, _ in curve(rows, "samples")] == [20]
    assert upload_state(run) == "arrived"


def test_a_wandb_that_does_not_keep_up_is_left_behind(open_wandb, server, monkeypatch):
    said: list[str] = []
    tracker = open_wandb(say=said.append, finish_timeout=5)
    held = threading.Event()
    monkeypatch.setattr(tracker._handle, "log", lambda *args, **kwargs: held.wait(60))
    for step in range(WAITING + 5):
        tracker.log(step, {"loss": 1.0})
    assert said == ["W&B stopped taking metrics (it does not keep up: 10000 rows wait); metrics.jsonl has everything."]
    held.set()
    tracker.finish("finished", 0, {})
    assert server.exits == {tracker.run.info()["id"]: 0}
    assert unsent(tracker.run)


def test_a_failing_wandb_warns_once_and_never_stops_training(open_wandb, server, monkeypatch):
    said: list[str] = []
    tracker = open_wandb(say=said.append)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("disk is full\nat length")

    monkeypatch.setattr(tracker._handle, "log", fail)
    tracker.log(1, {"loss": 0.5})
    tracker._sender.join(10)
    tracker.log(2, {"loss": 0.25})
    tracker.samples(3, SAMPLES)
    assert said == ["W&B stopped taking metrics (disk is full); metrics.jsonl has everything."]
    tracker.finish("finished", 0, {})
    assert server.exits == {tracker.run.info()["id"]: 0}
    assert said[1:] == [f"W&B did not take everything (disk is full). Upload the rest:  uft sync {tracker.run.path}"]
    assert unsent(tracker.run)


def test_a_wandb_whose_service_was_killed_never_stops_training(open_wandb, server):
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
    assert unsent(tracker.run)


@pytest.mark.parametrize("absent", [False, True], ids=["refused", "not installed"])
def test_a_wandb_that_cannot_start_never_stops_training(open_wandb, server, monkeypatch, absent):
    said: list[str] = []
    with monkeypatch.context() as without:
        if absent:
            without.setitem(sys.modules, "wandb", None)
        tracker = open_wandb("auto", say=said.append, project="no/such name")
        tracker.log(1, {"loss": 1.0})
        tracker.finish("finished", 0, {})
    assert (tracker.mode, len(said)) == ("offline", 1)
    assert said[0].startswith("W&B is offline: ")
    assert absent or "no/such name" in said[0]


@pytest.mark.slow
def test_a_fork_that_ends_takes_no_files_away(new_run, config, server):
    """Jobs of a sweep are forks of one process that has imported wandb, and with it made a folder for tables."""
    program = """
import json, os, sys, wandb
from pathlib import Path
from uft.runs import Run
from uft.tracking.trackers import make_tracker
from uft.evaluation.evaluate import Sample
if os.fork() == 0:
    sys.exit()
os.wait()
tracker = make_tracker(Run(Path(sys.argv[1])), json.loads(sys.argv[2]))
tracker.start()
tracker.samples(1, [Sample("sums", "sums.jsonl:1", "3+4?", "7", "7", {})])
tracker.finish("finished", 0, {})
"""
    run = new_run()
    command = [sys.executable, "-c", program, str(run.path), json.dumps(config())]
    assert subprocess.run(command, capture_output=True, text=True).stdout == ""
    assert [step for step, _ in curve(server.history[run.info()["id"]], "samples")] == [1]


PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
from uft.runs import Run
from uft.tracking.trackers import make_tracker
tracker = make_tracker(Run(Path(sys.argv[1])), json.loads(sys.argv[2]))
tracker.start()
for step in range(1, 61):
    tracker.log(step, {"loss": 1 / step})
"""


@pytest.mark.slow
def test_a_crash_is_recorded_and_control_c_does_no_harm(new_run, config, server):
    """The kernel sends Ctrl-C to every process of the terminal's group: to wandb's service too."""
    interrupted = """
signal.signal(signal.SIGINT, lambda *_: None)
os.killpg(0, signal.SIGINT)
time.sleep(0.3)
tracker.log(61, {"loss": 0.5})
tracker.finish("stopped", 130, {})
"""
    crash, stop = new_run("crash"), new_run("stop")
    started = []
    for run, ending in ((crash, "raise RuntimeError('bug')"), (stop, interrupted)):
        command = [sys.executable, "-c", PROGRAM + ending, str(run.path), json.dumps(config())]
        started.append(subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True))
    assert [process.wait(60) for process in started] == [1, 0]
    assert server.exits == {crash.info()["id"]: 1, stop.info()["id"]: 130}
    assert {run.name: len(server.history[run.info()["id"]]) for run in (crash, stop)} == {"crash": 60, "stop": 61}


@pytest.mark.parametrize("resumed", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["resumed", "synced"])
def test_what_a_kill_takes_from_wandbs_memory_arrives_once(new_run, config, server, resumed):
    """Rows of the end, and the evaluation and the table of the last step that arrived."""
    run = new_run()
    tracker = make_tracker(run, config())
    tracker.start()
    for step in range(1, 61):
        tracker.log(step, {"loss": 1 / step})
        if step == 40:
            tracker.log(step, {"eval/nll": 0.5})
            tracker.samples(step, SAMPLES)
    tracker.finish("failed", 1, {})
    run_id = run.info()["id"]
    rows = server.history[run_id]
    rows[39:] = [{name: rows[39][name] for name in ("step", "_step", "train/loss")}]
    run.update_info(wandb={**run.info()["wandb"], "sent": None})
    if resumed:
        tracker = make_tracker(run, config(), resumed_step=58)
        tracker.start()
        for step in range(59, 65):
            tracker.log(step, {"loss": 1 / step})
        tracker.finish("finished", 0, {})
    else:
        write_json(run.config_file, config())
        assert upload(run) == (21, "")
    last = 64 if resumed else 60
    assert curve(server.history[run_id], "loss") == [(step, 1 / step) for step in range(1, last + 1)]
    assert curve(server.history[run_id], "eval/nll") == [(40, 0.5)]
    assert [step for step, _ in curve(server.history[run_id], "samples")] == [40]
