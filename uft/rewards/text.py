"""Checkers of plain text: comparisons with the row's answer, and shaping rewards that look at the form of a reply.

None of them parses deeply: every pattern takes time linear in the reply, so they judge where they are called.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar

from uft.data.rows import Row
from uft.playground import world
from uft.rewards.base import Checker, Figures, Unjudged, answer_of, answered, gold, key, stated

NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
"""A number as people write it. A minus right after a word or bracket is subtraction."""


def last_number(text: str) -> Decimal | None:
    """The final answer of a worked solution: the first number after `####` (GSM8K), else the last number there is."""
    _, marked, after = text.replace("−", "-").rpartition("####")
    found = NUMBER.findall(after)
    if not found:
        return None
    return Decimal(re.sub(r"[$,]", "", found[0 if marked else -1]))


@dataclass(frozen=True)
class Playground(Checker):
    """`exact_match` (right and plain), `correct` (right, chatter aside), `plain` (no chatter), by the playground."""

    figures: ClassVar[tuple[str, ...]] = ("exact_match", "correct", "plain")

    def judge(self, row: Row, reply: str) -> Figures:
        answer_of(row)
        return world.check(row.task, row.prompt[-1].content, gold(row), reply)


@dataclass(frozen=True)
class FinalNumber(Checker):
    """`exact_match`: the final number has the value of the answer's (1,000 = $1000.00); `answered`: there is one."""

    figures: ClassVar[tuple[str, ...]] = ("exact_match", "answered")

    def judge(self, row: Row, reply: str) -> Figures:
        right, found = last_number(answer_of(row)), last_number(reply)
        if right is None:
            raise Unjudged("the row's answer has no number")
        return {"exact_match": float(found == right), "answered": float(found is not None)}


@dataclass(frozen=True)
class Exact(Checker):
    """`exact_match`: the same words with the same case and punctuation, however spaced."""

    figures: ClassVar[tuple[str, ...]] = ("exact_match",)

    def judge(self, row: Row, reply: str) -> Figures:
        return {"exact_match": float(answered(reply).split() == answer_of(row).split())}


@dataclass(frozen=True)
class Contains(Checker):
    """`contains`: the answer stands in the reply as whole words, however spaced."""

    figures: ClassVar[tuple[str, ...]] = ("contains",)

    case: bool = key(False, "upper and lower case differ")

    def judge(self, row: Row, reply: str) -> Figures:
        words, said = (" ".join(text.split()) for text in (answer_of(row), answered(reply)))
        if not words:
            raise Unjudged("the row's answer is empty")
        if not self.case:
            words, said = words.lower(), said.lower()
        return {"contains": float(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", said) is not None)}


@dataclass(frozen=True)
class Choice(Checker):
    """`exact_match`: the reply names the answer's letter; `answered`: it names one.

    A reply names a letter after the word answer, in a box, at its start, or in brackets, the first of these that it
    does; of several in one of these ways the last counts. "A cat" names none.
    """

    figures: ClassVar[tuple[str, ...]] = ("exact_match", "answered")

    letters: str = key("ABCDEFGHIJ", "letters of the choices")

    def problems(self) -> list[tuple[str, str]]:
        return [] if self.letters.isalpha() and self.letters.isupper() else [("letters", "must be capital letters")]

    def letter(self, text: str) -> str | None:
        one = rf"[({{\[*]{{0,3}}([{self.letters}])(?![\w'])"
        ways = (
            rf"(?i:answer(?: is)? ?:? ?){one}",
            rf"\\boxed\{{(?:\\text\{{)?{one}",
            rf"\A\W{{0,3}}([{self.letters}])(?:[.):\]*]|\Z)",
            rf"\(([{self.letters}])\)",
        )
        said = " ".join(text.split())
        found = next((hits for way in ways if (hits := re.findall(way, said))), None)
        return None if found is None else str(found[-1])

    def judge(self, row: Row, reply: str) -> Figures:
        right, found = self.letter(answer_of(row)), self.letter(stated(reply))
        if right is None:
            raise Unjudged(f"the row's answer names no letter of {self.letters}")
        return {"exact_match": float(found == right), "answered": float(found is not None)}


@dataclass(frozen=True)
class KnightsKnaves(Checker):
    """`exact_match`: everyone is called what the answer calls them; `correct`: the share; `answered`: all are named.

    Answer and reply say "Zoey is a knight" and "Oliver is a knave" (K&K, arXiv 2410.23123); a reply's last word about
    someone counts.
    """

    figures: ClassVar[tuple[str, ...]] = ("exact_match", "correct", "answered")
    SAID: ClassVar[re.Pattern[str]] = re.compile(r"\b(\w+)\s+is\s+(?:an?\s+)?\W{0,3}(knight|knave)\b", re.IGNORECASE)

    def judge(self, row: Row, reply: str) -> Figures:
        right, said = (
            {name.lower(): role.lower() for name, role in self.SAID.findall(text)}
            for text in (answer_of(row), stated(reply))
        )
        if not right:
            raise Unjudged("the row's answer names no knight and no knave")
        share = sum(said.get(name) == role for name, role in right.items()) / len(right)
        return {"exact_match": float(share == 1), "correct": share, "answered": float(right.keys() <= said.keys())}


# --- Shaping: the form of a reply, whatever the row.


@dataclass(frozen=True)
class Format(Checker):
    """`format`: the reply is a thinking part and an answer part, each in its tags, and nothing else.

    `tags`: the share of the four tags that occur exactly once, a smoother signal for a model that writes none.
    """

    figures: ClassVar[tuple[str, ...]] = ("format", "tags")

    thinking: str = key("think", "name of the tag around the thinking")
    answer: str = key("answer", "name of the tag around the answer")
    opened: bool = key(False, "the prompt ends with the opening tag of the thinking, so that replies lack it")

    def judge(self, row: Row, reply: str) -> Figures:
        tags = [tag for name in (self.thinking, self.answer) for tag in (f"<{name}>", f"</{name}>")]
        text = (tags[0] + reply if self.opened else reply).strip()
        once = [text.count(tag) == 1 for tag in tags]
        places = [text.find(tag) for tag in tags]
        between = text[places[1] + len(tags[1]) : places[2]]
        whole = all(once) and places == sorted(places) and not between.strip()
        whole = whole and text.startswith(tags[0]) and text.endswith(tags[3])
        return {"format": float(whole), "tags": sum(once) / len(once)}


@dataclass(frozen=True)
class Length(Checker):
    """`length`: 1 for up to `free` words, from there falling linearly to 0 at `limit` words."""

    figures: ClassVar[tuple[str, ...]] = ("length",)

    free: int = key(200, "words that cost nothing", ge=0)
    limit: int = key(400, "words from which on the figure is 0", ge=1)
    least: int = key(1, "a reply of fewer words has 0", ge=0)

    def problems(self) -> list[tuple[str, str]]:
        return [] if self.free < self.limit else [("free", f"must be below reward.limit={self.limit}")]

    def judge(self, row: Row, reply: str) -> Figures:
        words = len(reply.split())
        share = (self.limit - words) / (self.limit - self.free)
        return {"length": 0.0 if words < self.least else min(max(share, 0.0), 1.0)}


@dataclass(frozen=True)
class Repetition(Checker):
    """`distinct`: the share of different ones among the reply's n-grams of words; 1 where nothing is repeated."""

    figures: ClassVar[tuple[str, ...]] = ("distinct",)

    n: int = key(4, "words of an n-gram", ge=1)

    def judge(self, row: Row, reply: str) -> Figures:
        words = reply.lower().split()
        grams = [tuple(words[place : place + self.n]) for place in range(len(words) - self.n + 1)]
        return {"distinct": len(set(grams)) / len(grams) if grams else 1.0}
