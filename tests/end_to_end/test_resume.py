"""A run that is killed and resumed is the run that was not, bit for bit: real processes, real signals."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import program
import pytest
from lifecycle import LORA, STEPS, UNEVEN, USES, at_step, begun, child_of, files_for, kill_worker, same, wait_for

from uft.runs import create_run

Start = Callable[..., "subprocess.Popen[str]"]
Uft = Callable[..., "subprocess.CompletedProcess[str]"]
OPTIMISERS = {
    "adamw": ("optim=adamw", "optim.weight_decay=0.1"),
    "rmsprop": ("optim=rmsprop", "optim.momentum=0.9"),
    "sgd": ("optim=sgd", "optim.momentum=0.9"),
}
TUNINGS: dict[str, tuple[str, ...]] = {"full": (), "lora": LORA}
EXTRAS = {"ift": ("objective.lam_noise=0.5", "objective.lam_start=0.0")}


@pytest.fixture
def request_for(request_of: Callable[..., list[str]], tmp_path: Path, write: Callable[..., Path]) -> Callable[..., Any]:
    """request_for("ift", *overrides): a run whose lines, evaluations, checkpoints and end fall on different steps."""

    def make(objective: str, *more: str) -> list[str]:
        files = files_for(objective, tmp_path / "rows", write)
        return request_of(objective, files, *UNEVEN, *EXTRAS.get(objective, ()), *more)

    return make


@pytest.mark.slow
def test_killed_moved_and_resumed_twice(start: Start, uft: Uft, request_for: Any, tmp_path: Path) -> None:
    """One story: every command a person would type around a run that dies, and what each of them says."""
    request = request_for("uft", *LORA, *OPTIMISERS["rmsprop"], "reference.mode=cached")
    whole, died, moved = tmp_path / "whole", tmp_path / "died", tmp_path / "elsewhere" / "run"
    uft("train", *request, f"run.dir={whole}", env={"UFT_CACHE": str(tmp_path / "other-cache")})

    process = start("train", *request, f"run.dir={died}")
    wait_for(at_step(died, 8), process)
    code, said = kill_worker(process)
    assert code == 1
    assert "killed by SIGKILL" in said
    assert not (died / "result.json").exists()

    moved.parent.mkdir()
    died.rename(moved)
    refused = uft("resume", str(moved), "optim.lr=0.5", "train.batch_size=7", code=2)
    assert "optim.lr" in refused.stderr
    assert "0.01 -> 0.5" in refused.stderr
    assert "6 -> 7" in refused.stderr

    process = start("resume", str(moved))
    wait_for(begun(moved), process)
    wait_for(at_step(moved, 16), process)
    second = uft("resume", str(moved), code=2)
    assert "another process is working in this run folder" in second.stderr
    assert kill_worker(process)[0] == 1

    uft("resume", str(moved), "train.log_every=2")
    same(moved, whole)
    again = uft("resume", str(moved))
    assert "finished already" in again.stdout
    same(moved, whole)


@pytest.mark.slow
def test_killed_where_nothing_was_saved_yet(start: Start, uft: Uft, request_for: Any, tmp_path: Path) -> None:
    """Killed before the first checkpoint, a run begins again and no line is there twice."""
    request = request_for("ift", "train.checkpoint_every=0", "eval.max_new_tokens=4")
    whole, died = tmp_path / "whole", tmp_path / "died"
    uft("train", *request, f"run.dir={whole}")
    process = start("train", *request, f"run.dir={died}")
    wait_for(at_step(died, 4), process)
    kill_worker(process)
    assert not (died / "checkpoints").exists()
    refused = uft("train", *request, "train.steps=30", f"run.dir={died}", code=2)
    assert f"{STEPS} -> 30" in refused.stderr
    uft("train", *request, f"run.dir={died}")  # the same command again continues, too
    same(died, whole)


def test_a_second_worker_is_refused_by_the_lock(tmp_path: Path, environment: dict[str, str]) -> None:
    """Also where two launchers looked at the same moment and both saw a free run."""
    run = create_run(tmp_path / "run", "seed: 0\n", [])
    with run.lock():
        command = [sys.executable, "-m", "uft.launch.worker", str(run.path)]
        second = program.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode == 2
    assert "another process is working in this run folder" in second.stderr


CASES = [
    pytest.param(objective, tuning, optimiser, id=f"{objective}-{tuning}-{optimiser}")
    for objective in USES
    for tuning in TUNINGS
    for optimiser in OPTIMISERS
]


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "tuning", "optimiser"), CASES)
def test_every_combination_survives_random_kills(
    start: Start, uft: Uft, request_for: Any, tmp_path: Path, objective: str, tuning: str, optimiser: str
) -> None:
    """Two kills each, one at a step and one after a random time, wherever that may fall."""
    request = request_for(objective, *TUNINGS[tuning], *OPTIMISERS[optimiser])
    whole, died = tmp_path / "whole", tmp_path / "died"
    uft("train", *request, f"run.dir={whole}", env={"UFT_CACHE": str(tmp_path / "other-cache")})
    chance = random.Random(f"{objective} {tuning} {optimiser}")
    process = start("train", *request, f"run.dir={died}")
    wait_for(at_step(died, chance.randrange(0, STEPS - 3)), process)
    kill_worker(process)
    process = start("resume", str(died))
    try:
        process.wait(timeout=chance.uniform(2, 8))
    except subprocess.TimeoutExpired:
        # a slow machine may not have started it yet, a fast one be done
        if wait_for(lambda: child_of(process.pid) or process.poll() is not None, process) is not True:
            kill_worker(process)
    uft("resume", str(died))
    same(died, whole)
    shutil.rmtree(whole)
