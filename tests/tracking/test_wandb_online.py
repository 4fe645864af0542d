"""W&B runs as a stand-in for the server sees them, and what is said where there is no server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
from records import SAMPLES, curve, load, segments
from standin import KEY

from uft.errors import UftError
from uft.tracking import make_tracker


def test_auto_without_a_key_goes_on_at_once_on_a_terminal(new_run, config):
    """A terminal is where wandb would prompt."""
    import pty

    program = (
        "import json, sys, time; from pathlib import Path; from uft.runs import Run; from uft.tracking import wandb\n"
        "import wandb as imported; began = time.monotonic(); assert sys.stdin.isatty()\n"
        "t = wandb.Wandb(Run(Path(sys.argv[1])), json.loads(sys.argv[2])); t.start(); t.log(1, {'loss': 1.0})\n"
        "t.finish('finished', 0, {}); print('seconds', time.monotonic() - began)"
    )
    run, (leader, follower) = new_run(), pty.openpty()
    command = [sys.executable, "-c", program, str(run.path), json.dumps(config("auto"))]
    done = subprocess.run(command, stdin=follower, capture_output=True, text=True, timeout=60)
    os.close(leader)
    os.close(follower)
    assert done.stderr == ""
    assert "W&B is offline: no API key" in done.stdout
    assert float(done.stdout.split()[-1]) < 10
    assert load(segments(run)[0])["exit"] == 0


def test_auto_without_a_network_goes_on(open_wandb, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    said: list[str] = []
    tracker = open_wandb("auto", say=said.append)
    tracker.finish("finished", 0, {})
    assert (tracker.mode, len(said)) == ("offline", 1)
    assert f"127.0.0.1:{port} does not answer" in said[0]


def test_online_without_a_key_is_refused_before_training(open_wandb):
    with pytest.raises(UftError) as refused:
        open_wandb("online")
    assert refused.value.code == 2
    assert "no W&B API key" in str(refused.value)
    assert "wandb login" in str(refused.value)


def test_online_with_a_key_that_cannot_be_one_is_refused(open_wandb, server, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UftError, match=r"tracking\.mode=online"):
        open_wandb("online")
    tracker = open_wandb("auto")
    assert tracker.mode == "offline"
    tracker.finish("finished", 0, {})


def test_wandb_mode_of_the_environment_decides_auto(open_wandb, server, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = open_wandb("auto")
    tracker.finish("finished", 0, {})
    assert tracker.mode == "offline"
    assert server.operations == []


# Online, with a stand-in for the server


def test_an_online_run_as_the_server_sees_it(open_wandb, server, capfd):
    said: list[str] = []
    tracker = open_wandb("auto", say=said.append, group="sweep-1", tags=["paper"])
    run_id = tracker.run.info()["id"]
    for step in range(1, 4):
        tracker.log(step, {"loss": 1 / step, "tokens": 100 * step})
    tracker.log(3, {"eval/nll": 0.5})
    tracker.samples(3, SAMPLES)
    assert tracker.description.startswith(f"metrics.jsonl, W&B online: {server.url}")
    tracker.finish("failed", 1, {"best/eval/nll": 0.5})

    assert curve(server.history[run_id], "loss") == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert curve(server.history[run_id], "eval/nll") == [(3, 0.5)]
    assert len(server.history[run_id]) == 3
    assert server.history[run_id][2]["samples"]["nrows"] == 2
    assert server.exits == {run_id: 1}
    sent = server.runs[run_id]
    assert (sent["project"], sent["groupName"], sent["jobType"]) == ("uft", "sweep-1", "train")
    assert sorted(sent["tags"]) == ["ift", "mix", "paper", "playground"]
    assert json.loads(sent["config"])["objective"]["value"]["beta"] == 0.1
    summary = json.loads(server.uploads["wandb-summary.json"])
    assert (summary["status"], summary["best/eval/nll"], summary["loss"]) == ("failed", 0.5, 1 / 3)
    info = tracker.run.info()["wandb"]
    assert info["mode"] == "online"
    assert info["url"].endswith(run_id)
    assert said == []
    assert capfd.readouterr().err == ""


def test_a_resumed_online_run_has_every_step_and_every_evaluation(open_wandb, server):
    """It had sent steps up to 7 when it was killed during the evaluation of 7; the checkpoint is of step 5."""
    first = open_wandb("online")
    for step in range(1, 8):
        first.log(step, {"loss": 1 / step})
    first.finish("failed", 1, {})
    second = open_wandb("online", run=first.run)
    for step in range(6, 10):
        second.log(step, {"loss": 1 / step})
        if step % 7 == 0:
            second.log(step, {"eval/nll": 0.5})
    second.finish("finished", 0, {})
    run_id = first.run.info()["id"]
    rows = server.history[run_id]
    assert dict(curve(rows, "loss")) == {step: 1 / step for step in range(1, 10)}
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 7, 8, 9]
    assert curve(rows, "eval/nll") == [(7, 0.5)]
    assert server.exits == {run_id: 0}


def test_a_run_that_was_offline_goes_online_with_all_its_rows(server, new_run, config):
    run = new_run()
    for mode, steps, resumed in (("offline", range(1, 6), None), ("online", range(6, 9), 5)):
        tracker = make_tracker(run, config(mode), resumed_step=resumed)
        tracker.start()
        for step in steps:
            tracker.log(step, {"loss": 1 / step})
        tracker.finish("finished", 0, {})
    assert curve(server.history[run.info()["id"]], "loss") == [(step, 1 / step) for step in range(1, 9)]
