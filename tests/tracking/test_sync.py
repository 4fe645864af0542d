"""Runs that were offline reach the server whole and once, from metrics.jsonl and samples.jsonl."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from records import SAMPLES, curve
from standin import Standin

from uft.cli import main
from uft.config.compose import compose
from uft.config.frozen import to_builtins
from uft.runs import Run, create_run, write_json
from uft.tracking.trackers import make_tracker
from uft.tracking.wandb import extent, upload_state

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def settings() -> dict:
    return to_builtins(compose(["tracking.mode=offline"]))


@pytest.fixture
def offline(tmp_path, monkeypatch, settings) -> Callable[..., Run]:
    """offline(name, first, last): a session of a run that logged these steps offline."""
    monkeypatch.chdir(tmp_path)

    def session(name: str, first: int, last: int, status: str = "finished", **tracking: str) -> Run:
        run = Run(tmp_path / "outputs" / name)
        config = {**settings, "tracking": {**settings["tracking"], **tracking}}
        if not run.exists:
            create_run(run.path, json.dumps(config), [])
        tracker = make_tracker(run, config, resumed_step=first - 1, say=lambda line: None)
        tracker.start()
        for step in range(first, last + 1):
            tracker.log(step, {"loss": 1 / step})
        tracker.log(last, {"eval/nll": 0.5 / last})
        tracker.samples(last, SAMPLES)
        tracker.finish(status, {"finished": 0, "stopped": 75}[status], {})
        write_json(run.path / "result.json", {"status": status, "steps": last, "final": {"loss": 1 / last}})
        return run

    return session


def losses(server: Standin, run: Run) -> list[tuple[int, float]]:
    return curve(server.history[run.info()["id"]], "loss")


def whole(last: int) -> list[tuple[int, float]]:
    return [(step, 1 / step) for step in range(1, last + 1)]


@pytest.mark.slow
def test_runs_arrive_and_a_second_call_does_nothing_and_a_longer_run_sends_the_rest(offline, server, capsys):
    run, fine = offline("long", 1, 60, "stopped"), offline("fine", 1, 3)
    assert main(["sync", "--dry-run"]) == 0
    assert "2 runs would be uploaded" in capsys.readouterr().out
    assert server.operations == []

    assert main(["sync"]) == 0
    out = capsys.readouterr().out
    assert "outputs/long  arrived: 60 steps were missing" in out
    assert "outputs/fine  arrived: 3 steps were missing" in out
    assert losses(server, run) == whole(60)
    assert losses(server, fine) == whole(3)
    assert len(server.history[run.info()["id"]]) == 60
    assert server.exits == {run.info()["id"]: 75, fine.info()["id"]: 0}
    assert server.preempted == {run.info()["id"]}
    assert json.loads(server.uploads["wandb-summary.json"])["status"] in ("stopped", "finished")
    assert run.info()["wandb"]["url"].endswith(run.info()["id"])
    assert not (run.path / "wandb").exists()

    sent = len(server.operations)
    assert main(["sync", "outputs"]) == 0
    assert "2 runs arrived earlier\nNothing to upload." in capsys.readouterr().out
    assert len(server.operations) == sent

    offline("long", 61, 80)
    assert main(["sync", "outputs/long"]) == 0
    assert "arrived: 20 steps were missing" in capsys.readouterr().out
    assert losses(server, run) == whole(80)
    assert curve(server.history[run.info()["id"]], "eval/nll") == [(60, 0.5 / 60), (80, 0.5 / 80)]
    assert [step for step, _ in curve(server.history[run.info()["id"]], "samples")] == [60, 80]
    assert server.exits[run.info()["id"]] == 0


def test_without_a_key_or_a_network_it_is_said_what_waits(offline, no_server, monkeypatch, capsys):
    run = offline("waits", 1, 3)
    with monkeypatch.context() as without:
        without.delenv("WANDB_API_KEY")
        assert main(["sync", str(run.path)]) == 2
    out, err = capsys.readouterr()
    assert "1 runs wait to be uploaded" in out
    assert "no W&B API key" in err
    assert main(["sync", str(run.path)]) == 1
    out, err = capsys.readouterr()
    assert "waits" in out
    assert f"{no_server} does not answer" in err
    assert upload_state(run) == "due"


def test_what_did_not_arrive_is_told_with_the_reason_and_the_rest_arrives(offline, server, capsys):
    offline("broken", 1, 3).config_file.write_text("[")
    offline("refused", 1, 3, project="no/such name")
    fine = offline("fine", 1, 3)
    assert main(["sync"]) == 1
    out, err = capsys.readouterr()
    assert "outputs/broken  did NOT arrive: " in out
    assert "config.yaml is damaged" in out
    assert "outputs/refused  did NOT arrive: " in out
    assert "no/such name" in out
    assert "outputs/fine  arrived" in out
    assert "2 of 3 runs did not arrive" in err
    assert losses(server, fine) == whole(3)


def test_runs_that_are_left_alone(offline, tmp_path, capsys):
    run = offline("busy", 1, 3)
    create_run(tmp_path / "outputs" / "untracked", "{}\n", [])
    with run.lock():
        assert main(["sync", "outputs"]) == 0
    out = capsys.readouterr().out
    assert "outputs/busy  is running" in out
    assert "outputs/untracked  was not tracked by W&B" in out
    assert main(["sync", "nowhere"]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_which_runs_of_the_previous_version_are_uploaded(tmp_path):
    """It left W&B's logs in the folder, marked by `wandb sync` when uploaded, and noted online sessions cut off."""
    run = create_run(tmp_path / "r", "{}\n", [])
    log = run.path / "wandb" / "offline-run-20260101_000000-x" / "run-x.wandb"
    log.parent.mkdir(parents=True)
    log.touch()
    cases = [
        ({"mode": "offline"}, "finished", "due"),
        ({"mode": "online"}, "finished", "arrived"),
        ({"mode": "online"}, "interrupted", "due"),
        ({"mode": "online", "unsent": ["wandb/run-1"]}, "finished", "due"),
        ({"mode": "disabled"}, "finished", "untracked"),
        ({"mode": "online", "sent": None}, "failed", "due"),
        ({"mode": "online", "sent": extent(run, "failed")}, "failed", "arrived"),
        ({"mode": "online", "sent": extent(run, "failed")}, "finished", "due"),
    ]
    for info, status, state in cases:
        run.update_info(wandb=info)
        write_json(run.path / "result.json", {"status": status})
        assert upload_state(run) == state, (info, status)
    run.update_info(wandb={"mode": "offline"})
    log.with_suffix(".wandb.synced").touch()
    assert upload_state(run) == "arrived"


@pytest.mark.slow
def test_a_real_run_that_was_killed_uploaded_resumed_and_uploaded_again(tmp_path, monkeypatch, server):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = ["objective=sft", "data=instruct", "eval=none", "train.steps=60", "train.log_every=1", "run.dir=r"]
    words += ["train.batch_size=4", "train.checkpoint_every=15", "tracking.mode=offline", "hardware=cpu"]
    process = subprocess.Popen([sys.executable, "-m", "uft", "train", *words], stdout=subprocess.DEVNULL)
    run, deadline = Run(tmp_path / "r"), time.monotonic() + 300
    while not (run.metrics_file.is_file() and len(run.metrics_file.read_text().splitlines()) > 30):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(int((run.path / ".lock").read_text().split()[0]), signal.SIGKILL)
    assert process.wait(120) == 1

    def written() -> list[tuple[int, float]]:
        lines = map(json.loads, run.metrics_file.read_text().splitlines())
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    for code in (1, 0):
        assert main(["sync", "r"]) == 0
        assert losses(server, run) == written()
        assert server.exits[run.info()["id"]] == code
        if code:
            command = [sys.executable, "-m", "uft", "resume", "r"]
            assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert [step for step, _ in written()] == list(range(1, 61))
