from __future__ import annotations

from decimal import Decimal

from uft.data.rows import Completion, Message, Row
from uft.evaluation.measures import CHECKERS, gold, last_number


def row(answer=None, *completions, prompt="sort : owl cat", task="sort"):
    completions = completions or (Completion((Message("assistant", "cat owl"),)),)
    return Row("s", 0, (Message("user", prompt),), completions, answer, task)


def said(text, **feedback):
    return Completion((Message("assistant", text),), **feedback)


NUMBERS = {
    "so she has 18 left": "18",
    "18 - 5 = 13. #### 13": "13",
    "#### 1,000": "1000",
    "it costs $1,234.50.": "1234.50",
    "-$3": "-3",
    "the result is -7": "-7",
    "the result is −7": "-7",
    "12-5": "5",
    "(2)-3": "3",
    ".5": "0.5",
    "2, 3, 4": "4",
    "1,2": "2",
    "a 50% share": "50",
    "The answer is 72.\n": "72",
    "#### 72 apples in 3 bags": "72",
}


def test_the_last_number():
    assert {text: last_number(text) for text in NUMBERS} == {text: Decimal(number) for text, number in NUMBERS.items()}
    assert [last_number(text) for text in ("none at all", "5 #### none", "")] == [None, None, None]


def test_final_number_compares_values():
    check = CHECKERS["final_number"]
    assert check(row("1000"), "so $1,000.00.") == {"exact_match": 1.0, "answered": 1.0}
    assert check(row("18"), "it is 19") == {"exact_match": 0.0, "answered": 1.0}
    assert check(row("18"), "I do not know") == {"exact_match": 0.0, "answered": 0.0}
    assert check(row(None, said("9 + 9 = 18\n#### 18")), "18 it is") == {"exact_match": 1.0, "answered": 1.0}
    assert check(row("no number"), "18") == {}


def test_exact_ignores_spacing_only():
    check = CHECKERS["exact"]
    assert check(row("cat  owl"), " cat owl\n") == {"exact_match": 1.0}
    assert check(row("cat owl"), "Cat owl") == {"exact_match": 0.0}
    assert check(row(None, said("bad", label=False)), "bad") == {}


def test_playground_knows_skill_and_style():
    check = CHECKERS["playground"]
    assert check(row("cat owl"), "cat owl") == {"exact_match": 1.0, "correct": 1.0, "plain": 1.0}
    assert check(row("cat owl"), "sure ! the answer is cat owl") == {"exact_match": 0.0, "correct": 1.0, "plain": 0.0}
    assert check(row("cat owl"), "owl cat") == {"exact_match": 0.0, "correct": 0.0, "plain": 1.0}
    assert check(row(None, said("x", label=False), prompt="of another world"), "x") == {}


def test_gold_is_the_answer_or_the_best_good_completion():
    assert gold(row("a", said("b"))) == "a"
    assert gold(row(None, said("bad", preferred=False), said("good", preferred=True))) == "good"
    assert gold(row(None, said("so", score=0.4), said("best", score=0.9))) == "best"
    assert gold(row(None, said("so", score=0.4))) is None
    assert gold(row(None, said("shown"), said("drawn", sampled_by="m"))) == "shown"
