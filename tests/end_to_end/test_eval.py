"""`uft eval` on a run, on rows of a file and on a model that was not trained here, and what it leaves."""

from __future__ import annotations

import json

import pytest

from uft.training.measuring import Measured, tables

QUICK = ("data=mix", "eval=quick", "eval.rows=6", "eval.generate_rows=6", "tracking=none")
ROWS = [{"prompt": f"sort : {a} {b}", "response": f"{b} {a}"} for a, b in (("queen", "moon"), ("snow", "book"))] * 2


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_run_and_other_rows(uft, tmp_path):
    """A run's own rows give the figures of its last evaluation, rewards against its first model included."""
    run = tmp_path / "run"
    uft("train", "objective=sft", *QUICK, "train.steps=3", f"run.dir={run}")
    done = uft("eval", run)
    found, final = read(run / "evals" / "mix.json"), read(run / "result.json")["final"]
    values = {name: figure["value"] for name, figure in found["figures"].items()}
    wanted = {name: value for name, value in final.items() if name.startswith("eval/")}
    assert values == pytest.approx(wanted, abs=1e-4, rel=1e-4)
    assert "eval/chosen_reward" in values
    nll = found["figures"]["eval/nll"]
    assert f"{nll['value']:.4g} ± {nll['stderr']:.2g}" in done.stdout
    last = [json.loads(line) for line in (run / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    last = {item["row"]: item for item in last if item["step"] == 3}
    items = [json.loads(line) for line in (run / "evals" / "mix.items.jsonl").read_text("utf-8").splitlines()]
    assert [item["reply"] for item in items] == [last[item["row"]]["reply"] for item in items]
    assert nll["n"] == sum("nll" in item["measures"] for item in items)

    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    told = uft("eval", run, f"data={file}", "reward=exact").stdout
    assert "mine: 4 of 4 rows, none of which is held out (eval.rows=6)" in told
    assert read(run / "evals" / "mine.json")["figures"]["eval/exact_match"]["n"] == 2, "a prompt has one answer"
    refused = uft("export", run, "--gguf", "--to", "whole", code=2).stderr
    assert "--gguf" in refused
    assert not (tmp_path / "whole").exists(), "a tokenizer that GGUF does not describe is known before"
    again = uft("eval", run, f"data={file}").stdout  # without the checker: its figure is not lost
    assert "figures from before are kept: eval/exact_match, eval/mine/exact_match" in again
    assert read(run / "evals" / "mine.json")["figures"]["eval/exact_match"]["n"] == 2
    uft("compare", run)
    shown = read(tmp_path / "compare.json")["runs"][0]["final"]["evals/mine/nll"]
    assert shown == pytest.approx(read(run / "evals" / "mine.json")["figures"]["eval/nll"]["value"], rel=1e-5)


def test_a_model_that_was_not_trained_here_and_requests_that_mean_nothing(uft, tmp_path):
    uft("eval", "builtin:playground", *QUICK, "eval.out=here.json")
    found = read(tmp_path / "here.json")
    assert (found["model"], found["sources"]["pairs"]["rows"]) == ("builtin:playground", 6)
    assert "eval/nll" in found["figures"]
    assert "eval/chosen_reward" not in found["figures"], "there is nothing to compare it with"
    assert "no such folder, run or sweep" in uft("eval", "nothing", code=2).stderr
    both = uft("eval", "builtin:playground", "data=pairs", "eval.tasks=[gsm8k]", code=2).stderr
    assert "rows and tasks are measured one after the other" in both
    assert "one model is measured at a time" in uft("eval", "builtin:playground", "other", code=2).stderr


def test_an_estimate_of_kl_that_is_none_is_told_as_in_training():
    for value, odd in ((0.25, False), (1.2e7, True), (float("nan"), True)):
        figures = {"eval/kl": {"value": value, "stderr": None}}
        table = tables(Measured(figures, {"sources": {"mix": {}}}, []))
        assert any("kl: no estimate. Tokens that" in str(part) for part in table) is odd
