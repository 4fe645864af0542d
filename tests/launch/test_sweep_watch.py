"""How jobs stand, read from folders that somebody else fills."""

import json
import math

import pytest

from uft.launch.sweep_jobs import Job, JobFailed
from uft.launch.sweep_watch import State, Watch, count, leader
from uft.runs import Run, create_run, write_json

CONFIG = "train: {steps: null}\neval: {best: eval/nll, best_mode: min}\n"


@pytest.fixture
def jobs(tmp_path):
    return [Job((f"seed={seed}",), tmp_path / f"seed{seed}") for seed in (1, 2, 3)]


@pytest.fixture
def clock():
    class Clock:
        now = 100.0

        def __call__(self):
            return self.now

    return Clock()


def begin(job, steps=10, config=CONFIG):
    return create_run(job.folder, config, [], total_steps=steps)


def log(run: Run, step, **metrics):
    with open(run.metrics_file, "a") as file:
        file.write(json.dumps({"step": step, **{name.replace("__", "/"): v for name, v in metrics.items()}}) + "\n")


def watch_of(jobs, clock=None):
    watch = Watch(clock) if clock else Watch()
    watch.add(jobs)
    return watch


def test_a_job_from_nothing_to_its_end(jobs):
    watch = watch_of(jobs[:1])
    assert watch.look() == [State("seed1")]
    run = begin(jobs[0])
    with run.lock():
        assert (watch.look()[0].status, watch.look()[0].steps) == ("running", 10)
        log(run, 0, eval__nll=0.1)
        log(run, 4, loss=2.0)
        log(run, 4, eval__nll=0.5)
        (state,) = watch.look()
        assert (state.step, state.best, state.share) == (4, 0.5, 0.4), "step 0 is the model before training"
        log(run, 8, eval__nll=0.7)
        assert (watch.look()[0].step, watch.look()[0].best) == (8, 0.5)
    write_json(run.path / "result.json", {"status": "finished", "steps": 10})
    (state,) = watch.look()
    assert (state.status, state.step, state.best, state.share) == ("finished", 10, 0.5, 1.0)


def test_the_direction_is_the_jobs_own(jobs):
    run = begin(jobs[0], config=CONFIG.replace("min", "max"))
    for step, value in ((1, 0.5), (2, 0.75), (3, "nan"), (4, "inf"), (5, 0.25)):
        log(run, step, eval__nll=value)
    assert watch_of(jobs[:1]).look()[0].best == 0.75


def test_lines_are_read_once_and_a_file_that_was_written_anew_from_its_start(jobs):
    run, watch = begin(jobs[0]), watch_of(jobs[:1])
    log(run, 1, eval__nll=0.5)
    watch.look()
    offset = watch.followers[jobs[0].folder].tail.offset
    assert offset == run.metrics_file.stat().st_size
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 2, "eval/n')
    assert watch.look()[0].step == 1
    assert watch.followers[jobs[0].folder].tail.offset == offset, "half a line waits for the rest of it"
    with open(run.metrics_file, "a") as file:
        file.write('ll": 0.25}\n')
    assert (watch.look()[0].step, watch.look()[0].best) == (2, 0.25)
    beside = run.path / "beside"
    beside.write_text('{"step": 1, "eval/nll": 0.75}\n')
    beside.replace(run.metrics_file)
    assert (watch.look()[0].step, watch.look()[0].best) == (1, 0.75)


def test_what_an_earlier_sitting_left_waits(jobs):
    for job, status in zip(jobs, ("failed", "finished", "stopped"), strict=True):
        write_json(begin(job).path / "result.json", {"status": status, "steps": 5, "error": "x"})
    watch = watch_of(jobs)
    assert [state.status for state in watch.look()] == ["waiting", "finished", "waiting"]
    assert count(watch.look()) == {"done": 1, "running": 0, "failed": 0, "waiting": 2}
    write_json(jobs[0].folder / "result.json", {"status": "failed", "steps": 6, "error": "again"})
    assert watch.look()[0].status == "failed"


def test_the_launcher_has_the_last_word(jobs):
    begin(jobs[1])
    watch = watch_of(jobs)
    refused, killed = JobFailed(2, "", "no such rows\nmore"), JobFailed(75, "", "stopped by a signal")
    watch.end(jobs[:2], {jobs[0]: refused, jobs[1]: killed})
    assert [(state.status, state.error) for state in watch.look()] == [
        ("failed", "no such rows\nmore"),
        ("stopped", "stopped by a signal"),
        ("waiting", ""),
    ]


@pytest.mark.parametrize("damage", ["config.yaml", "run.json", "metrics.jsonl", "result.json"])
def test_a_damaged_folder_is_no_reason_to_stop(jobs, damage):
    run = begin(jobs[0])
    log(run, 3, eval__nll=0.5)
    watch = watch_of(jobs[:1])
    (run.path / damage).write_bytes(b'\xff{"a: [\n')
    assert watch.look()[0].name == "seed1"
    fresh = watch_of(jobs[:1])
    assert fresh.look()[0].name == "seed1"


def test_time_left_is_work_left_at_the_pace_of_this_sitting(jobs, clock):
    done = begin(jobs[0])
    write_json(done.path / "result.json", {"status": "finished", "steps": 10})
    watch = watch_of(jobs, clock)
    assert watch.left(watch.look()) is None, "nothing has run in this sitting"
    run = begin(jobs[1])
    with run.lock():
        watch.look()
        clock.now += 30
        log(run, 5, loss=1.0)
        assert watch.left(watch.look()) == pytest.approx(30 / 0.5 * 1.5), "half a job in 30 s, one and a half to go"
    watch.end([jobs[1]], {jobs[1]: JobFailed(1, "", "broke")})
    assert watch.left(watch.look()) == pytest.approx(60), "one that failed is not waited for"


def test_the_best_of_jobs_that_can_be_compared():
    one, two = State("a", best=0.5, metric="eval/nll"), State("b", best=0.25, metric="eval/nll")
    assert leader([State("c"), one, two]) is two
    assert leader([one, State("d", best=1.0, metric="eval/kl")]) is None
    assert leader([State("c")]) is None
    up = [State("a", best=0.5, metric="m", mode="max"), State("b", best=0.25, metric="m", mode="max")]
    assert leader(up) is up[0]
    assert not math.isnan(up[0].share)
