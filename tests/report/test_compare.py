"""`uft compare` as it is typed: what it takes, prints, writes and refuses, on real folders in every state."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from shape import STATES, check
from synthetic import held, make_run, make_sweep, tear

from uft.cli import main
from uft.report.compare import as_json, compare, write
from uft.report.runs import select
from uft.tracking import metrics

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UFT_TRACE", raising=False)
    return tmp_path


@pytest.fixture
def sweep(here) -> Path:
    return make_sweep(Path("outputs/2026-11-21/trial"), ("sft", "uft"), seeds=(1, 2, 3), points=5)


@pytest.fixture
def grid(here) -> Path:
    return make_sweep(Path("outputs/2026-11-21/beta"), ("sft", "uft"), (0.1, 0.3), (0.25, 0.75), (1, 2), points=10)


@pytest.fixture
def typed(capsys):
    """`typed(*words)` -> (exit code, stdout, stderr)."""

    def run(*words):
        code = main(["compare", *map(str, words)])
        return code, *capsys.readouterr()

    return run


def written(folder) -> dict:
    made = json.loads((Path(folder) / "compare.json").read_text(encoding="utf-8"))
    check(made)
    return made


def compared(*words) -> dict:
    made = compare(select([str(word) for word in words]))
    check(made)
    assert json.loads(as_json(made)) == json.loads(json.dumps(made))
    return made


def test_without_arguments_it_is_the_newest_sweep(sweep, typed):
    older = make_sweep(Path("outputs/2026-11-20/older"), ("dpo",), seeds=(1,), points=5)
    for path in older.rglob("*.*"):
        os.utime(path, (1, 1))
    make_run(Path("outputs/2026-11-22/alone"), points=5)
    code, out, err = typed()
    assert (code, err) == (0, "")
    assert "trial: 6 runs, 2 configurations" in out
    assert f"{sweep}/compare.json  {sweep}/compare.html" in out
    assert (sweep / "compare.html").read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html")
    assert len(written(sweep)["runs"]) == 6
    for path in sweep.glob("*/*"):
        os.utime(path, (0, 0))
    assert "older: one run, one configuration" in typed()[1], "a report does not make a sweep newer"
    assert typed(sweep)[0] == 0
    assert len(written(sweep)["runs"]) == 6, "nor is it a run"


def test_without_a_sweep_it_is_all_runs(here, typed):
    for name in ("a", "b"):
        make_run(Path("outputs/2026-11-22") / name, seed=ord(name), points=5)
    assert "2026-11-22: 2 runs, one configuration" in typed()[1]
    assert sorted(path.name for path in Path("outputs/2026-11-22").glob("*.*")) == [
        "compare.html",
        "compare.json",
        "compare.md",
    ]


def test_the_table_has_means_deviations_the_answer_and_the_warnings(sweep, typed):
    make_run(sweep / "uft-seed4", "uft", 4, points=5, status="failed", error="ValueError: too\nlong")
    _, out, _ = typed(sweep)
    made = written(sweep)
    groups = {group["name"]: group["metrics"]["eval/exact_match"] for group in made["groups"]}
    for name, found in groups.items():
        (row,) = [line for line in out.splitlines() if re.match(rf"  {name}\b.*±", line)]
        assert f"{found['mean']:.3f} ± {found['sd']:.3f}" in row
    assert re.search(r"^  uft +3 of 4 ", out, re.MULTILINE)
    assert re.search(r"^  sft \(baseline\) +3 ", out, re.MULTILINE)
    assert out.index("  uft  ") < out.index("  sft (baseline)"), "best first"
    flat = " ".join(out.split())
    for summary in made["summary"]:
        for sentence in summary["words"]:
            assert " ".join(sentence.split()) in flat
    assert "  uft-seed4 failed: ValueError: too\n" in out
    assert "! one run failed: uft-seed4. " in out


def test_compare_json_of_a_grid(grid):
    made = compared(grid)
    assert made["title"] == "beta"
    assert [(axis["key"], axis["values"]) for axis in made["axes"]] == [
        ("objective.name", ["sft", "uft"]),
        ("data.ratio", [0.25, 0.75]),
        ("objective.beta", [0.1, 0.3]),
    ]
    assert [group["name"] for group in made["groups"]] == [
        *("sft ratio=0.25", "sft ratio=0.75", "uft ratio=0.25 beta=0.1", "uft ratio=0.25 beta=0.3"),
        *("uft ratio=0.75 beta=0.1", "uft ratio=0.75 beta=0.3"),
    ]
    run = made["runs"][0]
    assert run["path"] == "outputs/2026-11-21/beta/sft-ratio0.25-seed1"
    assert run["config"] == {"objective.name": "sft", "data.ratio": 0.25}
    assert (run["seed"], run["steps"], run["total_steps"], run["tokens"]) == (1, 200, 200, 120_000)
    assert run["command"] == "uft train objective=sft seed=1 data.ratio=0.25"
    assert run["facts"]["torch"] == "2.13.0+cpu"
    assert run["final"]["eval/nll"] == pytest.approx(run["best"]["eval/nll"])
    assert [head["metric"] for head in made["headline"]][:2] == ["eval/exact_match", "eval/correct"]
    kinds = {metric["name"]: (metric["kind"], metric["direction"], metric["comparable"]) for metric in made["metrics"]}
    assert kinds["eval/instruct/exact_match"] == ("eval", "max", True)
    assert kinds["eval/margin"] == ("eval", None, True)
    assert kinds["loss"] == kinds["grad_norm"] == kinds["objective/uft"] == ("train", None, False)
    assert kinds["nll"] == ("train", None, True)
    assert kinds["seconds"] == ("cost", None, True)
    differing = {each["key"] for each in made["differences"]}
    assert {"data.ratio", "objective.beta", "data digest"} <= differing
    assert "seed" not in differing
    assert {each["metric"] for each in made["summary"]} == {head["metric"] for head in made["headline"]}
    under_one_objective = compared(f"{grid}/sft-*")
    assert all(metric["comparable"] for metric in under_one_objective["metrics"])


def test_runs_sweeps_patterns_and_names_together(sweep, typed):
    other = make_run(Path("elsewhere/one"), "ift", points=5)
    assert typed("trial", "elsewhere/o*", sweep / "sft-seed1", "--out", "here")[0] == 0
    made = written("here")
    assert len(made["runs"]) == 7, "a run that is named twice is one"
    assert {run["path"] for run in made["runs"]} > {str(other), str(sweep / "sft-seed1")}
    assert typed("uft-seed2", "--out", "here")[0] == 0
    assert [run["name"] for run in written("here")["runs"]] == ["uft-seed2"]
    assert typed("outputs/**/sft-seed*", "--out", "here")[0] == 0
    assert len(written("here")["runs"]) == 3
    make_run(Path("outputs/2026-11-22/alone"), points=5)
    assert typed(sweep, "outputs/2026-11-22")[0] == 0
    assert Path("outputs/compare.html").is_file(), "the common parent takes the report"


def test_a_run_alone(here, typed):
    run = make_run(Path("one"), points=5)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    sealed = "".join(metrics.checksum_line(json.loads(line)["step"], line) for line in lines)
    metrics.checksum_file(run / "metrics.jsonl").write_text(sealed)
    code, out, _ = typed("one")
    assert code == 0
    assert out.count("There is only one configuration") == 1, "whatever the number of metrics"
    assert "damaged" not in out
    assert Path("compare.json").is_file()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:1], *lines[2:]]) + "\n")
    step = json.loads(lines[1])["step"]
    assert f"one finished: metrics.jsonl: what was written at step {step} is damaged or lost" in typed("one")[1]


def test_what_is_asked_for_comes_first(sweep, typed):
    code, out, _ = typed("--metric", "correct", "--metric=eval/margin:max", "--baseline", "uft")
    assert code == 0
    made = written(sweep)
    assert [head["metric"] for head in made["headline"]][:3] == ["eval/correct", "eval/margin", "eval/exact_match"]
    assert [group["name"] for group in made["groups"] if group["baseline"]] == ["uft"]
    assert "uft (baseline)" in out
    assert typed("--seed-key", "optim.lr")[0] == 0
    assert [axis["key"] for axis in written(sweep)["axes"]] == ["objective.name", "seed"]


def test_json_is_all_that_is_printed_and_open_shows_the_page(sweep, typed, monkeypatch):
    import webbrowser

    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    code, out, err = typed("--json", "--open")
    assert code == 0
    made = json.loads(out)
    check(made)
    assert made["curves"]
    assert "compare.html" in err
    assert opened == [(sweep / "compare.html").resolve().as_uri()]


MISTAKES = [
    (["nowhere"], "no such folder, run or sweep"),
    (["empty"], "no run in this folder"),
    (["nowhere", "trial", "void-*"], "2 problems"),
    (["--metric", "los"], "no run has this figure"),
    (["--metric", "loss"], "the runs minimise different quantities"),
    (["--baseline", "dpo"], "no configuration has that name"),
    (["--out", "file.txt"], "cannot write there"),
]


def test_mistakes_are_told_and_write_nothing(here, typed):
    code, _, err = typed()
    assert (code, "no runs here" in err, "uft train -m" in err) == (2, True, True)
    sweep = make_sweep(Path("outputs/2026-11-21/trial"), ("sft", "uft"), seeds=(1, 2), points=5)
    Path("empty").mkdir()
    Path("file.txt").write_text("x")
    for words, why in MISTAKES:
        code, _, err = typed(*words)
        assert (code, why in err) == (2, True), words
    assert not (sweep / "compare.json").exists()


def test_runs_in_every_state_are_shown(grid):
    runs = sorted(grid.iterdir())
    make_run(grid / "failed", "ift", status="failed", error="RuntimeError: CUDA out of memory\n  Traceback")
    make_run(grid / "stopped", "ift", 2, status="stopped")
    make_run(grid / "interrupted", "ift", 3, status="interrupted")
    tear(runs[0] / "metrics.jsonl")
    (runs[1] / "run.json").write_text("{")
    (runs[2] / "run.json").unlink()
    (runs[3] / "config.yaml").unlink()
    tear(runs[4] / "samples.jsonl", 0.1)
    (runs[5] / "result.json").write_text("null")
    (runs[6] / "metrics.jsonl").unlink()
    with held(grid / "interrupted"):
        made = compared(grid)
    states = {run["name"]: run["status"] for run in made["runs"]}
    assert len(states) == 15
    assert set(states.values()) == STATES - {"interrupted"}
    assert compared(grid / "interrupted")["runs"][0]["status"] == "interrupted"
    errors = {run["name"]: run["error"] for run in made["runs"] if run["error"]}
    assert errors["failed"].startswith("RuntimeError: CUDA out of memory")
    assert errors["sft-ratio0.25-seed1"].startswith("metrics.jsonl breaks off at line")
    unreadable = [run for run in made["runs"] if run["status"] == "unreadable"]
    assert len(unreadable) == 4
    assert [run["group"] for run in unreadable].count(None) == 1, "without a configuration there is no group"
    assert max(spread["n"] for group in made["groups"] for spread in group["metrics"].values()) == 2
    assert any(warning["what"].startswith("4 runs cannot be read") for warning in made["warnings"])


def test_unreadable_runs_are_no_failure(here, typed):
    for name in ("a", "b"):
        make_run(Path("s") / name, points=5)
    for path in Path("s").rglob("*.*"):
        path.write_bytes(b"\x00{[")
    code, out, _ = typed("s", "--metric", "eval/nll")
    assert code == 0
    assert "! No run has finished" in out
    assert "  a unreadable: config.yaml" in out
    made = written("s")
    assert (made["headline"], made["summary"]) == ([], []), "nothing is known yet, and nothing is wrong"


def test_a_run_that_never_logged_anything(here):
    run = make_run(Path("a"), status="interrupted")
    for name in ("metrics.jsonl", "samples.jsonl", "overrides.yaml", "data.json"):
        (run / name).unlink()
    made = compared(run)
    assert (made["curves"], made["runs"][0]["final"], made["runs"][0]["command"]) == ({}, {}, None)


HOSTILE = "<script>alert(1)</script></script><!--\u202eevil\u2028\x1b[31m\"'&\x00 \ud83d"


def test_hostile_content_stays_text(here):
    run = make_run(
        Path("s/a"),
        final={f"eval/{HOSTILE}": 1.0, "eval/nll": math.nan, "eval/kl": math.inf},
        error=HOSTILE * 1000,
        data__name=HOSTILE.replace("\ud83d", "").replace("\x00", ""),
        overrides=[f"data.name={HOSTILE}", "objective=x", "just a word", "'"],
        info={"versions": {"uft": HOSTILE}, "device": ["cpu"], "total_steps": "many", "code": [1]},
        result={"steps": "x", "seconds": None, "tokens": 1e300, "peak_memory_bytes": math.nan, "best": [1]},
        samples=[{"step": 1, "source": HOSTILE, "row": HOSTILE, "prompt": "p" * 10**6, "reply": HOSTILE, "verdict": 3}],
    )
    make_run(Path("s/b"), "uft", sweep__name=HOSTILE[:5])
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 201, HOSTILE: 1, "loss": 1e999, "nll": "-inf"}) + "\n")
        file.write(json.dumps({"step": 202, HOSTILE: 2, "eval/nll": "nan", "x" * 10**6: 1}) + "\n")
    made = compared("s")
    assert not re.search("NaN|Infinity", as_json(made))
    assert HOSTILE.replace("\ud83d", "?") in [metric["name"] for metric in made["metrics"]]
    assert (made["runs"][0]["final"]["eval/nll"], made["runs"][0]["final"]["eval/kl"]) == ("nan", "inf")
    assert len(made["samples"][0]["prompt"]) < 5000
    assert len(made["runs"][0]["error"]) < 5000


def test_names_and_errors_cannot_move_the_cursor(here, typed):
    make_run(Path("s") / "red\x1b[31m\u202e", "uft", status="failed", error="bad\x1b[2J\rthing", points=5)
    make_run(Path("s") / "fine", "uft", data__name="n\x1b[1m[bold red]x[/]", points=5, final={"eval/\x1b[5mz": 1.0})
    _, out, _ = typed("s", "--metric", "eval/\x1b[5mz:max")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", out)
    assert "[bold red]x[/]" in out, "nor are they markup"
    assert "[bold red]x[/] has 1 (one seed)." in out, "escapes do not cost a sentence its end"


def test_at_80_columns_names_are_whole_and_metrics_left_out_are_counted(sweep, typed, monkeypatch):
    monkeypatch.setattr("uft.tracking.console.TABLE_WIDTH", 80)
    make_run(sweep / "other", "uft", points=5, data__name="n" * 60)
    _, out, _ = typed(sweep)
    head = next(line for line in out.splitlines() if line.startswith("  configuration"))
    metrics = head.split()[2::2]
    assert 0 < len(metrics) < 5
    assert f"  {5 - len(metrics)} more metrics in a wider terminal\n" in out
    assert "  mean ± standard deviation over seeds; ↑ more is better, ↓ less is better\n" in out
    assert "  * the best mean, and all that are not worse beyond seed noise\n" in out
    rows = out[out.index(head) : out.index("  mean ±")]
    assert "…" not in rows
    assert rows.count("n" * 20) >= 2, "a long name is folded"
    assert max(map(len, rows.splitlines())) <= 80


def test_a_long_table_ends(here, typed):
    make_sweep(Path("s"), ("uft",), [n / 100 for n in range(1, 41)], seeds=(1,), points=2)
    _, out, _ = typed("s")
    assert "and 10 more in compare.html" in out
    assert len([line for line in out.splitlines() if re.match(r"  (uft )?beta=", line)]) == 30


@pytest.mark.slow
def test_the_program_while_the_sweep_runs_and_runs_vanish(sweep, here):
    """Beside a process that holds a run, on folders that go away under it; it needs neither torch nor wandb."""
    shutil.rmtree(sweep / "uft-seed3")
    (sweep / "uft-seed3").mkdir()
    (sweep / "uft-seed3" / "run.json").write_text("{}")
    (sweep / "uft-seed3" / "metrics.jsonl").write_text('{"step": 1, "lo')
    command = [sys.executable, "-X", "importtime", "-m", "uft", "compare", str(sweep)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with held(sweep / "uft-seed2"):
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    states = {run["name"]: run["status"] for run in written(sweep)["runs"]}
    assert (states["uft-seed2"], states["uft-seed3"]) == ("running", "unreadable")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "uft" in imported
    assert not imported & {"torch", "transformers", "datasets", "wandb", "hydra", "peft"}


@pytest.mark.slow
def test_watch_ends_with_the_last_run_or_with_ctrl_c(sweep, here, typed):
    assert "trial: 6 runs, 2 configurations" in typed("--watch")[1], "nothing is at work"
    command = [sys.executable, "-m", "uft", "compare", "--watch", str(sweep)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "TERM": "xterm", "FORCE_COLOR": "1"}
    with held(sweep / "uft-seed2"):
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where the tests run in the background
        program = subprocess.Popen(command, cwd=here, env=environment, stdout=subprocess.PIPE, preexec_fn=heard)
        seen = b""
        while b"uft-seed2 step 200/200" not in seen:
            seen += os.read(program.stdout.fileno(), 10_000)
        assert b"5 finished" in seen
        program.send_signal(signal.SIGINT)
        rest, _ = program.communicate(timeout=120)
    assert program.returncode == 0
    assert b"compare.html" in rest, "and leaves the report"


@pytest.mark.slow
def test_two_hundred_runs_of_five_hundred_points(tmp_path):
    import time

    ratios = (0.1, 0.3, 0.5, 0.7, 0.9)
    sweep = make_sweep(tmp_path / "big", ("sft", "uft", "ift", "dpo"), (), ratios, range(10), points=500)
    started = time.process_time()
    made = compared(sweep)
    assert time.process_time() - started < 20, "a few seconds, on a slow machine too"
    files = write(made, tmp_path)
    assert sum(path.stat().st_size for path in files) < 25e6
    assert all(path.stat().st_size < 15e6 for path in files)
