"""Runs of a few steps on the embedded model and mixture, in processes of their own that faults are planted in."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for planting.py and sessions.py
sys.path.insert(0, str(Path(__file__).parents[1] / "report"))  # for synthetic.py

from evidence import written
from sessions import Bench

from uft.config.compose import compose
from uft.config.frozen import frozen
from uft.playground.world import SOURCES, records
from uft.runs import Run, create_run

SMALL = (
    "train.batch_size=4",
    "train.micro_batch_tokens=200",
    "train.log_every=2",
    "train.checkpoint_every=3",
    "train.eval_every=4",
    "train.keep_last=1",
    "data.holdout=2",
    "eval.rows=3",
    "eval.samples=1",
    "eval.generate_rows=2",
    "eval.max_new_tokens=4",
    "tracking=none",
    "hardware=cpu",
)
"""Lines, evaluations, checkpoints and ends all fall on different steps."""
LOOP = """\
# @package _global_
# every phase there is: two trainings with cached references, and rows that the model of the first one samples
stages:
  dpo:
    objective: dpo
    data: files
    set: {data.sources.pairs.path: pairs.jsonl, train.steps: 5, reference.mode: cached}
  sample:
    do: generate
    data: files
    set: {data.sources.instruct.path: instruct.jsonl, generate.max_new_tokens: 8, generate.batch_size: 4}
  dft:
    objective: dft
    data: files
    set: {data.sources.sampled.path: stage:sample, train.steps: 5, reference.mode: cached}
"""
COLUMN = """\
# @package _global_
# what models say of the rows, and a training on it
stages:
  baseline:
    do: annotate
    data: files
    set:
      data.sources.instruct.path: instruct.jsonl
      annotate: {column: baseline_logp, models: [builtin:playground], batch_tokens: 200}
  poft:
    objective: poft
    data: files
    set: {data.sources.instruct.path: stage:baseline, train.steps: 5}
"""


@pytest.fixture
def environment(environment):
    return environment | {"WANDB_MODE": "disabled"}


@pytest.fixture
def bench(tmp_path, environment) -> Bench:
    said = tmp_path / "said"
    said.mkdir()
    return Bench(said, environment)


@pytest.fixture
def new_run(tmp_path, monkeypatch):
    """new_run("name", "objective=sft", ...): a run folder as `uft train` makes it, before its first session.

    In a folder with the first rows of the embedded mixture's sources, as files.
    """
    conf = tmp_path / "conf-user" / "experiment"
    conf.mkdir(parents=True)
    (conf / "loop.yaml").write_text(LOOP)
    (conf / "column.yaml").write_text(COLUMN)
    monkeypatch.setenv("UFT_CONF", str(conf.parent))
    monkeypatch.chdir(tmp_path)
    for name in SOURCES:
        lines = [json.dumps(row) + "\n" for row in records(name)[:12]]
        Path(f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    def make(name: str, *overrides: str) -> Run:
        words = (*SMALL, *overrides)
        text = TEXTS.get(words) or frozen(compose(list(words)))
        assert str(tmp_path) not in text or "/" in "".join(overrides)
        TEXTS[words] = text
        return create_run(tmp_path / name, text, list(words))

    return make


TEXTS: dict[tuple[str, ...], str] = {}
"""Words -> configuration, which says nothing of the folder that one works in."""
UNDISTURBED: dict[tuple[str, ...], dict[str, Any]] = {}


@pytest.fixture
def undisturbed(bench, new_run, tmp_path):
    """undisturbed(*words): what a run leaves to which nothing happens; made once for all tests."""

    def made(*words: str) -> dict[str, Any]:
        if words not in UNDISTURBED:
            run = new_run("undisturbed", *words)
            bench.sit(run.path, code=0, UFT_CACHE=str(tmp_path / "undisturbed-cache"))
            UNDISTURBED[words] = written(run.path)
        return UNDISTURBED[words]

    return made
