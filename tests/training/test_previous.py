"""Run folders of the previous version (commit eebb614): resumed, listed, compared and generated from."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from dying import lines

from uft import cli
from uft.cli.verbs import as_found
from uft.config.frozen import load_config, to_config
from uft.errors import GOOD
from uft.runs import Run, find_weights
from uft.training import making, session
from uft.training.liveness import Stop


@pytest.fixture
def previous(tmp_path, model_folder, files, monkeypatch):
    """The folder that the old program worked in. In runs/: `plain`, stopped at step 5 of 7; `stages`, stopped in its
    second stage; `sweep`, a finished run and one that never started. In whole/: results of the same two unstopped."""
    with tarfile.open(Path(__file__).with_name("previous_runs.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    shutil.copytree(model_folder, tmp_path / "tiny")
    (tmp_path / "rows").mkdir()
    for kind in ("demonstration", "preference"):
        shutil.copy(files[kind], tmp_path / "rows")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UFT_CACHE", str(tmp_path / "cache"))
    return tmp_path


RENAMED = ("kl", "log_ratio")  # of an evaluation: the one was an estimate that a few tokens decided


@pytest.mark.parametrize("name", ["plain", "stages"])
def test_a_stopped_run_goes_on_and_its_model_answers(name, previous):
    """What was written stays as it is, and the run ends where the old program would have ended it."""
    run = Run(previous / "runs" / name)
    before, whole = run.metrics_file.read_text(), json.loads((previous / f"whole/{name}/result.json").read_text())
    assert (run.status, run.result()["steps"]) == ("stopped", run.steps)
    assert session.train(run, load_config(run.config_file), Stop()) == GOOD
    result = run.result()
    assert run.metrics_file.read_text().startswith(before)
    assert [line["step"] for line in lines(run.metrics_file) if "loss" in line][-1] == whole["steps"]
    for key in ("steps", "rows", "tokens", "supervised_tokens", "best_step", "best_checkpoint"):
        assert result[key] == whole[key], key
    then, now = (
        {name: value for name, value in end["final"].items() if name.rpartition("/")[2] not in RENAMED}
        for end in (whole, result)
    )
    assert now == pytest.approx(then, rel=1e-3, abs=1e-4)
    assert list(result.get("stages", {})) == list(whole.get("stages", {}))

    settings = as_found(find_weights(str(run.path)), ())
    settings["generate"] |= {"limit": 8, "max_new_tokens": 60, "temperature": 2.0, "top_k": 0}
    assert making.generate(to_config(settings)) == GOOD
    assert {line["sampled_by"] for line in lines(run.path / "generated.jsonl")} == {str(run.model_dir)}


def test_they_are_listed_and_compared(previous, capsys):
    assert cli.main(["ls", "runs", "--json"]) == GOOD
    found = {run["name"]: (run["status"], run["steps"]) for run in json.loads(capsys.readouterr().out)}
    assert found == {
        "plain": ("stopped", 5),
        "stages": ("stopped", 4),
        "beta0.1": ("finished", 3),
        "beta0.3": ("waiting", 0),
    }
    assert cli.main(["compare", "runs", "--out", "compared", "--json"]) == GOOD
    compared = json.loads(capsys.readouterr().out)
    assert {"plain", "stages", "beta0.1"} == {run["name"] for run in compared["runs"]}


@pytest.mark.slow
def test_a_sweep_goes_on(previous, capsys):
    for file in (*previous.glob("runs/sweep/*/run.json"), previous / "runs/sweep/sweep.json"):
        file.write_text(file.read_text().replace("/tmp/oldruns", str(previous)))
    before = (previous / "runs/sweep/beta0.1/metrics.jsonl").read_text()
    assert cli.main(["resume", "runs/sweep"]) == GOOD
    assert (previous / "runs/sweep/beta0.1/metrics.jsonl").read_text() == before
    assert Run(previous / "runs/sweep/beta0.3").result()["steps"] == 3
    rates = [Run(previous / f"runs/sweep/{name}").config()["optim"]["lr"] for name in ("beta0.1", "beta0.3")]
    assert rates == [1e-5, 1e-5], "the defaults of then, for all jobs"
    assert "optim.lr=1e-05" in capsys.readouterr().out
