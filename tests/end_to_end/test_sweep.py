"""A sweep, started as a person starts it: its jobs are forks of one server, and leave what other workers leave."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lifecycle import same
from program import isolated

LEARNING = ("train.steps=3", "optim.lr=0.01", "data.holdout=2", "eval=quick", "train.checkpoint_every=2")


@pytest.mark.slow
def test_jobs_of_a_sweep_leave_the_bits_of_a_run_alone(
    request_of: Callable[..., list[str]], here: Callable[..., Path], tmp_path: Path
) -> None:
    """Metrics, samples, checkpoints and weights; the job that fails takes no other one along."""
    words = request_of("sft", ["demonstrations"], *LEARNING, "train.batch_size=4")
    folder = tmp_path / "sweep"
    swept = ["objective=poft,sft", f"hydra.sweep.dir={folder}", "sweep.name=forked"]
    command = [sys.executable, "-m", "uft", "train", "-m", *words[1:], *swept]
    environment = isolated(tmp_path, tmp_path / "other-cache")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 of 2 jobs failed" in done.stderr
    assert "objective=poft needs baseline_logp, which 3 of 3 rows lack" in done.stderr
    same(folder / "sft", here(words, name="alone"))


def test_what_an_objective_of_a_sweep_cannot_use_is_told_before_any_job(
    request_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    words = request_of("sft", ["demonstrations"], *LEARNING)[1:]
    folder = tmp_path / "sweep"
    command = [sys.executable, "-m", "uft", "train", "-m", *words, "objective=sft,dpo", f"hydra.sweep.dir={folder}"]
    environment = isolated(tmp_path, tmp_path / "other-cache")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "objective=dpo cannot use 3 demonstration rows" in done.stderr
    assert "first in  objective=dpo, which can use no other row" in done.stderr
    assert re.search(r"Without what can use no row:  uft train -m .*\bobjective=sft( |$)", done.stderr, re.MULTILINE)
    assert "data.unusable=drop" not in done.stderr, "dpo would have nothing left"
    assert not folder.exists()
