"""compare.json as a whole: real folders in every state, hostile content, and sizes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from shape import STATES, check
from synthetic import held, make_run, make_sweep, tear

from uft.errors import UftError
from uft.report.compare import Options, as_json, compare, write
from uft.report.runs import select


def compared(*words, **options):
    made = compare(select([str(word) for word in words]), Options(**options))
    check(made)
    assert json.loads(as_json(made)) == json.loads(json.dumps(made))
    return made


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_sweep(Path("outputs/2026-11-21/beta"), ("sft", "uft"), (0.1, 0.3), (0.25, 0.75), (1, 2), points=10)


def test_a_sweep(sweep):
    made = compared(sweep)
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
    assert [head["metric"] for head in made["headline"]][:2] == ["eval/nll", "eval/exact_match"]
    kinds = {metric["name"]: (metric["kind"], metric["direction"], metric["comparable"]) for metric in made["metrics"]}
    assert kinds["eval/instruct/exact_match"] == ("eval", "max", True)
    assert kinds["eval/margin"] == ("eval", None, True)
    assert kinds["loss"] == kinds["grad_norm"] == kinds["objective/uft"] == ("train", None, False)
    assert kinds["nll"] == ("train", None, True)
    assert kinds["seconds"] == ("cost", None, True)
    assert {"data.ratio", "objective.beta", "data digest"} <= {each["key"] for each in made["differences"]}
    assert {each["metric"] for each in made["summary"]} == {head["metric"] for head in made["headline"]}
    assert "seed" not in {each["key"] for each in made["differences"]}


def test_under_one_objective_its_loss_can_be_compared(sweep):
    made = compared(f"{sweep}/sft-*")
    assert all(metric["comparable"] for metric in made["metrics"])


def broken(sweep: Path) -> None:
    """One run in each bad state, the first runs of the folder."""
    runs = sorted(sweep.iterdir())
    make_run(sweep / "failed", "ift", status="failed", error="RuntimeError: CUDA out of memory\n  Traceback")
    make_run(sweep / "stopped", "ift", 2, status="stopped")
    make_run(sweep / "interrupted", "ift", 3, status="interrupted")
    tear(runs[0] / "metrics.jsonl")
    (runs[1] / "run.json").write_text("{")
    (runs[2] / "run.json").unlink()
    (runs[3] / "config.yaml").unlink()
    tear(runs[4] / "samples.jsonl", 0.1)
    (runs[5] / "result.json").write_text("null")
    (runs[6] / "metrics.jsonl").unlink()


def test_runs_in_every_state_are_shown(sweep):
    broken(sweep)
    with held(sweep / "interrupted"):
        made = compared(sweep)
    states = {run["name"]: run["status"] for run in made["runs"]}
    assert len(states) == 15
    assert set(states.values()) == STATES - {"interrupted"}
    assert compared(sweep / "interrupted")["runs"][0]["status"] == "interrupted"
    errors = {run["name"]: run["error"] for run in made["runs"] if run["error"]}
    assert errors["failed"].startswith("RuntimeError: CUDA out of memory")
    assert errors["sft-ratio0.25-seed1"].startswith("metrics.jsonl breaks off at line")
    unreadable = [run for run in made["runs"] if run["status"] == "unreadable"]
    assert len(unreadable) == 4
    assert [run["group"] for run in unreadable].count(None) == 1, "without a configuration there is no group"
    figures = [spread["n"] for group in made["groups"] for spread in group["metrics"].values()]
    assert max(figures) == 2
    assert any(warning["what"].startswith("4 runs cannot be read") for warning in made["warnings"])


def test_a_run_deleted_after_it_was_found(sweep):
    found = select([str(sweep)])
    shutil.rmtree(found.runs[3])
    made = compare(found)
    check(made)
    assert made["runs"][3]["status"] == "unreadable"
    assert "is not there" in made["runs"][3]["error"]


def test_only_broken_runs(tmp_path):
    make_run(tmp_path / "a", status="failed")
    (make_run(tmp_path / "b") / "config.yaml").write_text(": :\n-")
    made = compared(tmp_path)
    assert made["summary"] == []
    assert made["warnings"][0]["what"] == "No run has finished"
    assert compared(tmp_path, metrics=["eval/nll"])["headline"][0]["metric"] == "eval/nll"


def test_a_run_that_never_logged_anything(tmp_path):
    make_run(tmp_path / "a", status="interrupted")
    for name in ("metrics.jsonl", "samples.jsonl", "overrides.yaml", "data.json"):
        (tmp_path / "a" / name).unlink()
    made = compared(tmp_path)
    assert made["curves"] == {}
    assert made["runs"][0]["final"] == {}
    assert made["runs"][0]["command"] is None
    assert compared(tmp_path, metrics=["eval/nll"])["headline"] == [], "nothing is known yet, and nothing is wrong"


HOSTILE = "<script>alert(1)</script></script><!--\u202eevil\u2028\x1b[31m\"'&\x00 \ud83d"


def test_hostile_content_stays_text(tmp_path):
    make_run(
        tmp_path / "a",
        final={f"eval/{HOSTILE}": 1.0, "eval/nll": math.nan, "eval/kl": math.inf},
        status="finished",
        error=HOSTILE * 1000,
        data__name=HOSTILE.replace("\ud83d", "").replace("\x00", ""),
        overrides=[f"data.name={HOSTILE}", "objective=x", "just a word", "'"],
        info={"versions": {"uft": HOSTILE}, "device": ["cpu"], "total_steps": "many", "code": [1]},
        result={"steps": "x", "seconds": None, "tokens": 1e300, "peak_memory_bytes": math.nan, "best": [1]},
        samples=[{"step": 1, "source": HOSTILE, "row": HOSTILE, "prompt": "p" * 10**6, "reply": HOSTILE, "verdict": 3}],
    )
    make_run(tmp_path / "b", "uft", sweep__name=HOSTILE[:5])
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 201, HOSTILE: 1, "loss": 1e999, "nll": "-inf"}) + "\n")
        file.write(json.dumps({"step": 202, HOSTILE: 2, "eval/nll": "nan", "x" * 10**6: 1}) + "\n")
    made = compared(tmp_path)
    text = as_json(made)
    assert "NaN" not in text
    assert "Infinity" not in text
    assert HOSTILE.replace("\ud83d", "?") in [metric["name"] for metric in made["metrics"]]
    assert made["runs"][0]["final"]["eval/nll"] == "nan"
    assert made["runs"][0]["final"]["eval/kl"] == "inf"
    assert len(made["samples"][0]["prompt"]) < 5000
    assert len(made["runs"][0]["error"]) < 5000


def test_files_appear_whole_and_render(sweep, tmp_path):
    files = write(compared(sweep), tmp_path / "new" / "folder")
    assert [path.name for path in files] == ["compare.json", "compare.html"]
    check(json.loads(files[0].read_text(encoding="utf-8")))
    assert files[1].read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html")
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["compare.html", "compare.json"]


def test_a_report_in_the_folder_is_no_run(sweep):
    before = compared(sweep)
    write(before, sweep)
    after = compared(sweep)
    assert [run["path"] for run in after["runs"]] == [run["path"] for run in before["runs"]]


def test_a_baseline_that_is_wrong_is_told_before_anything_is_written(sweep):
    with pytest.raises(UftError, match="no configuration is called so"):
        compare(select([str(sweep)]), Options(baseline="nope"))
    assert not (sweep / "compare.json").exists()


@pytest.mark.slow
def test_two_hundred_runs_of_five_hundred_points(tmp_path):
    import time

    sweep = make_sweep(
        tmp_path / "big", ("sft", "uft", "ift", "dpo"), (), (0.1, 0.3, 0.5, 0.7, 0.9), range(10), points=500
    )
    started = time.process_time()
    made = compared(sweep)
    assert time.process_time() - started < 20, "a few seconds, on a slow machine too"
    files = write(made, tmp_path)
    assert sum(path.stat().st_size for path in files) < 25e6
    assert all(path.stat().st_size < 15e6 for path in files)
