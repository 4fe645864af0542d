"""W&B runs that really ran, read back from their local logs or from a stand-in for the server."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from records import load
from standin import KEY, Standin

from uft.errors import UftError
from uft.evaluation.samples import Sample
from uft.runs import Run
from uft.tracking import make_tracker
from uft.tracking.wandb import Wandb

SAMPLES = [
    Sample("sums", "sums.jsonl:1", "3+4?", "7", "7", {"accuracy": 1.0}),
    Sample("style", "style.jsonl:2", "hello", "hi\nthere", None, {}),
]


@pytest.fixture
def open_wandb(new_run, config) -> Callable[..., Wandb]:
    """A W&B tracker that has started."""

    def start(mode: str = "offline", run: Run | None = None, say=lambda line: None, **tracking: Any) -> Wandb:
        limits = {key: tracking.pop(key) for key in ("init_timeout", "finish_timeout") if key in tracking}
        tracker = Wandb(run or new_run(), config(mode, **tracking), say, **limits)
        tracker.start()
        return tracker

    return start


def segments(run: Run) -> list[Path]:
    return [run.path / name for name in run.info()["wandb"]["dirs"]]


def curve(history: list[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in history if name in row]


def test_an_offline_run_read_back(open_wandb, new_run, home):
    run = new_run("ift-beta0.1", sweep="ignored, the group is given")
    tracker = open_wandb(run=run, group="beta-sweep", tags=["paper", "ift"], project="mine", job_type="search")
    tracker.log(0, {"eval/nll": 3.5})
    tracker.samples(0, SAMPLES)
    for step in range(1, 6):
        tracker.log(step, {"loss": 1 / step, "tokens": 100 * step, "rows": 4 * step, "objective/ift": math.nan})
    tracker.log(5, {"eval/nll": 2.5})
    tracker.samples(5, SAMPLES)
    tracker.finish("finished", 0, {"best/eval/nll": 2.5, "best/step": 5})

    (folder,) = segments(run)
    assert folder.parent == run.path / "wandb"
    found = load(folder)
    assert found["id"] == run.info()["id"]
    assert found["name"] == "ift-beta0.1"
    assert (found["project"], found["group"], found["job_type"]) == ("mine", "beta-sweep", "search")
    assert sorted(found["tags"]) == ["ift", "mix", "paper", "playground"]
    assert found["config"]["objective"] == {"name": "ift", "beta": 0.1}
    assert found["config"]["data"]["sources"]["a"]["share"] is None
    assert found["metrics"] == {"step": ("", True), "tokens": ("", True), "rows": ("", True), "*": ("step", False)}
    assert [row["_step"] for row in found["history"]] == [0, 1, 2, 3, 4, 5]
    assert curve(found["history"], "loss") == [(step, 1 / step) for step in range(1, 6)]
    assert curve(found["history"], "eval/nll") == [(0, 3.5), (5, 2.5)]
    assert math.isnan(found["history"][1]["objective/ift"])
    assert found["summary"]["best/eval/nll"] == 2.5
    assert found["summary"]["status"] == "finished"
    assert found["exit"] == 0
    assert not found["preempting"]
    assert run.info()["wandb"] | {"dirs": []} == {"id": run.info()["id"], "mode": "offline", "url": None, "dirs": []}
    written = [path.relative_to(home) for path in home.rglob("*") if path.is_file() and "log" not in str(path)]
    assert written == [], "W&B wrote outside of the run folder"


def test_samples_are_a_table_at_every_evaluation(open_wandb):
    tracker = open_wandb()
    tracker.samples(0, SAMPLES)
    tracker.samples(10, SAMPLES[::-1])
    tracker.finish("finished", 0, {})
    (folder,) = segments(tracker.run)
    tables = [row["samples.path"] for row in load(folder)["history"]]
    assert len(set(tables)) == 2
    table = json.loads((folder / "files" / tables[0]).read_text())
    assert table["columns"] == ["step", "source", "row", "prompt", "reply", "answer", "accuracy"]
    assert table["data"][0] == [0, "sums", "sums.jsonl:1", "3+4?", "7", "7", 1.0]
    assert table["data"][1] == [0, "style", "style.jsonl:2", "hello", "hi\nthere", None, None]


def test_the_official_reader_agrees(open_wandb):
    tracker = open_wandb()
    tracker.log(1, {"loss": 0.25})
    tracker.finish("failed", 1, {"steps": 1})
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(segments(tracker.run)[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tracker.run.path)
    shown = json.loads(done.stdout)
    assert shown["state"] == "failed"
    assert shown["summary"]["loss"] == 0.25
    assert shown["summary"]["status"] == "failed"
    assert "playground" in done.stdout


@pytest.mark.parametrize(
    ("status", "code", "preempting"), [("finished", 0, False), ("failed", 1, False), ("stopped", 75, True)]
)
def test_a_run_ends_as_what_it_was(open_wandb, status, code, preempting):
    tracker = open_wandb()
    tracker.finish(status, code, {})
    tracker.finish("finished", 0, {})  # a second call does nothing
    found = load(segments(tracker.run)[0])
    assert (found["summary"]["status"], found["exit"], found["preempting"]) == (status, code, preempting)


def test_the_group_is_the_sweep(open_wandb, new_run, config):
    named = Wandb(new_run("a"), config("offline") | {"sweep": {"name": "beta"}})
    by_folder = Wandb(new_run("b", sweep="grid-7"), config("offline"))
    alone = Wandb(new_run("c"), config("offline"))
    for tracker, group in ((named, "beta"), (by_folder, "grid-7"), (alone, "")):
        tracker.start()
        tracker.finish("finished", 0, {})
        assert load(segments(tracker.run)[0])["group"] == group


def test_two_runs_in_a_row_do_not_mix(open_wandb, new_run):
    first = open_wandb(run=new_run("first"))
    first.log(1, {"loss": 1.0})
    second = open_wandb(run=new_run("second"))  # the first was never finished
    second.log(1, {"loss": 2.0})
    second.log(2, {"loss": 2.5})
    second.finish("finished", 0, {})
    assert curve(load(segments(first.run)[0])["history"], "loss") == [(1, 1.0)]
    assert curve(load(segments(second.run)[0])["history"], "loss") == [(1, 2.0), (2, 2.5)]


def test_a_resumed_run_is_a_new_segment_of_the_same_run(open_wandb):
    first = open_wandb()
    for step in range(1, 8):
        first.log(step, {"loss": 1 / step})
    first.finish("stopped", 75, {})
    second = open_wandb(run=first.run)
    for step in range(5, 11):
        second.log(step, {"loss": 1 / step})
    second.finish("finished", 0, {})
    before, after = (load(folder) for folder in segments(first.run))
    assert before["id"] == after["id"] == first.run.info()["id"]
    assert [row["step"] for row in before["history"]] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["step"] for row in after["history"]] == [7, 8, 9, 10]  # 7 again: its evaluation may be new
    assert [row["_step"] for row in after["history"]] == [7, 8, 9, 10]
    assert (before["exit"], after["exit"]) == (75, 0)


def test_an_environment_without_an_agent_names_no_run(open_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "of-somebody-else")
    monkeypatch.setenv("WANDB_PROJECT", "elsewhere")
    tracker = open_wandb()
    tracker.finish("finished", 0, {})
    found = load(segments(tracker.run)[0])
    assert (found["id"], found["project"]) == (tracker.run.info()["id"], "uft")


def test_an_agent_names_the_run_and_a_resume_keeps_it(open_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    monkeypatch.setenv("WANDB_PROJECT", "tuning")
    tracker = open_wandb()
    tracker.finish("stopped", 75, {})
    found = load(segments(tracker.run)[0])
    assert (found["id"], found["project"]) == ("given", "tuning")
    monkeypatch.delenv("WANDB_SWEEP_ID")
    monkeypatch.delenv("WANDB_RUN_ID")
    again = open_wandb(run=tracker.run)
    again.finish("finished", 0, {})
    assert load(segments(tracker.run)[1])["id"] == "given"


def test_disabled_does_not_import_wandb(new_run, tmp_path):
    program = (
        "import sys; from pathlib import Path; from uft.runs import Run; from uft.tracking import make_tracker\n"
        "t = make_tracker(Run(Path(sys.argv[1])), {'tracking': {'mode': 'disabled'}})\n"
        "t.start(); t.log(1, {'loss': 1.0}); t.samples(1, []); print(t.description); t.finish('finished', 0, {})\n"
        "assert 'wandb' not in sys.modules and 'torch' not in sys.modules"
    )
    run = new_run()
    said = subprocess.run([sys.executable, "-c", program, str(run.path)], check=True, capture_output=True, text=True)
    assert said.stdout == "metrics.jsonl, no W&B\n"
    assert not (run.path / "wandb").exists()
    assert run.info()["wandb"] == {"mode": "disabled"}


def test_only_the_first_rank_tracks(new_run, config):
    run = new_run()
    tracker = make_tracker(run, config("online"), rank=1)  # online without a key: refused, if it were the first rank
    tracker.start()
    tracker.log(1, {"loss": 1.0})
    tracker.samples(1, SAMPLES)
    tracker.finish("finished", 0, {})
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "overrides.yaml", "run.json"]


def test_the_first_rank_writes_files_and_wandb(new_run, config):
    run, said = new_run(), []
    tracker = make_tracker(run, config("auto"), say=said.append)
    tracker.start()
    tracker.log(1, {"loss": 1.0})
    tracker.samples(1, SAMPLES)
    tracker.finish("finished", 0, {})
    assert json.loads(run.metrics_file.read_text()) == {"step": 1, "loss": 1.0}
    assert len(run.samples_file.read_text().splitlines()) == 2
    assert load(segments(run)[0])["history"][0]["loss"] == 1.0
    assert said == [f"W&B is offline: no API key. Upload it later:  uft sync {run.path}"]


# Without a key, without a network


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
