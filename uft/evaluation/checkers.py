"""Checkers: metrics between 0 and 1 of one reply, by exact rules. One function and one line of CHECKERS each."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

from uft.data.rows import Row
from uft.objectives.views import GOOD_ENOUGH, reward
from uft.playground import world

Verdict = dict[str, float]

NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
"""A number as people write it. A minus right after a word or bracket is subtraction."""


def gold(row: Row) -> str | None:
    """The right reply: the row's answer, else its best completion if that is good, else None."""
    if row.answer is not None:
        return row.answer
    best = max(row.completions, key=reward)
    return best.text if reward(best) >= GOOD_ENOUGH else None


def last_number(text: str) -> Decimal | None:
    """The final answer of a worked solution: the first number after `####` (GSM8K), else the last number there is."""
    _, marked, after = text.replace("−", "-").rpartition("####")
    found = NUMBER.findall(after)
    if not found:
        return None
    return Decimal(re.sub(r"[$,]", "", found[0 if marked else -1]))


def playground(row: Row, reply: str) -> Verdict:
    """`exact_match` (right and plain), `correct` (right, chatter aside), `plain` (no chatter)."""
    right = gold(row)
    return {} if right is None else world.check(row.task, row.prompt[-1].content, right, reply)


def final_number(row: Row, reply: str) -> Verdict:
    """`exact_match`: the reply's final number equals the answer's in value (1,000 = $1000.00); `answered`: it has one.

    {} for rows whose own answer is unknown or has no number.
    """
    right = last_number(gold(row) or "")
    if right is None:
        return {}
    found = last_number(reply)
    return {"exact_match": float(found == right), "answered": float(found is not None)}


def exact(row: Row, reply: str) -> Verdict:
    """`exact_match`: the same words with the same case and punctuation, however spaced."""
    right = gold(row)
    return {} if right is None else {"exact_match": float(reply.split() == right.split())}


CHECKERS: dict[str, Callable[[Row, str], Verdict]] = {
    "playground": playground,
    "final_number": final_number,
    "exact": exact,
}
