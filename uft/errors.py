"""Errors for the user, exit codes, and the redaction of secrets.

A user's mistake raises `UftError` with every problem found, never just the first; an internal impossibility asserts.
Nothing here imports anything heavy: the text must be there in milliseconds.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache, partial
from types import TracebackType
from typing import Any
from urllib.parse import quote

LONGEST_TEXT = 4000  # characters of one text
UNRULY = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

ROW = re.compile(r":\d+$")
NUMBER = re.compile(r"(?<= is )-?[\d.]+(?:e[+-]?\d+)?(?=, )")
"""The value of a row in what is wrong with it: scores on another scale are one fault, not one for each value."""
COUNT = re.compile(r"\Auft: \d+ problems? in this request\s*")
"""The first line of a message with problems."""

GOOD, FAILED, BAD_REQUEST, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
"""Exit codes: finished; a run failed; bad request; stopped by a signal after a checkpoint; Ctrl-C likewise."""
CLOSED_PIPE = 141
"""The exit code that a shell reports of a program ended by SIGPIPE."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""They ask a run to stop after a checkpoint: the program forwards them, its worker answers them."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what, why, where it was set, and what would be right.

    The texts may come from data, models and configurations: secrets are hidden, characters that would move a
    terminal's cursor or turn its text become escapes, and texts are cut after `LONGEST_TEXT` characters.
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
    """A request that cannot be carried out: all `problems` found, a `footer` with the next command, the exit `code`."""

    def __init__(self, *problems: Problem | str, footer: str = "", code: int = BAD_REQUEST) -> None:
        self.problems = tuple(p if isinstance(p, Problem) else Problem(p, "") for p in problems)
        self.footer = redact(footer)
        self.code = code
        super().__init__(self.problems, self.footer, code)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments: the error crosses process boundaries."""
        return partial(type(self), *self.problems, footer=self.footer, code=self.code), ()

    def __str__(self) -> str:
        return render(self)


def tame(text: str) -> str:
    """`text` without secrets and control characters, cut to a length that can be shown."""
    text = redact(text)
    left = len(text) - LONGEST_TEXT
    return visible(text if left <= 0 else f"{text[:LONGEST_TEXT]} ... ({left:,} more characters)")


def visible(text: str) -> str:
    """`text` with characters that would move a terminal's cursor or turn its text as escapes. Line feeds stay."""
    return UNRULY.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def render(error: UftError) -> str:
    """The message as it is printed, columns aligned over all problems."""
    count = len(error.problems)
    # Column widths; one long text does not push the others away.
    what = min(max((len(problem.what) for problem in error.problems), default=0), 40)
    why = min(max((len(problem.why) for problem in error.problems if problem.where), default=0), 40)
    lines = [f"uft: {count} problem{'s' if count != 1 else ''} in this request", ""]
    shown_advice: set[str] = set()  # rows share their advice: it is said at the first of them
    for problem, more in once(error.problems):
        where = f"      ({problem.where})" if problem.where else ""
        lines.append(f"  {problem.what:<{what}}  {problem.why:<{why}}{where}".rstrip())
        if more:
            lines.append(f"      and the same of {len(more)} more: {', '.join(more[:4])}{' ...' * (len(more) > 4)}")
        of_row = ROW.search(problem.what) is not None
        lines += [f"      {line}" for line in problem.advice if not (of_row and line in shown_advice)]
        shown_advice.update(problem.advice)
        lines.append("")
    if error.footer:
        lines.append(error.footer)
    return "\n".join(lines).rstrip() + "\n"


def once(problems: Sequence[Problem]) -> list[tuple[Problem, list[str]]]:
    """Problems of rows (`rows.jsonl:17`) that differ in their line or a number alone told once, with the places of the
    others."""
    found: dict[tuple[object, ...], tuple[Problem, list[str]]] = {}
    for place, problem in enumerate(problems):
        of_row = ROW.search(problem.what)
        why = NUMBER.sub("", problem.why)
        key = (problem.what[: of_row.start()], why, problem.where, problem.advice) if of_row else (place,)
        if key in found:
            found[key][1].append(problem.what)
        else:
            found[key] = problem, []
    return list(found.values())


def raise_problems(problems: Collection[Problem], footer: str = "") -> None:
    """Raise these problems as one UftError, if there are any."""
    if problems:
        raise UftError(*problems, footer=footer)


def typed(key: str, value: str) -> str:
    """`key=value` as a word that a shell and Hydra take for just that, whatever characters the value has."""
    if _BARE.fullmatch(value) and value.lower() not in ("null", "true", "false", "nan", "inf"):
        return f"{key}={value}"
    inside = re.sub(r'(\\*)("|\Z)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), value)
    return shlex.quote(f'{key}="{inside}"')


_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_./+-]*")


def did_you_mean(
    word: str, options: Iterable[str], most: int = 1, cutoff: float = 0.6, shown: Callable[[str], object] = str
) -> tuple[str, ...]:
    """Lines of advice with the options that are spelled most like `word`, the nearest first, each as `shown`."""
    near = get_close_matches(word, list(options), most, cutoff)
    return tuple(f"did you mean  {shown(option)} ?" for option in near)


def run_all(checks: Iterable[Callable[[], None]]) -> None:
    """Run all of these, and raise what they raise as one UftError, each problem and footer once."""
    errors: list[UftError] = []
    for check in checks:
        try:
            check()
        except UftError as error:
            errors.append(error)
    if errors:
        problems = dict.fromkeys(problem for error in errors for problem in error.problems)
        footers = dict.fromkeys(error.footer for error in errors if error.footer)
        code = FAILED if any(error.code == FAILED for error in errors) else BAD_REQUEST
        raise UftError(*problems, footer="\n".join(footers), code=code)


def problem_lines(text: str) -> list[str]:
    """The lines of an error's text from the first one that says what is wrong: not the count of its problems."""
    return COUNT.sub("", text.strip()).strip().splitlines()


def first_line(error: BaseException) -> str:
    """The first line of a message, with the next where it ends with a colon; the class where there is none."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if others and first.endswith(":") else first


def tell(error: UftError) -> int:
    """Print what was wrong to stderr; its exit code."""
    print(render(error), file=sys.stderr, end="")
    return error.code


def stop_code(number: int | None) -> int:
    """The exit code of a process that one of SIGNALS asked to stop."""
    return INTERRUPTED if number == signal.SIGINT else STOPPED


@contextmanager
def signals_to(receive: Callable[[int], None], numbers: Iterable[int] = SIGNALS) -> Iterator[None]:
    """Within, `receive` is called with the number of a signal; at the end the handlers are those from before."""
    before = {number: signal.signal(number, lambda number, frame: receive(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tracing() -> bool:
    """Whether a person asked for tracebacks (--trace); workers inherit the answer."""
    return bool(os.environ.get("UFT_TRACE"))


# --- Secrets stay out of errors, logs and records of runs. A secret is the value of an environment variable that is
# named like one (WANDB_API_KEY, HF_TOKEN, DB_PASSWORD), or text in the form of a service's token, of a password in a
# URL or of a key in its query.


REDACTED = "***"
SHORTEST = 8  # characters of a value that is hidden; a shorter one would black out ordinary words
CERTAIN = 16  # characters from which a value inside another text is no coincidence

NAMED = re.compile(
    r"(^|_)(TOKENS?|KEYS?|SECRETS?|PASS|PASSWD|PASSPHRASE|CREDENTIALS?|PAT|AUTH)(_|$)|(TOKEN|KEY|SECRET|PASSWORD)$",
    re.IGNORECASE,
)
ABOUT = re.compile(r"_(FILE|PATH|DIR|URL|SOCK|NAME|TTL|TYPE)$", re.IGNORECASE)  # where a secret is, not the secret

FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|hf_oauth_\S{20,}|api_org_[A-Za-z]{20,}|wandb_v\d_\w{20,}|local-[0-9a-f]{40}"
    r"|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|sk-[\w-]{20,}|AKIA[0-9A-Z]{16}|xox[abeoprs]-[\w-]{10,})"
    r"|(?<=://)[^\s/@:'\"]*:[^\s/@'\"]+(?=@)"
    r"|(?<=://)[^\s/@:'\"]{20,}(?=@)"
    r"|(?i:(?<=bearer )[\w.~+/=-]{16,})"
    r"|(?i:(?<=[?&]token=)|(?<=[?&]key=)|(?<=[?&]api_key=)|(?<=[?&]access_token=)|(?<=[?&]password=)|(?<=[?&]secret=)"
    r"|(?<=[?&]sig=)|(?<=[?&]signature=)|(?<=[?&]x-amz-signature=)|(?<=[?&]x-amz-credential=))[^\s&'\"]+"
)
"""Tokens of the hub, W&B, GitHub, GitLab, OpenAI, AWS and Slack; what stands between :// and @; keys of a query."""


def secrets() -> dict[str, str]:
    """Value -> variable of every secret in the environment, the longest first: one may be part of another."""
    found = {
        value: name
        for name, value in os.environ.items()
        if NAMED.search(name) and not ABOUT.search(name) and len(value) >= SHORTEST and not value.isdigit()
    }
    values = (value for value in found if not os.path.exists(value))
    return {value: found[value] for value in sorted(values, key=len, reverse=True)}


def redact(text: str) -> str:
    """`text` with every secret in it hidden."""
    pattern = _pattern(tuple(secrets()))
    return FORMS.sub(REDACTED, pattern.sub(REDACTED, text) if pattern else text)


def redacted(value: Any) -> Any:
    """A JSON value with the secrets in its texts hidden, those in keys too."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact(key) if isinstance(key, str) else key: redacted(item) for key, item in value.items()}
    return [redacted(item) for item in value] if isinstance(value, list | tuple) else value


def secret_in(text: str, known: Mapping[str, str]) -> str | None:
    """The kind of secret that a setting holds, in words; None where it holds none. `known`: of `secrets`.

    Stricter than `redact`, which may hide a word too many: a setting is refused for it.
    """
    for value, name in known.items():
        if text == value or (len(value) >= CERTAIN and value in text):
            return f"the value of the environment variable {name}"
    return "what looks like a token or a password" if FORMS.search(text) else None


def tell_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook` of our processes: the traceback as Python prints it, without secrets."""
    print(redact("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")


@lru_cache(maxsize=8)
def _pattern(values: tuple[str, ...]) -> re.Pattern[str] | None:
    """The values, also as JSON, a URL and repr write them, and a private key line by line."""
    lines = [line for value in values for line in (value, *value.splitlines()) if len(line) >= SHORTEST]
    forms = [form for line in lines for form in (line, json.dumps(line)[1:-1], quote(line, safe=""), repr(line)[1:-1])]
    ordered = sorted(dict.fromkeys(forms), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None
