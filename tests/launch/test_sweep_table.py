"""The table of a sweep: the state of jobs, read from their run folders, on a terminal and in a log."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from uft.launch.sweep_table import JobState, SweepTable, best_job, jobs_table
from uft.runs import Run, create_run, write_json

CONFIG = "train: {steps: null}\neval: {best: eval/nll, best_mode: min}\n"


@pytest.fixture
def folders(tmp_path):
    return [tmp_path / f"seed{seed}" for seed in (1, 2, 3)]


def begin(folder, steps=10, config=CONFIG):
    return create_run(folder, config, [], total_steps=steps)


def log(run: Run, step, **metrics):
    with open(run.metrics_file, "a") as file:
        file.write(json.dumps({"step": step, **{name.replace("__", "/"): v for name, v in metrics.items()}}) + "\n")


def table_with(folders, **settings):
    table = SweepTable("s", interactive=False, **settings)
    table.add(folders)
    return table


# --- one job


def test_a_job_from_nothing_to_its_end(folders):
    job = JobState(folders[0])
    assert (job.status, job.step, job.steps, job.best) == ("waiting", 0, None, None)
    run = begin(folders[0])
    with run.lock():
        job.refresh()
        assert (job.status, job.steps) == ("running", 10)
        log(run, 0, eval__nll=0.1)
        log(run, 4, loss=2.0)
        log(run, 4, eval__nll=0.5)
        job.refresh()
        assert (job.step, job.best, job.share) == (4, 0.5, 0.4), "step 0 is the model before training"
        log(run, 8, eval__nll=0.7)
        job.refresh()
        assert (job.step, job.best) == (8, 0.5)
    write_json(run.path / "result.json", {"status": "finished", "steps": 10})
    job.refresh()
    assert (job.status, job.step, job.best, job.share) == ("finished", 10, 0.5, 1.0)
    up = begin(folders[1], config=CONFIG.replace("min", "max"))
    for step, value in ((1, 0.5), (2, 0.75), (3, "nan"), (4, "inf"), (5, 0.25)):
        log(up, step, eval__nll=value)
    assert JobState(folders[1]).best == 0.75, "the direction is the job's own"
    judged = begin(folders[2])
    for step, nll, right in ((0, 2.0, 0.0), (2, 1.0, 0.5), (4, 3.0, 0.75)):
        log(judged, step, eval__nll=nll, eval__pair_accuracy=0.9, eval__exact_match=right)
    job = JobState(folders[2])
    assert (job.best_text, job.mode) == ("exact_match 0.750", "max"), "what a checker says comes before the likelihood"


def test_lines_are_read_once_and_a_file_that_was_written_anew_from_its_start(folders):
    run = begin(folders[0])
    log(run, 1, eval__nll=0.5)
    job = JobState(folders[0])
    assert job.offset == run.metrics_file.stat().st_size
    for part, step, best in (('{"step": 2, "eval/n', 1, 0.5), ('ll": 0.25}\n', 2, 0.25)):  # half a line waits
        with open(run.metrics_file, "a") as file:
            file.write(part)
        job.refresh()
        assert (job.step, job.best) == (step, best)
    beside = run.path / "beside"
    beside.write_text('{"step": 1, "eval/nll": 0.75}\n')
    beside.replace(run.metrics_file)
    job.refresh()
    assert (job.step, job.best) == (1, 0.75)


def test_what_an_earlier_session_left_waits_and_the_launcher_has_the_last_word(folders):
    for folder, status in zip(folders, ("failed", "finished", "stopped"), strict=True):
        error = "x" if status == "failed" else None
        write_json(begin(folder).path / "result.json", {"status": status, "steps": 5, "error": error})
    table = table_with(folders)
    assert [job.status for job in table.refresh()] == ["waiting", "finished", "waiting"]
    assert table.summary() == "1 of 3 done, 2 waiting"
    write_json(folders[0] / "result.json", {"status": "failed", "steps": 6, "error": "again"})
    assert table.refresh()[0].status == "failed"
    table.end(folders[0], "failed", "no such rows\nmore")
    table.end(folders[2], "stopped", "stopped by a signal")
    states = [(job.status, job.error) for job in table.refresh()]
    assert states == [("failed", "no such rows\nmore"), ("finished", ""), ("stopped", "stopped by a signal")]


def test_a_damaged_folder_is_no_reason_to_stop(folders):
    run = begin(folders[0])
    log(run, 3, eval__nll=0.5)
    job = JobState(folders[0])
    for file in ("metrics.jsonl", "result.json", "run.json", "config.yaml"):
        (run.path / file).write_bytes(b'\xff{"a: [\n')
        job.refresh()
        assert JobState(folders[0]).status in ("waiting", "interrupted")


# --- all of them


def test_time_left_is_work_left_at_the_pace_of_this_session(folders):
    write_json(begin(folders[0]).path / "result.json", {"status": "finished", "steps": 10})
    table, now = table_with(folders), [100.0]
    table.clock = lambda: now[0]
    table.refresh()
    assert table.seconds_left() is None, "nothing has run in this session"
    run = begin(folders[1])
    with run.lock():
        table.refresh()
        now[0] += 30
        log(run, 5, loss=1.0)
        table.refresh()
        assert table.seconds_left() == pytest.approx(30 / 0.5 * 1.5), "half a job in 30 s, one and a half to go"
    table.end(folders[1], "failed", "broke")
    assert table.seconds_left() == pytest.approx(60), "one that failed is not waited for"


def job(name, status="waiting", step=0, steps=None, metric="eval/nll", mode="min", best=None, error=""):
    return JobState(Path("nowhere") / name, status, step, steps, metric, mode, best, error)


JOBS = [
    job("sft", "finished", 10, 10, best=0.5),
    job("ift", "running", 4, 10, best=0.25),
    job("dpo", "failed", 3, 10, error="ValueError: \x1b[2J broke\nat length"),
    job("uft", metric=""),
]


def text(jobs, room=60):
    with (console := Console(width=100, markup=False)).capture() as captured:
        console.print(jobs_table(jobs, room))
    return [line.split() for line in captured.get().splitlines()]


def test_the_rows_of_the_table():
    head, *rows = text(JOBS)
    assert head == ["job", "state", "steps", "best", "nll"]
    assert rows[0] == ["sft", "finished", "10/10", "0.500"]
    assert rows[1] == ["ift", "running", "4/10", "0.250", "best", "so", "far"]
    assert rows[2] == ["dpo", "failed", "3/10", "ValueError:", r"\x1b[2J", "broke"]
    assert rows[3] == ["uft", "waiting"]
    # jobs with different headline metrics have no best one; each says which metric it is judged by
    one, other = job("a", best=0.5), job("x", "finished", 1, 1, "eval/[red]kl", best=2.0)
    assert [row[-2:] for row in text([one, other])[1:]] == [["nll", "0.500"], ["[red]kl", "2.000"]]
    assert [best_job(jobs) for jobs in ([one, other], [job("c")], [job("c"), one])] == [None, None, one]
    up = [job("a", best=0.5, mode="max"), job("b", best=0.25, mode="max")]
    assert best_job(up) is up[0]
    # a low terminal shows what says most
    jobs = [job(f"job{n}", "finished" if n < 50 else "waiting") for n in range(100)]
    jobs[3].status, jobs[50].status = "failed", "running"
    jobs[7].best, jobs[8].best = 0.25, 0.5
    _, *rows, last = text(jobs, 6)
    assert [row[0] for row in rows] == ["job3", "job7", "job50", "job51", "job52", "job53"]
    assert last == ["and", "94", "more"]
    assert len(text(jobs, 200)) == 101


def test_lines_about_the_sweep(capsys):
    table = table_with([])
    table._jobs = {one.folder: one for one in JOBS}
    table.seconds_left = lambda: 65.0
    head = "1 of 4 done, 1 running, 1 failed, 1 waiting"
    assert table.summary() == f"{head} | best ift nll 0.250 | left 01:05"
    assert table.summary(running=3) == f"{head} | ift step 4/10 nll 0.250 | best ift nll 0.250 | left 01:05"
    table._print_ended()
    assert capsys.readouterr().out.splitlines() == [
        "uft: 1 of 4 done: sft finished at step 10/10, nll 0.500, left 01:05",
        r"uft: 1 of 4 done: dpo failed at step 3/10, ValueError: \x1b[2J broke, left 01:05",
    ]


def test_where_there_is_no_terminal_every_end_is_a_line_and_time_passes_too(folders, capsys):
    config = CONFIG.replace("null", "8")
    write_json(create_run(folders[0], config, []).path / "result.json", {"status": "finished", "steps": 8})
    table = table_with(folders)
    table.interval = 0.1
    with table:
        run = create_run(folders[1], config, [])
        with run.lock():
            time.sleep(1.3)
        time.sleep(0.5)  # neither held nor at its end: another process takes it over
        table.end(folders[1], "failed", "it broke")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("uft: 1 of 3 done, 1 running, 1 waiting | seed2 step 0/8")
    assert [line for line in said if "done: " in line] == ["uft: 1 of 3 done: seed2 failed at step 0/8, it broke"]
    assert [line.split() for line in said[-4:]] == [
        ["job", "state", "steps", "best", "nll"],
        ["seed1", "finished", "8/8"],
        ["seed2", "failed", "0/8", "it", "broke"],
        ["seed3", "waiting"],
    ]


PROGRAM = """
import sys, time
from pathlib import Path
from uft.launch.sweep_table import SweepTable
from uft.runs import create_run, write_json
folder = Path(sys.argv[1]) / "a"
with SweepTable("mine") as table:
    table.add([folder])
    run = create_run(folder, "train: {steps: 8}\\neval: {best: eval/nll, best_mode: min}\\n", [])
    with run.lock():
        time.sleep(0.8)
        print("said by the way")
        time.sleep(0.8)
    write_json(run.path / "result.json", {"status": "finished", "steps": 8})
    table.end(folder, "finished")
print("after")
"""


def test_on_a_terminal_a_table_is_rewritten_and_the_last_one_stays(tmp_path):
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    shown = b""
    with subprocess.Popen(command, stdout=follower, stderr=subprocess.STDOUT, env=environment) as process:
        os.close(follower)
        with suppress(OSError):  # the other end is closed
            while part := os.read(leader, 4096):
                shown += part
    os.close(leader)
    assert process.returncode == 0
    assert b"\x1b[1A" in shown or b"\x1b[2K" in shown, "drawn over"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"sweep mine, 00:0\d: 0 of 1 done, 1 running", plain)
    assert re.search(r"a +running +0/8 +00:0\d", plain), "also before its first step"
    assert "said by the way" in plain
    *_, row, after = [line for line in plain.replace("\r", "").splitlines() if line.strip()]
    assert row.split() == ["a", "finished", "8/8"]
    assert after == "after"
