"""metrics.jsonl, samples.jsonl and items.jsonl: the record of a run, one JSON object a line. W&B mirrors two.

`step` comes first in a line, and lines are flushed one by one: a killed process loses at most the line that it was
writing. Floats keep every digit. JSON has no NaN: such values are written as the strings "nan", "inf" and "-inf", which
`read_metrics` turns back into floats; a reader that does not know this sees a string, never a wrong number. Training
and evaluation write a line each for the same step, and `read_metrics` merges them.

Checksums: `.metrics.jsonl.seals` has `STEP CRC32` for each line of `metrics.jsonl`, written before the line, so that a
line that the disk changed or lost is known. A file without checksums (copied alone) is taken as it is.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from uft.runs import Run, write_atomically, writing

if TYPE_CHECKING:  # it imports torch, and compare and ls read metrics
    from uft.evaluation.evaluate import Item, Sample

NOT_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
PREFIX = "eval/"
RISE, LEAST_RISE = 1.25, 0.25  # of nll since before training, as a factor and in nats: more is told
FEW = 3  # metric lines whose means are compared
GONE = 0.05  # of the entropy that there was: less is told
LARGEST_KL = {True: 20.0, False: 100.0}
"""Nats: of a token of the data more than a uniform guess over any vocabulary is away from certainty; of own samples."""
Checksum = tuple[int, int]  # step, CRC-32 of the line without its end


class Files:
    """Appends to the three files of a run.

    `resumed_step` is the step of the checkpoint that training continues from, None for a fresh start. Lines of later
    steps are dropped, and lines of that very step (an evaluation repeated because the checkpoint came before it) are
    not written twice: a resumed curve equals an uninterrupted one. `say` is told of lines that are damaged or lost.
    """

    def __init__(self, run: Run, resumed_step: int | None = None, say: Callable[[str], None] = lambda _: None) -> None:
        self.run, self.resumed_step, self.say = run, resumed_step, say
        self._files: dict[Path, TextIO] = {}
        self._written: set[str] = set()  # lines of the resumed step
        self._pending: dict[Path, Checksum] = {}  # of a line of the resumed step: written again soon, or lost

    def start(self) -> None:
        for path in (self.run.metrics_file, self.run.samples_file, self.run.items_file):
            self._keep_lines(path)
            for file in (checksum_file(path), path):
                # A lone surrogate (half an emoji in the data) becomes its JSON escape instead of an error.
                self._files[file] = open(file, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        self._append(self.run.metrics_file, step, [metrics])

    def samples(self, step: int, samples: Sequence[Sample], stage: str | None = None) -> None:
        named = {} if stage is None else {"stage": stage}
        self._append(self.run.samples_file, step, (named | asdict(sample) for sample in samples))

    def items(self, step: int, items: Sequence[Item], stage: str | None = None, answers: bool = False) -> None:
        named = {} if stage is None else {"stage": stage}
        self._append(self.run.items_file, step, (named | item.record(answers) for item in items))

    def secure(self) -> None:
        for path, file in self._files.items():
            with writing(path):
                os.fsync(file.fileno())

    def finish(self, status: str, exit_code: int, summary: Mapping[str, Any]) -> None:
        for path in list(self._pending) if status == "finished" else ():  # else the next session may write its line
            self._report_lost(path)
        for file in self._files.values():
            with suppress(OSError):  # a line that could not be written has ended the run, and would be tried again
                file.close()
        self._files = {}

    def _keep_lines(self, path: Path) -> None:
        """Rewrite the file with the lines up to the resumed step. Checksums first: no line is ever without one."""
        texts, checksums, last = list[str](), list[Checksum](), self.resumed_step
        if last is not None:
            checked = check(path)
            for text, row in _parse(checked.lines):
                if row["step"] <= last:
                    texts.append(text)
                    checksums.append((row["step"], _crc(text)))
                if row["step"] == last:
                    self._written.add(text)
            lost = {*checked.damaged, *checked.unlisted}
            if checked.pending and checked.pending[0] == last:  # a process may have died while it wrote this line
                self._pending[path] = checked.pending
                checksums.append(checked.pending)
            elif checked.pending:
                lost.add(checked.pending[0])
            if lost := {step for step in lost if step <= last}:
                self.say(describe_damage(path.name, lost))
        write_atomically(checksum_file(path), "".join(f"{step} {crc:08x}\n" for step, crc in checksums))
        write_atomically(path, "".join(text + "\n" for text in texts))

    def _report_lost(self, path: Path) -> None:
        """The pending line was not written again, so the disk lost it. Its checksum stays and tells other readers."""
        self.say(describe_damage(path.name, [self._pending.pop(path)[0]]))

    def _append(self, path: Path, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        assert path in self._files, "start() opens the files, finish() closes them"
        texts = [json.dumps({"step": int(step), **_plain(row)}, ensure_ascii=False, allow_nan=False) for row in rows]
        if path in self._pending and step > self._pending[path][0]:
            self._report_lost(path)
        for text in texts:  # one after the other: a process that dies leaves at most one checksum without its line
            if text in self._written:
                continue
            if self._pending.get(path) == (int(step), _crc(text)):
                del self._pending[path]  # its checksum is in the file already
            else:
                self._write(checksum_file(path), checksum_line(step, text))
            self._write(path, text + "\n")

    def _write(self, path: Path, content: str) -> None:
        with writing(path, len(content)):
            self._files[path].write(content)
            self._files[path].flush()


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """One dict per logged step, in order of steps: what training and evaluation wrote for it, merged.

    Also reads a run that is being written. A torn last line, and lines that are damaged, are left out.
    """
    merged: dict[int, dict[str, Any]] = {}
    for _, row in _parse(check(run.metrics_file).lines):
        for name, value in row.items():
            if isinstance(value, str) and name != "stage":
                row[name] = NOT_NUMBERS.get(value, value)
        merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


def read_samples(run: Run) -> dict[int, list[dict[str, Any]]]:
    """The rows of samples.jsonl by step, in order of steps. Damaged lines are left out."""
    found: dict[int, list[dict[str, Any]]] = {}
    for _, row in _parse(check(run.samples_file).lines):
        found.setdefault(row["step"], []).append(row)
    return dict(sorted(found.items()))


def final_metrics(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The last training loss, likelihood and reward, and the last evaluation."""
    final: dict[str, Any] = {}
    for line in lines:
        evaluated = {name: value for name, value in line.items() if name.startswith("eval/")}
        if evaluated:
            final = {name: value for name, value in final.items() if not name.startswith("eval/")}
        final |= {name: line[name] for name in ("loss", "nll", "rollout/reward") if name in line} | evaluated
    return final


def _parse(lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, its object) of the lines that are objects with a step."""
    for text in lines:
        with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
            row = json.loads(text)
            row["step"] = int(row["step"])
            yield text, row


def _plain(value: Any) -> Any:
    """`value` in JSON's terms; numbers of numpy and torch become Python's."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    number = float(value)
    return number if math.isfinite(number) else str(number)


# --- Checksums


@dataclass(frozen=True)
class Checked:
    """The undamaged lines of a file, and the steps of lines that are damaged or lost.

    Two findings are damage unless a process died there: `pending`, a last checksum without its line (the process was
    about to write it), and `unlisted`, the steps of lines past the last checksum (it was about to drop them on resume).
    """

    lines: list[str]
    damaged: list[int]
    torn: bool = False  # half a line at the end of a file without checksums
    pending: Checksum | None = None
    unlisted: Sequence[int] = ()


def check(path: Path) -> Checked:
    """Compare the lines of `path` with their checksums, also while it is being written."""
    *lines, rest = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    if not checksum_file(path).is_file():
        return Checked([line.decode("utf-8", "replace") for line in lines], [], torn=bool(rest))
    checksums: list[Checksum] = []
    for text in checksum_file(path).read_text(encoding="ascii", errors="replace").split("\n")[:-1]:
        step, _, digits = text.partition(" ")
        with suppress(ValueError):  # a damaged checksum
            checksums.append((int(step), int(digits, 16)))
    missing = Counter(crc for _, crc in checksums)
    good, unknown = list[str](), list[str]()
    for line in lines:
        own = zlib.crc32(line)
        (good if missing[own] > 0 else unknown).append(line.decode("utf-8", "backslashreplace"))
        missing[own] -= 1
    missing = +missing
    last, pending, unlisted = (-1, 0), None, set[int]()
    if checksums:
        last = checksums[-1]
        if missing[last[1]] and (rest or len(lines) < len(checksums)):
            pending = last
            missing[last[1]] -= 1
    damaged = {step for step, crc in checksums if missing[crc]}
    if len(unknown) > missing.total():  # more lines than were changed: their checksums are what the disk lost
        steps = {row["step"] for _, row in _parse(unknown)}
        damaged |= {step for step in steps if step <= last[0]}
        unlisted = steps - damaged
    return Checked(good, sorted(damaged), pending=pending, unlisted=sorted(unlisted))


def checksum_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.seals")


def checksum_line(step: int, text: str) -> str:
    """The line of the checksum file for a line `text` without its end."""
    return f"{int(step)} {_crc(text):08x}\n"


def describe_damage(name: str, steps: Iterable[int]) -> str:
    """One line about lines that are damaged."""
    numbers = ", ".join(map(str, sorted(steps)))
    return f"{name}: what was written at step {numbers} is damaged or lost (checksum), and left out"


def _crc(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "backslashreplace"))


# --- What metric lines say of a run.


def by_source(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The metrics of an evaluation by source; "" is all sources together."""
    grouped: dict[str, dict[str, float]] = {"": {}}
    for name, value in metrics.items():
        source, _, metric = name.removeprefix(PREFIX).rpartition("/")
        if name.startswith(PREFIX):
            grouped.setdefault(source, {})[metric] = value
    return grouped


def collapses(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What says that a run has collapsed, in words and with what helps, by kind; empty of a sound run.

    Likelihood: good answers are much less likely than before the first step; without an evaluation then and later, than
    in the first lines, while the loss fell. Entropy: that of own samples is gone. kl: an estimate beyond any bound.
    """
    steps = sorted((line for line in lines if "step" in line), key=itemgetter("step"))
    evaluated = [line for line in steps if f"{PREFIX}nll" in line]
    trained = [line for line in steps if "loss" in line]
    trained = [line for line in trained if line.get("stage") == trained[-1].get("stage")]
    first, last = trained[:FEW], trained[FEW:][-FEW:]

    def change(name: str) -> tuple[float, float]:
        """Means over the first lines and the last ones; infinite where there are too few."""
        ends = ([line[name] for line in end if name in line] for end in (first, last))
        before, now = (sum(end) / FEW if len(end) == FEW else math.inf for end in ends)
        return before, now

    notes = {}
    if len(evaluated) > 1 and evaluated[0]["step"] == 0:
        before, now = (by_source(line) for line in (evaluated[0], evaluated[-1]))
        there = [name for name, metrics in now.items() if "nll" in metrics and "nll" in before.get(name, {})]
        rises = {name: (before[name]["nll"], now[name]["nll"]) for name in there}
        sunk = {name: f"{old:.2f} to {new:.2f}" for name, (old, new) in rises.items() if risen(old, new)}
        parts = ", ".join(f"{name} {figures}" for name, figures in sunk.items() if name)
        if "" in sunk:
            notes["likelihood"] = f"eval/nll {sunk['']} since step 0{f' ({parts})' if parts else ''}"
    elif risen(*change("nll")) and change("loss")[1] < change("loss")[0]:
        figures = ("{} {:.2f} to {:.2f}".format(name, *change(name)) for name in ("nll", "loss"))
        notes["likelihood"] = f"{', '.join(figures)} of the training rows, from the first lines to the last"
    if "likelihood" in notes:
        notes["likelihood"] = (
            f"good answers have become less likely: {notes['likelihood']}. A lower learning rate, or a likelihood term "
            "(sft_weight, demonstrations in the mixture), holds them"
        )
    was, entropy = change("objective/entropy")
    if entropy < GONE * was:
        notes["entropy"] = (
            f"own samples are all alike: objective/entropy {was:.3g} to {entropy:.3g} nats a token. A lower learning "
            "rate, an entropy term (objective.entropy) or a divergence term (objective.kl) keeps them apart"
        )
    newest = {name: value for line in (*evaluated[-1:], *lines[-1:]) for name, value in line.items()}
    estimates = {name: value for name, value in newest.items() if name.rpartition("/")[2] == "kl"}
    bounds = {name: LARGEST_KL[name.startswith(PREFIX)] for name in estimates}
    if names := [name for name, value in estimates.items() if not value <= bounds[name]]:
        notes["kl"] = (
            f"{', '.join(name.removeprefix(PREFIX) for name in names)}: no estimate. Tokens that the model has made "
            "all but impossible outweigh all others; read nll instead"
        )
    return notes


def risen(old: float, new: float) -> bool:
    """Whether a negative log-likelihood is much larger than it was, or nan."""
    return not new <= max(RISE * old, old + LEAST_RISE)
