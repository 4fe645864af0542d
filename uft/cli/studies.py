"""Two small verbs that make no run: lake (objectives in a toy world) and advise (what finished runs suggest)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from uft.cli.manage import parser_of
from uft.config.messages import hint, nearest, written
from uft.errors import GOOD, Problem, UftError

T = TypeVar("T")

LAKE = """\
What do objectives learn of a world from one route through it? After the Frozen Lake of IFT's paper (2405.11870), whose
map, steps and seeds are not published: each key below is a choice that it leaves open. No run folder is made."""
ADVISE = """\
Experimental. Which settings to try next, by finished runs alone: a sum of tables over sets of settings is fitted to
their means, and what it predicts best among combinations whose every part was seen is proposed (after 2401.05442).
Often the answer is that nothing is known to be better than the best run. It needs 12 configurations and some seeds."""


def lake(arguments: list[str]) -> int:
    """`uft lake [key=value ...]`: the distance from the optimal policy that each objective ends at."""
    from uft.training.lake import Design, report, study, write_csv

    examples = """\
  uft lake                                          six methods, 8 maps, 10 seeds: a minute
  uft lake negative=hole stop=1600                  another rejected trajectory, eight times as long
  uft lake stop=best arms=sft,ift csv=lake.csv      the best of 28 rates and stops, by the measure itself"""
    words, design = asked("lake", LAKE, examples, Design, arguments)
    if words:
        raise UftError(Problem(words[0], "no such setting", "command line", ("settings are written key=value",)))
    found = study(design)
    print(report(design, found))
    if design.csv:
        write_csv(Path(design.csv), found)
    return GOOD


def advise(arguments: list[str]) -> int:
    """`uft advise [RUN | SWEEP | pattern ...] [key=value ...]`: what the finished runs suggest."""
    from uft.report.advise import Question
    from uft.report.advise import advise as advised
    from uft.report.runs import load, select

    examples = """\
  uft advise                                        of the newest sweep, by eval.best
  uft advise SWEEP metric=eval/exact_match          a sweep by name; a metric of your own
  uft advise SWEEP 'cliques=objective,optim.lr;data.ratio'  what acts together, where you know it"""
    words, question = asked("advise", ADVISE, examples, Question, arguments, "[RUN | SWEEP | pattern ...] ")
    print(advised([load(path) for path in select(words).runs], question))
    return GOOD


def asked(
    verb: str, description: str, examples: str, kind: type[T], arguments: Sequence[str], before: str = ""
) -> tuple[list[str], T]:
    """(words without a =, the settings of `kind`). UftError with everything that is wrong with them."""
    keys = {field.name: (field.default.description, field.default.default) for field in fields(kind)}  # type: ignore
    width = max(map(len, keys))
    table = "\n".join(f"  {key:<{width}}  {says}  [{written(default)}]" for key, (says, default) in keys.items())
    parser = parser_of(verb, description, f"{examples}\n\nSettings\n{table}")
    parser.usage = f"uft {verb} {before}[key=value ...]"
    parser.add_argument("words", nargs="*", metavar="WORD", help="see below")
    words = parser.parse_args(arguments).words
    given: dict[str, Any] = dict(word.partition("=")[::2] for word in words if "=" in word)
    problems = []
    for key in given.keys() - keys.keys():
        near = nearest(key, keys)
        advice = hint(near and f"{near}={given[key]}", "keys", list(keys))
        problems.append(Problem(f"{key}={given[key]}", "no such setting", "command line", (advice,)))
    try:
        settings = TypeAdapter(kind).validate_python({key: given[key] for key in given.keys() & keys.keys()})
    except ValidationError as error:
        wrong = {str(one["loc"][0]): one["msg"].removeprefix("Value error, ") for one in error.errors()}
        problems += [Problem(f"{key}={given[key]}", why, "command line") for key, why in wrong.items()]
    if problems:
        raise UftError(*problems, footer=f"Nothing was started.  All settings:  uft {verb} --help")
    return [word for word in words if "=" not in word], settings
