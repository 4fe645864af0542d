"""Checkers of plain text, by rows and replies that a person can judge."""

from __future__ import annotations

import time
from decimal import Decimal

from uft.data.rows import Completion, Message, Row
from uft.rewards import check, gold, judge
from uft.rewards.text import last_number


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
    assert check("final_number", row("1000"), "so $1,000.00.") == {"exact_match": 1.0, "answered": 1.0}
    assert check("final_number", row("18"), "it is 19") == {"exact_match": 0.0, "answered": 1.0}
    assert check("final_number", row("18"), "I do not know") == {"exact_match": 0.0, "answered": 0.0}
    worked = row(None, said("9 + 9 = 18\n#### 18"))
    assert check("final_number", worked, "18 it is") == {"exact_match": 1.0, "answered": 1.0}
    assert check("final_number", row("no number"), "18") == {}


def test_exact_ignores_spacing_only():
    assert check("exact", row("cat  owl"), " cat owl\n") == {"exact_match": 1.0}
    assert check("exact", row("cat owl"), "Cat owl") == {"exact_match": 0.0}
    assert check("exact", row("cat owl"), "<think>\nfox\n</think>\n\ncat owl") == {"exact_match": 1.0}
    assert check("contains", row("cat owl"), "<think>\ncat owl\n</think>\n\nfox") == {"contains": 0.0}
    assert check("exact", row(None, said("bad", label=False)), "bad") == {}


def test_playground_knows_skill_and_style():
    def figures(reply):
        return tuple(check("playground", row("cat owl"), reply).values())

    assert figures("cat owl") == (1, 1, 1)
    assert figures("sure ! the answer is cat owl") == (0, 1, 0)
    assert figures("owl cat") == (0, 0, 1)
    assert check("playground", row(None, said("x", label=False), prompt="of another world"), "x") == {}


def test_contains_finds_whole_words():
    said = {"it is Paris.": 1, "it is paris": 1, "Parisian": 0, "": 0, "New\n York": 0}
    assert {text: check("contains", row("Paris"), text)["contains"] for text in said} == said
    assert check("contains", row("New York"), "in new\nyork!") == {"contains": 1.0}
    assert check({"method": "contains", "case": True}, row("Paris"), "paris") == {"contains": 0.0}


CHOICES = {
    "B": "B",
    "(b) no, B.": None,
    "B. the second": "B",
    "The answer is (B), not C": "B",
    "Answer: **C**": "C",
    "A is wrong. The answer is D": "D",
    "A cat": None,
    "I think it is (C)": "C",
    "\\boxed{\\text{A}}": "A",
    "<think>(C)?</think><answer>D</answer>": "D",
    "K": None,
}


def test_choice_finds_the_letter():
    for text, letter in CHOICES.items():
        figures = [check("choice", row(right), text) for right in "ABCD"]
        assert [one["exact_match"] for one in figures] == [float(letter == right) for right in "ABCD"], text
        assert figures[0]["answered"] == float(letter is not None), text
    assert check("choice", row("no letter"), "A") == {}


def test_knights_and_knaves_by_the_last_word_about_each():
    right = row("(1) Zoey is a knight\n(2) Oliver is a knave")

    def figures(reply):
        return tuple(check("knights_knaves", right, reply).values())

    assert figures("Zoey is a knave? No: zoey is a knight and Oliver is a **knave**.") == (1, 1, 1)
    assert figures("<think>Zoey is a knave</think><answer>Zoey is a knight, Oliver is a knight</answer>") == (0, 0.5, 1)
    assert figures("Oliver is a knave") == (0, 0.5, 0)
    assert check("knights_knaves", row("nobody"), "Zoey is a knight") == {}


def test_format_wants_two_parts_and_nothing_else():
    def figures(reply, **keys):
        return tuple(check({"method": "format", **keys}, row(), reply).values())

    assert figures("<think>so</think>\n<answer>5</answer>") == (1, 1)
    assert figures("<think>so</think> then <answer>5</answer>") == (0, 1)
    assert figures("<answer>5</answer><think>so</think>") == (0, 1)
    assert figures("<think><think>so</think><answer>5</answer>") == (0, 0.75)
    assert figures("5") == (0, 0)
    assert figures("so</think><answer>5</answer>", opened=True) == (1, 1)
    assert figures("<a>so</a><b>5</b>", thinking="a", answer="b") == (1, 1)


def test_shaping_figures():
    spec = {"method": "length", "free": 2, "limit": 4}
    lengths = [check(spec, row(), "w " * words)["length"] for words in range(6)]
    assert lengths == [0, 1, 1, 0.5, 0, 0]
    grams = {"a b a b a b": 2 / 5, "A b c": 1.0, "a": 1.0}
    assert {t: check({"method": "repetition", "n": 2}, row(), t)["distinct"] for t in grams} == grams


def test_every_checker_of_text_takes_time_linear_in_the_reply():
    texts = ["<answer>" * 125_000, "answer" + " " * 1_000_000, "9" * 1_000_000, "1," * 500_000, "a is " * 200_000]
    names = ("final_number", "exact", "contains", "choice", "knights_knaves", "format", "length", "repetition")
    start = time.process_time()
    verdicts = judge([(name, row("Zoey is a knight 5 (A)"), text) for name in names for text in texts])
    assert all(verdict.figures and verdict.reason is None for verdict in verdicts)
    assert time.process_time() - start < 20  # it takes one; a quadratic pattern takes hours


def test_gold_is_the_answer_or_the_best_good_completion():
    assert gold(row("a", said("b"))) == "a"
    assert gold(row(None, said("bad", preferred=False), said("good", preferred=True))) == "good"
    assert gold(row(None, said("so", score=0.4), said("best", score=0.9))) == "best"
    assert gold(row(None, said("so", score=0.4))) is None
    assert gold(row(None, said("shown"), said("drawn", sampled_by="m"))) == "shown"
