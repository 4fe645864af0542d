"""Same request, same bits; a seed changes its own thing; a source's order is its own affair."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from evidence import same, written
from sessions import SINGLE

from uft.config.frozen import load_config
from uft.runs import Run
from uft.training.setup import Work, prepare


@pytest.fixture(autouse=True)
def same_generator(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with torch.random.fork_rng(devices=[]):
        yield


TOKENISED = {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "2"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "variables"),
    [
        pytest.param((), {}, id="again"),
        pytest.param(("train.prefetch=true",), {}, id="rows laid out by a thread"),
        pytest.param((), TOKENISED, id="tokenised by two threads"),
        pytest.param(("hardware.threads=2",), {"OMP_NUM_THREADS": "2"}, id="two threads"),
    ],
)
def test_the_same_request_gives_the_same_bits(bench, new_run, undisturbed, keys, variables):
    """From cold caches and from warm ones. Two threads may round sums otherwise than one, but do so every time."""
    expected = {} if "hardware.threads=2" in keys else undisturbed(*SINGLE)
    for name in ("cold", "warm"):
        run = new_run(name, *SINGLE, *keys)
        bench.sit(run.path, code=0, **variables)
        expected = expected or written(run.path)
        same(run.path, expected)


# --- what a seed is for


def things(run: Run) -> dict[str, Any]:
    """What the three seeds are for, as a run has it before its first step."""
    config = load_config(run.config_file)
    trainer = prepare(run, Work(config)).trainer
    weights = hashlib.sha256()
    for name, parameter in sorted(trainer.parameters.items()):
        weights.update(name.encode() + parameter.detach().numpy().tobytes())
    rows = [(draw.source, draw.index) for draw in trainer.sampler.preview(60)]
    noise = [trainer.step_context(step).noise for step in range(5)]
    return {"init": weights.hexdigest(), "data": rows, "sampling": (noise, torch.rand(8).tolist())}


@pytest.mark.slow
def test_every_seed_changes_its_own_thing_alone(new_run):
    before = things(new_run("zero", *SINGLE))
    assert things(new_run("again", *SINGLE)) == before
    for seed in ("init", "data", "sampling"):
        after = things(new_run(seed, *SINGLE, f"seeds.{seed}=1"))
        assert {name for name in before if after[name] != before[name]} == {seed}
    after = things(new_run("all", *SINGLE, "seed=1"))
    assert all(after[name] != before[name] for name in before)


def orders(run: Run) -> dict[str, list[str]]:
    """The rows that each source gives, in the order in which a run draws them."""
    sampler = prepare(run, Work(load_config(run.config_file))).trainer.sampler
    found: dict[str, list[str]] = {}
    for draw in sampler.preview(200):
        source = sampler.sources[draw.source]
        found.setdefault(source.source, []).append(source.rows[draw.index].id)
    return found


MIXED = ("objective=sft", "data=files", *(f"+data.sources.{n}.path={n}.jsonl" for n in ("instruct", "pairs", "binary")))
CHANGES = {
    "a share": ("data.sources.pairs.share=5", "data.sources.instruct.share=1", "data.sources.binary.share=1"),
    "one more source": ("+data.sources.also.path=scored.jsonl",),
    "the batch": ("train.batch_size=7",),
    "another objective": ("objective=ift",),
}


def test_a_source_s_order_is_its_own_affair(new_run):
    before = orders(new_run("before", *MIXED))
    assert set(before) == {"instruct", "pairs", "binary"}
    for name, words in CHANGES.items():
        after = orders(new_run(name, *MIXED, *words))
        for source, rows in before.items():
            common = min(len(rows), len(after[source]))
            assert common > 15
            assert after[source][:common] == rows[:common], f"{name}: {source}"
    assert orders(new_run("seed", *MIXED, "seeds.data=1"))["pairs"] != before["pairs"]
