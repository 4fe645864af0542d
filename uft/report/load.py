"""A run folder as it is found: finished, failed, running, torn, from another version, or gone while it is read.

Whatever is wrong with one folder is written down in its `status` and `error`; it never keeps the others from being
shown. Only what the report needs is read, so that a thousand folders take seconds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from uft.config.freeze import flat
from uft.runs import Run, bounded, shown
from uft.tracking import metrics
from uft.tracking.metrics import NOT_NUMBERS

T = TypeVar("T")
FINISHED, UNREADABLE = "finished", "unreadable"
AXES = ("step", "rows", "tokens", "supervised_tokens", "seconds", "epoch")
LARGEST = 2**63
EVAL = "eval/"
LAST = ("loss", "nll")  # of training, beside the last battery
BROKEN = (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError, yaml.YAMLError)
"""What reading a file of unknown content can raise."""

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # seven times as fast, where libyaml is there
BLOCK = re.compile(r"^(?=[A-Za-z_])", re.MULTILINE)

Line = dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """What one run folder says. Everything may be empty."""

    path: Path
    name: str
    status: str
    error: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)  # by dotted key
    info: Mapping[str, Any] = field(default_factory=dict)  # run.json
    result: Mapping[str, Any] = field(default_factory=dict)  # result.json
    data: Mapping[str, Any] = field(default_factory=dict)  # data.json
    overrides: tuple[str, ...] = ()
    lines: tuple[Line, ...] = ()  # of metrics.jsonl, by step
    samples: tuple[Mapping[str, Any], ...] = ()  # of the last step that has some

    @property
    def finished(self) -> bool:
        return self.status == FINISHED

    @property
    def final(self) -> dict[str, float]:
        """The last figures: of result.json, else of what was measured so far."""
        found = self.result.get("final")
        return numbers(found) if isinstance(found, Mapping) and found else last_figures(self.lines)

    def total(self, name: str) -> float | None:
        """A sum of the whole run (seconds, tokens, ...): of result.json, else of the last line that has it."""
        found = number(self.result.get(name))
        if found is not None:
            return found
        return next((value for line in reversed(self.lines) if (value := number(line.get(name))) is not None), None)


def load(path: Path) -> Loaded:
    """Read one run folder. Never raises for what is in it, or no longer in it."""
    run, problems = Run(path), list[str]()

    def attempt(what: str, read: Callable[[], T], instead: T, tell: bool = True) -> T:
        try:
            return read()
        except BROKEN as error:
            if tell:
                problems.append(f"{what}: {reason(error)}")
            return instead

    nothing: dict[str, Any] = {}
    config = attempt("config.yaml", lambda: read_config(run.config_file.read_text(encoding="utf-8")), nothing)
    info = attempt("run.json", lambda: read_object(path / "run.json"), nothing)
    result = attempt("result.json", lambda: read_object(path / "result.json", absent=True), nothing)
    locked = attempt(".lock", run.locked, False, tell=False)
    status = "running" if locked else str(result.get("status", "interrupted"))
    notes: list[str] = []
    if problems:
        status = UNREADABLE
    ended = status == FINISHED
    lines: tuple[Line, ...] = attempt("metrics.jsonl", lambda: read_lines(run.metrics_file, notes, ended), ())
    none: tuple[Mapping[str, Any], ...] = ()
    samples = attempt("samples.jsonl", lambda: read_samples(run.samples_file, notes, ended), none, tell=False)
    if notes and not locked and not problems:
        problems += notes
    said = str(result.get("error") or "").strip()
    return Loaded(
        path=path,
        name=run.name,
        status=status,
        error="\n".join([*filter(None, [said]), *problems]) or None,
        config=config,
        info=info,
        result=result,
        data=attempt("data.json", lambda: read_object(path / "data.json", absent=True), nothing, tell=False),
        overrides=attempt("overrides.yaml", lambda: read_overrides(path / "overrides.yaml"), (), tell=False),
        lines=lines,
        samples=samples,
    )


def reason(error: Exception) -> str:
    """One line about a file that could not be read."""
    if isinstance(error, FileNotFoundError):
        return "is not there"
    if isinstance(error, yaml.YAMLError):
        mark = getattr(error, "problem_mark", None)
        return f"cannot be read as YAML{f', line {mark.line + 1}' if mark else ''}"
    if isinstance(error, json.JSONDecodeError):
        return f"cannot be read as JSON, line {error.lineno}"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def read_object(path: Path, absent: bool = False) -> dict[str, Any]:
    """The file's JSON object; {} when there is no file and that is no fault."""
    if absent and not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("is not an object")
    return found


def read_config(text: str) -> dict[str, Any]:
    """The configuration by dotted key, without empty dicts.

    Runs of a sweep share most of their text, so every top-level block is parsed once. Text that cannot be cut so
    (anchors, documents) is parsed as a whole.
    """
    try:
        found = [pair for block in BLOCK.split(text) if block.strip() for pair in parsed(block)]
    except BROKEN:
        found = []
    return dict(found or flattened(text))


@lru_cache(maxsize=4096)
def parsed(block: str) -> tuple[tuple[str, Any], ...]:
    return flattened(block)


def flattened(text: str) -> tuple[tuple[str, Any], ...]:
    found = yaml.load(text, Loader)
    if not isinstance(found, dict):
        raise ValueError("is not a configuration")
    bounded(found)
    return tuple((key, value) for key, value in flat(found) if value != {})


def read_overrides(path: Path) -> tuple[str, ...]:
    """What was typed, word by word. Our own files have a JSON string per line, which is quicker to read than YAML."""
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        found = [json.loads(line.removeprefix("- ")) for line in lines]
    except ValueError:
        found = yaml.load("\n".join(lines), Loader) or []
    return tuple(str(word) for word in found)


def number(value: Any) -> float | None:
    """A figure, also one that is not finite and so was written as text; None for anything else."""
    kind = type(value)  # JSON has no other numbers
    if kind is float:
        return value
    if kind is int:
        return value if abs(value) < LARGEST else math.inf if value > 0 else -math.inf
    return NOT_NUMBERS.get(value) if kind is str else None


def numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """The figures among `found`: text, such as the stage of a pipeline, is none."""
    pairs = ((str(name), number(value)) for name, value in found.items() if name != "stage")
    return {name: value for name, value in pairs if value is not None}


def read_checked(path: Path, notes: list[str], ended: bool) -> metrics.Checked:
    """The lines that have their checksum; `notes` gets a line about the others. `ended`: nobody died while it wrote."""
    checked = metrics.check(path)
    if damaged := sorted({*checked.damaged, *(checked.uncertain if ended else ())}):
        notes.append(metrics.told(path.name, damaged))
    return checked


def read_lines(path: Path, notes: list[str], ended: bool = False) -> tuple[Line, ...]:
    """The objects of metrics.jsonl, one per step, in order of steps.

    What follows a line that cannot be read is left out, and so are lines without their checksum; `notes` gets a line
    about it.
    """
    if not path.is_file():
        return ()
    checked = read_checked(path, notes, ended)
    if checked.torn:
        notes.append(f"{path.name} breaks off at line {len(checked.lines) + 1}")
    text = "\n".join(checked.lines)
    merged: dict[int, Line] = {}
    for count, line in enumerate(objects(text), 1):
        try:
            merged.setdefault(int(line["step"]), line).update(line)
        except (ValueError, TypeError, KeyError, OverflowError, AttributeError):
            notes.append(f"metrics.jsonl breaks off at line {count}")
            break
    return tuple(merged[step] for step in sorted(merged))


def objects(text: str) -> list[Any]:
    """The values of a JSON Lines text up to the first that cannot be read, which is given as None.

    One call for the whole text is twice as fast as one for each line; a torn text is read line by line.
    """
    rows = text.rstrip("\n").split("\n") if text else []
    try:
        found = json.loads(f"[{','.join(rows)}]")
    except (ValueError, RecursionError):
        return [*whole(rows), None]
    return found if len(found) == len(rows) else [*whole(rows), None]


def whole(rows: Sequence[str]) -> Iterator[Any]:
    for row in rows:
        try:
            yield json.loads(row)
        except (ValueError, RecursionError):
            return


def last_figures(lines: tuple[Line, ...]) -> dict[str, float]:
    """The last training loss and likelihood and the last battery, as result.json would have them."""
    training = {name: line[name] for line in lines for name in LAST if name in line}
    batteries = (found for line in reversed(lines) if (found := {k: v for k, v in line.items() if k.startswith(EVAL)}))
    return numbers({**training, **next(batteries, {})})


def read_samples(path: Path, notes: list[str], ended: bool = False) -> tuple[Mapping[str, Any], ...]:
    """The samples of the last step that has some; a line that cannot be read ends the reading, and those without
    their checksum are left out."""
    if not path.is_file():
        return ()
    found: dict[int, list[Mapping[str, Any]]] = {}
    for sample in objects("\n".join(read_checked(path, notes, ended).lines)):
        if not isinstance(sample, dict) or type(sample.get("step")) is not int:
            break
        found.setdefault(sample["step"], []).append(sample)
    return tuple(found[max(found)]) if found else ()


def place(path: Path) -> str:
    return shown(path.resolve())
