"""metrics.jsonl, samples.jsonl and items.jsonl as readers meet them: whole, resumed, torn, and changed by the disk."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from uft.evaluation.evaluate import Item, Sample
from uft.evaluation.measures import Tally
from uft.report.runs import read_lines
from uft.runs import Run
from uft.tracking import metrics
from uft.tracking.metrics import Files, checksum_file, read_metrics


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def write(run: Run, steps: range, resumed: int | None = None, said: list[str] | None = None) -> list[bytes]:
    """A session that logs these steps; what its files hold then."""
    run.path.mkdir(exist_ok=True)
    files = Files(run, resumed, (lambda text: None) if said is None else said.append)
    files.start()
    for step in steps:
        files.log(step, {"loss": 1 / (step + 3), "rows": 4 * step})
        if step % 5 == 0:
            files.log(step, {"eval/nll": 2 / (step + 7)})
            files.samples(step, [Sample("pairs", f"row-{step}", "hello?", "hi\nyou", None, {"accuracy": 1.0})])
            measures = Tally(nll=(1 / 3, 2.0))
            files.items(step, [Item("pairs", f"row-{n}", "hello?", measures, [-step / 7], [None]) for n in range(3)])
    files.finish("finished", 0, {})
    return content(run)


def content(run: Run) -> list[bytes]:
    written = (run.metrics_file, run.samples_file, run.items_file)
    return [path.read_bytes() for file in written for path in (file, checksum_file(file))]


def cut(path: Path) -> None:
    """Take the end of its last line away."""
    path.write_bytes(path.read_bytes()[:-7])


def test_lines_are_on_disk_at_once_are_json_and_keep_every_digit(run):
    files = Files(run)
    files.start()
    odd = "snow ☃ half \ud83d line\nfeed \u2028 and \x00"
    files.log(1, {"loss": math.nan, "grad_norm": math.inf, "lr": -math.inf, "stage": "nan", "rows": 4})
    files.log(numpy.int64(3), {"loss": numpy.float32(0.5), "best": numpy.float64(0.1)})
    files.log(3, {"eval/nll": 1 / 3})
    files.samples(7, [Sample("pairs", "a.jsonl:3", odd, odd, "4", {"accuracy": math.nan})], "sft")
    files.samples(8, [Sample("pairs", "a.jsonl:3", "", "", None)])
    assert run.metrics_file.read_text().splitlines() == [
        '{"step": 1, "loss": "nan", "grad_norm": "inf", "lr": "-inf", "stage": "nan", "rows": 4}',
        '{"step": 3, "loss": 0.5, "best": 0.1}',
        '{"step": 3, "eval/nll": 0.3333333333333333}',
    ]
    first, second = read_metrics(run)
    assert math.isnan(first.pop("loss"))
    assert first == {"step": 1, "grad_norm": math.inf, "lr": -math.inf, "stage": "nan", "rows": 4}
    assert second == {"step": 3, "loss": 0.5, "best": 0.1, "eval/nll": 1 / 3}
    named, plain = [json.loads(text) for text in run.samples_file.read_text("utf-8").split("\n") if text]
    assert list(named) == ["step", "stage", "source", "row", "prompt", "reply", "answer", "verdict"]
    assert (named["step"], named["stage"], named["reply"]) == (7, "sft", odd)
    assert named["verdict"] == {"accuracy": "nan"}
    assert "stage" not in plain
    assert len(metrics.check(run.samples_file).lines) == 2, "checksums are of the text as it lies on the disk"
    files.finish("failed", 1, {})


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
    whole = write(Run(tmp_path / "whole"), range(20))
    for last, torn in itertools.product(
        (0, 5, 7, 12), ("", '{"step": 13, "lo', '{"step": 13, "loss": 0.1}', "\0\0\0\0")
    ):
        run = Run(tmp_path / f"{last}-{len(torn)}")
        write(run, range(13))
        for path in (run.metrics_file, run.samples_file, run.items_file):
            path.write_text(path.read_text() + torn)
        assert write(run, range(last, 20), resumed=last) == whole  # the evaluation of the last step is repeated
    assert write(run, range(2)) == write(Run(tmp_path / "new"), range(2)), (
        "a fresh start in a used folder keeps nothing"
    )


def test_a_process_that_died_within_a_line_of_an_evaluation_lost_nothing(tmp_path):
    said: list[str] = []
    for torn in range(4):
        run = Run(tmp_path / str(torn))
        whole = write(run, range(6))
        for path in (run.metrics_file, run.samples_file, run.items_file)[:torn]:
            cut(path)
            cut(checksum_file(path))
        assert write(run, range(5, 6), resumed=5, said=said) == whole
        cut(run.metrics_file)
        early = Files(run, 5, said.append)  # a session that ends early leaves the line to the next
        early.start()
        early.finish("stopped", 75, {})
        assert write(run, range(5, 6), resumed=5, said=said) == whole
    assert said == []


@pytest.mark.parametrize("steps", [range(5, 8), range(0)], ids=["later", "at the end"])
def test_a_last_line_that_is_lost_where_the_checkpoint_stands_is_told(run, steps):
    """A process that died there while it wrote would write it again. Nobody does, so the disk took it."""
    lost = ["metrics.jsonl: what was written at step 4 is damaged or lost (checksum), and left out"]
    write(run, range(5))
    cut(run.metrics_file)
    said: list[str] = []
    write(run, steps, resumed=4, said=said)
    assert said == lost
    assert [line["step"] for line in read_metrics(run)] == [0, 1, 2, 3, *steps]
    told: list[str] = []
    read_lines(run.metrics_file, told, ended=True)
    assert told == lost, "and to other readers"


def test_a_kill_loses_no_whole_line(run):
    program = (
        "import sys; from pathlib import Path; from uft.runs import Run; from uft.tracking.metrics import Files\n"
        "files = Files(Run(Path(sys.argv[1]))); files.start(); step = 0\n"
        "while True:\n"
        "    step += 1; files.log(step, {'loss': 1 / step}); print(step, flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while int(process.stdout.readline()) < 300:
            pass
        os.kill(process.pid, signal.SIGKILL)
    steps = [line["step"] for line in read_metrics(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 300


# --- Checksums: a changed and a lost line is known, whatever died in between.

STEPS = [1, 2, 2, 4, 7]
LINES = [f'{{"step": {step}, "loss": 0.{step}5}}' for step in STEPS]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in LINES))
    checksum_file(path).write_text("".join(map(metrics.checksum_line, STEPS, LINES)))
    return path


def found(path: Path) -> tuple[list[str], list[int]]:
    checked = metrics.check(path)
    return checked.lines, checked.damaged


def test_a_changed_a_lost_and_a_torn_line(file):
    assert found(file) == (LINES, [])
    for line, step in enumerate(STEPS):
        before, after = LINES[:line], LINES[line + 1 :]
        file.write_text("".join(text + "\n" for text in [*before, LINES[line].replace("loss", "lost"), *after]))
        assert found(file) == (before + after, [step])
        file.write_text("".join(text + "\n" for text in before + after))
        assert found(file) == (before + after, [step] if after else []), "between a checksum and its line one may die"
    for kept in range(1, len(LINES[-1]) + 1):  # a kill in the middle of the last line is no damage
        file.write_text("".join(line + "\n" for line in LINES[:-1]) + LINES[-1][:kept])
        assert found(file) == (LINES[:-1], [])


def test_lines_without_a_checksum_are_left_out_where_others_have_one(file):
    file.write_text(file.read_text() + '{"step": 9, "loss": 0.0}\n')
    assert found(file) == (LINES, [])
    assert metrics.check(file).unlisted == [9]
    whole = [*LINES, '{"step": 9, "loss": 0.0}']
    for content in (b"", b"\0" * 50, b"1 zz\n2\n\xff", b"1 00000000\n"):
        checksum_file(file).write_bytes(content)
        assert metrics.check(file).lines == []
    checksum_file(file).unlink()
    file.write_bytes(file.read_bytes() + b'{"step": 9, "lo\xff')
    assert found(file) == (whole, [])
    assert found(file.with_name("absent.jsonl")) == ([], [])


def test_checksums_that_are_cut_or_changed_are_told_by_the_lines_they_leave(file):
    """Those before the last checksum at once; those after it where the run is known to have come past them."""
    whole = checksum_file(file).read_text().splitlines(keepends=True)
    for kept in range(5):
        checksum_file(file).write_text("".join(whole[:kept]))
        checked = metrics.check(file)
        lost, last = set(STEPS[kept:]), STEPS[kept - 1] if kept else -1
        assert checked.lines == LINES[:kept]
        assert checked.damaged == sorted(step for step in lost if step <= last)
        assert checked.unlisted == sorted(step for step in lost if step > last)
        checksum_file(file).write_text("".join([*whole[:kept], "x" + whole[kept], *whole[kept + 1 :]]))
        checked = metrics.check(file)
        assert checked.lines == LINES[:kept] + LINES[kept + 1 :]
        assert {*checked.damaged, *checked.unlisted} == {STEPS[kept]}
