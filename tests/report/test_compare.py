"""`uft compare` as it is typed: what it takes, prints, writes and refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shape import check
from synthetic import held, make_run, make_sweep

from uft.cli import main
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
def typed(capsys):
    """`typed(*words)` -> (exit code, stdout, stderr)."""

    def run(*words):
        code = main(["compare", *words])
        return code, *capsys.readouterr()

    return run


def written(folder) -> dict:
    made = json.loads((Path(folder) / "compare.json").read_text(encoding="utf-8"))
    check(made)
    return made


def test_without_arguments_it_is_the_newest_sweep(sweep, typed):
    make_sweep(Path("outputs/2026-11-20/older"), ("dpo",), seeds=(1,), points=5)
    for path in Path("outputs/2026-11-20").rglob("*.*"):
        os.utime(path, (1, 1))
    make_run(Path("outputs/2026-11-22/alone"), points=5)
    code, out, err = typed()
    assert (code, err) == (0, "")
    assert "trial: 6 runs, 2 configurations" in out
    assert f"{sweep}/compare.json  {sweep}/compare.html" in out
    assert (sweep / "compare.html").stat().st_size > 10_000
    assert len(written(sweep)["runs"]) == 6


def test_a_report_does_not_make_a_sweep_newer(sweep, typed):
    time.sleep(0.01)
    make_sweep(Path("outputs/2026-11-22/newer"), ("dpo",), seeds=(1,), points=5)
    assert typed(str(sweep))[0] == 0
    assert "newer: one run, one configuration" in typed()[1]


def test_without_a_sweep_it_is_all_runs(here, typed):
    for name in ("a", "b"):
        make_run(Path("outputs/2026-11-22") / name, seed=ord(name), points=5)
    assert "2026-11-22: 2 runs, one configuration" in typed()[1]
    assert Path("outputs/2026-11-22/compare.json").is_file()


def test_the_table_has_means_deviations_the_answer_and_the_warnings(sweep, typed):
    make_run(sweep / "uft-seed4", "uft", 4, points=5, status="failed", error="ValueError: too\nlong")
    _, out, _ = typed(str(sweep))
    made = written(sweep)
    groups = {group["name"]: group["metrics"]["eval/exact_match"] for group in made["groups"]}
    for name, found in groups.items():
        (row,) = [line for line in out.splitlines() if re.match(rf"  {name}\b.*±", line)]
        assert f"{found['mean']:.4g} ± {found['sd']:.2g}" in row
    assert re.search(r"^  uft +3 of 4 ", out, re.MULTILINE)
    assert re.search(r"^  sft \(baseline\) +3 ", out, re.MULTILINE)
    assert out.index("  uft  ") < out.index("  sft (baseline)"), "best first"
    flat = " ".join(out.split())
    for summary in made["summary"]:
        for sentence in summary["words"]:
            assert " ".join(sentence.split()) in flat
    assert "  uft-seed4 failed: ValueError: too\n" in out
    assert "! one run failed: uft-seed4. " in out


def test_runs_sweeps_patterns_and_names_together(sweep, typed):
    other = make_run(Path("elsewhere/one"), "ift", points=5)
    assert typed("trial", "elsewhere/o*", str(sweep / "sft-seed1"), "--out", "here")[0] == 0
    made = written("here")
    assert len(made["runs"]) == 7, "a run that is named twice is one"
    assert {run["path"] for run in made["runs"]} > {str(other), str(sweep / "sft-seed1")}
    assert typed("uft-seed2", "--out", "here")[0] == 0
    assert [run["name"] for run in written("here")["runs"]] == ["uft-seed2"]
    assert typed("outputs/**/sft-seed*", "--out", "here")[0] == 0
    assert len(written("here")["runs"]) == 3


def test_the_common_parent_takes_the_report(sweep, typed):
    make_run(Path("outputs/2026-11-22/alone"), points=5)
    assert typed(str(sweep), "outputs/2026-11-22")[0] == 0
    assert Path("outputs/compare.html").is_file()


def test_a_run_alone(here, typed):
    make_run(Path("one"), points=5)
    code, out, _ = typed("one")
    assert code == 0
    assert out.count("There is only one configuration") == 1, "whatever the number of metrics"
    assert Path("compare.json").is_file()


def test_a_finished_run_that_lost_a_line_says_so(here, typed):
    run = make_run(Path("one"), points=5)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    sealed = "".join(metrics.seal(json.loads(line)["step"], line) for line in lines)
    metrics.file_of(run / "metrics.jsonl").write_text(sealed)
    assert "damaged" not in typed("one")[1]
    (run / "metrics.jsonl").write_text("\n".join([*lines[:1], *lines[2:]]) + "\n")
    step = json.loads(lines[1])["step"]
    code, out, _ = typed("one")
    assert code == 0
    assert f"one finished: metrics.jsonl: what was written at step {step} is damaged or lost" in out


def test_what_is_asked_for_comes_first(sweep, typed):
    code, out, _ = typed("--metric", "correct", "--metric=eval/margin:max", "--baseline", "uft")
    assert code == 0
    made = written(sweep)
    assert [head["metric"] for head in made["headline"]][:3] == ["eval/correct", "eval/margin", "eval/nll"]
    assert [group["name"] for group in made["groups"] if group["baseline"]] == ["uft"]
    assert "uft (baseline)" in out


def test_other_seeds(sweep, typed):
    assert typed("--seed-key", "optim.lr")[0] == 0
    assert [axis["key"] for axis in written(sweep)["axes"]] == ["objective.name", "seed"]


def test_json_is_all_that_is_printed(sweep, typed):
    code, out, err = typed("--json")
    assert code == 0
    made = json.loads(out)
    check(made)
    assert made["curves"]
    assert "compare.html" in err


MISTAKES = [
    (["nowhere"], "no such folder or sweep"),
    (["empty"], "no run in this folder"),
    (["nowhere", "trial", "void-*"], "2 problems"),
    (["--metric", "los"], "no run has this figure"),
    (["--metric", "loss"], "the runs minimise different quantities"),
    (["--baseline", "dpo"], "no configuration is called so"),
    (["--out", "file.txt"], "cannot write there"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES)
def test_mistakes_are_told_and_write_nothing(sweep, typed, words, said):
    Path("empty").mkdir()
    Path("file.txt").write_text("x")
    code, _, err = typed(*words)
    assert code == 2
    assert said in err
    assert not (sweep / "compare.json").exists()


def test_no_runs_at_all(here, typed):
    code, _, err = typed()
    assert code == 2
    assert "no runs here" in err
    assert "uft train -m" in err


def test_runs_nobody_can_read_are_no_failure(here, typed):
    make_run(Path("s/a"), points=5)
    make_run(Path("s/b"), points=5)
    for path in Path("s").rglob("*.*"):
        path.write_bytes(b"\x00{[")
    code, out, _ = typed("s")
    assert code == 0
    assert "! No run has finished" in out
    assert "  a unreadable: config.yaml" in out


def test_names_and_errors_cannot_move_the_cursor(here, typed):
    make_run(Path("s") / "red\x1b[31m\u202e", "uft", status="failed", error="bad\x1b[2J\rthing", points=5)
    make_run(Path("s") / "fine", "uft", data__name="n\x1b[1m[bold red]x[/]", points=5, final={"eval/\x1b[5mz": 1.0})
    _, out, _ = typed("s", "--metric", "eval/\x1b[5mz:max")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", out)
    assert "[bold red]x[/]" in out, "nor are they markup"


def test_a_long_table_ends(here, typed):
    make_sweep(Path("s"), ("uft",), [n / 100 for n in range(1, 41)], seeds=(1,), points=2)
    _, out, _ = typed("s")
    assert "and 10 more in compare.html" in out
    assert len([line for line in out.splitlines() if re.match(r"  (uft )?beta=", line)]) == 30


def test_open_shows_the_page(sweep, typed, monkeypatch):
    import webbrowser

    shown = []
    monkeypatch.setattr(webbrowser, "open", shown.append)
    assert typed("--open")[0] == 0
    assert shown == [(sweep / "compare.html").resolve().as_uri()]


def program(*words, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "importtime", "-m", "uft", "compare", *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_it_needs_neither_torch_nor_wandb(sweep, here):
    done = program(cwd=here)
    assert done.returncode == 0, done.stderr
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "uft" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "wandb", "hydra", "pyarrow", "peft"}


def test_while_the_sweep_runs_and_runs_vanish(sweep, here):
    """The real program beside a process that holds a run, on folders that go away under it."""
    shutil.rmtree(sweep / "uft-seed3")
    (sweep / "uft-seed3").mkdir()
    (sweep / "uft-seed3" / "run.json").write_text("{}")
    (sweep / "uft-seed3" / "metrics.jsonl").write_text('{"step": 1, "lo')
    with held(sweep / "uft-seed2"):
        done = program(str(sweep), cwd=here)
    assert done.returncode == 0, done.stderr
    states = {run["name"]: run["status"] for run in written(sweep)["runs"]}
    assert (states["uft-seed2"], states["uft-seed3"]) == ("running", "unreadable")


def test_help(capsys):
    with pytest.raises(SystemExit) as leave:
        main(["compare", "--help"])
    assert leave.value.code == 0
    out = capsys.readouterr().out
    for word in ("usage: uft compare", "--metric", "--baseline", "--seed-key", "--out", "--json", "--open", "--wandb"):
        assert word in out
