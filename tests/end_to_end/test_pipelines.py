"""Runs of several stages as a person meets them: real processes, killed and stopped in every stage and between two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from lifecycle import at_step, child_of, end, kill_worker, last_step, rows_of, same, wait_for

Start = Callable[..., "subprocess.Popen[str]"]
Uft = Callable[..., "subprocess.CompletedProcess[str]"]
SFT, DPO = 12, 14
SMALL = (
    "train.batch_size=6",
    "train.log_every=1",
    "train.checkpoint_every=3",
    "train.eval_every=5",
    "data.holdout=0.2",
    "eval=default",
    "eval.max_new_tokens=12",
    "model=custom",
    "tracking=none",
    "hardware=cpu",
)
PIPE = f"""\
# @package _global_
# two stages on files of one's own
stages:
  sft:
    objective: sft
    data: files
    set: {{data.sources.shown.path: shown.jsonl, train.steps: {SFT}, optim.lr: 0.01}}
  dpo:
    objective: dpo
    data: files
    set: {{data.sources.pairs.path: pairs.jsonl, train.steps: {DPO}, optim.lr: 0.005, objective.beta: 0.3}}
"""
LOOP = """\
# @package _global_
# negatives of the model so far, and training on them
stages:
  sft:
    objective: sft
    data: files
    set: {data.sources.shown.path: shown.jsonl, train.steps: 3}
  sample:
    do: generate
    data: files
    set:
      data.sources.shown.path: shown.jsonl
      generate: {max_new_tokens: 140, temperature: 1.0, top_k: 0, seeds: [0, 1, 2, 3, 4, 5, 6, 7], batch_size: 2}
  dft:
    objective: dft
    data: files
    set: {data.sources.sampled.path: stage:sample, train.steps: 3, objective.negatives: 1}
"""

ROUNDS = """\
# @package _global_
# sample and train, twice
rounds: 2
stages:
  sample:
    do: generate
    data: files
    set:
      data.sources.shown: {path: shown.jsonl, part: round}
      generate: {max_new_tokens: 100, temperature: 1.0, top_k: 0, seeds: [0, 1, 2, 3], repeats: drop}
  fit:
    objective: spin
    data: files
    set: {data.sources.own.path: stage:sample, train.steps: 6, optim.lr: 0.0001}
"""


@pytest.fixture
def request_for(tmp_path: Path, tiny_model: Path, write: Callable[..., Path]) -> Callable[..., list[str]]:
    """request_for("pipe", *overrides): a run of stages on files in the folder that every process works in."""
    folder = tmp_path / "conf-user" / "experiment"
    folder.mkdir(parents=True)
    (folder / "pipe.yaml").write_text(PIPE)
    (folder / "loop.yaml").write_text(LOOP)
    (folder / "rounds.yaml").write_text(ROUNDS)
    write(tmp_path / "shown.jsonl", rows_of("demonstrations"))
    write(tmp_path / "pairs.jsonl", rows_of("pairs"))
    return lambda name, *more: [f"experiment={name}", *SMALL, f"model.path={tiny_model}", *more]


@pytest.mark.slow
def test_killed_in_and_between_its_stages_moved_and_stopped(
    start: Start, uft: Uft, request_for: Callable[..., list[str]], tmp_path: Path
) -> None:
    """One story: whatever happens to the run, and however often, it ends as the one to which nothing happened."""
    request = request_for("pipe", "reference.mode=cached")
    whole, died, moved = tmp_path / "whole", tmp_path / "died", tmp_path / "elsewhere" / "run"
    uft("train", *request, f"run.dir={whole}", env={"UFT_CACHE": str(tmp_path / "other-cache")})
    assert last_step(whole) == SFT + DPO

    process = start("train", *request, f"run.dir={died}")
    wait_for(at_step(died, 7), process)
    assert kill_worker(process)[0] == 1  # in the first stage
    moved.parent.mkdir()
    died.rename(moved)

    process = start("resume", str(moved))
    wait_for((moved / "stages/1-sft/model").is_dir, process)
    assert kill_worker(process)[0] == 1  # between the two
    refused = uft("resume", str(moved), "optim.lr=0.5", code=2).stderr
    assert "stages.sft.optim.lr" in refused
    assert "0.01 -> 0.5" in refused

    process = start("resume", str(moved), "train.log_every=1")
    wait_for(at_step(moved, SFT + 6), process)
    worker = child_of(process.pid)
    assert worker is not None
    os.kill(worker, signal.SIGTERM)  # in the second stage
    code, said = end(process)
    assert code == 75
    assert "uft resume" in said
    result = json.loads((moved / "result.json").read_text())
    assert result["status"] == "stopped"
    assert result["steps"] >= SFT + 6
    assert list(result["stages"]) == ["sft"]
    listed = uft("ls", str(moved.parent)).stdout
    assert f"{result['steps']}/{SFT + DPO}" in listed

    uft("resume", str(moved))
    same(moved, whole)
    assert "finished already" in uft("resume", str(moved)).stdout
    same(moved, whole)


@pytest.mark.slow
def test_rows_that_a_stage_samples_are_sampled_once(
    start: Start, uft: Uft, request_for: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Stopped while it samples, the stage goes on by whole lines."""
    request = request_for("loop")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    uft("train", *request, f"run.dir={whole}", env={"UFT_CACHE": str(tmp_path / "other-cache")})
    rows = (whole / "stages/2-sample/rows.jsonl").read_text().splitlines()
    assert 4 < len({json.loads(row)["prompt"] for row in rows}) == len(rows) <= 8  # of ten, two are held out

    process = start("train", *request, f"run.dir={stopped}")
    part = stopped / "stages/2-sample/.rows.part.jsonl"
    wait_for(lambda: part.is_file() and part.stat().st_size > 0, process)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 75
    assert not (stopped / "stages/2-sample/rows.jsonl").exists()
    begun = part.read_text()
    uft("resume", str(stopped))
    assert (stopped / "stages/2-sample/rows.jsonl").read_text().startswith(begun)
    same(stopped, whole)


@pytest.mark.slow
def test_rounds_killed_in_the_second_end_as_if_nothing_had_happened(
    start: Start, uft: Uft, request_for: Callable[..., list[str]], tmp_path: Path
) -> None:
    request = request_for("rounds")
    whole, died = tmp_path / "whole", tmp_path / "died"
    uft("train", *request, f"run.dir={whole}", env={"UFT_CACHE": str(tmp_path / "other-cache")})
    assert list(json.loads((whole / "result.json").read_text())["stages"]) == ["sample-1", "fit-1", "sample-2", "fit-2"]
    process = start("train", *request, f"run.dir={died}")
    wait_for(at_step(died, 8), process)
    assert kill_worker(process)[0] == 1
    uft("resume", str(died))
    same(died, whole)
    refused = uft("resume", str(died), "rounds=3", code=2).stderr
    assert "rounds" in refused


@pytest.mark.slow
def test_the_verbs_after_train_know_stages(uft: Uft, request_for: Callable[..., list[str]], tmp_path: Path) -> None:
    request, run = request_for("pipe", "train.steps=2", "eval=none"), tmp_path / "run"
    uft("train", *request, f"run.dir={run}")
    assert list(yaml.safe_load((run / "config.yaml").read_text())["stages"]) == ["sft", "dpo"]
    changed = uft("config", *request, "stages.dpo.set.optim.lr=0.25", "--diff", str(run)).stdout
    matters = [line.split() for line in changed.splitlines() if "may change within a run" not in line]
    assert matters == [["stages.dpo.optim.lr", "0.005", "->", "0.25"]]
    warm = ("generate.temperature=5", "generate.top_k=0", "generate.seeds=[0,1,2,3,4,5,6,7]")  # some replies end
    uft("generate", str(run), *warm, "generate.out=said.jsonl")
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert {line["sampled_by"] for line in said} == {str(run / "model")}


@pytest.mark.slow
def test_a_sweep_over_a_key_of_one_stage(uft: Uft, request_for: Callable[..., list[str]], tmp_path: Path) -> None:
    request = request_for("pipe", "train.steps=2", "eval=none", "sweep.name=betas")
    uft("train", "-m", *request, "objective.beta=0.1,0.9")
    (folder,) = (tmp_path / "outputs").glob("*/betas")
    runs = sorted(path for path in folder.iterdir() if (path / "run.json").is_file())
    assert [path.name for path in runs] == ["pipe-beta0.1", "pipe-beta0.9"]
    losses = []
    for run, beta in zip(runs, (0.1, 0.9), strict=True):
        frozen = yaml.safe_load((run / "config.yaml").read_text())
        assert frozen["objective"]["beta"] == beta
        assert "beta" not in frozen["stages"]["sft"]["config"]["objective"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines])
    assert losses[0][:3] == losses[1][:3]  # SFT, and the first step of DPO
    assert losses[0][3] != losses[1][3]
    refused = uft("train", "-m", *request, "objective.betta=0.1,0.9", code=2).stderr
    assert "no such key in any stage" in refused
