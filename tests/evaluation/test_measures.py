from __future__ import annotations

import pytest

from uft.data.rows import Completion, Message, Row
from uft.evaluation.measures import NOTHING, Scored, ScoredRow, Tally, measured, pair_of


def said(text, **feedback):
    return Completion((Message("assistant", text),), **feedback)


def pair(better, worse):
    return ScoredRow((better, worse), (better, worse))


PREFERENCE = pair(
    Scored(good=True, tokens=4, log_prob=-6.0, reward=1.5),
    Scored(good=False, tokens=10, log_prob=-5.0, reward=-0.5),
)
SHOWN = ScoredRow((Scored(good=True, tokens=1, log_prob=-4.0, reward=-1.0),))
BAD = ScoredRow((Scored(good=False, tokens=3, log_prob=-9.0, reward=-2.0),))


def means(*rows):
    tally = Tally()
    for row in rows:
        tally.add(measured(row))
    return tally.means()


def test_figures_by_hand():
    assert means(PREFERENCE, SHOWN, BAD) == pytest.approx(
        {
            "nll": 10 / 5,
            "log_prob": -10 / 2,
            "log_ratio": 0.5 / 5,
            "pair_accuracy": 0.0,
            "reward_accuracy": 1.0,
            "margin": 2.0,
            "chosen_reward": 0.5 / 2,
            "rejected_reward": -2.5 / 2,
        }
    )


def test_what_there_is_none_of_is_not_reported():
    assert means(BAD).keys() == {"rejected_reward"}
    without_reference = ScoredRow((Scored(good=True, tokens=2, log_prob=-1.0),))
    assert means(without_reference) == {"nll": 0.5, "log_prob": -1.0}
    assert means() == {}


def test_a_tie_counts_half():
    for ahead, accuracy in ((1.0, 1.0), (-1.0, 0.0), (0.0, 0.5), (1e-6, 0.5), (-1e-6, 0.5)):
        better = Scored(good=True, tokens=1, log_prob=-3.0 + ahead, reward=ahead)
        found = means(pair(better, Scored(good=False, tokens=1, log_prob=-3.0, reward=0.0)))
        assert found["pair_accuracy"] == found["reward_accuracy"] == accuracy
        assert found["margin"] == pytest.approx(ahead)


def test_pairs_of_every_kind_of_row():
    prompt = (Message("user", "x"),)

    def found(*completions):
        return pair_of(Row("s", 0, prompt, completions))

    assert found(said("a", preferred=False), said("b", preferred=True)) == (1, 0)
    assert found(said("a", score=0.5), said("b", score=0.1), said("c", score=0.9)) == (2, 1)
    assert found(said("a", score=0.5), said("b", score=0.5)) is None
    assert found(said("a"), said("b", sampled_by="m"), said("c", sampled_by="m")) == (0, 1)
    assert found(said("a")) is None
    assert found(said("a", label=False)) is None


def test_tallies_add_up_like_their_rows():
    one, other = Tally(measured(PREFERENCE)), Tally(measured(SHOWN))
    other.add(measured(BAD))
    one.add(other)
    assert one.means() == pytest.approx(means(PREFERENCE, SHOWN, BAD))
    one.add({"exact_match": (1.0, 1.0), "never": NOTHING})
    one.add({"exact_match": (0.0, 1.0)})
    assert one.means()["exact_match"] == 0.5
    assert "never" not in one.means()
