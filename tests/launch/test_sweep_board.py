"""The table of a sweep on a terminal, and its lines elsewhere."""

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

from uft.launch.sweep_board import Board, Lines, chosen, ended, progress, summary, table
from uft.launch.sweep_jobs import Job, JobFailed
from uft.launch.sweep_watch import State, Watch
from uft.runs import create_run, write_json

STATES = [
    State("sft", "finished", 10, 10, "eval/nll", "min", 0.5),
    State("ift", "running", 4, 10, "eval/nll", "min", 0.25),
    State("dpo", "failed", 3, 10, "eval/nll", "min", error="ValueError: \x1b[2J broke\nat length"),
    State("uft"),
]


def text(states, room=60):
    from rich.console import Console

    console = Console(width=100, markup=False)
    with console.capture() as captured:
        console.print(table(states, room))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_the_table():
    head, *rows = text(STATES)
    assert head.split() == ["job", "state", "steps", "best", "nll"]
    assert rows[0].split() == ["sft", "finished", "10/10", "0.500"]
    assert rows[1].split() == ["ift", "running", "4/10", "0.250", "best", "so", "far"]
    assert rows[2].split()[:3] == ["dpo", "failed", "3/10"]
    assert r"ValueError: \x1b[2J broke" in rows[2]
    assert rows[3].split() == ["uft", "waiting"]


def test_jobs_with_different_headline_metrics_say_which():
    states = [STATES[0], State("x", "finished", 1, 1, "eval/[red]kl", "min", 2.0)]
    _, first, second = text(states)
    assert first.split()[-2:] == ["nll", "0.500"]
    assert second.split()[-2:] == ["[red]kl", "2.000"]


def test_a_low_terminal_shows_what_says_most():
    states = [State(f"job{n}", "finished" if n < 50 else "waiting") for n in range(100)]
    states[3].status, states[50].status = "failed", "running"
    states[7].best, states[8].best = 0.25, 0.5
    assert chosen(states, 6) == [3, 7, 49, 50, 51, 52] or chosen(states, 6) == [3, 7, 48, 49, 50, 51]
    assert chosen(states, 200) == list(range(100))
    assert text(states, 6)[-1] == "and 94 more"


def test_lines_about_the_sweep():
    assert (
        summary("s", STATES, 65)
        == "sweep s: 1 of 4 done, 1 running, 1 failed, 1 waiting | best ift nll 0.250 | left 01:05"
    )
    assert summary("s", STATES[:1], 0.0) == "sweep s: 1 of 1 done | best sft nll 0.500"
    assert progress(STATES, None) == "1 of 4 done, 1 running, 1 failed | ift step 4/10 nll 0.250"
    assert ended(STATES[0], STATES, 65) == "1 of 4 done: sft finished at step 10/10, nll 0.500, left 01:05"
    assert ended(STATES[2], STATES, None) == r"1 of 4 done: dpo failed at step 3/10, ValueError: \x1b[2J broke"


def test_where_there_is_no_terminal_every_end_is_a_line_and_time_passes_too(tmp_path):
    jobs = [Job((), tmp_path / "a"), Job((), tmp_path / "b"), Job((), tmp_path / "c")]
    config = "train: {steps: 8}\neval: {best: eval/nll, best_mode: min}\n"
    write_json(create_run(jobs[0].folder, config, []).path / "result.json", {"status": "finished", "steps": 8})
    watch, said = Watch(), []
    watch.add(jobs)
    with Lines(watch, 0.1, said.append):
        run = create_run(jobs[1].folder, config, [])
        with run.lock():
            for _ in range(100):
                if said:
                    break
                time.sleep(0.05)
        watch.end(jobs[1:2], {jobs[1]: JobFailed(1, "", "it broke")})
    assert said[0].startswith("uft: 1 of 3 done, 1 running, 0 failed | b step 0/8")
    assert [line for line in said if "done: " in line] == ["uft: 1 of 3 done: b failed at step 0/8, it broke"]


PROGRAM = """
import sys, time
from pathlib import Path
from uft.launch.sweep_board import Board
from uft.launch.sweep_jobs import Job
from uft.runs import create_run, write_json
folder = Path(sys.argv[1])
job = Job((), folder / "a")
with Board("mine") as board:
    board.add([job])
    run = create_run(job.folder, "train: {steps: 8}\\neval: {best: eval/nll, best_mode: min}\\n", [])
    with run.lock():
        time.sleep(1.2)
        print("said by the way")
        time.sleep(1.2)
    write_json(run.path / "result.json", {"status": "finished", "steps": 8})
    board.end([job], {})
print("after")
"""


def test_on_a_terminal_a_table_is_rewritten_and_the_last_one_stays(tmp_path):
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    process = subprocess.Popen(command, stdout=follower, stderr=subprocess.STDOUT, env=environment)
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        shown += part
    assert process.wait(20) == 0
    os.close(leader)
    assert b"\x1b[1A" in shown or b"\x1b[2K" in shown, "drawn over"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "sweep mine: 0 of 1 done, 1 running" in plain
    assert "said by the way" in plain
    *_, row, after = [line for line in plain.replace("\r", "").splitlines() if line.strip()]
    assert row.split() == ["a", "finished", "8/8"]
    assert after == "after"


def test_a_board_without_a_terminal(tmp_path, capsys):
    job = Job((), tmp_path / "a")
    with Board("mine", interactive=False) as board:
        board.add([job])
        board.end([job], {job: JobFailed(2, "", "refused")})
    assert capsys.readouterr().out.splitlines() == [
        "uft: 0 of 1 done: a failed at step 0, refused",
        "job  state   steps  best",
        "a    failed      0        refused",
    ]
