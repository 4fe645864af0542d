"""What hangs, crashes or runs out of memory: the cause is said, and the run goes on where it was."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest
from evidence import same
from planting import Fault
from sessions import COLUMN, LOOP, SINGLE

from uft.config.frozen import may_change
from uft.launch.process import cause, oom_kills

PATIENCE = 4.0  # seconds of the watchdog here
SLOW = pytest.mark.slow

MODEL, REFERENCE = "before load.load_base", "before reference.ReferenceColumn._compute"
STEP, EXPORT = "after step.all_reduce_terms", "before export.plain_model"
HANGS = {
    "step": (SINGLE, STEP, 4, "it trained", "training/trainer.py"),
    "tokens": (SINGLE, "before tokens._encode_chunk", 1, "rows were tokenised", "data/tokens.py"),
    "model": (SINGLE, MODEL, 0, "a model was loaded", "model/load.py"),
    "reference": (SINGLE, REFERENCE, 0, "reference log-probs were computed", "model/reference.py"),
    "evaluation": (SINGLE, "before generate.complete", 4, "the model was evaluated", "evaluation/evaluate.py"),
    "checkpoint": (SINGLE, "before os.replace", 0, "a checkpoint was written", "model/checkpoint.py"),
    "export": (SINGLE, EXPORT, 0, "the model was exported", "model/export.py"),
    "stage": (LOOP, STEP, 4, "it trained", "training/session.py"),
    "sampling": (LOOP, "before negatives.append_records", 1, "completions were sampled", "sampling/negatives.py"),
    "annotating": (COLUMN, "after annotate._mean", 3, "rows were annotated", "sampling/annotate.py"),
    "stage's export": (LOOP, EXPORT, 0, "the model was exported", "model/export.py"),
}
"""What hangs: the request, the moment, the phase that is named, and a file that its stack leads through."""


@pytest.mark.parametrize("where", ["step", *(pytest.param(name, marks=SLOW) for name in list(HANGS)[1:])])
def test_a_run_that_hangs_is_ended_and_can_be_resumed(bench, new_run, undisturbed, where):
    words, name, at, phase, file = HANGS[where]
    run = new_run("hung", *words, f"hardware.watchdog={PATIENCE:g}")
    path = "/.step-" if "os." in name else ""
    fault = Fault(do="hang", name=name, path=path, at=at, roots=(str(run.path),))
    said = bench.sit(run.path, fault=fault, code=1).said
    assert run.status == "failed"
    assert f"hung: no sign of life for 00:04 while {phase} (hardware.watchdog=4)" in run.result()["error"]
    for stacks in ((run.path / "hang.txt").read_text(), said):
        assert "in hang" in stacks  # the function that hangs, and how one came there
        assert file in stacks
    assert "uft resume" in said
    bench.sit(run.path, code=0)
    same(run.path, undisturbed(*words))


GENERATE = ("generate.max_new_tokens=8", "generate.batch_size=4")
ANNOTATE = ("annotate.column=baseline_logp", "annotate.models=[builtin:playground]", "annotate.batch_tokens=200")
JOBS = {
    "generate": (GENERATE, "before negatives.append_records", "completions were sampled"),
    "annotate": (ANNOTATE, "after annotate._mean", "rows were annotated"),
}


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_a_job_that_hangs_is_ended_and_goes_on(bench, new_run, tmp_path, job):
    more, where, phase = JOBS[job]
    words = (*SINGLE[:3], *more, f"hardware.watchdog={PATIENCE:g}")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    hung = new_run("hung", *words, f"{job}.out={out}").config_file
    said = bench.sit("--job", job, hung, fault=Fault(do="hang", name=where, at=2), code=1).said
    assert f"uft: hung: no sign of life for 00:04 while {phase} (hardware.watchdog=4). Where it stood is above" in said
    assert "in hang" in said
    assert "Traceback" not in said
    bench.sit("--job", job, hung, code=0)
    bench.sit("--job", job, new_run("whole", *words, f"{job}.out={whole}").config_file, code=0)
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_one_of_two_processes_hangs(new_run, uft, environment):
    """The one that hangs and the one that waits for it both end, each with its own stacks."""
    run = new_run("run", *SINGLE, "hardware=cpu2", f"hardware.watchdog={2 * PATIENCE:g}")
    fault = Fault(do="hang", name=STEP, at=2, rank="1")
    asked = time.monotonic()
    uft("resume", run.path, code=1, env=fault.into(environment), timeout=600)
    assert time.monotonic() - asked < 120
    assert "hung: no sign of life for 00:08 while it trained" in run.result()["error"]
    assert run.status == "failed"
    assert "in hang" in (run.path / "hang-rank1.txt").read_text()
    assert "in hang" not in (run.path / "hang.txt").read_text()
    assert "distributed.py" in (run.path / "hang.txt").read_text()  # where it waits for the other
    uft("resume", run.path, timeout=600)
    assert run.status == "finished"


# --- a worker that dies


def test_how_a_worker_died_is_said(new_run, uft):
    """The real program, whose worker crashes in a library."""
    run = new_run("run", *SINGLE)
    err = uft("resume", run.path, code=1, env=Fault(do="crash", name=STEP, at=2).variable()).stderr
    stack, said, after = err.partition("the worker was killed by SIGSEGV (a crash; where it was is above)")
    assert said
    assert "training/trainer.py" in stack
    assert "continue it:  uft resume" in after
    assert run.status == "interrupted"


def test_the_kernel_s_own_count_tells_want_of_memory(tmp_path):
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["device_memory", "memory"])
def test_out_of_memory_in_a_step(bench, new_run, kind):
    """A check tells it before the run, and the run, which goes on with the keys that it is told."""
    run = new_run("run", *SINGLE)
    fault = Fault(do=kind, name="before step.global_counts")
    said = bench.sit("--job", "check", run.config_file, fault=fault, code=1).said
    assert "the largest step  out of memory" in said
    assert "train.micro_batch_tokens=100" in said
    assert "Traceback" not in said
    assert "Traceback" not in bench.sit(run.path, fault=Fault(do=kind, name=fault.name, at=4), code=1).said
    error = run.result()["error"]
    for part in ("step 5  out of memory: ", "7.25 GiB", "the step has 4 rows, ", "the longest sequence has "):
        assert part in error
    keys = [line.split(":  ")[1].split("=")[0] for line in error.splitlines() if ":  " in line]
    assert keys[:2] == ["train.micro_batch_tokens", "model.gradient_checkpointing"]
    assert len(keys) == 3
    assert all(may_change(key) for key in keys[:2])  # a run that ran out goes on with them
    assert run.steps == 4  # its last checkpoint
    bench.sit(run.path, code=0)


ELSEWHERE = ("before tokens._encode", "before reference.")


@pytest.mark.parametrize("where", ["before evaluate.evaluate", *(pytest.param(n, marks=SLOW) for n in ELSEWHERE)])
def test_out_of_memory_elsewhere(bench, new_run, where):
    run = new_run("run", *SINGLE)
    assert "Traceback" not in bench.sit(run.path, fault=Fault(do="memory", name=where), code=1).said
    assert "train.micro_batch_tokens=100" in run.result()["error"]
    assert run.status == "failed"


# --- two at once, and clocks


@pytest.mark.slow
def test_a_run_has_one_worker_at_a_time(bench, new_run, tmp_path):
    """The second is refused while the first lives, and only then."""
    run, log = new_run("run", *SINGLE), tmp_path / "moments"
    first = bench.start(run.path, fault=Fault(do="hang", name="after evaluate.evaluate", log=str(log)))
    deadline = time.monotonic() + 600
    while not (log.is_file() and "after evaluate.evaluate" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    assert "another process is working in this run folder" in bench.sit(run.path, code=2).said
    assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before
    assert run.status == "running"
    first.process.kill()
    assert first.wait().code == -signal.SIGKILL
    assert (run.path / ".lock").is_file()  # of a dead process: it holds nothing
    assert run.status == "interrupted"
    bench.sit(run.path, code=0)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["clock_back", "clock_forward"])
def test_a_clock_that_jumps_changes_nothing(bench, new_run, undisturbed, way):
    run = new_run("run", *SINGLE)
    said = bench.sit(run.path, fault=Fault(do=way, name=STEP, at=3), code=0).said
    same(run.path, undisturbed(*SINGLE))
    assert 0 <= run.result()["seconds"] <= run.result()["wall_seconds"] < 600
    assert "-" not in said.partition("eta ")[2].partition("\n")[0]
