"""Which is best, by how much, over what: verdicts and the sentences they are told in."""

from __future__ import annotations

import math

import pytest
from scipy import stats as reference
from synthetic import compared, loaded

from uft.errors import UftError

METRIC = "eval/exact_match"


def runs_of(table, metric=METRIC):
    """{objective: figures by seed 1, 2, ...} as finished runs; None: the run failed."""
    failed = {"status": "failed", "error": "it broke", "final": {}}
    return [
        loaded(objective, seed, **(failed if value is None else {"final": {metric: value}}))
        for objective, values in table.items()
        for seed, value in enumerate(values, 1)
    ]


def judge(table, metric=METRIC, **options):
    """The summary of one metric, with its words."""
    found = compared(runs_of(table, metric), **options)
    names = {group["id"]: group["name"] for group in found["groups"]}
    (one,) = [each for each in found["summary"] if each["metric"] == metric]
    one["names"] = {key: names.get(one[key]) for key in ("best", "runner_up", "baseline")}
    return one


A, B, C = [0.81, 0.84, 0.86], [0.70, 0.74, 0.73], [0.60, 0.65, 0.63]


def test_best_runner_up_and_baseline_with_paired_intervals():
    found = judge({"sft": C, "uft": A, "ift": B})
    assert found["names"] == {"best": "uft", "runner_up": "ift", "baseline": "sft"}
    first, second = found["comparisons"]
    for comparison, other in ((first, B), (second, C)):
        known = reference.ttest_rel(A, other)
        assert comparison["p"] == pytest.approx(known.pvalue, rel=1e-4)
        assert comparison["low"] == pytest.approx(known.confidence_interval().low, rel=1e-4)
        assert (comparison["n"], comparison["paired"], comparison["inside_noise"]) == (3, True, False)
    assert first["p_adjusted"] == pytest.approx(max(first["p"], 2 * second["p"]), rel=1e-4)
    assert found["words"] == [
        "uft is best with 0.8367 (95 % interval 0.765 to 0.8897, 3 seeds).",
        "It is 0.1133 ahead of the runner-up, ift (95 % interval 0.07539 to 0.1513, paired t, 3 seeds, p = 0.006, "
        "0.006 after Holm's adjustment for 2 comparisons): more than seed noise.",
        "It is 0.21 ahead of the baseline, sft (95 % interval 0.1603 to 0.2597, paired t, 3 seeds, p = 0.003, "
        "0.006 after Holm's adjustment for 2 comparisons): more than seed noise.",
        "The best of 3 was chosen on these same numbers, so the lead is optimistic: confirm it on new seeds.",
    ]
    assert (found["leading"], found["beyond_noise"]) == ([found["best"]], True)


def test_less_is_better_where_it_is():
    found = judge({"sft": A, "uft": C}, "eval/nll")
    assert found["names"]["best"] == "uft"
    assert found["comparisons"][0]["difference"] < 0
    assert found["words"][0].startswith("uft is best with 0.6267 ")
    assert (
        "It is 0.21 ahead of the runner-up and the baseline, sft (95 % interval 0.1603 to 0.2597" in found["words"][1]
    )


def test_a_difference_inside_noise_is_said():
    found = judge({"sft": [0.5, 0.6, 0.7], "uft": [0.56, 0.58, 0.72]})
    assert found["comparisons"][0]["inside_noise"] is True
    assert found["words"][0].startswith("uft has the best mean, 0.62 ")
    assert found["words"][1].endswith("inside seed noise.")
    assert (set(found["leading"]), found["beyond_noise"]) == ({found["best"], found["baseline"]}, False)


def test_every_configuration_is_compared_with_the_baseline():
    found = judge({"sft": C, "uft": A, "ift": B, "dpo": [0.9]})
    names = {"dpo": [0.9], "uft": A, "ift": B}
    against = found["against_baseline"]
    differences = [sum(v) / len(v) - sum(C) / 3 for v in names.values()]
    assert [one["difference"] for one in against] == pytest.approx(differences, rel=1e-5)
    assert (against[0]["method"], against[0]["inside_noise"]) == ("one seed", None)
    for one, values in zip(against[1:], (A, B), strict=True):
        known = reference.ttest_rel(values, C)
        assert one["p"] == pytest.approx(known.pvalue, rel=1e-4)
        assert (one["low"], one["high"]) == pytest.approx(tuple(known.confidence_interval()), rel=1e-4)
    first, second = sorted(against[1:], key=lambda one: one["p"])
    assert first["p_adjusted"] == pytest.approx(2 * first["p"], rel=1e-4), "Holm"
    assert second["p_adjusted"] == pytest.approx(max(2 * first["p"], second["p"]), rel=1e-4)


def test_the_verdict_follows_the_adjusted_p():
    """One of many: the interval alone excludes zero, and Holm's adjustment says noise."""
    table = {"uft": [0.60, 0.70, 0.80], "sft": [0.57, 0.68, 0.76]} | {
        name: [0.59 - k / 100, 0.695 - k / 90, 0.78 + k / 300] for k, name in enumerate(("a", "b", "c", "d"))
    }
    found = judge(table)
    (sft,) = [each for each in found["comparisons"] if each["b"] == found["baseline"]]
    assert sft["low"] > 0, "unadjusted"
    assert sft["p"] < 0.05 < sft["p_adjusted"]
    assert sft["inside_noise"] is True


def test_one_seed_says_nothing_about_noise():
    found = judge({"sft": [0.5], "uft": [0.9]})
    assert found["words"][0] == "uft has the best mean, 0.9 (one seed)."
    assert (found["leading"], found["beyond_noise"]) == ([found["best"]], False)
    assert found["words"][1].endswith("sft: one seed: nothing can be said about noise.")
    (comparison,) = found["comparisons"]
    known = {"difference": 0.4, "n": 1, "paired": False, "method": "one seed"}
    assert comparison == {**dict.fromkeys(comparison), "a": found["best"], "b": found["baseline"], **known}


def test_all_the_same():
    found = judge({"sft": [0.5, 0.6], "uft": [0.5, 0.6]})
    assert found["comparisons"][0]["inside_noise"] is True
    assert found["words"][0].startswith("None is best alone: sft has the same mean as uft, 0.55 (95 % interval ")
    assert found["words"][1] == "It equals the runner-up, uft, on every seed: inside seed noise."
    even = judge({"sft": [0.5, 0.75], "uft": [0.75, 0.5]})
    assert even["words"][1].startswith(
        "Its mean is that of the runner-up, uft (95 % interval -3.177 to 3.177, paired t"
    )
    assert judge({"sft": [0.5], "uft": [0.5]})["words"][1].startswith(
        "Its mean is that of the runner-up, uft: one seed"
    )
    shifted = judge({"sft": [0.5, 0.6], "uft": [0.7, 0.8]})
    assert shifted["comparisons"][0]["inside_noise"] is None
    assert "the same on every seed, so these seeds show no noise" in shifted["words"][1]
    assert "(3 seeds, all the same)" in judge({"sft": [0.0] * 3, "uft": [1.0] * 3})["words"][0]


def test_a_baseline_that_wins_and_one_configuration():
    found = judge({"sft": A, "uft": B})
    assert found["baseline"] == found["best"]
    assert found["words"][-1] == "This is the baseline."
    alone = judge({"uft": A})
    assert (alone["runner_up"], alone["comparisons"]) == (None, [])
    assert alone["words"][0].startswith("uft has 0.8367 ")
    assert not alone["beyond_noise"]
    assert alone["words"][-1] == "There is only one configuration, so there is nothing to compare it with."


def test_a_seed_without_a_finite_figure_takes_its_configuration_out():
    for bad in (math.nan, math.inf, -math.inf):
        found = judge({"sft": C, "uft": [0.9, bad, 0.9]})
        assert (found["names"]["best"], found["comparisons"]) == ("sft", [])
        assert found["words"][-1] == "Not ranked, because a seed ended at a figure that is not finite: uft."


def test_nothing_finite_is_no_summary():
    found = compared(runs_of({"sft": [math.nan], "uft": [None, None]}))
    assert found["summary"] == []
    assert found["headline"] == [{"metric": METRIC, "direction": "max"}]


def test_failed_seeds_leave_pairs_of_the_rest():
    found = judge({"sft": C, "uft": [0.81, None, 0.86], "ift": [None, None, None]})
    assert found["comparisons"][0]["n"] == 2
    assert found["words"][-1] == "Not ranked, because no finished run has this figure: ift."
    known = reference.ttest_rel([0.81, 0.86], [0.60, 0.63])
    assert found["comparisons"][0]["p"] == pytest.approx(known.pvalue, rel=1e-4)


def test_a_lead_that_turns_over_the_shared_seeds_is_said():
    found = judge({"uft": [0.50, 0.52, 0.99], "sft": [0.60, 0.64, None]})
    assert found["names"]["best"] == "uft"
    assert found["comparisons"][0]["difference"] == pytest.approx(-0.11)
    assert found["words"][1].startswith("It is 0.11 behind the runner-up and the baseline, sft (95 % interval ")
    assert "paired t over the 2 seeds that both have" in found["words"][1]
    low, high = (-found["comparisons"][0][key] for key in ("high", "low"))
    assert f"95 % interval {low:.4g} to {high:.4g}" in found["words"][1]


def test_five_seeds_are_checked_by_a_bootstrap():
    found = judge({"sft": [0.5, 0.52, 0.47, 0.55, 0.51], "uft": [0.6, 0.63, 0.6, 0.69, 0.6]})
    low, high = found["comparisons"][0]["bootstrap"]
    assert 0 < low < found["comparisons"][0]["difference"] < high
    assert "; a bootstrap agrees): more than seed noise" in found["words"][1]


def test_a_seed_twice_is_no_new_evidence_and_runs_without_a_seed_are_draws_of_their_own():
    runs = [loaded("uft", seed, final={METRIC: value}) for seed, value in ((1, 0.5), (1, 0.7), (2, 0.8))]
    (group,) = compared(runs)["groups"]
    assert (group["metrics"][METRIC]["n"], group["metrics"][METRIC]["mean"]) == (2, pytest.approx(0.7))
    for run in runs:
        for key in [key for key in run.config if key.startswith("seed")]:
            del run.config[key]
    (group,) = compared(runs)["groups"]
    assert group["metrics"][METRIC]["n"] == 3


def grid(values):
    return [loaded(o, s, data__ratio=r, final={METRIC: v + s / 50}) for (o, r), v in values.items() for s in (1, 2, 3)]


GRID = {("sft", 0.25): 0.5, ("sft", 0.5): 0.7, ("uft", 0.25): 0.9, ("uft", 0.5): 0.6}


def test_every_baseline_is_taken_at_its_best():
    found = compared(grid(GRID))
    assert [group["name"] for group in found["groups"] if group["baseline"]] == ["sft ratio=0.25", "sft ratio=0.5"]
    (one,) = found["summary"]
    names = {group["id"]: group["name"] for group in found["groups"]}
    assert names[one["baseline"]] == "sft ratio=0.5"
    assert "the best of 2 baseline configurations, sft ratio=0.5" in " ".join(one["words"])


BASELINES = {
    "uft ratio=0.5": ["uft ratio=0.5"],
    "ratio=0.25": ["sft ratio=0.25", "uft ratio=0.25"],
    "objective=uft": ["uft ratio=0.25", "uft ratio=0.5"],
    "objective=uft data.ratio=0.25": ["uft ratio=0.25"],
    "objective.name=sft ratio=0.5": ["sft ratio=0.5"],
}


def names_of_baselines(runs, **options):
    return [group["name"] for group in compared(runs, **options)["groups"] if group["baseline"]]


def test_a_baseline_by_name_or_by_keys():
    found = {wanted: names_of_baselines(grid(GRID), baseline=wanted) for wanted in BASELINES}
    assert found == BASELINES
    assert names_of_baselines(runs_of({"uft": A, "ift": B})) == ["ift"], "without sft the first"
    for wanted in ("dpo", "ratio=0.75", "", "ratio", "objective=uft ratio"):
        with pytest.raises(UftError, match="no configuration has that name") as error:
            compared(grid(GRID), baseline=wanted)
        assert "sft ratio=0.25, sft ratio=0.5" in error.value.footer


FINAL = {"eval/nll": 1.0, METRIC: 0.5, "eval/kl": 0.2, "eval/margin": 3.0, "loss": 0.7, "nll": 0.9}
FINAL |= {"eval/new/exact_match": 0.4, "objective/uft": 0.7}


def heads(*wanted, objectives=("sft", "uft"), **more):
    runs = [loaded(objective, seed, final=FINAL, **more) for objective in objectives for seed in (1, 2)]
    found = compared(runs, metrics=wanted)["headline"]
    return [(head["metric"], head["direction"]) for head in found]


USUAL = [(METRIC, "max"), ("eval/nll", "min")]


def test_headlines_are_those_asked_for_then_what_the_runs_chose_by_then_the_usual():
    assert heads() == USUAL, "the likelihood does not rank what people want"
    chosen = {"eval__best": "eval/new/exact_match", "eval__best_mode": "max"}
    assert heads(**chosen) == [("eval/new/exact_match", "max"), *USUAL]
    assert heads(eval__best="eval/nonsense") == heads(eval__best=["odd"]) == USUAL
    assert heads("kl", "new/exact_match") == [("eval/kl", "min"), ("eval/new/exact_match", "max"), *USUAL]
    assert heads("eval/margin:max")[0] == ("eval/margin", "max")
    assert heads("nll") == USUAL[::-1], "the evaluation's, not training's"


def test_training_losses_are_compared_under_one_objective_alone_and_every_wrong_metric_is_told():
    for metric in ("loss", "objective/uft:min"):
        with pytest.raises(UftError, match="the runs minimise different quantities"):
            heads(metric)
    assert heads("loss", objectives=("uft",))[0] == ("loss", "min")
    assert heads(eval__best="loss")[0] == USUAL[0]
    assert heads(eval__best="loss", objectives=("uft",))[0] == ("loss", "min")
    with pytest.raises(UftError) as error:
        heads("eval/margin", "exact", "loss")
    for text in (
        "3 problems",
        "say which:  eval/margin:max",
        "--metric exact ",
        "there are:  eval/nll, eval/exact_match",
    ):
        assert text in str(error.value)
