"""What each objective takes of each kind of row: the table of the design, row by row."""

from __future__ import annotations

import math

import pytest
from toys import PRESETS, preset, settings

from uft.data.rows import Kind, Role
from uft.objectives.views import kind_table

LIKELIHOOD = ["sft", "ift", "dynamic_ft", "anchored_sft", "f_sft", "poft"]
PAIRS = [name for name in PRESETS if "sft_weight" in settings(name)]


@pytest.fixture
def rows(kit):
    c, row = kit.completion, kit.row_of
    return {
        "demonstration": row(0, c("1")),
        "preference": row(0, c("1", preferred=True), c("2", preferred=False)),
        "good": row(0, c("1", label=True)),
        "bad": row(0, c("1", label=False)),
        "scored": row(0, c("1", score=0.3), c("2", score=0.9), c("3", score=0.5), c("4", score=0.1)),
        "one score": row(0, c("1", score=0.9)),
        "equal scores": row(0, c("1", score=0.9), c("2", score=0.9)),
        "negatives": row(0, c("1"), *(c(str(i), sampled_by="m") for i in range(5))),
    }


def taken(name, row, visit=0, **changes):
    """{completion: (role, target or None)}, or None where the run stops."""
    view = preset(name, **changes).views.get(row.kind)
    parts = view(row, visit) if view else None
    if parts is None:
        return None
    return {p.completion: (p.role.name.lower(), None if math.isnan(p.target) else p.target) for p in parts}


POSITIVE, NEGATIVE = ("positive", None), ("negative", None)


@pytest.mark.parametrize("name", LIKELIHOOD)
def test_likelihood_takes_what_is_good(rows, name):
    assert taken(name, rows["demonstration"]) == {0: POSITIVE}
    assert taken(name, rows["preference"]) == {0: POSITIVE}
    assert taken(name, rows["good"]) == {0: POSITIVE}
    assert taken(name, rows["bad"]) == {}, "taken by its own rule: nothing; the run goes on"
    assert taken(name, rows["scored"]) == {1: POSITIVE, 2: POSITIVE}
    assert taken(name, rows["scored"], min_score=0.6) == {1: POSITIVE}
    assert taken(name, rows["negatives"]) == {0: POSITIVE}


@pytest.mark.parametrize("name", ["uft", "una"])
def test_uft_gives_everything_a_reward(rows, name):
    assert taken(name, rows["demonstration"]) == {0: ("positive", 1.0)}
    assert taken(name, rows["demonstration"], demonstration_score=0.8) == {0: ("positive", 0.8)}
    assert taken(name, rows["preference"]) == {0: POSITIVE, 1: NEGATIVE}
    assert taken(name, rows["preference"], pairs="scores") == {0: ("positive", 1.0), 1: ("negative", 0.0)}
    assert taken(name, rows["good"]) == {0: ("positive", 1.0)}
    assert taken(name, rows["bad"]) == {0: ("negative", 0.0)}
    rewards = {i: target for i, (_, target) in taken(name, rows["scored"]).items()}
    assert rewards == {0: 0.3, 1: 0.9, 2: 0.5, 3: 0.1}
    rewards = {i: target for i, (_, target) in taken(name, rows["negatives"]).items()}
    assert rewards == {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0, 4: 0.0, 5: 0.0}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_need_two_sides(rows, name):
    assert taken(name, rows["demonstration"]) is None
    assert taken(name, rows["demonstration"], sft_weight=0.1) == {0: POSITIVE}
    assert taken(name, rows["preference"]) == {0: POSITIVE, 1: NEGATIVE}
    assert taken(name, rows["good"]) is None
    assert taken(name, rows["bad"], sft_weight=0.1) is None
    assert taken(name, rows["scored"]) == {1: POSITIVE, 3: NEGATIVE}
    assert taken(name, rows["one score"]) is None
    assert taken(name, rows["equal scores"]) is None
    assert taken(name, rows["negatives"]) == {0: POSITIVE, **dict.fromkeys(range(1, 6), NEGATIVE)}


def test_kto_judges_every_completion_by_itself(rows):
    assert taken("kto", rows["demonstration"]) == {0: POSITIVE}
    assert taken("kto", rows["preference"]) == {0: POSITIVE, 1: NEGATIVE}
    assert taken("kto", rows["good"]) == {0: POSITIVE}
    assert taken("kto", rows["bad"]) == {0: NEGATIVE}
    assert taken("kto", rows["scored"]) == {0: NEGATIVE, 1: POSITIVE, 2: POSITIVE, 3: NEGATIVE}
    assert taken("kto", rows["one score"], min_score=0.95) == {0: NEGATIVE}
    assert taken("kto", rows["negatives"]) == {0: POSITIVE, **dict.fromkeys(range(1, 6), NEGATIVE)}


@pytest.mark.parametrize("name", ["dft", "dft2"])
def test_dft_takes_fresh_negatives_at_every_visit(rows, name):
    assert taken(name, rows["demonstration"]) == {0: POSITIVE}
    assert taken(name, rows["preference"]) == {0: POSITIVE, 1: NEGATIVE}
    assert taken(name, rows["good"]) == {0: POSITIVE}
    assert taken(name, rows["bad"]) == {}
    assert taken(name, rows["scored"]) == {1: POSITIVE, 2: POSITIVE}
    visits = [sorted(set(taken(name, rows["negatives"], visit)) - {0}) for visit in range(4)]
    assert visits == [[1, 2], [3, 4], [1, 5], [2, 3]]
    assert taken(name, rows["negatives"], 3, negatives=9).keys() == set(range(6))
    assert taken(name, rows["negatives"], negatives=0) == {0: POSITIVE}
    assert taken(name, rows["preference"], denominator="sampling") is None


def test_per_kind_takes_what_the_objective_of_the_kind_takes(rows):
    assert taken("per_kind", rows["demonstration"]) == taken("sft", rows["demonstration"])
    assert taken("per_kind", rows["preference"]) == taken("dpo", rows["preference"])
    assert taken("per_kind", rows["bad"]) == taken("kto", rows["bad"])
    assert taken("per_kind", rows["scored"]) == taken("uft", rows["scored"])
    assert taken("per_kind", rows["negatives"], 1) == taken("dft", rows["negatives"], 1)
    assert taken("per_kind", rows["scored"], scored=settings("dpo")) == {1: POSITIVE, 3: NEGATIVE}
    assert taken("per_kind", rows["demonstration"], demonstration=None) is None


def test_every_objective_is_in_one_of_the_tests_above():
    assert {*LIKELIHOOD, *PAIRS, "uft", "una", "kto", "dft", "dft2", "per_kind"} == set(PRESETS)


def test_parts_name_their_side():
    assert (Role.POSITIVE, Role.NEGATIVE) == (1, 0)


def test_the_printed_table_is_asked_of_the_views():
    header, *lines = kind_table({name: preset(name) for name in PRESETS})
    assert header == ["objective", *(kind.value for kind in Kind)]
    assert [line[0] for line in lines] == PRESETS
    cells = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert cells["dpo"]["demonstration"] == "stops"
    assert cells["dpo"]["scored"] == "high score positive, low score negative"
    assert cells["dft"]["negatives"] == "shown positive, 2 of 4 sampled negative"
    assert cells["uft"]["negatives"] == "shown r=1, each sampled r=0"
    assert cells["sft"]["binary"] == "good positive"
    assert cells["kto"]["binary"] == "good positive, bad negative"
    assert cells["kto"]["scored"] == "high score positive, middling score positive, low score negative"
    assert cells["per_kind"] == {
        "objective": "per_kind",
        **{kind: cells[name][kind] for kind, name in zip(header[1:], ("sft", "dpo", "kto", "uft", "dft"), strict=True)},
    }
    named = kind_table({"mine": preset("dpo", sft_weight=1.0)})
    assert named[1][:2] == ["mine", "shown positive"]
