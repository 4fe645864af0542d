"""Checker: a frozen dataclass of settings and one method from a row and a reply to named figures in [0, 1].

Checkers are metrics of the evaluation and rewards of training alike. The figures of one reply add up to a reward where
a configuration gives them weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, cast

from uft.data.rows import Row

if TYPE_CHECKING:
    import torch

Figures = dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """The verdict of a checker on one reply.

    A reply that cannot be judged (it took too long, or too much memory) has every figure 0 and the reason. A row that
    cannot be judged (it lacks an answer) has no figures and the reason.
    """

    figures: Figures
    reason: str | None = None


class Unjudged(Exception):
    """The row lacks what its replies are judged by; the message says what."""


def key(default: Any, help: str, **rules: Any) -> Any:
    """A setting, and so a config key: default, one line of help, rules (ge, gt, le, lt, choices)."""
    return field(default=default, metadata={"help": help, **rules})


@dataclass(frozen=True)
class Checker:
    """Settings that every checker has, and the contract it fulfils.

    `isolated` checkers parse what a model wrote. They judge in a child process with limits, and import what they need
    for it within :meth:`judge`, so that the training process never does.
    """

    name: str = field(default="", metadata={"help": "public name of the reward"})
    method: str = field(default="", metadata={"help": "which class of uft/rewards computes it"})

    figures: ClassVar[tuple[str, ...]] = ()  # their names; the first is the one to look at
    columns: ClassVar[tuple[str, ...]] = ()  # of the data set, read besides the answer; kept as `Row.facts`
    packages: ClassVar[tuple[str, ...]] = ()  # modules to import that uft does not require
    isolated: ClassVar[bool] = False

    def problems(self) -> list[tuple[str, str]]:
        """(key, problem) where keys contradict each other; the limits of a single key are in its metadata."""
        return []

    def prepare(self) -> None:
        """Import what :meth:`judge` of an isolated checker needs: called in the child, before the time is taken."""
        for package in self.packages:
            import_module(package)

    def judge(self, row: Row, reply: str) -> Figures:
        """Every figure of one reply, each in [0, 1]. Raises :class:`Unjudged` with what the row lacks."""
        raise NotImplementedError

    def verdict(self, row: Row, reply: str) -> Verdict:
        """:meth:`judge` with its exceptions as reasons: one reply, or row, costs no other its verdict."""
        try:
            figures = self.judge(row, reply)
        except Unjudged as error:
            return Verdict({}, str(error))
        except Exception as error:  # a reply that the parser of this or that format cannot take
            return self.failed(f"{type(error).__name__}: {error}")
        return self.checked(figures)

    def verdicts(self, jobs: Sequence[tuple[Row, str]], device: torch.device | None) -> list[Verdict]:
        """Verdicts of many replies. `device`: where a checker that has a model puts it; None: the CPU."""
        return [self.verdict(row, reply) for row, reply in jobs]

    def failed(self, reason: str) -> Verdict:
        """The verdict on a reply that cannot be judged."""
        return Verdict(dict.fromkeys(self.figures, 0.0), " ".join(reason.split())[:200])

    def checked(self, figures: Any) -> Verdict:
        """Figures that have the promised names and range as a verdict, others as a failure."""
        if not isinstance(figures, Mapping) or set(figures) != set(self.figures):
            return self.failed(f"{self.method} gave other figures than {', '.join(self.figures)}")
        if wrong := [
            name
            for name, value in figures.items()
            if not (isinstance(value, Real) and 0 <= cast(float, value) <= 1)  # float() of a huge integer would raise
        ]:
            return self.failed(f"{self.method} gave {wrong[0]}={figures[wrong[0]]}, not a number from 0 to 1")
        return Verdict({name: float(figures[name]) for name in self.figures})


# --- What checkers read of a row and of a reply.


def gold(row: Row) -> str | None:
    """The right reply: the row's answer, else its best completion if that is good, else None."""
    if row.answer is not None or not row.completions:
        return row.answer
    from uft.objectives.views import good_completion

    good = good_completion(row)
    return None if good is None else good.text


def answer_of(row: Row) -> str:
    """As :func:`gold`; Unjudged where there is none."""
    right = gold(row)
    if right is None:
        raise Unjudged("the row has no answer")
    return right


def fact(row: Row, *columns: str) -> Any:
    """The row's value in the first of these columns that it has; Unjudged where it has none."""
    for column in columns:
        if column in row.facts:
            return row.facts[column]
    raise Unjudged(f"the row has no column {' or '.join(columns)}")


def answered(reply: str) -> str:
    """The reply after its thought, if it has one."""
    return reply.rpartition("</think>")[2]


def stated(reply: str) -> str:
    """The text between the last pair of answer tags; of a reply without them all that follows its thought."""
    end = reply.rfind("</answer>")
    start = reply.rfind("<answer>", 0, max(end, 0))
    return (reply[start + len("<answer>") : end] if start >= 0 else answered(reply)).strip()
