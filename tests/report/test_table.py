"""Tables for a paper: CSV, Markdown and LaTeX of one comparison, and the report that one can paste."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from hostile import hostile
from pages import all_failed, mixed, nothing, one_run
from synthetic import compared, loaded, make_sweep

from uft.cli import main
from uft.report.table import FORMS, as_report, as_text

METRIC = "eval/exact_match"
FIGURES = {"sft": [0.60, 0.65, 0.63], "uft": [0.81, 0.84, 0.86], "dpo_x": [0.70]}


def comparison(figures=FIGURES, **more):
    runs = [
        loaded(objective, seed, final={METRIC: value, "eval/nll": 1.0 - value}, **more)
        for objective, values in figures.items()
        for seed, value in enumerate(values, 1)
    ]
    return compared(runs)


def outside_code(text):
    """Without the indented lines, in which everything is text."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def markdown_rows(text):
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()]


def test_csv_has_a_line_per_configuration_and_metric_with_the_axes():
    made = mixed()
    rows = list(csv.DictReader(io.StringIO(as_text(made, "csv"))))
    assert len(rows) == len(made["groups"]) * len(made["headline"])
    groups = {group["name"]: group for group in made["groups"]}
    seeds = {run["id"]: str(run["seed"]) for run in made["runs"] if run["status"] == "finished"}
    for row in rows:
        group = groups[row["configuration"]]
        found = group["metrics"][row["metric"]]
        assert (int(row["n"]), float(row["mean"]), float(row["low"])) == (found["n"], found["mean"], found["low"])
        assert row["seeds"].split() == [seeds[run] for run in group["runs"] if run in seeds]
        assert (row["objective.name"], float(row["data.ratio"])) == tuple(group["config"].values())
        assert row["baseline"] == str(group["baseline"])
        finding = next(one for one in made["summary"] if one["metric"] == row["metric"])
        against = [one["difference"] for one in finding["against_baseline"] if one["group"] == group["id"]]
        assert row["baseline_difference"] == (str(against[0]) if against else "")
    best = {row["metric"]: row["configuration"] for row in rows if row["best"] == "True"}
    assert {groups[name]["id"] for name in best.values()} == {finding["best"] for finding in made["summary"]}


def test_the_best_is_bold_where_its_lead_is_more_than_noise():
    head, _, *rows = markdown_rows(as_text(comparison(), "markdown"))
    assert head == ["configuration", "seeds", r"eval/exact\_match ↑", r"eval/nll ↓"]
    assert rows[0][:2] == ["uft", "3"], "best first"
    assert rows[0][2] == r"0.837 \[0.765, 0.890\]", "the runner-up has one seed: nothing is known of its noise"
    assert rows[1][:3] == [r"dpo\_x", "1", "0.700"]
    assert rows[2][:3] == ["sft", "3", r"0.627 \[0.563, 0.687\]"]
    two = {name: values for name, values in FIGURES.items() if name != "dpo_x"}
    _, _, first, second = markdown_rows(as_text(comparison(two), "markdown"))
    assert first[2] == r"**0.837 \[0.765, 0.890\]**"
    assert not second[2].startswith("**")
    close = {"sft": [0.5, 0.6, 0.7], "uft": [0.56, 0.58, 0.72]}
    assert "**" not in as_text(comparison(close), "markdown")
    text = as_text(comparison(two), "latex")
    assert r"uft & 3 & \textbf{0.837 [0.765, 0.890]} & \textbf{0.163 [0.101, 0.226]} \\" in text
    assert r"configuration & seeds & eval/exact\_match $\uparrow$ & eval/nll $\downarrow$ \\" in text
    assert all(rf"\{rule}" in text for rule in ("toprule", "midrule", "bottomrule"))
    assert r"\caption{Mean [95 \% interval] over seeds" in text


def test_names_are_neither_markdown_nor_latex():
    runs = [
        loaded("uft", data__name=name, final={METRIC: 0.5}) for name in ("[a]_b|c", "$x^2$ & <b>50 %</b> \\input{y}")
    ]
    made = compared(runs)
    markdown, latex = as_text(made, "markdown"), as_text(made, "latex")
    assert r"| \[a\]\_b\|c |" in markdown
    assert "<b>" not in markdown + outside_code(as_report(made))
    assert r"\\" + "\n{}[a]\\_b" in latex, "a bracket after the break of a line would be its argument"
    assert r"\$x\textasciicircum 2\$ \& <b>50 \%</b> \textbackslash input\{y\}" in latex


def test_any_comparison_has_its_tables_and_report():
    for make in (nothing, one_run, all_failed, hostile):
        made = make()
        texts = [as_text(made, form) for form in FORMS] + [as_report(made)]
        assert not any(re.search(r"[\x00-\x09\x0b-\x1f\u202e\ud800-\udfff]", text) for text in texts)
        assert "<script>" not in texts[1] + outside_code(texts[3])


def test_the_report_has_answer_table_warnings_and_commands():
    made = mixed()
    text = as_report(made)
    assert text.startswith("# beta-sweep: 27 runs, 9 configurations\n")
    assert "sft ratio=0.75 has the best mean, 0.8545 (95 % interval 0.7959 to 0.8985, 3 seeds)." in text
    assert as_text(made, "markdown") in text
    for warning in made["warnings"]:
        assert f"* {warning['what']}. {warning['why']}" in text
    assert text.count("\n    uft train objective=") == len(made["groups"])


def test_what_is_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sweep = make_sweep(Path("outputs/2026-11-21/trial"), ("sft", "uft"), seeds=(1, 2), points=5)
    for form, start in (
        ("csv", "configuration,metric,"),
        ("markdown", "| configuration |"),
        ("latex", "\\begin{table}"),
    ):
        assert main(["compare", f"--{form}"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(start)
        assert "compare.md" in err, "where the files are is no part of the table"
    assert (sweep / "compare.md").read_text(encoding="utf-8").startswith("# trial: 4 runs, 2 configurations")
    assert main(["compare", "--csv", "--json"]) == 2
