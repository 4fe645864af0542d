"""metrics.jsonl and samples.jsonl: the source of truth about a run. W&B only mirrors them.

One object per line, `step` first, flushed line by line, so that a killed process loses at most the line it was writing;
every line has a seal (`seals.py`).

Floats keep every digit. JSON has no NaN: such values are written as the strings "nan", "inf" and "-inf", which
`read_metrics` turns back into floats; a reader that does not know this sees a string, never a wrong number.

Training and evaluation write a line each for the same step. `read_metrics` merges them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from uft.disk import writing
from uft.evaluation.samples import Sample
from uft.runs import Run, write_atomically
from uft.tracking import seals

NOT_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Files:
    """Appends to the two files of a run.

    `resumed_step` is the step of the checkpoint that training continues from, None for a fresh start. Whatever an
    earlier process wrote beyond it is dropped, and a line that it had already written at that very step (a battery
    repeated because the checkpoint came before it) is not written twice: a resumed curve equals an uninterrupted one.
    """

    def __init__(
        self, run: Run, resumed_step: int | None = None, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.run = run
        self.resumed_step = resumed_step
        self.say = say  # hears of lines that are not what was written
        self._files: dict[Path, TextIO] = {}
        self._written: set[str] = set()
        self._awaited: dict[Path, seals.Seal] = {}  # of a line at that very step: written again soon, or lost

    def start(self) -> None:
        for path in (self.run.metrics_file, self.run.samples_file):
            self._written |= {text for step, text in self._take_over(path) if step == self.resumed_step}
            for file in (seals.file_of(path), path):
                # A lone surrogate (half an emoji in somebody's data) becomes its JSON escape instead of an error.
                self._files[file] = open(file, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        self._append(self.run.metrics_file, step, [metrics])

    def samples(self, step: int, samples: Sequence[Sample], stage: str | None = None) -> None:
        named = {} if stage is None else {"stage": stage}
        self._append(self.run.samples_file, step, (named | asdict(sample) for sample in samples))

    def secure(self) -> None:
        for path, file in self._files.items():
            with writing(path):
                os.fsync(file.fileno())

    def finish(self, status: str, exit_code: int, summary: Mapping[str, Any]) -> None:
        if status == "finished":  # otherwise the next sitting may write it yet
            for path in list(self._awaited):
                self._tell_lost(path)
        for file in self._files.values():
            with suppress(OSError):  # a line that could not be written has ended the run, and would be tried again
                file.close()
        self._files = {}

    def _take_over(self, path: Path) -> list[tuple[int, str]]:
        """The lines that are kept of an earlier sitting, in a file of their own. Seals first, as ever."""
        kept: list[tuple[int, str]] = []
        sealed: list[seals.Seal] = []
        last = self.resumed_step
        if last is not None:
            found = seals.check(path)
            kept = [(step, text) for step, text in _with_steps(found.lines) if step <= last]
            sealed = [seals.of(step, text) for step, text in kept]
            lost = {step for step in (*found.damaged, *found.unsealed) if step <= last}
            if found.open_end and found.open_end[0] == last:  # a process may have died while it wrote that
                self._awaited[path] = found.open_end
                sealed.append(found.open_end)
            elif found.open_end and found.open_end[0] < last:
                lost.add(found.open_end[0])
            if lost:
                self.say(seals.told(path.name, sorted(lost)))
        write_atomically(seals.file_of(path), "".join(map(seals.as_line, sealed)))
        write_atomically(path, "".join(text + "\n" for _, text in kept))
        return kept

    def _tell_lost(self, path: Path) -> None:
        """Nobody wrote it again, so that no process died over it. Its seal stays and tells other readers."""
        step, _ = self._awaited.pop(path)
        self.say(seals.told(path.name, [step]))

    def _append(self, path: Path, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        assert path in self._files, "start() opens the files, finish() closes them"
        texts = [json.dumps({"step": int(step), **_plain(row)}, ensure_ascii=False, allow_nan=False) for row in rows]
        new = [text for text in texts if text not in self._written]
        if path in self._awaited and step > self._awaited[path][0]:
            self._tell_lost(path)
        for text in new:  # one after the other, so that whatever dies leaves one seal at most without its line
            seal = seals.of(int(step), text)
            if seal == self._awaited.get(path):
                del self._awaited[path]  # and stands already
            else:
                self._write(seals.file_of(path), seals.as_line(seal))
            self._write(path, text + "\n")

    def _write(self, path: Path, content: str) -> None:
        with writing(path, len(content)):
            self._files[path].write(content)
            self._files[path].flush()


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """One dict per logged step, in order of steps: what training and evaluation wrote for it, together.

    Reads a run that is still being written, too. A torn last line, and lines that are damaged, are left out.
    """
    merged: dict[int, dict[str, Any]] = {}
    for step, text in _with_steps(seals.check(run.metrics_file).lines):
        line = json.loads(text)
        numbers = {name: value if name == "stage" else _number(value) for name, value in line.items()}
        merged.setdefault(step, {}).update(numbers)
    return [merged[step] for step in sorted(merged)]


def _with_steps(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """(step, line) of what is a line of ours at all."""
    for text in lines:
        try:
            yield int(json.loads(text)["step"]), text
        except (ValueError, KeyError, TypeError):
            continue


def _plain(value: Any) -> Any:
    """`value` in JSON's terms; numbers of numpy and torch become Python's."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _number(value: Any) -> Any:
    return NOT_NUMBERS.get(value, value) if isinstance(value, str) else value
