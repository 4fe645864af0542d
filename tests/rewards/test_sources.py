"""Rewards in a configuration, and the columns that checkers read: from the file to the row and back."""

from __future__ import annotations

import json

import pytest
import torch

from uft.config.compose import examine, require
from uft.config.files import Request
from uft.config.schema import Config, data_settings
from uft.data.records import write_rows
from uft.data.sources import load_sources
from uft.errors import UftError
from uft.evaluation.evaluate import judge_logged
from uft.rewards import check, spec_of

COUNTDOWN = [
    {"prompt": f"reach {a + b}", "response": f"{a}+{b}", "nums": [a, b], "target": a + b, "id": a}
    for a, b in ((1, 2), (3, 4), (5, 6))
]


def settings_of(*words):
    return require(Request(words)).settings


def problems_of(*words):
    return {problem.what: problem for problem in examine(Request(words)).problems}


def load(folder, rows=COUNTDOWN, cache=None, **source):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {"a": {"path": str(file), **source}}
    return load_sources(data_settings({"sources": sources, "cache": cache and str(cache)}))[0]


def test_the_reward_judges_every_source_that_says_nothing_else():
    said = ("+data.sources.a.path=a.jsonl", "+data.sources.b.path=b.jsonl", "+data.sources.b.checker=null")
    settings = settings_of("data=mix", *said, "reward=choice", "reward.letters=AB")
    checkers = {name: source["checker"] for name, source in settings["data"]["sources"].items()}
    assert checkers.items() >= {"a": "choice", "b": None, "instruct": "playground"}.items()
    node = {"name": "choice", "method": "choice", "letters": "AB"}
    assert spec_of(settings["reward"], "format+choice") == ["format", node]
    assert spec_of(settings["reward"], None) is None
    assert settings_of("data=mix")["reward"] == {} == Config().reward


def test_what_is_wrong_with_a_reward_is_told(monkeypatch):
    assert "reward=countdown" in problems_of("reward=cuntdown")["reward=cuntdown"].advice[0]
    found = problems_of("reward=length", "reward.free=500", "reward.limt=3")
    assert found.keys() == {"reward.free=500", "reward.limt=3"}
    assert "reward.limit" in found["reward.limt=3"].advice[0]
    assert problems_of("reward.free=3")['reward={"free": 3}'].advice == ("choose one:  reward=NAME",)
    assert problems_of("reward=likelihood")["reward.path"].advice == ("give it:  reward.path=...",)
    key = "data.sources.instruct.checker"
    assert "exact" in problems_of("data=instruct", f"{key}=exakt")[f"{key}=exakt"].advice[0]
    assert "reward.path=..." in problems_of("data=instruct", f"{key}=likelihood")[f"{key}=likelihood"].advice[0]
    assert problems_of("data=instruct", f"{key}=math") == {}
    assert problems_of("data=instruct", f"{key}=math+format") == {}
    assert "exact_match twice" in problems_of("data=instruct", f"{key}=math+exact")[f"{key}=math+exact"].why
    monkeypatch.setattr("uft.rewards.find_spec", lambda name: None)
    assert problems_of("data=instruct", f"{key}=math")[f"{key}=math"].advice == ("pip install 'uft-lm[rewards]'",)


def test_the_figures_of_several_checkers_are_those_of_each(tmp_path):
    row = load(tmp_path, checker="length+countdown").rows[0]
    reply = "<think>so</think><answer>2+1</answer>"
    found = check("countdown+format", row, reply)
    assert found == {"exact_match": 1.0, "answered": 1.0, "format": 1.0, "tags": 1.0}
    assert check(["exact", {"method": "length", "free": 0, "limit": 2}], row, "1+2") == {
        "exact_match": 1.0,
        "length": 0.5,
    }


def test_columns_of_the_checker_are_read_and_others_told(tmp_path):
    source = load(tmp_path, checker="countdown", columns={"numbers": "nums"})
    assert source.rows[1].facts == {"numbers": [3, 4], "target": 7}
    assert dict(source.omitted.unread) == {"id": 3}
    assert check("countdown", source.rows[1], "4+3") == {"exact_match": 1.0, "answered": 1.0}
    unread = load(tmp_path)
    assert unread.rows[1].facts == {}
    assert dict(unread.omitted.unread) == {"id": 3, "nums": 3, "target": 3}
    assert source.digest != unread.digest


@pytest.mark.slow
def test_facts_survive_text_cells_writing_and_the_cache(tmp_path):
    texts = [{**row, "nums": json.dumps(row["nums"])} for row in COUNTDOWN]
    assert load(tmp_path, texts, checker="countdown").rows == load(tmp_path, checker="countdown").rows
    rows = load(tmp_path, checker="countdown").rows
    write_rows(tmp_path / "rows.jsonl", rows)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert load(tmp_path, lines, checker="countdown").rows == rows
    many = [{**row, "prompt": f"{number} {'long ' * 30}"} for number, row in enumerate(COUNTDOWN * 2000)]
    cached = [load(tmp_path, many, tmp_path / "cache", checker="countdown").rows for _ in range(2)]
    assert cached[0][5999].facts == cached[1][5999].facts == {"nums": [5, 6], "target": 11}
    assert load(tmp_path, many, tmp_path / "cache").rows[0].facts == {}, "another checker, another table"


def test_a_source_without_the_columns_of_its_checker_is_refused(tmp_path):
    with pytest.raises(UftError) as error:
        load(tmp_path, [{"prompt": "a", "response": "b", "digits": [1]}], checker="countdown")
    assert "data.sources.a.columns.numbers=THEIR_COLUMN" in str(error.value)
    assert "digits" in str(error.value)
    with pytest.raises(UftError, match="no such field"):
        load(tmp_path, columns={"numbers": "nums"})


def test_the_evaluation_tells_how_many_answers_could_not_be_judged(tmp_path, caplog):
    rows = load(tmp_path, [*COUNTDOWN, {"prompt": "p", "response": "q"}], checker="countdown").rows
    jobs = [("countdown", row, text) for row, text in zip(rows, ["1+2", "(" * 500_000, "5+6", "?"], strict=True)]
    verdicts = judge_logged("a", jobs, torch.device("cpu"))
    assert [verdict.figures.get("exact_match") for verdict in verdicts] == [1.0, 0.0, 1.0, None]
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "a: 1 of 4 answers scored 0: is longer than 400,000 characters",
        "a: 1 of 4 answers left out: the row has no column numbers or nums",
    ]
