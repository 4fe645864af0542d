"""What hangs, crashes or runs out of memory: the cause is said, and the run goes on where it was."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import program
import pytest
from evidence import same
from planting import Fault
from requests_of import COLUMN, LOOP, SINGLE
from sessions import Bench

from uft.config.frozen import free
from uft.launch.process import cause, oom_kills
from uft.runs import Run

NewRun = Callable[..., Run]
Undisturbed = Callable[..., dict[str, Any]]
PATIENCE = 4.0  # seconds of the watchdog here


QUICK = {
    "step": (SINGLE, "after step.all_reduce_terms", 4, "it trained", "training/trainer.py"),
    "tokens": (SINGLE, "before tokens._encode_chunk", 1, "rows were tokenised", "data/tokens.py"),
}
LONG = {
    "model": (SINGLE, "before load.load_base", 0, "a model was loaded", "model/load.py"),
    "reference": (
        SINGLE,
        "before reference.ReferenceColumn._compute",
        0,
        "reference log-probs were computed",
        "model/reference.py",
    ),
    "evaluation": (SINGLE, "before generate.complete", 4, "the model was evaluated", "evaluation/evaluate.py"),
    "checkpoint": (SINGLE, "before os.replace", 0, "a checkpoint was written", "training/checkpoint.py"),
    "export": (SINGLE, "before export.plain_model", 0, "the model was exported", "model/export.py"),
    "stage": (LOOP, "after step.all_reduce_terms", 4, "it trained", "training/session.py"),
    "sampling": (LOOP, "before negatives._append", 1, "completions were sampled", "sampling/negatives.py"),
    "annotating": (COLUMN, "after annotate._mean", 3, "rows were annotated", "sampling/annotate.py"),
    "stage's export": (LOOP, "before export.plain_model", 0, "the model was exported", "model/export.py"),
}
"""What hangs: the request, the moment, the phase that is named, and a file that its stack leads through."""


@pytest.mark.parametrize(
    ("words", "where", "at", "phase", "file"),
    [*QUICK.values(), *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG.values())],
    ids=[*QUICK, *LONG],
)
def test_a_run_that_hangs_is_ended_and_can_be_resumed(
    bench: Bench,
    new_run: NewRun,
    undisturbed: Undisturbed,
    words: tuple[str, ...],
    where: str,
    at: int,
    phase: str,
    file: str,
) -> None:
    run = new_run("hung", *words, f"hardware.watchdog={PATIENCE:g}")
    roots, path = (str(run.path),), "/.step-" if "os." in where else ""
    ended = bench.sit(run.path, fault=Fault(do="hang", name=where, path=path, at=at, roots=roots))
    assert ended.code == 1, ended.said
    assert run.status == "failed"
    assert f"hung: no sign of life for 00:04 while {phase} (hardware.watchdog=4)" in run.result()["error"]
    trace = (run.path / "hang.txt").read_text()
    for stacks in (trace, ended.said):
        assert "in hang" in stacks  # the function that hangs, and how one came there
        assert file in stacks
    assert "uft resume" in ended.said
    assert bench.sit(run.path).code == 0
    same(run.path, undisturbed(*words))


JOBS = {
    "generate": (
        ("generate.max_new_tokens=8", "generate.batch_size=4"),
        "before negatives._append",
        "completions were sampled",
    ),
    "annotate": (
        ("annotate.column=baseline_logp", "annotate.models=[builtin:playground]", "annotate.batch_tokens=200"),
        "after annotate._mean",
        "rows were annotated",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_a_job_that_hangs_is_ended_and_goes_on(bench: Bench, new_run: NewRun, tmp_path: Path, job: str) -> None:
    more, where, phase = JOBS[job]
    words = (*SINGLE[:3], *more, f"hardware.watchdog={PATIENCE:g}")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    hung = new_run("hung", *words, f"{job}.out={out}").config_file
    ended = bench.sit("--job", job, hung, fault=Fault(do="hang", name=where, at=2))
    assert ended.code == 1, ended.said
    assert (
        f"uft: hung: no sign of life for 00:04 while {phase} (hardware.watchdog=4). Where it stood is above"
        in ended.said
    )
    assert "in hang" in ended.said
    assert "Traceback" not in ended.said
    assert bench.sit("--job", job, hung).code == 0
    assert bench.sit("--job", job, new_run("whole", *words, f"{job}.out={whole}").config_file).code == 0
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_one_of_two_processes_hangs(new_run: NewRun, tmp_path: Path, environment: dict[str, str]) -> None:
    """The one that hangs and the one that waits for it both end, each with its own stacks."""
    run = new_run("run", *SINGLE, "hardware=cpu2", f"hardware.watchdog={2 * PATIENCE:g}")
    fault = Fault(do="hang", name="after step.all_reduce_terms", at=2, rank="1")
    asked = time.monotonic()
    ended = resumed(run, fault.into(environment))
    assert ended.returncode == 1, ended.stderr
    assert time.monotonic() - asked < 120
    assert "hung: no sign of life for 00:08 while it trained" in run.result()["error"]
    assert run.status == "failed"
    assert "in hang" in (run.path / "hang-rank1.txt").read_text()
    assert "in hang" not in (run.path / "hang.txt").read_text()
    assert "distributed.py" in (run.path / "hang.txt").read_text()  # where it waits for the other
    assert resumed(run, environment).returncode == 0
    assert run.status == "finished"


def resumed(run: Run, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What the real program says."""
    command = [sys.executable, "-m", "uft", "resume", str(run.path)]
    return program.run(command, env=environment, capture_output=True, text=True, timeout=600)


# --- a worker that dies


def test_how_a_worker_died_is_said(new_run: NewRun, tmp_path: Path, environment: dict[str, str]) -> None:
    """The real program, whose worker crashes in a library."""
    run, fault = new_run("run", *SINGLE), Fault(do="crash", name="after step.all_reduce_terms", at=2)
    done = resumed(run, environment | fault.variable())
    assert done.returncode == 1, done.stderr
    assert "the worker was killed by SIGSEGV (a crash; where it was is above)" in done.stderr
    assert "training/trainer.py" in done.stderr.partition("the worker was killed")[0]
    assert "continue it:  uft resume" in done.stderr
    assert run.status == "interrupted"


def test_the_kernel_s_own_count_tells_want_of_memory(tmp_path: Path) -> None:
    if sys.platform == "linux":
        folder = tmp_path / Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 1\n")
        assert oom_kills(tmp_path) == 2
    assert oom_kills(tmp_path / "nowhere") == 0
    assert "ran out of memory" in cause(signal.SIGKILL, 1)
    assert "sent from outside" in cause(signal.SIGKILL, 0)
    assert cause(signal.SIGTERM, 0) == ""


# --- out of memory


@pytest.mark.parametrize("kind", ["device_memory", pytest.param("memory", marks=pytest.mark.slow)])
def test_out_of_memory_in_a_step(bench: Bench, new_run: NewRun, kind: str) -> None:
    run = new_run("run", *SINGLE)
    ended = bench.sit(run.path, fault=Fault(do=kind, name="before step.global_counts", at=4))
    assert ended.code == 1
    assert "Traceback" not in ended.said
    error = run.result()["error"]
    assert "step 5  out of memory: " in error
    assert "7.25 GiB" in error
    assert "the step has 4 rows, " in error
    assert "the longest sequence has " in error
    keys = [line.split(":  ")[1].split("=")[0] for line in error.splitlines() if ":  " in line]
    assert keys[:2] == ["train.micro_batch_tokens", "model.gradient_checkpointing"]
    assert len(keys) == 3
    assert all(free(key) for key in keys[:2])  # a run that ran out goes on with them
    assert run.steps == 4  # its last checkpoint
    assert bench.sit(run.path).code == 0


ELSEWHERE = ("before tokens._encode", "before reference.")


@pytest.mark.parametrize(
    "where", ["before evaluate.evaluate", *(pytest.param(name, marks=pytest.mark.slow) for name in ELSEWHERE)]
)
def test_out_of_memory_elsewhere(bench: Bench, new_run: NewRun, where: str) -> None:
    run = new_run("run", *SINGLE)
    ended = bench.sit(run.path, fault=Fault(do="memory", name=where))
    assert ended.code == 1
    assert "Traceback" not in ended.said
    assert "train.micro_batch_tokens=100" in run.result()["error"]
    assert run.status == "failed"


def test_a_check_tells_it_before_the_run(bench: Bench, new_run: NewRun) -> None:
    run = new_run("run", *SINGLE)
    fault = Fault(do="device_memory", name="before step.global_counts")
    ended = bench.sit("--job", "check", run.config_file, fault=fault)
    assert ended.code == 1
    assert "the largest step  out of memory" in ended.said
    assert "train.micro_batch_tokens=100" in ended.said
    assert "Traceback" not in ended.said


# --- two at once, and clocks


def test_a_run_has_one_worker_at_a_time(bench: Bench, new_run: NewRun, tmp_path: Path) -> None:
    """The second is refused while the first lives, and only then."""
    run, log = new_run("run", *SINGLE), tmp_path / "moments"
    first = bench.start(run.path, fault=Fault(do="hang", name="after evaluate.evaluate", log=str(log)))
    deadline = time.monotonic() + 600
    while not (log.is_file() and "after evaluate.evaluate" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    second = bench.sit(run.path)
    assert second.code == 2
    assert "another process is working in this run folder" in second.said
    assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before
    assert run.status == "running"
    first.process.kill()
    assert first.wait().code == -signal.SIGKILL
    assert (run.path / ".lock").is_file()  # of a dead process: it holds nothing
    assert run.status == "interrupted"
    assert bench.sit(run.path).code == 0


@pytest.mark.parametrize("way", ["clock_back", pytest.param("clock_forward", marks=pytest.mark.slow)])
def test_a_clock_that_jumps_changes_nothing(bench: Bench, new_run: NewRun, undisturbed: Undisturbed, way: str) -> None:
    run = new_run("run", *SINGLE)
    ended = bench.sit(run.path, fault=Fault(do=way, name="after step.all_reduce_terms", at=3))
    assert ended.code == 0, ended.said
    same(run.path, undisturbed(*SINGLE))
    assert 0 <= run.result()["seconds"] <= run.result()["wall_seconds"] < 600
    assert "-" not in ended.said.partition("eta ")[2].partition("\n")[0]
