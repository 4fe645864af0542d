"""Offline runs reach the server whole, whatever happened to their files."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from standin import KEY, Standin

from uft.cli import main
from uft.config.compose import compose
from uft.config.freeze import plain
from uft.runs import Run, create_run, write_json
from uft.tracking import make_tracker
from uft.tracking.sync import Segment, given_up, plan, segments_of

ROOT = Path(__file__).resolve().parents[2]
STEPS = 300  # more than a block of 32 KiB


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Callable[..., Run]:
    """offline(name, first, last): a sitting of a run that logged these steps offline."""
    settings = plain(compose(["tracking.mode=offline"]))
    monkeypatch.chdir(tmp_path)

    def sit(name: str, first: int, last: int, status: str = "finished") -> Run:
        run = Run(tmp_path / "outputs" / name)
        if not run.exists:
            create_run(run.path, json.dumps(settings), [])
        tracker = make_tracker(run, settings, resumed_step=first - 1, say=lambda line: None)
        tracker.start()
        for step in range(first, last + 1):
            tracker.log(step, {"loss": 1 / step})
        code = {"finished": 0, "stopped": 75}[status]
        tracker.finish(status, code, {})
        write_json(run.path / "result.json", {"status": status, "steps": last})
        time.sleep(1.01)  # segments are ordered by their second
        return run

    return sit


def curve(server: Standin, run: Run) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in server.history[run.info()["id"]] if "loss" in row]


def whole(last: int, first: int = 1) -> list[tuple[int, float]]:
    return [(step, 1 / step) for step in range(first, last + 1)]


def test_torn_segments_and_those_after_them_arrive_and_a_second_call_does_nothing(offline, server, capsys):
    run = offline("torn", 1, STEPS, "stopped")
    offline("torn", STEPS + 1, STEPS + 20)
    fine = offline("fine", 1, 3)
    first, second = segments_of(run)
    data = first.file.read_bytes()
    first.file.write_bytes(data[: len(data) - 5000])

    assert main(["sync", "--dry-run"]) == 0
    assert "2 runs would be uploaded" in capsys.readouterr().out
    assert first.file.stat().st_size == len(data) - 5000

    assert main(["sync"]) == 0
    out = capsys.readouterr().out
    assert "outputs/torn  2 segments arrived" in out
    assert "was torn: " in out
    assert "outputs/fine  1 segment arrived" in out
    steps = [step for step, _ in curve(server, run)]
    lost = sorted(set(range(1, STEPS + 21)) - set(steps))
    assert curve(server, run) == [point for point in whole(STEPS + 20) if point[0] not in lost]
    assert 0 < len(lost) < 30
    assert lost == list(range(lost[0], STEPS + 1)), "all up to the tear, and the later segment"
    assert curve(server, fine) == whole(3)
    assert server.exits == {run.info()["id"]: 0, fine.info()["id"]: 0}
    assert not first.original.exists()
    assert first.arrived
    assert second.arrived

    sent = len(server.operations)
    assert main(["sync", "outputs"]) == 0
    assert "2 runs arrived earlier\nNothing to upload." in capsys.readouterr().out
    assert len(server.operations) == sent


def test_without_a_key_or_a_network_it_is_said_what_waits(offline, server, monkeypatch, capsys):
    run = offline("waits", 1, 3)
    monkeypatch.delenv("WANDB_API_KEY")
    assert main(["sync", str(run.path)]) == 2
    out, err = capsys.readouterr()
    assert "1 runs wait to be uploaded" in out
    assert "no W&B API key" in err
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    sys.modules["wandb"].teardown()  # it remembers the server
    assert main(["sync", str(run.path)]) == 1
    out, err = capsys.readouterr()
    assert "waits" in out
    assert f"127.0.0.1:{port} does not answer" in err
    assert not segments_of(run)[0].arrived


def test_what_did_not_arrive_is_told_with_the_reason_and_the_rest_arrives(offline, server, capsys):
    broken, fine = offline("broken", 1, 3), offline("fine", 1, 3)
    (segment,) = segments_of(broken)
    with open(segment.file, "r+b") as file:
        file.write(b"nope")  # not even the header is left
    assert main(["sync"]) == 1
    out, err = capsys.readouterr()
    assert "outputs/broken  did NOT arrive: offline-run-" in out
    assert "its first bytes are damaged" in out
    assert "outputs/fine  1 segment arrived" in out
    assert "1 of 2 runs did not arrive" in err
    assert curve(server, fine) == whole(3)


def test_what_wandb_says_of_a_run_is_its_reason(offline, server, capsys, monkeypatch):
    run = offline("torn", 1, 40)
    (segment,) = segments_of(run)
    segment.file.write_bytes(segment.file.read_bytes()[:-50])
    monkeypatch.setattr("uft.tracking.wandb.repair", lambda file, keep: 0)
    assert main(["sync"]) == 1
    out = capsys.readouterr().out
    assert "outputs/torn  did NOT arrive: Failed to sync all data" in out
    assert "incomplete record" in out


def test_runs_that_are_left_alone(offline, tmp_path, capsys):
    run = offline("busy", 1, 3)
    create_run(tmp_path / "outputs" / "untracked", "{}\n", [])
    with run.lock():
        assert main(["sync", "outputs"]) == 0
    out = capsys.readouterr().out
    assert "outputs/busy  is running" in out
    assert "outputs/untracked  has no W&B files" in out
    assert main(["sync", "nowhere"]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_online_segments_are_sent_again_only_where_something_is_missing(tmp_path):
    run = create_run(tmp_path / "r", "{}\n", [])
    file = run.path / "wandb" / "run-20260101_000000-x" / "run-x.wandb"
    file.parent.mkdir(parents=True)
    file.write_bytes(b":W&B\0\0\0")
    assert [s.file for s in plan(run).segments] == [file], "it has no end: its process was killed"
    file.with_suffix(".wandb.synced").touch()
    assert plan(run).segments == []
    assert plan(run).before == 1
    assert Segment(file).online


def test_an_upload_that_says_nothing_is_given_up():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.PIPE, text=True)
    with given_up(process, 0.2):
        assert process.stdout.read() == ""
    assert process.wait(5) == -signal.SIGKILL


@pytest.fixture
def killed(tmp_path, monkeypatch) -> Run:
    """A real offline run after kill -9 within training."""
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
    time.sleep(1)
    return run


def losses(rows: list[dict]) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def written(run: Run) -> dict[int, float]:
    return losses([json.loads(line) for line in run.metrics_file.read_text().splitlines()])


@pytest.mark.slow
def test_a_real_run_that_was_killed_arrives_with_all_that_it_logged(killed, server, capsys):
    assert main(["sync", "r"]) == 0
    assert "taken from metrics.jsonl" in capsys.readouterr().out
    rows = server.history[killed.info()["id"]]
    assert losses(rows) == written(killed)
    assert len(rows) == len(losses(rows))
    assert server.exits[killed.info()["id"]] == 1


@pytest.mark.slow
def test_a_real_run_that_was_killed_uploaded_resumed_and_uploaded_again(killed, server):
    assert main(["sync", "r"]) == 0
    assert subprocess.run([sys.executable, "-m", "uft", "resume", "r"], stdout=subprocess.DEVNULL).returncode == 0
    assert main(["sync", "r"]) == 0
    assert losses(server.history[killed.info()["id"]]) == written(killed)
    assert sorted(written(killed)) == list(range(1, 61))
    assert server.exits[killed.info()["id"]] == 0
