"""Numbers that an objective needs beside completions: rows without them stop the run, or are left out and counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from uft.config.schema import Config
from uft.data.rows import Completion, Kind, Message, Row, Selected
from uft.errors import UftError
from uft.model.load import load_tokenizer
from uft.objectives import make
from uft.objectives.base import Needs, Objective
from uft.training.dataset import StageData, counted_as_certain, lacks, make_sampler, read_train_data

Configure = Callable[..., Config]


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """Six rows, of which the even ones have a baseline."""
    rows = [
        {"prompt": f"w{n + 3}", "completion": "w4", "baseline_logp": -1.0 if n % 2 == 0 else None} for n in range(6)
    ]
    path = tmp_path / "half.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Three pairs: all numbers, the chosen one's alone, the rejected one's alone."""
    path = tmp_path / "pairs.jsonl"
    base = {"prompt": "w3", "chosen": "w4", "rejected": "w5"}
    columns = ([-1.0, -2.0], [-1.0, None], [None, -2.0])
    path.write_text("".join(json.dumps({**base, "baseline_logp": both}) + "\n" for both in columns))
    return path


def test_a_run_stops_and_says_how_to_write_them(configure: Configure, half: Path, pairs: Path) -> None:
    config = configure("poft", sources={"half": half, "pairs": pairs})
    config.data.sources["half"].columns = {"baseline_logp": "baseline_logp"}
    corpus = read_train_data(config, load_tokenizer(config.model))
    with pytest.raises(UftError) as error:
        make_sampler(config, corpus, make(config.objective))
    first, second = error.value.problems
    assert (first.what, first.where) == ("data.sources.half", "half:1")
    assert first.why == "objective=poft needs baseline_logp, which 3 of 6 rows lack"
    assert second.why == "objective=poft needs baseline_logp, which 1 of 3 rows lack"  # it takes the chosen one alone
    assert second.where == "pairs:2"
    command = f"uft annotate baseline_logp data=files +data.sources.half.path={half}"
    assert command in error.value.footer
    assert f"+data.sources.pairs.path={pairs}" in error.value.footer
    assert "annotate.models=[MODEL,...]" in error.value.footer
    assert "data.unusable=drop" in error.value.footer


def test_or_leaves_them_out_and_counts_them(configure: Configure, half: Path) -> None:
    config = configure("poft", "data.unusable=drop", sources={"half": half})
    corpus = read_train_data(config, load_tokenizer(config.model))
    sampler = make_sampler(config, corpus, make(config.objective))
    assert {item.row.index for item in sampler.take(6)} == {0, 2, 4}
    record = StageData.of(config, corpus).record
    assert record["sources"]["half"]["dropped_unusable"] == 3
    config.data.unusable = "error"
    looked = make_sampler(config, corpus, make(config.objective), refuse=False)
    assert looked.unusable() == {"half": {Kind.DEMONSTRATION: (3, "half:1")}}


def test_nothing_left_is_no_run(configure: Configure, files: dict[str, Path]) -> None:
    config = configure("poft", "data.unusable=drop", sources={"mine": files["demonstration"]})
    corpus = read_train_data(config, load_tokenizer(config.model))
    with pytest.raises(UftError, match="cannot use any of the 12 rows"):
        make_sampler(config, corpus, make(config.objective))


def test_rows_of_which_nothing_is_taken_are_no_run_either(configure: Configure, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "w3", "completion": "w4", "label": false}\n' * 3)
    config = configure("sft", sources={"bad": bad})
    corpus = read_train_data(config, load_tokenizer(config.model))
    with pytest.raises(UftError, match="learns from none of the 3 rows"):
        make_sampler(config, corpus, make(config.objective))


def test_pairs_without_a_soft_label_are_told(configure: Configure, tmp_path: Path) -> None:
    path = tmp_path / "soft.jsonl"
    base = {"prompt": "w3", "chosen": "w4", "rejected": "w5"}
    path.write_text("".join(json.dumps(row) + "\n" for row in ({**base, "soft_label": 0.8}, base, base)))
    said = {}
    for name in ("gdpo_soft", "dpo"):
        config = configure(name, sources={"soft": path})
        corpus = read_train_data(config, load_tokenizer(config.model))
        objective = make(config.objective)
        said[name] = counted_as_certain(make_sampler(config, corpus, objective), objective)
    assert said == {"gdpo_soft": ["2 of 3 pairs of soft have no soft_label: they count as certain"], "dpo": []}


def test_objectives_that_need_none_take_rows_as_they_are(configure: Configure, half: Path) -> None:
    config = configure("sft", sources={"half": half})
    corpus = read_train_data(config, load_tokenizer(config.model))
    assert len(make_sampler(config, corpus, make(config.objective)).take(6)) == 6


@dataclass(frozen=True)
class Turning(Objective):
    """Takes another completion at every visit, and needs a number on each."""

    @property
    def needs(self) -> Needs:
        return Needs(annotations=frozenset({"baseline_logp"}))

    @property
    def views(self):
        return {Kind.NEGATIVES: lambda row, visit: (Selected(visit % len(row.completions)),)}


def test_later_visits_count_too() -> None:
    turns = (Message("assistant", "a"),)
    shown = Completion(turns, annotations={"baseline_logp": -1.0})
    known = Completion(turns, sampled_by="m", annotations={"baseline_logp": -1.0})
    row = Row("s", 0, (Message("user", "q"),), (shown, known, known))
    assert lacks(Turning(), row) == frozenset()
    assert lacks(Turning(), replace(row, completions=(shown, known, replace(known, annotations={})))) == {
        "baseline_logp"
    }


def test_per_kind_asks_each_kind_for_what_its_own_objective_needs(configure: Configure) -> None:
    poft, dpo = (configure(name, sources={}).objective for name in ("poft", "dpo"))
    objective = make({"name": "per_kind", "method": "per_kind", "demonstration": poft, "preference": dpo})
    prompt, turns = (Message("user", "q"),), (Message("assistant", "a"),)
    shown = Row("s", 0, prompt, (Completion(turns),))
    pair = Row("s", 1, prompt, (Completion(turns, preferred=True), Completion(turns, preferred=False)))
    assert lacks(objective, shown) == {"baseline_logp"}
    assert lacks(objective, pair) == frozenset()
