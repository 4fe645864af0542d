"""The console on captured streams and on a real terminal."""

from __future__ import annotations

import fcntl
import io
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace
from typing import Any

import pytest

from uft.config.compose import compose
from uft.config.frozen import frozen, load_config
from uft.evaluation.evaluate import Evaluation, Sample
from uft.heartbeat import heartbeat
from uft.launch.launcher import provenance
from uft.runs import create_run
from uft.tracking.console import (
    CLEAR_LINE,
    Console,
    StatusStream,
    card,
    count,
    duration,
    evaluation_table,
    expect_durations,
    number,
    printable,
    save_durations,
    saved_durations,
    shorten,
    step_line,
)
from uft.training.card import start_card


def result(status: str, steps: int, seconds: float, tokens: int, **more: Any) -> dict[str, Any]:
    """As in result.json."""
    base = {"final": {}, "best": {}, "best_step": None, "best_checkpoint": None, "peak_memory_bytes": None}
    return {"status": status, "steps": steps, "seconds": seconds, "tokens": tokens, "error": None, **base, **more}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setenv("TERM", "xterm")
    return io.StringIO()


def metrics(step: int) -> dict[str, float]:
    return {"seconds": 0.5 * step, "loss": 1 / step, "nll": 1.0, "objective/ift": 0.25, "tokens_per_second": 900.0}


# --- Lines between and of the steps


@pytest.mark.parametrize("interactive", [None, False])
def test_without_a_terminal_every_line_stays_a_line(tmp_path, stream, interactive):
    """Or on one where that was asked for."""
    stream = stream if interactive is None else Terminal()
    console = Console(stream, tmp_path / "console.log", 100, interactive)
    for step in (10, 20, 30):
        console.step(step, metrics(step))
    console.message("checkpoint saved")
    console.start("stage 2 of 2: dpo", [("model", "tiny"), ("mixture", "a  1\nb  2")])
    console.step(40, {"loss": 0.7, "objective/dpo": 0.7})
    console.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step  10/100  10% | loss  0.100 | ift  0.25 nll  1.00 |    900 tok/s | eta 00:45"
    assert [line[:12] for line in lines[:4]] == ["step  10/100", "step  20/100", "step  30/100", "checkpoint s"]
    assert lines[2].endswith("eta 00:35")
    assert lines[4:8] == ["stage 2 of 2: dpo", "  model    tiny", "  mixture  a  1", "           b  2"]
    assert "ift" not in lines[-1], "a stage starts its line afresh"
    assert not re.search(r"[\r\x1b]", stream.getvalue())
    assert (tmp_path / "console.log").read_text() == stream.getvalue()


def test_on_a_terminal_the_line_is_rewritten_and_the_log_is_plain(tmp_path, stream):
    stream = Terminal()
    console = Console(stream, tmp_path / "console.log", 100)
    console.step(10, metrics(10))
    console.step(20, metrics(20))
    console.message("checkpoint saved")
    console.step(30, metrics(30))
    console.end("run", result("finished", 100, 50.0, 1000), 100)
    console.close()
    shown = stream.getvalue()
    assert shown.split("checkpoint saved")[0].count("\n") == 0
    assert "\r\x1b[2Kcheckpoint saved\nstep  20/100" in shown
    assert re.search(r"step  30/100[^\n]*\n\n", shown), "the card starts below the last step line"
    log = (tmp_path / "console.log").read_text()
    assert [line[5:8] for line in log.splitlines()[:4]] == [" 10", " 20", "poi", " 30"]
    assert not re.search(r"[\r\x1b]", log)


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colors_only_where_they_are_wanted(stream, monkeypatch, variable, value):
    ending = result("failed", 3, 1.0, 10)
    colored, plain = Terminal(), Terminal()
    Console(colored).end("run", ending, 10)
    assert "\x1b[1;31mrun" in colored.getvalue()
    monkeypatch.setenv(variable, value)
    Console(plain).end("run", ending, 10)
    assert "\x1b" not in plain.getvalue()


def test_a_real_terminal(tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from uft.tracking.console import Console\n"
        "console = Console(sys.stdout, Path(sys.argv[1]), 1000)\n"
        "for step in range(1, 4): console.step(step * 100, {'loss': 2.0, 'lr': 1e-5, 'grad_norm': 1.0,\n"
        "    'nll': 2.0, 'objective/a': 1.0, 'objective/b': 1.0, 'seconds': 1.0 * step})\n"
        "console.close()"
    )
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    command = [sys.executable, "-c", program, str(tmp_path / "log")]
    environment = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    subprocess.run(command, stdout=follower, env=environment, check=True)
    os.close(follower)
    shown = os.read(leader, 65536).decode()
    os.close(leader)
    assert shown.count("\n") == 1
    lines = shown.rstrip().split("\r\x1b[2K")[1:]
    assert len(lines) == 3
    assert all(len(line) < 60 for line in lines)
    assert lines[-1].startswith("step  300/1000  30% | loss  2.000")
    assert "grad  1.00" in (tmp_path / "log").read_text(), "the log is as wide as it needs"


def test_the_remaining_time_follows_the_recent_pace(stream):
    console = Console(stream, None, 1000)
    console.step(500, {"seconds": 5000.0})  # a slow start
    for step in range(501, 531):
        console.step(step, {"seconds": 5000.0 + (step - 500)})
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("eta 1:23:20")
    assert lines[-1].endswith("eta 07:50")


STEP = {
    "loss": 1.873,
    "nll": 1.8,
    "objective/uft": 0.21,
    "lr": 9.6e-6,
    "grad_norm": 0.8,
    "tokens_per_second": 41_200.0,
    "mfu": 0.38,
    "memory_gb": 61.0,
    "memory_total_gb": 80.0,
}


def test_the_step_line_leaves_out_what_is_unknown_or_has_no_room():
    assert step_line(120, 800, STEP, ("uft",), eta=432) == (
        "step 120/800  15% | loss  1.873 | uft  0.21 nll  1.80 | lr 9.6e-06 | grad  0.80 |  41.2k tok/s"
        " | mfu 38% | 61.0/80 GB | eta 07:12"
    )
    assert step_line(1, 800, {"loss": 2.0, "lr": 0.0}) == "step   1/800   0% | loss  2.000 | lr 0.0e+00"
    assert step_line(1, 800, {"memory_gb": 1.25}) == "step   1/800   0% | 1.2 GB"
    for width in range(30, 140):
        line = step_line(120, 800, STEP, ("uft",), eta=432, width=width)
        assert len(line) <= max(width, len("step 120/800 | loss  1.873 | eta 07:12"))
        assert line.startswith("step 120/800")
        assert line.endswith("eta 07:12")
    assert "nll" in step_line(120, 800, STEP, ("uft",), eta=432, width=80)


def test_the_width_is_fixed_while_numbers_grow():
    lines = [
        step_line(1, 800, STEP | {"loss": 12.5, "tokens_per_second": 950.0}, ("uft",), eta=3000),
        step_line(99, 800, STEP | {"grad_norm": 0.00012, "objective/uft": -1.5}, ("uft",), eta=2000),
        step_line(800, 800, {name: value for name, value in STEP.items() if name != "objective/uft"}, ("uft",), 0),
    ]
    bars = [[at for at, character in enumerate(line) if character == "|"] for line in lines]
    assert bars[0] == bars[2]
    assert len(lines[0]) == len(lines[2])
    assert len(lines[1]) - len(lines[0]) <= 4  # powers of ten need two characters more


def test_numbers_times_and_text():
    numbers = {
        (1.8734, 3): "1.873",
        (0.0, 2): "0.00",
        (-12.345, 2): "-12.35",
        (0.01, 2): "0.01",
        (0.0012, 2): "1.2e-03",
        (1234.56, 2): "1234.6",
        (-123456.0, 3): "-1.2e+05",
        (math.nan, 2): "nan",
        (-math.inf, 2): "-inf",
        (None, 2): "-",
    }
    assert {given: number(*given) for given in numbers} == numbers
    counts = {0: "0", 999: "999", 41_200: "41.2k", 1_234_567: "1.2M", 7.2e9: "7.2G"}
    assert {value: count(value) for value in counts} == counts
    times = {0: "00:00", -3: "00:00", 432: "07:12", 59.6: "01:00", 4032: "1:07:12", 187_032: "2d 03:57:12"}
    assert {seconds: duration(seconds) for seconds in times} == times
    assert printable("a\nb\x1b[2J\r\u202e\u2028") == "a\\nb\\x1b[2J\\r\\u202e\\u2028"
    assert printable("häß 日本 \u0645\u06cc\u200c\u062e") == "häß 日本 \u0645\u06cc\u200c\u062e"
    assert printable("half \ud83d") == "half \\ud83d"
    assert (shorten("abcdefgh", 8), shorten("abcdefghi", 8)) == ("abcdefgh", "abcde...")


# --- Cards and evaluations


def test_the_start_card_names_the_commit(tmp_path, monkeypatch):
    """Of run.json as the launcher writes it."""
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\necho 0123456789abcdef\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    run = create_run(tmp_path / "run", frozen(compose()), [], **provenance())
    data: Any = SimpleNamespace(held_out=[], trained_held_out=0, digest="")
    lines = dict(start_card(run, load_config(run.config_file), [], data, ""))
    assert ", commit 0123456789, torch " in lines["version"]


def evaluation(nll: float) -> Evaluation:
    samples = [("sums", "1", "3+4?", "7", "7"), ("sums", "2", "5+5?", "9", "10"), ("style", "3", "a\nb", "c")]
    values = {"eval/nll": nll, "eval/accuracy": 1 / nll, "eval/sums/nll": nll / 2, "eval/style/margin": -2.0}
    return Evaluation(values, [Sample(*sample) for sample in samples])


def columns(text: str, row: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(row)).split()


def test_the_evaluation_before_last_and_now(tmp_path, stream):
    console = Console(stream, tmp_path / "log", 300)
    console.evaluation(0, evaluation(4.0))
    assert columns(stream.getvalue(), "metric") == ["metric", "now", "(0)", "sums", "style"]
    stream.truncate(0)
    console.recall([{"step": 90, "loss": 1.0}, {"step": 100, "loss": 1.0, "eval/nll": 2.0, "eval/accuracy": 0.5}])
    console.evaluation(200, evaluation(1.0))
    text = stream.getvalue()
    header = ["metric", "before", "(0)", "last", "(100)", "now", "(200)", "sums", "style"]
    assert columns(text, "metric") == header
    assert columns(text, "nll") == ["nll", "4.000", "2.000", "1.000", "0.500", "-"]
    assert columns(text, "accuracy") == ["accuracy", "0.250", "0.500", "1.000", "-", "-"]
    assert columns(text, "margin") == ["margin", "-", "-", "-", "-", "-2.000"]
    assert '  sums: "3+4?" -> "7"  (answer "7")' in text
    assert '  style: "a\\nb" -> "c"' in text
    assert "5+5" not in text, "one sample per source"
    assert "4.000" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("left", ["", "[1]", '{"train m": 5}', '{"train m": {"a": "x"}}', "\x00"])
def test_durations_of_phases_are_kept_also_where_the_file_was_damaged(left, tmp_path, monkeypatch):
    monkeypatch.setenv("UFT_CACHE", str(tmp_path))
    (tmp_path / "phases.json").write_text(left)
    monkeypatch.setattr(heartbeat, "took", {"it was tried": 9.0})
    monkeypatch.setattr(heartbeat, "subject", "")
    expect_durations("train m")
    save_durations(heartbeat.subject)
    assert saved_durations() == {"train m": {"it was tried": 9.0}}


def test_the_ends_of_stages_stay_in_the_table():
    def headers(**marks: int) -> list[str]:
        history = {step: {"eval/nll": 1.0 + step} for step in (0, 2, 4, 6)}
        return [str(column.header) for column in evaluation_table(6, history, marks).columns]

    assert headers() == ["metric", "before (0)", "last (4)", "now (6)"]
    assert headers(sft=2) == ["metric", "before (0)", "sft (2)", "last (4)", "now (6)"]
    assert headers(sft=4) == ["metric", "before (0)", "sft (4)", "now (6)"]
    assert headers(dpo=6) == headers()  # it is now


def test_an_estimate_of_kl_that_is_none_is_told():
    for value, odd in ((0.5, False), (20.0, False), (99.0, True), (1.2e7, True), (math.inf, True), (math.nan, True)):
        stream = io.StringIO()
        console = Console(stream, None, 300)
        console.evaluation(200, Evaluation({"eval/nll": 1e9, "eval/kl": 0.25, "eval/sums/kl": value}, []))
        assert ("\nsums/kl: no estimate. " in stream.getvalue()) is odd
        console.end("run", result("finished", 200, 1.0, 1, final={"eval/kl": value, "eval/sums/kl": 1.0}), 200)
        assert bool(re.search(r"  caution +kl: no estimate\. ", stream.getvalue())) is odd


def test_the_end_card_of_a_good_run(stream, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = create_run(tmp_path / "runs" / "a", "{}", [])
    run.model_dir.mkdir()
    (run.checkpoints_dir / "step-000700").mkdir(parents=True)
    ending = result(
        "finished",
        800,
        seconds=432,
        tokens=1_200_000,
        final={"loss": 2.0, "eval/nll": 1.25, "eval/sums/nll": 1.0, "eval/accuracy": 0.5},
        best={"eval/sums/nll": 1.125},
        best_step=700,
        best_checkpoint="checkpoints/step-000700",
        peak_memory_bytes=61.25e9,
    )
    Console(stream).end("ift-mix", ending, 800, ("uft generate runs/a", "uft ls"), run)
    assert stream.getvalue().splitlines() == [
        "",
        "ift-mix",
        "  status       finished at step 800/800",
        "  final        loss 2.000, eval/nll 1.250, eval/accuracy 0.500",
        "  best         eval/sums/nll 1.125 at step 700",
        "  time         07:12 of training",
        "  tokens       1.2M, 2.8k tok/s",
        "  peak memory  61.2 GB",
        "  checkpoint   runs/a/checkpoints/step-000700",
        "  model        runs/a/model",
        "  next         uft generate runs/a",
        "               uft ls",
    ]


def test_the_end_card_of_a_run_that_failed_at_once(stream):
    error = "RuntimeError: out of memory\nat layer \x1b[5m3"
    final = {f"eval/measure{number}": 1.0 for number in range(12)} | {"eval/exact_match": 0.5, "eval/nll": 2.0}
    ending = result("failed", 0, 0.0, 0, error=error, final={"loss": 3.0, **final})
    Console(stream).end("ift-mix", ending, 800, ("uft resume runs/a",))
    lines = stream.getvalue().splitlines()[2:]
    assert lines[:2] == ["  status  failed at step 0/800", "  error   RuntimeError: out of memory"]
    assert lines[2] == "          at layer \\x1b[5m3"
    first = "  final   loss 3.000, eval/exact_match 0.500, eval/nll 2.000, eval/measure0 1.000, eval/measure1 1.000,"
    assert lines[3] == first, "the headlines come first where not all metrics fit"
    assert lines[5:] == ["          1.000", "  next    uft resume runs/a"]
    Console(stream).end("early", result("stopped", 0, 0.0, 0, final={}), 0)
    assert "  status  stopped at its start\n" in stream.getvalue()
    assert card([("mixture", "a  1\nb  2\n")]) == "  mixture  a  1\n           b  2\n"


def test_good_answers_that_become_unlikely_are_told_while_it_trains_and_at_its_end(stream):
    console = Console(stream)
    for step, nll in ((0, 1.0), (5, 1.2), (10, 2.5)):
        console.evaluation(step, Evaluation({"eval/nll": nll, "eval/pairs/nll": nll / 2, "eval/sft/nll": 1.0}))
        told = "good answers have become less likely: eval/nll 1.00 to 2.50 since step 0 (pairs 0.50 to" in " ".join(
            stream.getvalue().split()
        )
        assert told == (step == 10)
    console.end("ift-mix", result("finished", 10, 1.0, 10), 10)
    assert "  caution  good answers have become less likely" in stream.getvalue()


def test_answers_that_are_long_are_two_whole_ones(stream):
    prompts = {name: f"{name} asks " + "why " * 60 for name in ("a", "b", "c")}
    samples = [Sample(name, "row", prompt, "because\nof this", "x", {}) for name, prompt in prompts.items()]
    Console(stream).evaluation(1, Evaluation({}, samples))
    said = " ".join(stream.getvalue().split())
    assert [" ".join(prompt.split()) in said for prompt in prompts.values()] == [True, True, False]
    assert "reply because of this answer x" in said
    assert max(map(len, stream.getvalue().splitlines())) <= 110


QUIET_PROGRAM = """
import sys, time
from uft.heartbeat import activity, report_progress
from uft.tracking import console
console.QUIET = 0.2
with console.phase_status(), activity("the model was evaluated"):
    report_progress(6, 30, "rows scored")
    time.sleep(1.2)
    report_progress(12, 30, "rows scored")
    time.sleep(1.5)
    print("done", flush=True)
"""


def test_the_status_line_does_not_outlive_a_process_that_ends_at_once():
    written = io.BytesIO()
    status = StatusStream(io.TextIOWrapper(written, encoding="utf-8"))
    status.shown = True
    status.clear()
    assert written.getvalue() == CLEAR_LINE.encode()


QUIET_EXPORT = """
import sys, time, types
from uft.cli import manage
from uft.tracking import console
console.QUIET = 0.2
run = types.SimpleNamespace(path="a", runs_code=False)
manage.find_weights = lambda word: types.SimpleNamespace(run=run, config={"model": {"path": "x"}})
def export_run(source, wanted, say):
    time.sleep(1.5)
    say("done")
sys.modules["uft.training.exporting"] = types.SimpleNamespace(Export=dict, export_run=export_run)
manage.export(["a", "--to", "b"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "told"),
    [
        (QUIET_PROGRAM, r"the model is being evaluated: 12 of 30 rows scored, 00:0\d, about 00:0\d left"),
        (QUIET_EXPORT, r"it is being prepared, 00:0\d"),
    ],
)
def test_a_terminal_is_told_what_takes_long_and_a_pipe_is_not(program, told):
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", program], stdout=side, env=environment, check=True, timeout=60)
    os.close(side)
    seen = os.read(main, 10_000).decode()
    assert re.search(told, seen)
    assert seen.endswith("\r\x1b[2Kdone\r\n"), "output replaces the line"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, timeout=60)
    assert done.stdout == b"done\n"


# --- Odd text and broken streams


def test_text_of_data_stays_text_and_an_ascii_stream_gets_plain_characters(tmp_path):
    raw = io.BytesIO()
    console = Console(io.TextIOWrapper(raw, encoding="ascii"), tmp_path / "log", 10)
    console.message("row [bold]7[/bold] \x1b[2J häß")
    samples = [Sample("[red]", "1", "[bold]\x07", ":smile:"), Sample("fußball", "1", "日", "ok")]
    console.evaluation(0, Evaluation({"eval/[red]x/nll": 1.0}, samples))
    console.close()
    shown, log = raw.getvalue().decode("ascii"), (tmp_path / "log").read_text("utf-8")
    assert "row [bold]7[/bold] \\x1b[2J h\\xe4\\xdf" in shown
    assert "\\u65e5" in shown
    assert "日" in log
    for text in (shown, log):
        assert "[red]x" in text
        assert '"[bold]\\x07" -> ":smile:"' in text


def test_a_pipe_that_closes_does_not_end_the_run(tmp_path):
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    console = Console(stream, tmp_path / "log", 10)
    console.step(1, {"loss": 1.0})
    os.close(reader)
    console.step(2, {"loss": 1.0})
    console.step(3, {"loss": 1.0})
    console.close()
    Console(io.StringIO(), tmp_path / "log").message("resumed")
    assert len((tmp_path / "log").read_text().splitlines()) == 4
    with pytest.raises(BrokenPipeError):
        stream.close()  # what it could not write
