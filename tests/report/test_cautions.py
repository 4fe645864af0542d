"""What is said at the top when runs are not equal."""

from __future__ import annotations

import io
import json
from dataclasses import replace

from synthetic import compared, loaded, make_run, make_sweep

from uft.evaluation.evaluate import Evaluation
from uft.report.compare import compare
from uft.report.runs import select
from uft.tracking.console import Console

FINAL = {"eval/nll": 1.0}
RESULT = dict.fromkeys(("error", "best_step", "best_checkpoint", "peak_memory_bytes")) | {
    **{"status": "finished", "steps": 60, "seconds": 1.0, "tokens": 10, "best": {}},
}


def run(objective="sft", seed=1, *, info=None, data=None, result=None, **more):
    """A finished run; `info`, `data` and `result` are laid over what all of them have."""
    usual = {"data_digest": f"d{seed}", "device": "cpu", "torch": "2.13.0", "versions": {"uft": "0.1.0"}}
    made = loaded(objective, seed, final=FINAL, **more)
    spent = {"steps": 100, "rows": 3200, "supervised_tokens": 5000}
    return replace(
        made,
        info={**usual, "code": {"commit": "abc", "dirty": None}, **(info or {})},
        data={"digest": "same", **(data or {})},
        result={**made.result, **spent, **(result or {})},
    )


def warned(runs):
    return {warning["what"]: warning for warning in compared(runs)["warnings"]}


EQUAL = [run("sft", 1), run("sft", 2), run("uft", 1), run("uft", 2)]


CASES = {
    "The data are not the same under one configuration": {"data": {"digest": "other"}},
    "Data digests differ between runs of the same seed": {"info": {"data_digest": "other"}},
    "Budgets differ: 100 to 150 optimiser steps": {"result": {"steps": 200}},
    "Budgets differ: 3,200 to 3,264 rows": {"result": {"rows": 3329}},
    "Budgets differ: 5,000 to 5,500 supervised tokens": {"result": {"supervised_tokens": 6000}},
    "2 versions of uft": {"info": {"versions": {"uft": "0.2.0"}}},
    "2 commits of uft's code": {"info": {"code": {"commit": "def", "dirty": None}}},
    "one run from code with uncommitted changes": {"info": {"code": {"commit": "abc", "dirty": "123"}}},
    "2 versions of torch: 2.13.0, 2.11.0": {"info": {"torch": "2.11.0"}},
    "2 kinds of device: cpu, cuda:0": {"info": {"device": "cuda:0"}},
    "one run failed: run": {"status": "failed"},
    "one run not finished yet: run": {"status": "running"},
    "one run stopped before the end: run": {"status": "stopped"},
    "one run ended without a result: run": {"status": "interrupted"},
    "one run cannot be read: run": {"status": "unreadable"},
    "one run in a state that this version does not know: run": {"status": "paused"},
}


def test_one_run_that_is_not_like_the_others():
    for what, other in CASES.items():
        found = warned([*EQUAL[:3], run("uft", 2, **other)])
        short = what.startswith("one run") and "code" not in what
        assert set(found) == {what} | ({"Unequal numbers of seeds: 1 to 2"} if short else set())
        assert found[what]["runs"] == ([] if "Budgets" in what else ["r3"])
        assert found[what]["why"].endswith(".")


def test_equal_runs_and_budgets_within_two_percent_or_over_the_seeds_are_not_warned_of():
    assert warned(EQUAL) == {}
    assert warned([*EQUAL[:3], run("uft", 2, result={"supervised_tokens": 5100})]) == {}
    over_seeds = [run(o, s, result={"supervised_tokens": 5000 + 600 * s}) for o in ("sft", "uft") for s in (1, 2)]
    assert warned(over_seeds) == {}


MIXTURES = [run("sft", s, data__ratio=r, info={"data_digest": f"{s}{r}"}) for r in (0.25, 0.5) for s in (1, 2)]


def test_rows_that_differ_on_purpose_are_said_as_that():
    assert list(warned(MIXTURES)) == ["Configurations saw different rows, as asked for by data.ratio"]
    found = warned([run(data__name=name, data={"digest": name}, info={"data_digest": name}) for name in ("a", "b")])
    assert "Configurations saw different rows, as asked for by data.name" in found
    assert not any("not the same" in what for what in found)


def test_data_that_changed_within_one_mixture_of_several():
    other = replace(MIXTURES[3], data={"digest": "other"}, info={**MIXTURES[3].info, "data_digest": "other"})
    found = warned([*MIXTURES[:3], other])
    assert list(found) == ["The data are not the same under one configuration"]
    assert found["The data are not the same under one configuration"]["runs"] == ["r3"]


def test_other_evaluations_and_models():
    found = warned([*EQUAL[:2], *(run("uft", s, eval__rows=8) for s in (1, 2))])
    assert "Not all runs were measured alike, by eval.rows" in found
    assert "2 different base models" in warned([*EQUAL[:3], run("uft", 2, model__path="org/other")])


def test_single_seeds():
    assert "One seed per configuration" in warned([run("sft"), run("uft")])
    found = warned([*EQUAL, run("uft", 3)])
    assert found["Unequal numbers of seeds: 2 to 3"]["why"].endswith("Short of seeds: sft.")
    again = warned([*EQUAL, run("uft", 2)])
    assert again["Several runs of one configuration and seed"]["runs"] == ["r3", "r4"]


def test_unequal_search():
    runs = [*EQUAL[:2], *(run("uft", s, objective__beta=b) for b in (0.1, 0.2, 0.3) for s in (1, 2))]
    assert "Unequal search: configurations per objective: uft 3, sft 1" in warned(runs)


def test_a_diverged_run():
    broken = replace(EQUAL[3], result={**EQUAL[3].result, "final": {"eval/nll": "nan"}})
    found = warned([*EQUAL[:3], broken])
    assert found["one run ended at a figure that is not finite: eval/nll"]["runs"] == ["r3"]


def test_kl_estimates_that_are_infinite_or_absurd():
    for kl in ("inf", 5.2e7, "nan"):
        far = replace(EQUAL[3], result={**EQUAL[3].result, "final": {**FINAL, "eval/pairs/kl": kl, "eval/kl": 3.0}})
        found = warned([*EQUAL[:3], far])
        assert list(found) == ["There is no estimate of kl in one run: run"]
        assert found.popitem()[1]["runs"] == ["r3"]
    near = replace(EQUAL[3], result={**EQUAL[3].result, "final": {**FINAL, "eval/kl": 12.0, "objective/kl": 90.0}})
    assert warned([*EQUAL[:3], near]) == {}


def test_a_collapse_is_told_in_the_words_of_the_run_itself():
    """What the console said while a run trained and at its end, from the same lines."""
    evaluated = [{"step": step, "eval/nll": nll, "eval/pairs/nll": nll / 2} for step, nll in ((0, 1.0), (60, 2.5))]
    trained = [
        {"step": step, "loss": 1 - step / 100, "nll": 1 + step / 10, "objective/entropy": 2.0 * 0.2**step}
        for step in range(1, 9)
    ]
    for lines, kinds in (
        (
            evaluated,
            {"Good answers have become less likely": "1.00 to 2.50 since step 0 (pairs 0.50 to 1.25)"},
        ),
        (
            trained,
            {
                "Good answers have become less likely": "nll 1.20 to 1.70, loss 0.98 to 0.93 of the training rows",
                "Own samples are all alike": "objective/entropy 0.165 to 5.29e-05 nats a token",
            },
        ),
        ([{**line, "loss": 1 + line["step"], "objective/entropy": 2.0} for line in trained], {}),  # the loss rises too
        (trained[:5], {}),  # too few to say
    ):
        stream = io.StringIO()
        console = Console(stream)
        for line in lines:
            if "loss" in line:
                console.step(line["step"], line)
            else:
                console.evaluation(line["step"], Evaluation({k: v for k, v in line.items() if k != "step"}))
        while_training = " ".join(stream.getvalue().split())
        final = {**FINAL, **{name: value for name, value in lines[-1].items() if name != "step"}}
        console.end("run", {**RESULT, "final": final}, 60)
        resumed = Console(later := io.StringIO())
        resumed.recall(lines[:5])
        for line in lines[5:]:
            resumed.step(line["step"], line)
        resumed.end("run", {**RESULT, "final": final}, 60)
        found = warned([*EQUAL[:3], replace(EQUAL[3], lines=tuple(lines), result={**EQUAL[3].result, "final": final})])
        assert [*found] == [f"{kind} in one run: run" for kind in kinds]
        for what, words in zip(found, kinds.values(), strict=True):
            assert words in found[what]["why"]
            said = found[what]["why"].removeprefix("run: ").removesuffix(".")
            assert said in " ".join(stream.getvalue()[len(while_training) :].split())
            assert said.split(":")[0] in while_training
            assert said in " ".join(later.getvalue().split()), "also where the first lines are of an earlier session"


def test_nothing_finished():
    found = warned([run(status="failed"), run(status="running")])
    assert next(iter(found)) == "No run has finished"


def test_jobs_that_have_not_started(tmp_path):
    sweep = make_sweep(tmp_path / "s", ("sft", "uft"), seeds=(1,))
    jobs = [{"name": path.name} for path in sorted(sweep.iterdir())] + [{"name": "ift-seed1"}]
    (sweep / "sweep.json").write_text(json.dumps({"jobs": jobs}))

    def said(*words):
        return [warning["what"] for warning in compare(select([str(word) for word in words]))["warnings"]]

    assert "one job of the sweep not started yet: ift-seed1" in said(sweep)
    assert not any("not started" in what for what in said(sweep / "sft-seed1")), "one run is not the sweep"
    (sweep / "sweep.json").write_text("{")
    assert not any("not started" in what for what in said(sweep))


def test_a_run_that_says_nothing_of_itself_warns_of_nothing(tmp_path):
    make_run(tmp_path / "a", seed=1, info={"versions": None, "code": "?", "device": None, "torch": None})
    make_run(tmp_path / "b", seed=2)
    assert compare(select([str(tmp_path)]))["warnings"] == []
