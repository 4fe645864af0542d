"""The jobs that leave no run behind: what they say, and that they stop when asked."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from typing import Any

import pytest

from uft.config.schema import Config, Eval
from uft.errors import GOOD, INTERRUPTED, STOPPED
from uft.training import jobs, making
from uft.training.card import measured_rows, stage_card
from uft.training.setup import Prepared


def test_check_prepares_takes_the_largest_step_and_writes_nothing(configure, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configure("dpo")
    assert jobs.check(config) == GOOD
    said = capsys.readouterr().out
    assert "largest step" in said
    assert "No run was made" in said
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, STOPPED), (signal.SIGINT, INTERRUPTED)])
def test_check_stops_when_asked(configure, monkeypatch, number, code):
    real = jobs.prepare_stage

    def prepare(*arguments: Any) -> Prepared:
        os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(jobs, "prepare_stage", prepare)
    assert jobs.check(configure("sft")) == code


def test_data_shows_the_mixture_and_the_rows(configure, capsys, tmp_path):
    assert jobs.show_data(configure("dpo")) == GOOD
    said = capsys.readouterr().out
    for expected in ("preference", "scored", "negatives", "tokens per completion", "preference:0"):
        assert expected in said
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "double : 1"}\n' * 9)
    assert jobs.show_data(configure("sft", sources={"mine": str(asked)})) == GOOD
    said = capsys.readouterr().out
    assert "asked: no reply" in said
    assert "training stops:  data.sources.mine  objective=sft cannot use" in said, "what `uft train` would say"


@pytest.mark.slow
def test_generate_stops_between_batches_and_goes_on(configure, files, tmp_path, monkeypatch):
    config = configure("sft", sources={"mine": files["demonstration"]})

    def settings(out: str) -> Config:
        return replace(
            config,
            generate=replace(
                config.generate, out=str(tmp_path / out), max_new_tokens=60, batch_size=3, temperature=2.0, top_k=0
            ),
        )

    assert making.generate(settings("whole.jsonl")) == GOOD
    real = making.generate_rows

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        def progress(done: int, of: int) -> None:
            if done == 6:
                os.kill(os.getpid(), signal.SIGUSR1)

        return real(*arguments, **keywords | {"progress": progress})

    with monkeypatch.context() as patch:
        patch.setattr(making, "generate_rows", interrupted)
        assert making.generate(settings("broken.jsonl")) == STOPPED
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert 0 < len(broken.read_text().splitlines()) < len(whole.read_text().splitlines())
    assert making.generate(settings("broken.jsonl")) == GOOD
    assert broken.read_text() == whole.read_text()
    assert all(json.loads(line)["negatives"] for line in whole.read_text().splitlines())


def test_the_card_says_every_derived_number(build):
    prepared = build("dpo", "train.steps=10", "train.batch_size=9", "data.holdout=0.25", "objective.beta=0.7")
    card = dict(stage_card(prepared))
    assert "beta=0.7" in card["objective"]
    assert "10 steps of 9 rows" in card["horizon"]
    assert "9 rows held out" in card["evaluation"]
    assert measured_rows(prepared.data.dataset, Eval(rows=0)) == "none"
    assert "1 steps of warm-up" in card["optimiser"]
    assert [line.split()[0] for line in card["data"].split("\n")] == [
        *("source", "negatives", "preference", "scored", "all"),
    ]
