"""The long part: a soak, a sweep among kills, and a thousand run folders. `pytest -m slow tests/faults`."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from evidence import CLOCKS, same, written
from sessions import Session

from uft.runs import Run, create_run, find_runs

pytestmark = pytest.mark.slow
MINUTE = 60.0
SOAK = (
    "objective=ift",
    "data=mix",
    "train.steps=200000",
    "train.batch_size=4",
    "train.log_every=5",
    "train.checkpoint_every=100",
    "train.eval_every=250",
    "train.keep_last=3",
    "eval=quick",
    "tracking.mode=offline",
    "hardware=cpu",
)


def figures(pid: int) -> dict[str, int]:
    """What a process takes at a moment: bytes of memory, open handles, threads."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    handles = len(os.listdir(f"/proc/{pid}/fd"))
    return {"resident": int(status["VmRSS"].split()[0]) * 1024, "handles": handles, "threads": int(status["Threads"])}


def last_step(run: Run) -> int:
    if not run.metrics_file.is_file():
        return -1
    with open(run.metrics_file, "rb") as file:
        file.seek(max(0, run.metrics_file.stat().st_size - 4000))
        lines = file.read().splitlines()[:-1]
    return json.loads(lines[-1])["step"] if len(lines) > 1 else -1


def lines_of(run: Run) -> dict[int, list[Mapping[str, Any]]]:
    """The lines of every step but for times."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for text in run.metrics_file.read_text().splitlines():
        line = json.loads(text)
        found.setdefault(line["step"], []).append({k: v for k, v in line.items() if k not in CLOCKS})
    return found


def wait_until(condition: Callable[[], bool], session: Session) -> None:
    deadline = time.monotonic() + 20 * MINUTE
    while not condition():
        assert session.process.poll() is None, session.said
        assert time.monotonic() < deadline
        time.sleep(0.2)


def stop(session: Session) -> None:
    os.kill(session.process.pid, signal.SIGTERM)
    assert session.wait().code == 75


def test_soak(bench, new_run, tmp_path):
    """FAULT_SOAK_SECONDS (1800) of steps, evaluations, checkpoints and W&B offline: nothing grows, and a copy of the
    folder that was taken while it was written goes on bit for bit."""
    seconds, samples = float(os.environ.get("FAULT_SOAK_SECONDS", "1800")), list[dict[str, int]]()
    run, copy = new_run("soak", *SOAK), Run(tmp_path / "copy")
    session = bench.start(run.path, WANDB_MODE="offline", WANDB_SILENT="true", WANDB__DISABLE_STATS="true")
    wait_until(lambda: last_step(run) > 100, session)
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        samples.append(figures(session.process.pid))
        time.sleep(min(2.0, seconds / 100))
        assert session.process.poll() is None, session.said
    shutil.copytree(run.path, copy.path, ignore=shutil.ignore_patterns("wandb", ".step-*"))
    taken = copy.steps
    wait_until(lambda: run.steps >= taken + 200, session)
    stop(session)
    fifth = len(samples) // 5  # the last takes no more than the second, when everything had been used once
    for name, allowed in (("resident", 1.03), ("handles", 1.0), ("threads", 1.0)):
        before, after = (
            statistics.median(sample[name] for sample in part)
            for part in (samples[fifth : 2 * fifth], samples[-fifth:])
        )
        assert after <= before * allowed, f"{name}: {before} -> {after}"

    again = bench.start(copy.path, WANDB_MODE="disabled")
    wait_until(lambda: copy.steps >= taken + 200, again)
    stop(again)
    ours, theirs = lines_of(copy), lines_of(run)
    common = [step for step in ours if step in theirs]
    assert max(common) >= taken + 200
    assert {step: ours[step] for step in common} == {step: theirs[step] for step in common}
    kept = {step for step, _ in copy.checkpoints()} & {step for step, _ in run.checkpoints()}
    assert kept
    for step in kept:
        files = [of.checkpoints_dir / f"step-{step:06d}" / "tensors.safetensors" for of in (copy, run)]
        assert files[0].read_bytes() == files[1].read_bytes(), step


# --- a sweep


def workers_below(pid: int) -> list[int]:
    """The workers among the children of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name, _, rest = (entry / "stat").read_text().rpartition(")")
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if int(rest.split()[1]) == pid and (b"uft.launch.worker" in words or name.endswith("(uft-worker")):
                found.append(int(entry.name))
    return found


def test_a_sweep_of_a_hundred_jobs_among_kills(tmp_path, environment, bench):
    """FAULT_JOBS (100) of them; workers and the program itself are killed at random, and the command is given again."""
    jobs, chance, kills, rounds = int(os.environ.get("FAULT_JOBS", "100")), random.Random(8), 0, 0
    request = ["debug=fast", "objective=sft", "train.steps=3", "train.checkpoint_every=1", "train.log_every=1"]
    folder = tmp_path / "outputs"
    command = [sys.executable, "-m", "uft", "train", "-m", *request, f"seed=range(0,{jobs})", "sweep.name=many"]
    code = 1
    while code != 0:
        rounds += 1
        program = subprocess.Popen(
            command, cwd=tmp_path, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while program.poll() is None:
            time.sleep(chance.uniform(2, 40))
            if kills < jobs // 4:
                targets = workers_below(program.pid)
                target = program.pid if not targets or chance.random() < 0.1 else chance.choice(targets)
                os.kill(target, signal.SIGKILL)
                kills += 1
        code = program.wait()
        assert rounds <= jobs // 4 + 5
    found = [run for run in find_runs(folder) if run.status == "finished"]
    assert len(found) == jobs
    assert kills > 0
    first = next(run for run in found if run.name == "sft-seed0")
    whole = create_run(tmp_path / "whole", (first.path / "config.yaml").read_text(encoding="utf-8"), [])
    bench.sit(whole.path, code=0)
    expected = written(whole.path)
    same(first.path, {name: expected[name] for name in ("curve", "models", "tensors")})


# --- many runs


def test_a_thousand_run_folders_are_read_in_seconds(tmp_path, uft):
    """FAULT_RUNS (1000) of them, with seals; a minute is allowed, for machines that are busy or old."""
    from synthetic import make_sweep

    from uft.tracking import metrics

    runs, sweep = int(os.environ.get("FAULT_RUNS", "1000")), tmp_path / "outputs" / "sweep"
    make_sweep(sweep, objectives=("sft", "uft", "ift", "dpo"), seeds=range(runs // 4))
    for run in find_runs(sweep):
        for file in (run.metrics_file, run.samples_file):
            lines = file.read_text().splitlines()
            checksums = (metrics.checksum_line(json.loads(line)["step"], line) for line in lines)
            metrics.checksum_file(file).write_text("".join(checksums))
    took = {}
    for verb, words in {"ls": ["--json"], "compare": []}.items():
        began = time.monotonic()
        done = uft(verb, sweep, *words, timeout=600)
        took[verb] = time.monotonic() - began
        if verb == "ls":
            assert len(json.loads(done.stdout)) == 4 * (runs // 4)
    assert max(took.values()) < MINUTE, took
