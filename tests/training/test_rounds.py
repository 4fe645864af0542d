"""Runs of rounds, composed as a person writes them: what each round trains on, and that no death changes anything."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from dying import UNEVEN, lines
from stage_runs import sit, survive, written

from uft.config.compose import examine
from uft.config.files import Request
from uft.config.frozen import to_config
from uft.config.schema import Config
from uft.errors import FAILED, GOOD
from uft.runs import Run

LOOP = """\
# @package _global_
# sample, choose, train
rounds: 2
stages:
  sample:
    do: generate
    data: files
    set: {data.sources.shown: {path: FILE, part: round}, generate: {top_k: 0, seeds: [0, 1, 2, 3], repeats: drop}}
  pick:
    do: select
    data: files
    set: {data.sources.own.path: stage:sample, select: {by: random, rows: 4, past: "stage:pick@before"}}
  fit:
    objective: spin
    data: files
    set:
      data.sources: {own: {path: stage:pick}, before: {path: stage:sample@before}}
      train.steps: 4
"""
GENERATE = ("generate.temperature=3", "generate.max_new_tokens=45", "generate.batch_size=2")


@pytest.fixture
def compose(files, model_folder, tmp_path, monkeypatch):
    """compose(*overrides): the configuration of the experiment above, as a worker reads it."""
    folder = tmp_path / "conf-user" / "experiment"
    folder.mkdir(parents=True)
    (folder / "loop.yaml").write_text(LOOP.replace("FILE", str(files["demonstration"])))
    monkeypatch.chdir(tmp_path)

    def make(*overrides: str) -> Config:
        machine = ("model=custom", f"model.path={model_folder}", "tracking=none", "hardware=cpu", "optim.lr=0.02")
        words = ("experiment=loop", *machine, *UNEVEN, *GENERATE, "train.check_model=false", *overrides)
        found = examine(Request(words))
        assert found.problems == []
        return to_config(found.settings)

    return make


def stage(folder: Path, name: str) -> Path:
    (found,) = folder.glob(f"stages/*-{name}")
    return found


def sampled(folder: Path, round: int) -> list[dict[str, object]]:
    return lines(stage(folder, f"sample-{round}") / "rows.jsonl")


def test_a_round_samples_from_the_model_before_it_and_begins_at_its_reference(compose, tmp_path):
    folder = tmp_path / "run"
    assert sit(folder, compose()) == GOOD
    first, second = sampled(folder, 1), sampled(folder, 2)
    assert {line["sampled_by"] for line in first} == {compose().model.path}
    assert {line["sampled_by"] for line in second} == {"stage:fit-1"}
    prompts = [{line["prompt"] for line in round} for round in (first, second)]
    assert all(prompts)
    assert prompts[0].isdisjoint(prompts[1]), "each has a slice of its own"
    rows = {name: json.loads((stage(folder, name) / "data.json").read_text()) for name in ("fit-1", "fit-2")}
    assert list(rows["fit-1"]["sources"]) == ["own"], "there is nothing before the first round"
    assert list(rows["fit-2"]["sources"]) == ["before", "own"]
    assert rows["fit-2"]["sources"]["before"]["rows"] == len(first)
    curve = lines(folder / "metrics.jsonl")
    for step in (1, 5):  # the first of each round
        (line,) = (line for line in curve if line["step"] == step and "loss" in line)
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    result = Run(folder).result()["stages"]
    assert result["sample-1"]["rows"] == len(first)
    assert result["pick-2"]["rows"] == min(4, len(second))
    assert [line["picked"] for line in lines(stage(folder, "pick-1") / "scores.jsonl")].count(True) == min(
        4, len(first)
    )


def test_a_round_without_a_sample_to_train_on_says_why(compose, tmp_path):
    assert sit(tmp_path / "run", compose("generate.max_new_tokens=1", "eval=none", "rounds=1")) == FAILED
    assert "all 40 samples are without text, cut before their end or equal" in Run(tmp_path / "run").result()["error"]


@pytest.mark.slow
@pytest.mark.parametrize(("link", "start"), [("linear", 0.0), ("hinge", 1.0)])
def test_other_links_begin_at_their_own_value(link, start, compose, tmp_path):
    config = compose(f"objective.link={link}", "stages.fit.set.train.steps=1", "rounds=1", "eval=none")
    assert sit(tmp_path / "run", config) == GOOD
    (line,) = (line for line in lines(tmp_path / "run/metrics.jsonl") if "loss" in line)
    assert line["loss"] == pytest.approx(start, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [1, 60])
def test_death_in_any_stage_of_any_round_changes_nothing(deaths, compose, death, tmp_path):
    config, whole = compose("eval=none"), tmp_path / "whole"
    survive(whole, config, death)
    expected, moments = written(whole), len(death.moments)
    for number in range(deaths):
        at = 10 + (2 * number + 1) * (moments - 20) // (2 * deaths)
        survive(tmp_path / f"died-{at}", config, death, at)
        assert written(tmp_path / f"died-{at}") == expected, (at, moments)
