"""The shipped pipelines, and that their single-stage counterparts have the same budget of the same rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from uft.config.compose import compose
from uft.config.frozen import to_builtins, to_config, to_yaml
from uft.config.schema import Config
from uft.config.stages import stages_of
from uft.launch.worker import train
from uft.model.load import load_tokenizer
from uft.objectives import make
from uft.runs import Run, create_run
from uft.training.dataset import make_horizon, make_sampler, read_run_data, read_train_data

SMALL = (
    *("eval=none", "eval.generate_rows=0", "tracking=none", "hardware=cpu", "train.batch_size=8", "train.log_every=1"),
)


@pytest.fixture(autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all tests here: they read the same rows."""
    monkeypatch.setenv("UFT_CACHE", str(tmp_path_factory.getbasetemp() / "pipelines-cache"))


@cache
def config_of(*words: str) -> Config:
    return to_config(to_builtins(compose(list(words))))


def records(config: Config, folder: Path) -> list[Mapping[str, Any]]:
    """data.json of every stage."""
    data = read_run_data(Run(folder), config, stages_of(config))
    return [stage.record for stage in data.stages.values()]


def budget(found: list[Mapping[str, Any]]) -> dict[str, Counter[str]]:
    """Rows and supervised tokens drawn, by source."""
    drawn: dict[str, Counter[str]] = {"rows_drawn": Counter(), "supervised_tokens_drawn": Counter()}
    for record in found:
        for source, entry in record["sources"].items():
            for name, counter in drawn.items():
                counter[source] += entry[name]
    return {name: +counter for name, counter in drawn.items()}


@pytest.mark.slow
@pytest.mark.parametrize("second", ["dpo", "kto", "una"])
def test_one_stage_has_the_budget_of_the_two(second: str, tmp_path: Path) -> None:
    """The same number of rows of every source, and of their supervised tokens."""
    two, one = (config_of(f"experiment=sft_{how}_{second}") for how in ("then", "with"))
    ours, theirs = budget(records(one, tmp_path)), budget(records(two, tmp_path))
    assert ours == theirs
    assert sum(ours["rows_drawn"].values()) == 329 * 32
    assert len(ours["rows_drawn"]) >= 2


@pytest.mark.slow
def test_the_rows_themselves_are_the_same_each_as_often(tmp_path: Path) -> None:
    """The k-th row of a source is the same in every mixture, so equal counts are equal rows."""
    drawn = []
    for how in ("then", "with"):
        config = config_of(f"experiment=sft_{how}_una")
        found: Counter[str] = Counter()
        for part in [stage.config for stage in stages_of(config)]:
            corpus = read_train_data(part, load_tokenizer(part.model))
            sampler = make_sampler(part, corpus, make(part.objective))
            for draw in sampler.mixture.take(make_horizon(part, corpus).total_rows):
                found[sampler.sources[draw.source].rows[draw.index].id] += 1
        drawn.append(found)
    assert drawn[0] == drawn[1]


@pytest.mark.slow
def test_training_spends_what_was_planned(tmp_path: Path) -> None:
    """Both, trained for a few steps: the counters of metrics.jsonl end on the same numbers, those of data.json."""
    short = ("train.steps=3", "stages.dpo.set.train.steps=2")
    two = config_of("experiment=sft_then_dpo", *SMALL, *short)
    shares = ("data.sources.instruct.share=3", "data.sources.pairs.share=2", "train.steps=5")
    one = config_of("experiment=sft_with_dpo", *SMALL, *shares)
    ends = []
    for name, config in (("two", two), ("one", one)):
        run = create_run(tmp_path / name, to_yaml(to_builtins(asdict(config))), [])
        assert train(str(run.path)) == 0
        last = json.loads(run.metrics_file.read_text().splitlines()[-1])
        result = run.result()
        assert (last["rows"], last["supervised_tokens"]) == (result["rows"], result["supervised_tokens"])
        files = [run.path / "data.json"] if name == "one" else sorted(run.path.glob("stages/*/data.json"))
        spent = budget([json.loads(file.read_text()) for file in files])
        assert sum(spent["supervised_tokens_drawn"].values()) == result["supervised_tokens"]
        ends.append((last["step"], last["rows"], last["supervised_tokens"], spent))
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_what_the_shipped_pipelines_are() -> None:
    for name, stages in {
        "sft_then_dpo": ["sft", "dpo"],
        "sft_then_kto": ["sft", "kto"],
        "sft_then_una": ["sft", "una"],
        "dpo_then_sft": ["dpo", "sft"],
        "poft": ["baseline", "poft"],
    }.items():
        config = config_of(f"experiment={name}")
        assert list(config.stages) == stages
        trained = [stage.config for stage in stages_of(config) if stage.do == "fit"]
        assert sum(part.train.steps or 0 for part in trained) == 329  # as every arm of the playground
