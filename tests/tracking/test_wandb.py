"""W&B runs that really ran, read back from their local logs."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from records import SAMPLES, curve, load, segments

from uft.tracking import make_tracker
from uft.tracking.wandb import Wandb


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
