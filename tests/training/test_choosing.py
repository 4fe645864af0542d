"""The job `select` on files: what it writes and remembers, and what it refuses before a model is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dying import StopAt, lines

from uft.config.schema import Config
from uft.data.rows import Completion, Message, Row
from uft.data.sources import LoadedSource, load_sources
from uft.errors import UftError
from uft.sampling.generate import Interrupted
from uft.training import making
from uft.training.choosing import read_past
from uft.training.liveness import Stop
from uft.training.setup import Work


@pytest.fixture
def choose(configure, files, tmp_path):
    """choose("random", "demonstration", ..., select keys): (folder, counts)."""

    def run(by: str, *kinds: str, out: str = "out", stop: Stop | None = None, shares: Any = (), **settings: Any):
        config = configure("sft", "data.holdout=0.25", sources={kind: files[kind] for kind in kinds})
        for kind, share in dict(shares).items():
            config.data.sources[kind].share = share
        chosen = replace(config.select, **{"by": by, "rows": 3, "dim": 256, "steps": 2, "batch": 6, **settings})
        folder = tmp_path / out
        work = Work(replace(config, select=chosen), stop=stop or Stop())
        return folder, making.select_stage(work, folder, "")

    return run


def rows_of(file: Path) -> tuple[Row, ...]:
    from uft.config.schema import data_settings

    (source,) = load_sources(data_settings({"name": "made", "sources": {"made": {"path": str(file)}}}))
    return tuple(source.rows)


def contents(rows: Any) -> list[Any]:
    return [(row.prompt, row.completions, row.answer, row.task) for row in rows]


def test_chosen_rows_are_as_they_were_in_their_order_with_a_score_for_each(choose, configure, files):
    folder, counts = choose("random", "demonstration", "preference", rows=0.5)
    scores = lines(folder / "scores.jsonl")
    config: Config = configure(
        "sft", "data.holdout=0.25", sources={k: files[k] for k in ("demonstration", "preference")}
    )
    given = {source.name: source.rows for source in load_sources(config.data)}
    assert counts == {"rows": 9, "candidates": 18, "chosen_before": 0, "unfit": 0}
    assert [(line["source"], line["index"]) for line in scores] == [
        (r.source, r.index) for s in given.values() for r in s
    ]
    by_rank = sorted((line["rank"], -line["score"]) for line in scores if line["picked"])
    assert [rank for rank, _ in by_rank] == list(range(1, 10))
    assert by_rank == sorted(by_rank, key=lambda one: one[1]), "the best first"
    for name, rows in given.items():
        picked = {line["index"] for line in scores if line["source"] == name and line["picked"]}
        kept = [row for row in rows if row.index in picked]
        assert contents(rows_of(folder / "rows" / f"{name}.jsonl")) == contents(kept)
    before = (folder / "scores.jsonl").read_bytes()
    choose("random", "demonstration", "preference", rows=0.5)
    assert (folder / "scores.jsonl").read_bytes() == before, "the same request chooses the same rows"
    other, _ = choose("random", "demonstration", "preference", rows=0.5, seed=1, out="other")
    assert (other / "scores.jsonl").read_bytes() != before


def test_earlier_picks_are_no_candidates_and_are_remembered(choose):
    first, _ = choose("active_dpo", "preference", out="1")
    second, counts = choose("active_dpo", "preference", out="2", past=str(first))
    prompts = [{str(row.prompt) for row in rows_of(folder / "rows.jsonl")} for folder in (first, second)]
    assert counts == {"rows": 3, "candidates": 6, "chosen_before": 3, "unfit": 0}
    assert prompts[0].isdisjoint(prompts[1])
    remembered = read_past(str(second), 256)
    assert (len(remembered["prompts"]), remembered["phi"].shape) == (6, (6, 256))
    assert np.array_equal(remembered["phi"][:3], read_past(str(first), 256)["phi"])
    fresh, _ = choose("active_dpo", "preference", out="3", rows=9)
    unaware = {line["index"]: line["score"] for line in lines(fresh / "scores.jsonl")}
    assert unaware.keys() > {line["index"] for line in lines(second / "scores.jsonl")}
    with pytest.raises(UftError, match="was made with 256"):
        choose("active_dpo", "preference", past=str(first), dim=128)
    with pytest.raises(UftError, match="holds no selection"):
        choose("random", "preference", past=str(first / "no"))


def test_pds_scores_rows_for_a_source_that_is_never_chosen_from(choose):
    folder, counts = choose("pds", "binary", "demonstration", dev="demonstration", shares={"demonstration": 0.0})
    scores = lines(folder / "scores.jsonl")
    assert {line["source"] for line in scores} == {"binary"}
    assert counts["candidates"] + counts["unfit"] == 9, "rows that are not held out; bad ones teach nothing"
    assert counts["unfit"] > 0
    assert len({line["score"] for line in scores}) == len(scores)
    assert len(rows_of(folder / "rows.jsonl")) == counts["rows"] == 3


def test_a_stopped_selection_leaves_nothing(choose, tmp_path):
    for by, kind in (("active_dpo", "preference"), ("pds", "demonstration")):
        with pytest.raises(Interrupted):
            choose(by, kind, "binary", stop=StopAt(3), dev="binary", shares={"binary": 0.0})
    assert not (tmp_path / "out" / "rows.jsonl").exists()
    assert not (tmp_path / "out" / "scores.jsonl").exists()


def test_rows_that_a_method_has_no_use_for_are_refused(choose, monkeypatch):
    monkeypatch.setattr("uft.training.choosing.loaded_policy", None)  # nothing is loaded for a request that cannot be
    for by, kind, said in (
        ("active_dpo", "demonstration", "none of the rows is a candidate"),
        ("top_score", "demonstration", "9 rows have none"),
    ):
        with pytest.raises(UftError, match=said):
            choose(by, kind)


def test_a_checker_without_a_verdict_is_told_before_the_first_sample(configure):
    rows = tuple(
        Row("mine", n, (Message("user", "how many"),), (Completion((Message("assistant", reply),)),))
        for n, reply in enumerate(("it is 7", "many"))
    )
    numbered = LoadedSource("mine", "here", rows, (), "", checker="final_number")
    config = configure("sft")
    with pytest.raises(UftError, match=r"1 of 2 rows cannot be judged") as caught:
        making.make_scorer(config, [numbered])
    (problem,) = caught.value.problems
    assert (problem.where, problem.advice) == ("mine:1", ()), "rollout=false would change nothing here"
    score = making.make_scorer(config, [replace(numbered, rows=rows[:1])])
    assert [score(rows[0], reply) for reply in ("so 7", "so 8", "")] == [1.0, 0.0, 0.0]


def test_samples_that_cannot_be_judged_are_told_once_per_reason(configure, caplog):
    asked, given = (Message("user", "list"),), (Completion((Message("assistant", "{}"),)),)
    row = Row("mine", 0, asked, given, facts={"schema": {"$ref": "https://nowhere.example/schema"}})
    score = making.make_scorer(configure("sft"), [LoadedSource("mine", "here", (row,), (), "", checker="json_schema")])
    assert [score(row, reply) for reply in ("{}", "[]", "no JSON")] == [0.0, 0.0, 0.0]
    assert caplog.text.count("samples that cannot be judged are scored 0") == 1
