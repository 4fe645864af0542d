"""What the data came to."""

import json

import pytest

from uft.config.schema import data_settings
from uft.data.chat import Renderer
from uft.data.mixture import Mixture
from uft.data.report import (
    HEADER,
    coloured,
    data_cautions,
    data_report,
    length_histogram,
    merged_lengths,
    report_table,
)
from uft.data.rows import Kind, Message, Selected
from uft.data.sources import load_sources
from uft.data.table import claims
from uft.data.tokens import tokenize_all


@pytest.fixture
def loaded(tmp_path):
    shown = [{"prompt": f"q{n}", "completion": "yes"} for n in range(12)]
    pairs = [{"prompt": f"q{n}", "chosen": "yes", "rejected": "no" * 20} for n in range(6)]
    bad = [{"prompt": "q", "chosen": "a", "rejected": ""}]
    for name, rows in (("shown", shown), ("pairs", pairs + bad)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("shown", "pairs")}
    sources["shown"]["holdout"] = 2
    return load_sources(data_settings({"sources": sources, "bad_rows": "drop"}))


@pytest.fixture
def report(loaded, tokenizer):
    tokenized = tokenize_all({s.name: s.rows for s in loaded}, Renderer(tokenizer), 30, "truncate", None)
    mixture = Mixture([s.name for s in loaded], [len(t.rows) for t in tokenized], [0.25, 0.75], 0)
    mixture.take(3)
    return data_report(loaded, tokenized, mixture, 40, unusable={"shown": 1})


def test_what_was_asked_and_what_came_of_it(report):
    pairs, shown = report["sources"]["pairs"], report["sources"]["shown"]
    assert list(report["sources"]) == ["pairs", "shown"]
    assert (pairs["share_asked"], pairs["share_rows"], pairs["rows_drawn"]) == (0.25, 0.25, 10)
    assert (shown["rows"], shown["held_out"], shown["passes"]) == (10, 2, 3.0)
    assert pairs["share_supervised_tokens"] + shown["share_supervised_tokens"] == pytest.approx(1)
    assert pairs["share_supervised_tokens"] > 0.25  # pairs have two completions, one of them long
    assert (pairs["dropped_bad"], pairs["truncated"], shown["dropped_unusable"]) == (1, 6, 1)
    assert pairs["supervised_tokens_lost"] > 0
    assert report["rows_drawn"] == 40
    assert len(report["digest"]) == 64
    json.dumps(report)


def test_supervised_tokens_are_those_the_objective_takes(loaded, tokenizer):
    tokenized = tokenize_all({s.name: s.rows for s in loaded}, Renderer(tokenizer), 100, "error", None)
    mixture = Mixture([s.name for s in loaded], [6, 10], [0.5, 0.5], 0)
    views = {Kind.PREFERENCE: lambda row, visit: (Selected(0),), Kind.DEMONSTRATION: lambda row, visit: (Selected(0),)}
    report = data_report(loaded, tokenized, mixture, 20, views)
    assert report["sources"]["pairs"]["share_supervised_tokens"] == 0.5  # "yes" on both sides


def test_held_out_prompts_that_another_source_trains_on_are_counted(report, loaded):
    held = {row.prompt[0].content for row in next(s for s in loaded if s.name == "shown").held_out}
    expected = len(held & {f"q{n}" for n in range(6)})
    assert report["sources"]["shown"]["held_out_seen"] == expected


def test_the_table_says_the_same(report):
    header, pairs, shown, total = report_table(report)
    assert header == list(HEADER)
    assert all(len(line) == len(header) for line in (pairs, shown, total))
    cell = dict(zip(header, pairs, strict=True))
    assert (cell["source"], cell["kind"], cell["asked"], cell["drawn"]) == ("pairs", "preference", "25.0%", "10")
    assert dict(zip(header, total, strict=True))["drawn"] == "40"


def test_the_histogram_has_a_bar_for_every_range():
    lines = length_histogram([(16, 10), (32, 20), (1024, 1)], width=20)
    assert [line.count("█") for line in lines] == [10, 20, 1]
    assert lines[0].startswith("<=    16")
    assert lines[2].endswith(" 1")
    assert length_histogram([]) == []


def test_histograms_add_up(loaded, tokenizer):
    tokenized = tokenize_all({s.name: s.rows for s in loaded}, Renderer(tokenizer), 100, "error", None)
    counts = merged_lengths([t.report for t in tokenized])
    assert sum(count for _, count in counts) == 10 + 12
    assert counts == sorted(counts)


def test_trained_tokens_are_highlighted_and_the_text_is_whole(tokenizer):
    renderer = Renderer(tokenizer)
    encoded = renderer.encode((Message("user", "où?"),), (Message("assistant", "là 😀"),))
    text = coloured(encoded, tokenizer)
    assert text.plain == "<|im_start|>user\noù?<|im_end|>\n<|im_start|>assistant\nlà 😀<|im_end|>"
    trained = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert trained == ["là 😀<|im_end|>"]


def test_a_long_run_is_counted_in_proportion(loaded, tokenizer, monkeypatch):
    tokenized = tokenize_all({s.name: s.rows for s in loaded}, Renderer(tokenizer), 30, "truncate", None)
    mixture = Mixture([s.name for s in loaded], [len(t.rows) for t in tokenized], [0.25, 0.75], 0)
    exact = data_report(loaded, tokenized, mixture, 4000)
    monkeypatch.setattr("uft.data.report.COUNTED", 400)
    about = data_report(loaded, tokenized, mixture, 4000)
    assert about["rows_drawn"] == exact["rows_drawn"] == 4000
    for name, source in exact["sources"].items():
        assert about["sources"][name]["rows_drawn"] == source["rows_drawn"]
        counted = about["sources"][name]["supervised_tokens_drawn"]
        assert counted == pytest.approx(source["supervised_tokens_drawn"], rel=0.02)


@pytest.mark.parametrize("many", [0, 6000], ids=["in memory", "on disk"])
def test_rows_that_repeat_or_contradict_others_are_counted(tmp_path, many):
    others = [{"prompt": str(n), "completion": "a", "label": n % 2 == 0} for n in range(many)]
    path, pairs = tmp_path / "labels.jsonl", tmp_path / "pairs.jsonl"
    single, pair = {"prompt": "7*6?", "completion": "42"}, {"prompt": "7*6?", "chosen": "42", "rejected": "13"}
    labels = [*others, *(single | {"label": label} for label in (True, False, False))]
    path.write_text("".join(json.dumps(one) + "\n" for one in labels))
    swapped = pair | {"chosen": "13", "rejected": "42"}
    pairs.write_text("".join(json.dumps(one) + "\n" for one in (pair, swapped, pair | {"chosen": "40"})))
    sources = {"labels": {"path": str(path)}, "pairs": {"path": str(pairs)}}
    loaded = load_sources(data_settings({"sources": sources, "holdout": 0}))
    assert claims([source.rows for source in loaded]) == (1, 2)
    said = "\n".join(data_cautions({"sources": {}, "repeated": 1, "contradicted": 2}))
    assert "1 of the training rows repeat another one" in said
    assert "rows contradict each other in 2 cases" in said
