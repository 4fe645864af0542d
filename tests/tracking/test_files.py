"""metrics.jsonl and samples.jsonl as their readers meet them."""

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

from uft.evaluation.evaluate import Sample
from uft.report.runs import read_lines
from uft.runs import Run
from uft.tracking import metrics
from uft.tracking.metrics import Files, read_metrics


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def write(run: Run, steps: range, resumed: int | None = None, said: list[str] | None = None) -> None:
    files = Files(run, resumed, (lambda text: None) if said is None else said.append)
    files.start()
    for step in steps:
        files.log(step, {"loss": 1 / (step + 3), "rows": 4 * step})
        if step % 5 == 0:
            files.log(step, {"eval/nll": 2 / (step + 7)})
            files.samples(step, [Sample("pairs", f"row-{step}", "hello?", "hi\nyou", None, {"accuracy": 1.0})])
    files.finish("finished", 0, {})


def strictly(text: str) -> list[dict]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_line_per_log_with_step_first_and_every_digit(run):
    write(run, range(1, 4))
    lines = strictly(run.metrics_file.read_text())
    assert [next(iter(line)) for line in lines] == ["step"] * 3
    assert [line["loss"] for line in lines] == [1 / 4, 1 / 5, 1 / 6]
    assert isinstance(lines[0]["rows"], int)


def test_lines_are_on_disk_at_once_and_what_is_not_a_number_does_not_lie(run):
    files = Files(run)
    files.start()
    files.log(1, {"loss": math.nan, "grad_norm": math.inf, "lr": -math.inf, "stage": "nan"})
    files.log(numpy.int64(3), {"loss": numpy.float32(0.5), "best": numpy.float64(0.1)})
    assert strictly(run.metrics_file.read_text()) == [
        {"step": 1, "loss": "nan", "grad_norm": "inf", "lr": "-inf", "stage": "nan"},
        {"step": 3, "loss": 0.5, "best": 0.1},
    ]
    first, second = read_metrics(run)
    assert math.isnan(first["loss"])
    assert (first["grad_norm"], first["lr"], first["stage"]) == (math.inf, -math.inf, "nan")
    assert second == {"step": 3, "loss": 0.5, "best": 0.1}
    files.finish("failed", 1, {})


def test_training_and_evaluation_of_a_step_are_merged_by_the_reader(run):
    write(run, range(10))
    assert len(strictly(run.metrics_file.read_text())) == 12
    merged = read_metrics(run)
    assert [line["step"] for line in merged] == list(range(10))
    assert merged[5] == {"step": 5, "loss": 1 / 8, "rows": 20, "eval/nll": 2 / 12}


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
    whole = Run(tmp_path / "whole")
    whole.path.mkdir()
    write(whole, range(20))
    for last, torn in itertools.product(
        [0, 5, 7, 12], ["", '{"step": 13, "lo', '{"step": 13, "loss": 0.1}', "\0\0\0\0"]
    ):
        cut = Run(tmp_path / f"{last}-{len(torn)}")
        cut.path.mkdir()
        write(cut, range(13))
        for path in (cut.metrics_file, cut.samples_file):
            path.write_text(path.read_text() + torn)
        write(cut, range(last, 20), resumed=last)  # the evaluation of the last step is repeated
        assert cut.metrics_file.read_bytes() == whole.metrics_file.read_bytes()
        assert cut.samples_file.read_bytes() == whole.samples_file.read_bytes()


def cut(path: Path) -> None:
    """Take the end of its last line away."""
    path.write_bytes(path.read_bytes()[:-7])


LOST = "metrics.jsonl: what was written at step 4 is damaged or lost (checksum), and left out"


@pytest.mark.parametrize("steps", [range(5, 8), range(0)], ids=["later", "at the end"])
def test_a_last_line_that_is_lost_where_the_checkpoint_stands_is_told(run, steps):
    """A process that died there while it wrote would write it again. Nobody does, so the disk took it."""
    write(run, range(5))
    cut(run.metrics_file)
    said: list[str] = []
    write(run, steps, resumed=4, said=said)
    assert said == [LOST]
    assert [line["step"] for line in read_metrics(run)] == [0, 1, 2, 3, *steps]
    told: list[str] = []
    read_lines(run.metrics_file, told, ended=True)
    assert told == [LOST], "and to other readers"


def test_a_session_that_ends_early_leaves_it_to_the_next(run):
    write(run, range(6))
    whole = run.metrics_file.read_bytes()
    cut(run.metrics_file)
    said: list[str] = []
    early = Files(run, 5, said.append)
    early.start()
    early.finish("stopped", 75, {})
    write(run, range(5, 6), resumed=5, said=said)
    assert said == []
    assert run.metrics_file.read_bytes() == whole


@pytest.mark.parametrize("torn", [0, 1, 2], ids=["none", "metrics", "samples too"])
def test_a_process_that_died_within_a_line_of_an_evaluation_lost_nothing(run, torn):
    write(run, range(6))
    files = [run.metrics_file, run.samples_file]
    files += [metrics.checksum_file(path) for path in files]
    whole = [path.read_bytes() for path in files]
    for path in files[:torn]:
        cut(path)
    said: list[str] = []
    write(run, range(5, 6), resumed=5, said=said)
    assert said == []
    assert [path.read_bytes() for path in files] == whole


def test_a_fresh_start_in_a_used_folder_keeps_nothing(run):
    write(run, range(8))
    write(run, range(2))
    assert [line["step"] for line in read_metrics(run)] == [0, 1]
    assert len(strictly(run.samples_file.read_text())) == 1


def test_samples_hold_any_text(run):
    files = Files(run)
    files.start()
    odd = "snow ☃ half \ud83d line\nfeed \u2028 and \x00"
    files.samples(7, [Sample("pairs", "a.jsonl:3", odd, odd, "4", {"accuracy": math.nan})])
    files.finish("finished", 0, {})
    (line,) = [json.loads(text) for text in run.samples_file.read_text("utf-8").split("\n") if text]
    assert list(line) == ["step", "source", "row", "prompt", "reply", "answer", "verdict"]
    assert line["step"] == 7
    assert line["reply"] == odd
    assert line["verdict"] == {"accuracy": "nan"}


def test_a_kill_loses_no_whole_line(run):
    program = (
        "import sys; from pathlib import Path; from uft.runs import Run; from uft.tracking.metrics import Files\n"
        "files = Files(Run(Path(sys.argv[1]))); files.start(); step = 0\n"
        "while True:\n"
        "    step += 1; files.log(step, {'loss': 1 / step}); print(step, flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = 0
        while seen < 300:
            seen = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
    steps = [line["step"] for line in read_metrics(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 300
