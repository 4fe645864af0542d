"""`import uft`: runs and comparisons as DataFrames, held against the files and against scipy."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from scipy.stats import ttest_rel
from synthetic import make_run

import uft
from uft.errors import UftError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs/2026-01-02/first")
    for objective in ("sft", "uft"):
        for seed in (1, 2, 3):
            make_run(folder / f"{objective}-seed{seed}", objective, seed, points=5)
    return folder


def test_a_run_is_found_by_every_word_for_it_and_read_as_its_files_have_it(sweep):
    run = sweep / "uft-seed2"
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 300, "loss": "nan", "nll": "inf"}\n')
        file.write('{"step": 400, "loss": 0.5')  # a run that is being written
    (run / ".metrics.jsonl.seals").unlink(missing_ok=True)
    os.utime(run / "run.json", (4e9, 4e9))  # the newest
    found = [uft.load(word) for word in (run, "uft-seed2", "first/uft-seed2", "last")]
    assert {one.path.resolve() for one in found} == {run.resolve()}
    one = found[0]
    assert one.config["objective"]["name"] == "uft"
    assert one.status == one.result["status"] == "finished"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
    assert sorted({line["step"] for line in lines}) == [*one.metrics.index]
    evaluated = {line["step"]: line["eval/nll"] for line in lines if "eval/nll" in line}
    assert one.metrics["eval/nll"].dropna().to_dict() == pytest.approx(evaluated)
    assert one.metrics["loss"].dtype == float
    assert math.isnan(one.metrics.loc[300, "loss"])
    assert one.metrics.loc[300, "nll"] == math.inf
    shown = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [*one.samples["reply"]] == [sample["reply"] for sample in shown]
    with pytest.raises(UftError, match=r"did you mean  uft-seed1"):
        uft.load("uft-sed1")


def test_a_comparison_has_the_statistics_of_the_command(sweep, monkeypatch):
    found = uft.compare("first", metrics=["exact_match"], baseline="objective=sft")
    by_seed = found.runs.pivot(index="seed", columns="configuration", values="eval/exact_match")
    of = found.groups.set_index(["configuration", "metric"])
    for name in ("sft", "uft"):
        row = of.loc[(name, "eval/exact_match")]
        assert (row["n"], row["baseline"]) == (3, name == "sft")
        assert row["mean"] == pytest.approx(by_seed[name].mean(), rel=1e-5)
        assert row["sd"] == pytest.approx(by_seed[name].std(), rel=1e-4)
        assert row["low"] < row["mean"] < row["high"]
    first = found.differences.iloc[0]
    assert (first["metric"], first["a"], first["b"], first["n"]) == ("eval/exact_match", "uft", "sft", 3)
    test = ttest_rel(by_seed["uft"], by_seed["sft"])
    assert (first["p"], first["difference"]) == pytest.approx(
        (test.pvalue, (by_seed["uft"] - by_seed["sft"]).mean()), rel=1e-4
    )
    assert found.words["eval/exact_match"].startswith("uft is best")
    assert isinstance(found.groups, pd.DataFrame)
    runs = [sweep / "sft-seed1", uft.load("uft-seed1")]
    assert len(uft.compare(runs).runs) == 2
    assert not list(Path().rglob("compare.*")), "nothing is written"
    with pytest.raises(UftError, match="no run has this figure"):
        uft.compare("first", metrics=["nosuch"])


def test_settings_are_composed_as_the_command_composes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    found = uft.compose(["objective=dpo", "data=rows.jsonl", "objective.beta=0.3"])
    assert (found["objective"]["beta"], found["data"]["sources"]["rows"]["path"]) == (0.3, "rows.jsonl")
    with pytest.raises(UftError, match=r"did you mean  objective\.beta"):
        uft.compose(["objective=dpo", "objective.bta=0.3"])


def test_the_package_imports_nothing_heavy_and_says_what_it_has():
    code = (
        "import sys, uft; assert {'load', 'compare', 'compose'} <= set(dir(uft)); heavy = {'torch', 'pandas', 'hydra'}"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(heavy & {{*sys.modules}})"], capture_output=True, cwd=ROOT
    )
    assert done.stdout.decode().strip() == "set()", done.stderr
