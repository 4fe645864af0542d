"""A W&B that fails, is slow or dies: training goes on, and `uft sync` sends the rest exactly once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from records import SAMPLES, curve
from standin import Standin

from uft.runs import Run, write_json
from uft.tracking import Trackers, make_tracker
from uft.tracking.metrics import Files
from uft.tracking.wandb import Wandb, plan, send, unsent


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


def test_a_network_that_dies_during_training_costs_bounded_time_and_sync_sends_the_rest(new_run, config, server):
    said: list[str] = []
    run = new_run()
    tracker = Trackers(Files(run), Wandb(run, config(), said.append, finish_timeout=1))
    tracker.start()
    server.deaf.set()
    for step in range(1, 50):
        tracker.log(step, {"loss": 1 / step})
    began = time.monotonic()
    tracker.finish("finished", 0, {})
    assert time.monotonic() - began < 15
    assert len(said) == 1
    assert said[0].endswith(f"uft sync {run.path}")
    write_json(run.path / "result.json", {"status": "finished", "steps": 49})
    write_json(run.config_file, config())
    upload = plan(run)
    assert upload.due

    server.deaf.clear()
    send([upload], said.append)
    assert upload.arrived, upload.why
    rows = server.history[run.info()["id"]]
    assert curve(rows, "loss") == [(step, 1 / step) for step in range(1, 50)]
    assert not plan(run).due


def test_a_failing_wandb_warns_once_and_never_stops_training(open_wandb, server, monkeypatch):
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


def test_a_wandb_that_cannot_start_never_stops_training(open_wandb, server):
    said: list[str] = []
    tracker = open_wandb(say=said.append, project="no/such name")
    tracker.log(1, {"loss": 1.0})
    tracker.finish("finished", 0, {})
    assert len(said) == 1
    assert said[0].startswith("W&B is offline: ")
    assert "no/such name" in said[0]


def test_without_the_package_training_goes_on(open_wandb, server, monkeypatch):
    said: list[str] = []
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "wandb", None)
        tracker = open_wandb("auto", say=said.append)
        tracker.log(1, {"loss": 1.0})
        tracker.finish("finished", 0, {})
    assert tracker.mode == "offline"
    assert len(said) == 1
    assert said[0].startswith("W&B is offline: ")


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


def execute(run: Run, config: Mapping[str, Any], ending: str) -> int:
    command = [sys.executable, "-c", PROGRAM + ending, str(run.path), json.dumps(config)]
    return subprocess.run(command, capture_output=True, timeout=60, start_new_session=True).returncode


def test_a_crash_is_recorded_as_a_crash(new_run, config, server):
    run = new_run()
    assert execute(run, config(), "raise RuntimeError('bug')") == 1
    assert server.exits == {run.info()["id"]: 1}
    assert len(server.history[run.info()["id"]]) == 300


def test_control_c_reaches_the_service_too_and_does_no_harm(new_run, config, server):
    """The kernel sends it to every process of the terminal's group."""
    ending = """
signal.signal(signal.SIGINT, lambda *_: None)
os.killpg(0, signal.SIGINT)
time.sleep(0.3)
tracker.log(301, {"loss": 0.5})
tracker.finish("stopped", 130, {})
"""
    run = new_run()
    assert execute(run, config(), ending) == 0
    assert len(server.history[run.info()["id"]]) == 301
    assert server.exits == {run.info()["id"]: 130}


@pytest.mark.parametrize("resumed", [True, False], ids=["resumed", "synced"])
def test_what_a_kill_takes_from_wandbs_memory_arrives_once(new_run, config, server, resumed):
    """Rows of the end, and the evaluation and the table of the last step that arrived."""
    run = new_run()
    tracker = make_tracker(run, config())
    tracker.start()
    for step in range(1, 301):
        tracker.log(step, {"loss": 1 / step})
        if step == 200:
            tracker.log(step, {"eval/nll": 0.5})
            tracker.samples(step, SAMPLES)
    tracker.finish("failed", 1, {})
    run_id = run.info()["id"]
    rows = server.history[run_id]
    rows[199:] = [{name: rows[199][name] for name in ("step", "_step", "loss")}]
    run.update_info(wandb={**run.info()["wandb"], "sent": None})
    if resumed:
        tracker = make_tracker(run, config(), resumed_step=290)
        tracker.start()
        for step in range(291, 321):
            tracker.log(step, {"loss": 1 / step})
        tracker.finish("finished", 0, {})
    else:
        write_json(run.config_file, config())
        upload = plan(run)
        send([upload], print)
        assert (upload.arrived, upload.steps) == (True, 101)
    last = 320 if resumed else 300
    assert curve(server.history[run_id], "loss") == [(step, 1 / step) for step in range(1, last + 1)]
    assert curve(server.history[run_id], "eval/nll") == [(200, 0.5)]
    assert [step for step, _ in curve(server.history[run_id], "samples")] == [200]


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
