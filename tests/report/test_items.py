"""Two configurations on the same rows: tests over rows and seeds against known numbers, and flipped prompts."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from synthetic import compared, loaded, make_run

from uft.report.items import over_rows
from uft.report.page import render
from uft.report.runs import load
from uft.report.table import as_report, show
from uft.report.verdict import difference_of, spread
from uft.tracking.metrics import checksum_file, checksum_line

METRIC = "eval/exact_match"


def run(folder, objective, seed, verdicts, metric="exact_match"):
    """A finished run whose last evaluation found these values, a row each."""
    folder.mkdir()
    lines = [
        {"step": step, "source": "instruct", "row": f"instruct:{row}", "measures": {metric: [value * bool(step), 1]}}
        | ({"prompt": f"what is {row}?", "reply": f"{objective} says {value}"} if step else {})
        for step in (0, 40)
        for row, value in enumerate(verdicts)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    final = {f"eval/{metric}": sum(verdicts) / len(verdicts)}
    return loaded(objective, seed, path=folder, name=folder.name, final=final)


def summary(runs, **options):
    found = compared(runs, **options)
    return found, found["summary"][0]


def test_one_seed_is_compared_by_mcnemar_and_names_the_prompts_that_flipped(tmp_path, capsys):
    """9 against 1 of 10 discordant rows: two-sided p = 2 (1 + 10) / 2^10."""
    right = [1.0] * 9 + [0.0] + [1.0] * 6
    wrong = [0.0] * 9 + [1.0] + [1.0] * 6
    made, finding = summary([run(tmp_path / "a", "uft", 1, right), run(tmp_path / "b", "sft", 1, wrong)])
    (rows,) = [one["rows"] for one in finding["comparisons"]]
    assert (rows["method"], rows["rows"], rows["better"], rows["worse"]) == ("McNemar", 16, 9, 1)
    assert rows["p"] == pytest.approx(22 / 1024, rel=1e-5)
    assert (
        "On the same 16 rows it is right on 9 that sft has wrong, wrong on 1 that sft has right "
        "(McNemar, p = 0.021): more than the noise of the rows, for one seed." in finding["words"]
    )
    flips = rows["flipped"]
    assert len(flips) == 10
    first = {"row": "instruct:0", "right": "a", "prompt": "what is 0?", "a": "uft says 1.0", "b": "sft says 0.0"}
    assert (flips[0], flips[-1]["row"], flips[-1]["right"]) == (first, "instruct:9", "b")
    show(made)
    assert "what is 0?  ->  uft: uft says 1.0   sft: sft says 0.0" in capsys.readouterr().out
    assert "Prompts that flipped: uft and sft" in render(made)
    assert "| what is 9? | sft | uft: uft says 0.0; sft: sft says 1.0 |" in as_report(made)


def test_lines_that_the_disk_changed_are_left_out_and_told(tmp_path):
    runs = [run(tmp_path / "a", "uft", 1, [1.0, 1.0, 1.0]), run(tmp_path / "b", "sft", 1, [0.0, 0.0, 0.0])]
    file = tmp_path / "a" / "items.jsonl"
    lines = file.read_text().splitlines()
    checksum_file(file).write_text("".join(checksum_line(json.loads(line)["step"], line) for line in lines))
    file.write_text("\n".join([*lines[:-1], lines[-1].replace("[1.0, 1]", "[0.0, 1]"), ""]))
    _, finding = summary(runs)
    (rows,) = [one["rows"] for one in finding["comparisons"]]
    assert (rows["rows"], rows["better"]) == (2, 2)
    assert any("a: items.jsonl: what was written at step 40 is damaged" in words for words in finding["words"])


def test_figures_that_are_no_verdicts_are_compared_by_a_paired_t_test_over_rows(tmp_path):
    a, b = [2.0, 4.0, 6.0], [1.0, 2.0, 3.0]  # differences 1, 2, 3, as in test_stats: p of t = 3.464 on 2 df
    runs = [run(tmp_path / "a", "sft", 1, a, "nll"), run(tmp_path / "b", "uft", 1, b, "nll")]
    _, finding = summary(runs)
    (rows,) = [one["rows"] for one in finding["comparisons"]]
    assert (rows["method"], rows["better"], rows["difference"]) == ("paired t over rows", None, -2)
    assert rows["p"] == pytest.approx(1 - 3.464 / math.sqrt(2 + 3.464**2), abs=1e-3)
    assert any(words.startswith("On the same 3 rows it is 2 ahead (95 % interval -0.484") for words in finding["words"])


def test_rows_and_seeds_are_both_in_the_interval():
    """Effects of rows alone give the interval over rows, those of seeds alone the one over seeds."""
    draw = np.random.default_rng(3)
    of_rows, of_seeds = draw.normal(0.1, 0.3, 50), draw.normal(0.1, 0.05, 4)
    rows = over_rows(np.tile(of_rows, (4, 1)), False)
    plain = spread(list(of_rows))
    assert (rows.low, rows.high) == pytest.approx((plain.low, plain.high), rel=1e-6)
    seeds = over_rows(np.tile(of_seeds[:, None], (1, 50)), False)
    plain = spread(list(of_seeds))
    assert (seeds.low, seeds.high) == pytest.approx((plain.low, plain.high), rel=1e-6)
    both = over_rows(of_seeds[:, None] + of_rows, False)
    assert both.high - both.low > max(rows.high - rows.low, seeds.high - seeds.low)


def test_the_interval_over_rows_and_seeds_covers_the_truth():
    """Simulated: rows, seeds and noise of each answer; the true difference lies within 95 % of the intervals."""
    draw, hits = np.random.default_rng(5), 0
    for _ in range(600):
        effects = 0.2 + draw.normal(0, 0.1, (5, 1)) + draw.normal(0, 0.5, 40) + draw.normal(0, 0.4, (5, 40))
        found = over_rows(effects, False)
        hits += found.low <= 0.2 <= found.high
    assert 0.94 <= hits / 600 <= 0.99


def test_several_seeds_flip_where_most_of_them_agree(tmp_path):
    runs = []
    for seed, (ours, theirs) in enumerate(
        [([1, 1, 0, 1], [0, 1, 0, 0]), ([1, 0, 0, 1], [0, 1, 1, 1]), ([1, 1, 0, 1], [0, 1, 1, 0])], 1
    ):
        runs += [run(tmp_path / f"a{seed}", "uft", seed, list(map(float, ours)))]
        runs += [run(tmp_path / f"b{seed}", "sft", seed, list(map(float, theirs)))]
    _, finding = summary(runs)
    (rows,) = [one["rows"] for one in finding["comparisons"]]
    assert (rows["seeds"], rows["rows"], rows["method"]) == (3, 4, "rows and seeds")
    assert [(flip["row"], flip["right"]) for flip in rows["flipped"]] == [
        ("instruct:0", "a"),
        ("instruct:3", "a"),
        ("instruct:2", "b"),
    ]
    assert {(flip["a"], flip["b"]) for flip in rows["flipped"]} == {
        ("uft says 1.0", "sft says 0.0"),
        ("uft says 0.0", "sft says 1.0"),
    }, "shown is a seed at which the prompt did flip"
    assert "On most seeds it is right on 2 that sft has wrong, wrong on 1 that sft has right." in finding["words"]


def test_rows_that_cannot_be_paired_say_nothing(tmp_path):
    other_seed = summary([run(tmp_path / "a", "uft", 1, [1.0, 1.0]), run(tmp_path / "b", "sft", 2, [0.0, 0.0])])[1]
    without = summary([loaded("uft", 1, final={METRIC: 1.0}), loaded("sft", 1, final={METRIC: 0.5})])[1]
    one_row = summary([run(tmp_path / "c", "uft", 1, [1.0]), run(tmp_path / "d", "sft", 1, [0.0])])[1]
    for finding in (other_seed, without, one_row):
        assert [one["rows"] for one in finding["comparisons"]] == [None]


def test_what_the_seeds_could_have_shown():
    """Differences 1, 2, 3 of three pairs: (t_0.975 + t_0.8 on 2 df) / sqrt 3 = (4.303 + 1.061) / 1.732."""
    found = difference_of({1: 2.0, 2: 4.0, 3: 6.0}, {1: 1.0, 2: 2.0, 3: 3.0})
    assert found.detectable == pytest.approx((4.303 + 1.061) / math.sqrt(3), abs=1e-3)
    needed = found.seeds_needed  # for a difference of 2 with a deviation of 1
    assert needed == 5
    close = {"sft": [0.5, 0.6, 0.7], "uft": [0.56, 0.58, 0.72]}
    runs = [loaded(name, seed, final={METRIC: value}) for name, of in close.items() for seed, value in enumerate(of)]
    words = " ".join(summary(runs)[1]["words"])
    assert "would have been seen in four cases of five; one of this size takes about" in words
    assert difference_of({1: 0.5, 2: 0.7}, {1: 0.51, 2: 0.6899}).seeds_needed is None, "more than a thousand"


@pytest.mark.parametrize("values", [[1.0, 0.99], [0.01, 0.0, 0.0], [0.9, 1.0, 1.0, 0.98]])
def test_intervals_of_shares_are_shares(values):
    found = spread(values, share=True)
    assert 0 <= found.low < found.mean < found.high <= 1
    plain = spread(values)
    assert plain.low < 0 or plain.high > 1, "which the t interval is not"


def test_the_interval_of_a_share_is_wilson_s():
    """Seeds of 0.4 and 0.6: se 0.1, so n = 0.25 / 0.01 = 25 verdicts, and t = 12.706 in the place of z."""
    t, n, p = 12.7062, 25, 0.5
    half = t / (1 + t**2 / n) * math.sqrt(p * (1 - p) / n + t**2 / (4 * n**2))
    found = spread([0.4, 0.6], share=True)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), rel=1e-4)


def test_figures_of_uft_eval_are_compared_and_unlike_ones_doubted(tmp_path):
    runs = []
    for objective, shots, value in (("sft", 5, 0.1), ("uft", 0, 0.3)):
        folder = make_run(tmp_path / objective, objective)
        (folder / "evals").mkdir()
        rows = {"made": 1.0, "figures": {"eval/exact_match": {"value": value / 2, "stderr": 0.1, "n": 9}}, "rows": 9}
        task = {"value": value, "stderr": 0.02, "n": 100, "shots": shots, "template": False}
        tasks = {"made": 2.0, "harness": "lm_eval 0.4.13", "figures": {"gsm8k/exact_match,strict-match": task}}
        (folder / "evals" / "mine.json").write_text(json.dumps(rows))
        (folder / "evals" / "gsm8k.json").write_text(json.dumps(tasks))
        runs.append(load(folder))
    made = compared(runs)
    assert all(one["final"]["evals/mine/exact_match"] in (0.05, 0.15) for one in made["runs"])
    judged = {finding["metric"]: made["groups"][int(finding["best"][1:])]["name"] for finding in made["summary"]}
    assert judged["evals/gsm8k/exact_match,strict-match"] == judged["evals/mine/exact_match"] == "uft"
    doubts = [warning["what"] for warning in made["warnings"] if "uft eval" in warning["what"]]
    assert doubts == ["Figures of uft eval were not measured alike: evals/gsm8k/exact_match,strict-match"]
