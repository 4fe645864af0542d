"""W&B runs as a stand-in for the server sees them, and what is said where there is no server."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
from records import SAMPLES, curve

from uft.errors import UftError
from uft.runs import write_json
from uft.tracking.trackers import make_tracker
from uft.tracking.wandb import Wandb


def test_an_online_run_as_the_server_sees_it(open_wandb, new_run, server, capfd, home):
    said: list[str] = []
    run = new_run("ift-beta0.1", sweep="ignored, the group is given")
    settings = {"group": "beta-sweep", "tags": ["paper", "ift"], "project": "mine", "job_type": "search"}
    tracker = open_wandb("auto", run=run, say=said.append, **settings)
    tracker.log(0, {"eval/nll": 3.5})
    tracker.samples(0, SAMPLES[::-1])
    for step in range(1, 4):
        tracker.log(step, {"loss": 1 / step, "tokens": 100 * step, "objective/ift": float("nan")})
    tracker.log(3, {"eval/nll": 0.5})
    tracker.samples(3, SAMPLES)
    assert tracker.description.startswith(f"metrics.jsonl, W&B online: {server.url}")
    tracker.finish("failed", 1, {"best/eval/nll": 0.5})
    tracker.finish("finished", 0, {})  # a second call does nothing

    run_id = run.info()["id"]
    rows = server.history[run_id]
    assert [row["_step"] for row in rows] == [0, 1, 2, 3]
    assert curve(rows, "loss") == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert curve(rows, "eval/nll") == [(0, 3.5), (3, 0.5)]
    assert math.isnan(rows[1]["objective/ift"])
    assert rows[3]["samples"]["nrows"] == 2
    assert rows[3]["samples"]["path"] != rows[0]["samples"]["path"]
    table = json.loads(server.uploads[rows[3]["samples"]["path"]])
    assert table["columns"] == ["step", "source", "row", "prompt", "reply", "answer", "accuracy"]
    assert table["data"][0] == [3, "sums", "sums.jsonl:1", "3+4?", "7", "7", 1.0]
    assert table["data"][1] == [3, "style", "style.jsonl:2", "hello", "hi\nthere", None, None]
    assert server.exits == {run_id: 1}
    sent = server.runs[run_id]
    named = [sent[name] for name in ("displayName", "project", "groupName", "jobType")]
    assert named == ["ift-beta0.1", "mine", "beta-sweep", "search"]
    assert sorted(sent["tags"]) == ["ift", "mix", "paper", "playground"]
    config = json.loads(sent["config"])
    assert config["objective"]["value"] == {"name": "ift", "beta": 0.1}
    assert config["data"]["value"]["sources"]["a"]["share"] is None
    summary = json.loads(server.uploads["wandb-summary.json"])
    assert (summary["status"], summary["best/eval/nll"], summary["train/loss"]) == ("failed", 0.5, 1 / 3)
    info = run.info()["wandb"]
    assert (info["id"], info["mode"]) == (run_id, "online")
    assert info["url"].endswith(run_id)
    assert said == []
    assert capfd.readouterr().err == ""
    written = [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]
    assert [file for file in written if "log" not in file and not file.startswith("cache/")] == [], "outside of the run"


def test_two_runs_in_a_row_do_not_mix_and_the_group_is_the_sweep(new_run, config, server):
    first = Wandb(new_run("first"), config() | {"sweep": {"name": "beta"}})
    second = Wandb(new_run("second", sweep="grid-7"), config())
    for tracker in (first, second):  # the first is never finished
        tracker.start()
        tracker.log(1, {"loss": 2.0 if tracker is second else 1.0})
    second.finish("finished", 0, {})
    for tracker, loss, group in ((first, 1.0, "beta"), (second, 2.0, "grid-7")):
        run_id = tracker.run.info()["id"]
        assert curve(server.history[run_id], "loss") == [(1, loss)]
        assert server.runs[run_id]["groupName"] == group


def test_what_a_run_was_made_of_and_how_well_it_did_stand_in_its_table(open_wandb, new_run, server):
    code = {"commit": "a" * 40, "dirty": None}
    run = new_run(sweep="first", command=["uft train", "objective=ift", "data.name='a b'"], code=code, data_digest="d1")
    write_json(run.path.parent / "sweep.json", {"made": "2026-11-30T11:59:20+00:00"})
    write_json(run.path / "data.json", {"sources": {"pairs": {"rows": 1000}}})
    write_json(run.path / "check.json", {"model": ["Llama"], "parameters": {"all": 10, "trained": 5}})
    lines = [{"step": step, "eval/nll": nll, "eval/pairs/nll": 1.0} for step, nll in ((0, 3.0), (5, 1.0), (9, 2.0))]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(run.path / "result.json", {"best": {"eval/nll": 1.0}, "best_step": 5})
    tracker = open_wandb(run=run)
    tracker.log(10, {"loss": 0.5, "tokens": 7})
    tracker.finish("finished", 0, {"eval/nll": 2.0, "eval/pairs/nll": 1.0})
    run_id = run.info()["id"]
    sent = server.runs[run_id]
    about = json.loads(sent["config"])["run_info"]["value"]
    assert about["command"] == sent["notes"] == "uft train objective=ift 'data.name='\"'\"'a b'\"'\"''"
    assert (about["commit"], about["data_digest"], about["rows"]) == ("a" * 40, "d1", {"pairs": 1000})
    assert about["parameters"] == {"all": 10, "trained": 5}
    assert sent["groupName"] == "first 2026-11-30 11.59", "another day's sweep of that name is another group"
    summary = json.loads(server.uploads["wandb-summary.json"])
    known = {"min/eval/nll": 1.0, "max/eval/nll": 3.0, "best/eval/nll": 1.0, "best/step": 5, "eval/nll": 2.0}
    assert known.items() <= summary.items()
    assert (summary["train/loss"], summary["tokens"], summary["eval_pairs/nll"]) == (0.5, 7, 1.0), "sections"


def test_a_resumed_run_has_every_step_and_every_evaluation_once(open_wandb, server):
    """It had sent steps up to 7 when it was killed during the evaluation of 7; the checkpoint is of step 5."""
    first = open_wandb()
    for step in range(1, 8):
        first.log(step, {"loss": 1 / step})
    first.finish("failed", 1, {})
    second = open_wandb(run=first.run)
    for step in range(6, 10):
        second.log(step, {"loss": 1 / step, "stage": "dpo"} if step > 7 else {"loss": 1 / step})
        if step % 7 == 0:
            second.log(step, {"eval/nll": 0.5})
    second.finish("finished", 0, {})
    run_id = first.run.info()["id"]
    rows = server.history[run_id]
    assert curve(rows, "loss") == [(step, 1 / step) for step in range(1, 10)]
    assert curve(rows, "eval/nll") == [(7, 0.5)]
    assert curve(rows, "stage") == [(8, "dpo"), (9, "dpo")]
    assert [row["_step"] for row in rows] == sorted({row["_step"] for row in rows})
    assert server.exits == {run_id: 0}


def test_a_run_that_was_offline_goes_online_with_all_its_rows(server, new_run, config):
    run = new_run()
    for mode, steps, resumed in (("offline", range(1, 6), None), ("online", range(6, 9), 5)):
        tracker = make_tracker(run, config(mode), resumed_step=resumed)
        tracker.start()
        for step in steps:
            tracker.log(step, {"loss": 1 / step})
            if step % 5 == 0:
                tracker.samples(step, SAMPLES, "sft")
        tracker.finish("finished", 0, {})
    rows = server.history[run.info()["id"]]
    assert curve(rows, "loss") == [(step, 1 / step) for step in range(1, 9)]
    ((_, samples),) = curve(rows, "samples")
    table = json.loads(server.uploads[samples["path"]])
    assert table["columns"][:3] == ["step", "stage", "source"]
    assert table["data"][0][:3] == [5, "sft", "sums"]


@pytest.mark.slow
def test_an_agent_names_the_run_and_a_resume_keeps_it(open_wandb, new_run, server, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    alone = open_wandb(run=new_run("alone"))
    alone.finish("finished", 0, {})
    monkeypatch.setenv("WANDB_PROJECT", "tuning")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    tracker = open_wandb(project="other")
    tracker.finish("stopped", 75, {})
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name)
    again = open_wandb(run=tracker.run)
    again.finish("finished", 0, {})
    projects = {run: sent["project"] for run, sent in server.runs.items()}
    assert projects == {alone.run.info()["id"]: "uft", "given": "tuning"}
    assert server.exits["given"] == 0


@pytest.mark.slow
def test_variables_of_w_and_b_are_followed_or_it_is_said(open_wandb, new_run, server, monkeypatch):
    """Where the configuration leaves the default they are; where it says otherwise it wins. So does a run's first
    session over the environment of a later one."""
    said: list[str] = []
    monkeypatch.setenv("WANDB_PROJECT", "papers")
    monkeypatch.setenv("WANDB_ENTITY", "team")
    first = open_wandb(say=said.append)
    first.finish("stopped", 75, {})
    assert said == []
    sent = server.runs[first.run.info()["id"]]
    assert (sent["project"], first.run.info()["wandb"]["entity"]) == ("papers", "team")
    monkeypatch.setenv("WANDB_PROJECT", "other")
    open_wandb(run=first.run, say=said.append).finish("finished", 0, {})
    mine = open_wandb(run=new_run("mine"), say=said.append, project="mine", entity="me")
    mine.finish("finished", 0, {})
    assert said == [
        "WANDB_PROJECT=other is not followed: this run has tracking.project=papers",
        "WANDB_PROJECT=other is not followed: this run has tracking.project=mine",
        "WANDB_ENTITY=team is not followed: this run has tracking.entity=me",
    ]
    monkeypatch.setenv("WANDB_DISABLED", "true")
    quiet = open_wandb("auto", run=new_run("quiet"), say=said.append)
    assert (quiet.mode, said[3:]) == ("disabled", [])
    open_wandb("offline", run=new_run("kept"), say=said.append, project="other", entity="team")
    assert said[3:] == ["WANDB_DISABLED=true is not followed: tracking.mode=offline"]


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_without_w_and_b_it_is_not_even_imported(new_run, config, mode):
    program = (
        "import json, sys; from pathlib import Path; from uft.runs import Run\n"
        "from uft.tracking.trackers import make_tracker\n"
        "t = make_tracker(Run(Path(sys.argv[1])), json.loads(sys.argv[2]))\n"
        "t.start(); t.log(1, {'loss': 1.0}); t.samples(1, []); print(t.description); t.finish('finished', 0, {})\n"
        "assert 'wandb' not in sys.modules and 'torch' not in sys.modules"
    )
    run = new_run()
    command = [sys.executable, "-c", program, str(run.path), json.dumps(config(mode))]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said == f"metrics.jsonl, {'no W&B' if mode == 'disabled' else f'W&B offline: uft sync {run.path}'}\n"
    assert not (run.path / "wandb").exists()
    noted = {"id": run.info()["id"], "mode": "offline", "url": None, "sent": None}
    assert run.info()["wandb"] == ({"mode": "disabled"} if mode == "disabled" else noted)


# --- Without a key, without a network


def test_auto_without_a_key_goes_on_at_once_on_a_terminal(new_run, config):
    """A terminal is where wandb would prompt."""
    import pty

    program = (
        "import json, sys, time; from pathlib import Path; from uft.runs import Run\n"
        "from uft.tracking.trackers import make_tracker; import wandb as imported; assert sys.stdin.isatty()\n"
        "began = time.monotonic()\n"
        "t = make_tracker(Run(Path(sys.argv[1])), json.loads(sys.argv[2])); t.start(); t.log(1, {'loss': 1.0})\n"
        "t.finish('finished', 0, {}); print('seconds', time.monotonic() - began)"
    )
    run, (leader, follower) = new_run(), pty.openpty()
    command = [sys.executable, "-c", program, str(run.path), json.dumps(config("auto"))]
    done = subprocess.run(command, stdin=follower, capture_output=True, text=True, timeout=60)
    os.close(leader)
    os.close(follower)
    assert done.stderr == ""
    told, seconds = done.stdout.splitlines()
    assert told == f"W&B is offline: no API key. Upload it later:  uft sync {run.path}"
    assert float(seconds.split()[-1]) < 10
    assert json.loads(run.metrics_file.read_text()) == {"step": 1, "loss": 1.0}


def test_auto_without_a_network_goes_on(open_wandb, no_server):
    said: list[str] = []
    tracker = open_wandb("auto", say=said.append)
    tracker.finish("finished", 0, {})
    assert (tracker.mode, len(said)) == ("offline", 1)
    assert f"{no_server} does not answer" in said[0]


def test_online_without_a_key_that_can_be_one_is_refused_before_training(open_wandb, server, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UftError, match=r"tracking\.mode=online"):
        open_wandb("online")
    assert open_wandb("auto").mode == "offline"
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(UftError, match=r"no W&B API key(.|\n)*wandb login") as refused:
        open_wandb("online")
    assert refused.value.code == 2


def test_wandb_mode_of_the_environment_decides_auto(open_wandb, server, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert open_wandb("auto").mode == "offline"
    assert server.operations == []
