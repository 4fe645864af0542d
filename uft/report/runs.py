"""Select run folders and read them, whatever state they are in: finished, failed, running, damaged, or being deleted.

A fault of one folder is recorded in its `status` and `error` and never keeps the others from being shown. Only what
the report needs is read, so that a thousand folders take seconds.
"""

from __future__ import annotations

import glob
import json
import math
import operator
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from uft.config.frozen import flat
from uft.errors import Problem, UftError, first_line, problem_lines, raise_problems
from uft.runs import OUTPUTS, Run, bounded, lineage, named_folder, no_runs, shown, yaml_text
from uft.tracking import metrics
from uft.tracking.metrics import NOT_NUMBERS

RUN_FILES = frozenset(("config.yaml", "run.json", "metrics.jsonl", "result.json"))
FINISHED, UNREADABLE = "finished", "unreadable"
COSTS = ("seconds", "tokens", "supervised_tokens", "tokens_per_second", "peak_memory_bytes")
"""Totals of result.json about the run itself."""
VERSIONS = ("uft", "python", "torch", "transformers", "datasets", "peft", "numpy", "platform")
EVALS = "evals/"  # figures of `uft eval` begin so
OF_ONE_EVAL = ("format", "uft", "made", "seconds", "model", "figures")  # keys of its file that differ by nature
LARGEST = 2**63  # of integers; a larger one counts as infinite
BROKEN = (OSError, ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError, yaml.YAMLError)
"""Errors that reading a file of unknown content can raise."""
YamlLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # seven times as fast, where libyaml is there

Line = dict[str, Any]


@dataclass(frozen=True)
class Selection:
    """Runs to compare, a title for them, and the report's folder unless another is given."""

    runs: tuple[Path, ...]
    title: str
    folder: Path


def select(words: Sequence[str]) -> Selection:
    """The runs that the arguments of `uft compare` name; without any, the newest sweep below outputs/, else all runs.

    A word is a folder of runs, a pattern, or the name of something below outputs/. Raises UftError that lists every
    word without a run.
    """
    if not words:
        return as_selection(newest_runs())
    problems: list[Problem] = []
    chosen: dict[Path, Path] = {}
    for word in words:
        folder = named_folder(word)
        matches = [folder] if folder.is_dir() else [Path(path) for path in sorted(glob.glob(word, recursive=True))]
        runs = [run for match in matches if match.is_dir() for run in runs_below(match)]
        if not runs:
            problems += no_runs(Path(word)).problems
        for run in runs:
            chosen.setdefault(run.resolve(), run)
    raise_problems(problems, footer="See the runs here:  uft ls")
    return as_selection(chosen.values())


def as_selection(runs: Iterable[Path]) -> Selection:
    paths = tuple(sorted(runs))
    folder = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    return Selection(paths, folder.name or str(folder), Path(shown(folder)))


def runs_below(root: Path) -> list[Path]:
    """Run folders at or below `root`, by path; also those that lack a file or two. Does not descend into runs."""
    runs: list[Path] = []
    for folder, children, files in os.walk(root):
        if len(RUN_FILES.intersection(files)) > 1:
            runs.append(Path(folder))
            children.clear()
        children.sort()
    return runs


def newest_runs() -> list[Path]:
    """The runs of the sweep that was written to last, a sweep being a folder within a day's; else all runs."""
    runs = runs_below(OUTPUTS)
    if not runs:
        footer = "Make some:  uft train -m objective=sft,ift data=mix seed=1,2,3"
        raise UftError(Problem(f"{OUTPUTS}/", "no runs here"), footer=footer)
    sweeps: dict[Path, list[Path]] = defaultdict(list)
    for run in runs:
        if len(run.relative_to(OUTPUTS).parts) > 2:
            sweeps[run.parent].append(run)

    def modified(jobs: list[Path]) -> float:
        files = (job / name for job in jobs for name in ("run.json", "config.yaml"))
        return max((os.stat(file).st_mtime for file in files if file.exists()), default=0.0)

    return max(sweeps.values(), key=modified) if sweeps else runs


@dataclass(frozen=True)
class LoadedRun:
    """The content of one run folder. Every part may be empty."""

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
    evals: Mapping[str, tuple[float, str]] = field(default_factory=dict)  # `evals/NAME`: value, how it was measured

    @cached_property
    def items_read(self) -> tuple[tuple[Mapping[str, Any], ...], list[str]]:
        """What the last evaluation measured of every row, read when it is asked for; texts about lost lines."""
        notes = list[str]()
        try:
            return read_last(Run(self.path).items_file, notes, self.finished), notes
        except BROKEN as error:
            return (), [f"items.jsonl: {reason(error)}"]

    @property
    def items(self) -> tuple[Mapping[str, Any], ...]:
        return self.items_read[0]

    @property
    def finished(self) -> bool:
        return self.status == FINISHED

    @cached_property
    def final(self) -> dict[str, float]:
        """The last metrics, of result.json; else of metrics.jsonl."""
        final = self.result.get("final")
        return numbers(final if isinstance(final, Mapping) and final else metrics.final_metrics(self.lines))

    @cached_property
    def figures(self) -> dict[str, float]:
        """The last metrics, those of `uft eval`, and the totals of the run."""
        totals = {name: self.total(name) for name in COSTS}
        of_evals = {name: value for name, (value, _) in self.evals.items()}
        return {**self.final, **of_evals, **{name: value for name, value in totals.items() if value is not None}}

    def total(self, name: str) -> float | None:
        """A sum over the whole run (seconds, tokens, ...): of result.json, else of the last line that has it."""
        values = (number(line.get(name)) for line in (self.result, *reversed(self.lines)))
        return next((value for value in values if value is not None), None)

    @cached_property
    def facts(self) -> dict[str, str]:
        """Versions, code, device and data digests that the run was made with."""
        nodes = (self.info.get(key) for key in ("versions", "code"))
        versions, code = (node if isinstance(node, dict) else {} for node in nodes)
        facts = {
            "data digest": self.info.get("data_digest"),
            "data contents": self.data.get("digest"),
            "commit": code.get("commit"),
            "uncommitted changes": code.get("dirty"),
            "device": self.info.get("device"),
            "started from": lineage(self.info),
            **{name: versions.get(name) for name in VERSIONS},
            "torch": self.info.get("torch") or versions.get("torch"),
        }
        return {name: str(value) for name, value in facts.items() if value}


def load(path: Path) -> LoadedRun:
    """Read one run folder. Never raises for its content, nor for a file that is gone."""
    run, problems = Run(path), list[str]()

    def attempt(what: str, read: Callable[[], Any], default: Any, tell: bool = True) -> Any:
        try:
            return read()
        except BROKEN as error:
            if tell:
                problems.append(f"{what}: {reason(error)}")
            return default

    config = attempt("config.yaml", lambda: read_config(run.config_file), {})
    info = attempt("run.json", lambda: read_object(path / "run.json"), {})
    result = attempt("result.json", lambda: read_object(path / "result.json", absent=True), {})
    locked = attempt(".lock", run.locked, False, tell=False)
    status = UNREADABLE if problems else "running" if locked else str(result.get("status", "interrupted"))
    notes, ended = list[str](), status == FINISHED
    lines = attempt("metrics.jsonl", lambda: read_lines(run.metrics_file, notes, ended), ())
    samples = attempt("samples.jsonl", lambda: read_last(run.samples_file, notes, ended), (), tell=False)
    data = attempt("data.json", lambda: read_object(path / "data.json", absent=True), {}, tell=False)
    evals = attempt("evals", lambda: read_evals(path / "evals"), {})
    overrides = attempt("overrides.yaml", lambda: tuple(run.overrides()), (), tell=False)
    if not problems and not locked:
        problems += notes
    error = "\n".join([*problem_lines(str(result.get("error") or "")), *problems]) or None
    return LoadedRun(path, run.name, status, error, config, info, result, data, overrides, lines, samples, evals)


def read_evals(folder: Path) -> dict[str, tuple[float, str]]:
    """The figures that `uft eval` left: `evals/TASK/METRIC` of tasks, `evals/FILE/METRIC` of rows; the newest.

    The text beside a value has everything that it can be compared by.
    """
    evals: dict[str, tuple[float, str]] = {}
    files = [(read_object(file), file) for file in folder.glob("*.json")]
    for content, file in sorted(files, key=lambda pair: str(pair[0]["made"])):
        about = {key: value for key, value in content.items() if key not in OF_ONE_EVAL}
        for name, figure in content["figures"].items():
            own = {key: value for key, value in figure.items() if key not in ("name", "value", "stderr")}
            stem = f"{file.stem}/" if name.startswith("eval/") else ""
            value = number(figure["value"])
            if value is not None:
                evals[f"{EVALS}{stem}{name.removeprefix('eval/')}"] = value, json.dumps(about | own, sort_keys=True)
    return evals


def reason(error: Exception) -> str:
    """One line about a file that could not be read."""
    if isinstance(error, FileNotFoundError):
        return "is not there"
    if isinstance(error, yaml.YAMLError):
        mark = getattr(error, "problem_mark", None)
        return f"cannot be read as YAML{f', line {mark.line + 1}' if mark else ''}"
    if isinstance(error, json.JSONDecodeError):
        return f"cannot be read as JSON, line {error.lineno}"
    return first_line(error)


def read_object(path: Path, absent: bool = False) -> dict[str, Any]:
    """The file's JSON object; {} when there is no file and that is no fault."""
    if absent and not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("is not an object")
    return found


def read_config(path: Path) -> dict[str, Any]:
    """The configuration by dotted key, without empty dicts."""
    config = yaml.load(yaml_text(path), YamlLoader)
    if not isinstance(config, dict):
        raise ValueError("is not a configuration")
    bounded(config)
    return {key: value for key, value in flat(config) if value != {}}


def number(value: Any) -> float | None:
    """A JSON number, also one that is not finite and so was written as text; None for anything else."""
    kind = type(value)
    if kind is float:
        return value
    if kind is int:
        return value if abs(value) < LARGEST else math.inf if value > 0 else -math.inf
    return NOT_NUMBERS.get(value) if kind is str else None


def numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """The metrics among `found`: text, such as the stage of a pipeline, is none."""
    pairs = ((str(name), number(value)) for name, value in found.items() if name != "stage")
    return {name: value for name, value in pairs if value is not None}


def read_lines(path: Path, notes: list[str], ended: bool = False) -> tuple[Line, ...]:
    """The objects of metrics.jsonl, one per step, in order of steps; up to the first line that cannot be read.

    Lines without their checksum are left out. `notes` gets a text about every loss; `ended`: the writer finished, so
    that a missing last line is a loss too.
    """
    checked = checked_lines(path, notes, ended)
    if checked.torn:
        notes.append(f"{path.name} breaks off at line {len(checked.lines) + 1}")
    merged: dict[int, Line] = {}
    for count, text in enumerate(checked.lines, 1):
        if not text:
            continue
        try:
            line = json.loads(text)
            merged.setdefault(int(line["step"]), line).update(line)
        except BROKEN:
            notes.append(f"metrics.jsonl breaks off at line {count}")
            break
    return tuple(merged[step] for step in sorted(merged))


def read_last(path: Path, notes: list[str], ended: bool = False) -> tuple[Mapping[str, Any], ...]:
    """The objects of samples.jsonl or items.jsonl of the last step that has some; lines are in order of steps."""
    objects: list[Mapping[str, Any]] = []
    for text in reversed(checked_lines(path, notes, ended).lines):
        try:
            one = json.loads(text)
            if operator.index(one["step"]) < operator.index(objects[0]["step"] if objects else one["step"]):
                break
            objects.append(one)
        except BROKEN:
            continue
    return tuple(reversed(objects))


def checked_lines(path: Path, notes: list[str], ended: bool) -> metrics.Checked:
    """The lines that have their checksum; `notes` gets a text about the others."""
    if not path.is_file():
        return metrics.Checked([], [])
    checked = metrics.check(path)
    lost = {*checked.damaged}
    if ended:  # no process died there
        lost |= {*checked.unlisted, *(checked.pending or ())[:1]}
    if lost:
        notes.append(metrics.describe_damage(path.name, lost))
    return checked
