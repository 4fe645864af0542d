"""Runs of two processes through the launchers of sweeps: submitit on this machine, a real Slurm, a Ray.

The last two are asked for: `UFT_TEST_SLURM=1` where `sbatch` works (scripts/slurm_node.sh makes such a machine), and
`UFT_TEST_RAY=1` where the extra [ray] is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from cases import overrides, write_files
from outside import environment

LAUNCHER = "hydra_plugins.hydra_submitit_launcher"


def request(folder: Path, *more: str) -> list[str]:
    wanted = overrides("sft", ("demonstrations",), folder, ())
    return [sys.executable, "-m", "uft", "train", "-m", *(w for w in wanted if w != "hardware=cpu"), *more]


def finished(folder: Path, count: int) -> list[dict]:
    results = [json.loads(file.read_text()) for file in sorted((folder / "outputs").rglob("result.json"))]
    assert [result["status"] for result in results] == ["finished"] * count
    return results


def run(folder: Path, command: Sequence[str], **more: str) -> None:
    write_files(folder)
    env = environment(folder) | more
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_submitit_on_this_machine(tmp_path: Path) -> None:
    pytest.importorskip(LAUNCHER, reason="extra [slurm] is not installed")
    words = ("hardware=cpu2", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=20", "seed=1,2")
    run(tmp_path, request(tmp_path, *words))
    assert [result["steps"] for result in finished(tmp_path, 2)] == [4, 4]


SLURM = pytest.mark.skipif(
    not os.environ.get("UFT_TEST_SLURM") or shutil.which("sbatch") is None,
    reason="asked for by UFT_TEST_SLURM=1, on a machine with Slurm",
)
ON_CPU = (
    "hardware=slurm",
    "hardware.device=cpu",
    "hardware.processes=2",
    "hydra.launcher.gpus_per_node=null",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=null",
    "hydra.launcher.timeout_min=30",
    "hydra.launcher.signal_delay_s=20",
)


@pytest.mark.slow
@SLURM
def test_slurm(tmp_path: Path) -> None:
    run(tmp_path, request(tmp_path, *ON_CPU, "seed=1,2"))
    finished(tmp_path, 2)


@pytest.mark.slow
@SLURM
def test_slurm_puts_a_job_back_and_it_goes_on(tmp_path: Path) -> None:
    """`scancel --signal=USR2`, as before the end of a job's time: a checkpoint, the queue, and on from there."""
    write_files(tmp_path)
    command = request(tmp_path, *ON_CPU, "seed=1", "train.steps=150", "train.checkpoint_every=0")
    waiting = subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path))
    try:
        deadline = time.monotonic() + 600
        while not [file for file in tmp_path.rglob("metrics.jsonl") if file.read_text().count("\n") > 5]:
            assert waiting.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        subprocess.run(["scancel", "--signal=USR2", "--name=train"], check=True)
        assert waiting.wait(timeout=1200) == 0
    finally:
        waiting.kill()
    (result,) = finished(tmp_path, 1)
    assert result["steps"] == 150
    (log,) = tmp_path.rglob("console.log")
    assert "resumed at step" in log.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("UFT_TEST_RAY"), reason="asked for by UFT_TEST_RAY=1, with the extra [ray]")
def test_ray_on_loopback(tmp_path: Path) -> None:
    words = ("hardware=ray", "hardware.device=cpu", "hydra.launcher.ray.remote.num_gpus=0", "seed=1,2")
    run(tmp_path, request(tmp_path, *words, "hydra.launcher.ray.remote.num_cpus=1"))
    finished(tmp_path, 2)
