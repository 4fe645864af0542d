"""Numbers beside completions: how columns give them, what cannot stand there, and that they are part of a row."""

import json
from dataclasses import replace

import pytest

from uft.config.schema import data_settings
from uft.data.formats import ANNOTATION_RULES, FIELDS, recognise, rename
from uft.data.messages import Unreadable
from uft.data.rows import ANNOTATIONS, Completion, Message, Row, content_digest
from uft.data.sources import load_sources
from uft.errors import UftError

USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
SHOWN = {"prompt": "q", "completion": "a"}
NEGATIVES = {"prompt": "q", "response": "a", "negatives": ["x", "y"]}
ULTRA = {
    "instruction": "q",
    "completions": [{"response": "a", "overall_score": 7}, {"response": "b"}],
    "ratings": [1, 2],
}
NAN, INFINITY = float("nan"), float("inf")


def numbers(record):
    fields = rename(record, {})
    return [dict(c.annotations) for c in recognise(fields).read(fields).completions]


def load(path, **source):
    return load_sources(data_settings({"name": "d", "sources": {"mine": {"path": str(path), **source}}}))[0]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_what_columns_say_of_each_completion():
    for record, found in [
        (SHOWN | {"baseline_logp": -0.9}, [{"baseline_logp": -0.9}]),
        (SHOWN | {"baseline_logp": -1}, [{"baseline_logp": -1.0}]),
        (SHOWN | {"baseline_logp": 0}, [{"baseline_logp": 0.0}]),
        (SHOWN | {"baseline_logp": None}, [{}]),
        ({"messages": [USER, REPLY], "baseline_logp": -2.5}, [{"baseline_logp": -2.5}]),
        ({"conversations": [USER, REPLY], "baseline_logp": -2.5}, [{"baseline_logp": -2.5}]),
        ({"instruction": "q", "output": "a", "baseline_logp": -2.5}, [{"baseline_logp": -2.5}]),
        ({"question": "q", "answer": "a #### 2", "baseline_logp": -2.5}, [{"baseline_logp": -2.5}]),
        (SHOWN | {"label": True, "baseline_logp": -2.5}, [{"baseline_logp": -2.5}]),
        (SHOWN | {"score": 0.5, "baseline_logp": -1, "soft_label": 0.3}, [{"baseline_logp": -1.0, "soft_label": 0.3}]),
        (PAIR | {"baseline_logp": [-1.5, -0.5]}, [{"baseline_logp": -1.5}, {"baseline_logp": -0.5}]),
        (PAIR | {"baseline_logp": [-1.5, None]}, [{"baseline_logp": -1.5}, {}]),
        (PAIR | {"soft_label": 0.75}, [{"soft_label": 0.75}, {"soft_label": 0.25}]),
        (PAIR | {"soft_label": 0}, [{"soft_label": 0.0}, {"soft_label": 1.0}]),
        (PAIR | {"soft_label": None}, [{}, {}]),
        (NEGATIVES | {"baseline_logp": [-1, None, -3]}, [{"baseline_logp": -1.0}, {}, {"baseline_logp": -3.0}]),
        (ULTRA | {"baseline_logp": [-1, -2]}, [{"baseline_logp": -1.0}, {"baseline_logp": -2.0}]),
        (PAIR | {"score_chosen": 8, "score_rejected": 6.5}, [{"score": 8.0}, {"score": 6.5}]),
        (PAIR | {"score_chosen": 8, "score_rejected": None}, [{"score": 8.0}, {}]),
        (PAIR | {"score_chosen": "good", "score_rejected": NAN}, [{}, {}]),
    ]:
        assert numbers(record) == found, record


def test_what_cannot_stand_in_them():
    for record, why in [
        (SHOWN | {"baseline_logp": "-1"}, "baseline_logp is text, not a number"),
        (SHOWN | {"baseline_logp": True}, "baseline_logp is true/false, not a number"),
        (SHOWN | {"baseline_logp": [-1]}, "baseline_logp is a list, not a number"),
        (SHOWN | {"baseline_logp": NAN}, "baseline_logp is nan, not a mean log-probability"),
        (SHOWN | {"baseline_logp": -INFINITY}, "baseline_logp is -inf, not a mean log-probability"),
        (SHOWN | {"baseline_logp": -(10**400)}, "baseline_logp is -1000"),
        (SHOWN | {"baseline_logp": 0.1}, "baseline_logp is 0.1, not a mean log-probability, at most 0"),
        (PAIR | {"baseline_logp": -1.0}, "baseline_logp is a number, not a list of 2 numbers"),
        (PAIR | {"baseline_logp": [-1.0]}, "baseline_logp is 1 of them, not a list of 2 numbers"),
        (PAIR | {"baseline_logp": [-1.0, 2.0]}, "baseline_logp[1] is 2.0"),
        (NEGATIVES | {"baseline_logp": [-1, -2]}, "baseline_logp is 2 of them, not a list of 3 numbers"),
        (PAIR | {"soft_label": [0.7, 0.3]}, "soft_label is a list, not a number"),
        (PAIR | {"soft_label": 1.01}, "soft_label is 1.01, not a probability from 0 to 1"),
        (PAIR | {"soft_label": -0.01}, "soft_label is -0.01"),
        (PAIR | {"soft_label": NAN}, "soft_label is nan"),
    ]:
        with pytest.raises(Unreadable) as error:
            numbers(record)
        assert why in str(error.value)


def test_bad_values_are_bad_rows_and_missing_ones_are_not(tmp_path):
    records = [SHOWN | {"baseline_logp": -1}, SHOWN, SHOWN | {"baseline_logp": 3}, PAIR, SHOWN | {"baseline_logp": ""}]
    path = write(tmp_path / "rows.jsonl", records)
    with pytest.raises(UftError) as error:
        load(path)
    told = {problem.what: problem.why for problem in error.value.problems}
    assert list(told) == [f"{path}:{line}" for line in (3, 4, 5)]
    assert told[f"{path}:3"] == "baseline_logp is 3, not a mean log-probability, at most 0"
    (kept,) = load_sources(data_settings({"name": "d", "bad_rows": "drop", "sources": {"mine": {"path": str(path)}}}))
    assert [dict(row.completions[0].annotations) for row in kept.rows] == [{"baseline_logp": -1.0}, {}]


def test_other_names_are_mapped(tmp_path):
    path = write(tmp_path / "rows.jsonl", [PAIR | {"sure": 0.9, "b": [-1, -2], "good": 3, "bad": 1}] * 2)
    columns = {"soft_label": "sure", "baseline_logp": "b", "score_chosen": "good", "score_rejected": "bad"}
    chosen, rejected = load(path, columns=columns).rows[0].completions
    assert dict(chosen.annotations) == {"baseline_logp": -1.0, "soft_label": 0.9, "score": 3.0}
    assert dict(rejected.annotations) == {"baseline_logp": -2.0, "soft_label": 1 - 0.9, "score": 1.0}


def test_text_cells_become_numbers(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected,soft_label,score_chosen\nq,a,b,0.75,7\nq,a,b,,\n")
    first, second = load(path).rows
    assert [dict(c.annotations) for c in first.completions] == [
        {"soft_label": 0.75, "score": 7.0},
        {"soft_label": 0.25},
    ]
    assert [dict(c.annotations) for c in second.completions] == [{}, {}]


def test_scored_completions_keep_their_own_when_they_meet_in_a_row(tmp_path):
    lines = [SHOWN | {"score": n / 4, "baseline_logp": -n, "completion": f"a{n}"} for n in (3, 1, 2)]
    (row,) = load(write(tmp_path / "rows.jsonl", lines)).rows
    assert [(c.text, c.annotations["baseline_logp"]) for c in row.completions] == [("a3", -3), ("a1", -1), ("a2", -2)]


def test_they_are_part_of_what_a_row_says():
    completion = Completion((Message("assistant", "a"),))
    row = Row("s", 0, (Message("user", "q"),), (completion,))

    def digest(**numbers):
        return content_digest([replace(row, completions=(replace(completion, annotations=numbers),))])

    assert digest() == content_digest([row])
    digests = {digest(), digest(baseline_logp=-1.0), digest(baseline_logp=-1.5), digest(soft_label=0.5)}
    assert len(digests) == 4
    assert digest(baseline_logp=-1.0, soft_label=0.5) == digest(soft_label=0.5, baseline_logp=-1.0)


def test_a_row_without_any_hashes_to_what_it_always_did():
    """Tokens that were cached and runs that were stopped before there were annotations are found again."""
    row = Row("s", 0, (Message("user", "q"),), (Completion((Message("assistant", "a"),), label=True),))
    assert content_digest([row]) == "ed2879b4422089b1c8e0a44e93e7f289fe85aa12f138c9de894f5876a001b536"


def test_every_known_column_has_its_rule_and_can_be_mapped():
    assert set(ANNOTATION_RULES) == set(ANNOTATIONS) < FIELDS
