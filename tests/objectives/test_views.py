"""What each objective takes of each kind of row: the table of the design, row by row."""

from __future__ import annotations

import math

import pytest

from uft.data.rows import Kind
from uft.data.views import Role
from uft.objectives import OBJECTIVES, make
from uft.objectives.kinds import kind_table

WEIGHTED_NLL = [{"method": "nll"}, {"method": "ift"}]


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


def taken(settings, row, visit=0):
    """{completion: (role, target or None)}, or None where the run stops."""
    view = make(settings).views.get(row.kind)
    parts = view(row, visit) if view else None
    if parts is None:
        return None
    return {p.completion: (p.role.name.lower(), None if math.isnan(p.target) else p.target) for p in parts}


POSITIVE, NEGATIVE = ("positive", None), ("negative", None)


@pytest.mark.parametrize("settings", WEIGHTED_NLL)
def test_weighted_nll_takes_what_is_good(rows, settings):
    assert taken(settings, rows["demonstration"]) == {0: POSITIVE}
    assert taken(settings, rows["preference"]) == {0: POSITIVE}
    assert taken(settings, rows["good"]) == {0: POSITIVE}
    assert taken(settings, rows["bad"]) == {}, "taken by its own rule: nothing; the run goes on"
    assert taken(settings, rows["scored"]) == {1: POSITIVE, 2: POSITIVE}
    assert taken({**settings, "min_score": 0.6}, rows["scored"]) == {1: POSITIVE}
    assert taken(settings, rows["negatives"]) == {0: POSITIVE}


def test_uft_gives_everything_a_reward(rows):
    uft = {"method": "uft"}
    assert taken(uft, rows["demonstration"]) == {0: ("positive", 1.0)}
    assert taken({**uft, "demonstration_score": 0.8}, rows["demonstration"]) == {0: ("positive", 0.8)}
    assert taken(uft, rows["preference"]) == {0: POSITIVE, 1: NEGATIVE}
    assert taken({**uft, "pairs": "scores"}, rows["preference"]) == {0: ("positive", 1.0), 1: ("negative", 0.0)}
    assert taken(uft, rows["good"]) == {0: ("positive", 1.0)}
    assert taken(uft, rows["bad"]) == {0: ("negative", 0.0)}
    rewards = {i: target for i, (_, target) in taken(uft, rows["scored"]).items()}
    assert rewards == {0: 0.3, 1: 0.9, 2: 0.5, 3: 0.1}
    rewards = {i: target for i, (_, target) in taken(uft, rows["negatives"]).items()}
    assert rewards == {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0, 4: 0.0, 5: 0.0}


def test_pairwise_needs_two_sides(rows):
    dpo = {"method": "pairwise"}
    assert taken(dpo, rows["demonstration"]) is None
    assert taken({**dpo, "sft_weight": 0.1}, rows["demonstration"]) == {0: POSITIVE}
    assert taken(dpo, rows["preference"]) == {0: POSITIVE, 1: NEGATIVE}
    assert taken(dpo, rows["good"]) is None
    assert taken({**dpo, "sft_weight": 0.1}, rows["bad"]) is None
    assert taken(dpo, rows["scored"]) == {1: POSITIVE, 3: NEGATIVE}
    assert taken(dpo, rows["one score"]) is None
    assert taken(dpo, rows["equal scores"]) is None
    assert taken(dpo, rows["negatives"]) == {0: POSITIVE, **dict.fromkeys(range(1, 6), NEGATIVE)}


def test_dft_takes_fresh_negatives_at_every_visit(rows):
    dft = {"method": "dft"}
    assert taken(dft, rows["demonstration"]) == {0: POSITIVE}
    assert taken(dft, rows["preference"]) == {0: POSITIVE, 1: NEGATIVE}
    assert taken(dft, rows["good"]) == {0: POSITIVE}
    assert taken(dft, rows["bad"]) == {}
    assert taken(dft, rows["scored"]) == {1: POSITIVE, 2: POSITIVE}
    visits = [sorted(set(taken(dft, rows["negatives"], visit)) - {0}) for visit in range(4)]
    assert visits == [[1, 2], [3, 4], [1, 5], [2, 3]]
    assert taken({**dft, "negatives": 9}, rows["negatives"], 3).keys() == set(range(6))
    assert taken({**dft, "negatives": 0}, rows["negatives"]) == {0: POSITIVE}
    assert taken({**dft, "denominator": "sampling"}, rows["preference"]) is None


def test_parts_name_their_side():
    assert (Role.POSITIVE, Role.NEGATIVE) == (1, 0)


def test_the_printed_table_is_asked_of_the_views():
    header, *lines = kind_table({method: make({"method": method}) for method in OBJECTIVES})
    assert header == ["objective", *(kind.value for kind in Kind)]
    assert [line[0] for line in lines] == list(OBJECTIVES)
    cells = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert cells["pairwise"]["demonstration"] == "stops"
    assert cells["pairwise"]["scored"] == "high score positive, low score negative"
    assert cells["dft"]["negatives"] == "shown positive, 2 of 4 sampled negative"
    assert cells["uft"]["negatives"] == "shown r=1, each sampled r=0"
    assert cells["sft"]["binary"] == "good positive"
    named = kind_table({"mine": make({"method": "pairwise", "sft_weight": 1.0})})
    assert named[1][:2] == ["mine", "shown positive"]
