"""What a user is told when a request cannot be carried out.

A user's mistake raises :class:`UftError` with every problem found, never just the first; an internal
impossibility asserts. Nothing here imports anything heavy: the text must be there in milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from uft.redact import redact

LONGEST = 4000  # characters of one text
UNRULY = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

GOOD, FAILED, BAD_REQUEST, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
"""Exit codes: finished; a run failed; bad request; stopped by a signal after a checkpoint; Ctrl-C likewise."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what, why, where it was set, and what would be right.

    Much of it was written by data, models and configurations. Secrets in it are hidden, characters that would move a
    terminal's cursor or turn its text are shown as escapes, and what is endless is cut.
    """

    what: str  # as the user wrote it: "objective.bta=0.2"
    why: str  # "no such key in objective=dpo"
    where: str = ""  # "command line", "conf/data/mix.yaml", "rows.jsonl:17"
    advice: tuple[str, ...] = ()  # "did you mean  objective.beta ?", "keys: beta, label_smoothing"

    def __post_init__(self) -> None:
        for name in ("what", "why", "where"):
            object.__setattr__(self, name, tame(getattr(self, name)))
        object.__setattr__(self, "advice", tuple(map(tame, self.advice)))


class UftError(Exception):
    """A request that cannot be carried out; the message is for the person who made it.

    `problems` are all that was found, `footer` is what to do next, `code` the exit status.
    """

    def __init__(self, *problems: Problem | str, footer: str = "", code: int = BAD_REQUEST) -> None:
        self.problems = tuple(p if isinstance(p, Problem) else Problem(p, "") for p in problems)
        self.footer = redact(footer)
        self.code = code
        super().__init__(self.problems, self.footer, code)

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes it travels as what it was made of."""
        return partial(type(self), *self.problems, footer=self.footer, code=self.code), ()

    def __str__(self) -> str:
        return render(self)


def tame(text: str) -> str:
    """`text` as it may be shown."""
    text = redact(text)
    whole = text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text) - LONGEST:,} more characters)"
    return UNRULY.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), whole)


def render(error: UftError) -> str:
    """The message as it is printed, columns aligned over all problems."""
    count = len(error.problems)
    what = _column(problem.what for problem in error.problems)
    why = _column(problem.why for problem in error.problems if problem.where)
    lines = [f"uft: {count} problem{'s' if count != 1 else ''} in this request", ""]
    for problem in error.problems:
        where = f"      ({problem.where})" if problem.where else ""
        lines.append(f"  {problem.what:<{what}}  {problem.why:<{why}}{where}".rstrip())
        lines += [f"      {line}" for line in problem.advice]
        lines.append("")
    if error.footer:
        lines.append(error.footer)
    return "\n".join(lines).rstrip() + "\n"


def _column(texts: Iterable[str]) -> int:
    """Width of a column; one long text does not push the others away."""
    return min(max(map(len, texts), default=0), 40)
