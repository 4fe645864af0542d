"""metrics.jsonl and samples.jsonl: the source of truth about a run. W&B only mirrors them.

One object per line, `step` first, flushed line by line, so that a killed process loses at most the line it was writing.
Floats keep every digit. JSON has no NaN: such values are written as the strings "nan", "inf" and "-inf", which
`read_metrics` turns back into floats; a reader that does not know this sees a string, never a wrong number.

Training and evaluation write a line each for the same step. `read_metrics` merges them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from uft.evaluation.samples import Sample
from uft.runs import Run, read_lines, write_atomically

NOT_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Files:
    """Appends to the two files of a run.

    `resumed_step` is the step of the checkpoint that training continues from, None for a fresh start. Whatever an
    earlier process wrote beyond it is dropped, and a line that it had already written at that very step (a battery
    repeated because the checkpoint came before it) is not written twice: a resumed curve equals an uninterrupted one.
    """

    def __init__(self, run: Run, resumed_step: int | None = None) -> None:
        self.run = run
        self.resumed_step = resumed_step
        self._files: dict[Path, TextIO] = {}
        self._written: set[str] = set()

    def start(self) -> None:
        for path in (self.run.metrics_file, self.run.samples_file):
            kept = list(_lines_until(path, self.resumed_step))
            write_atomically(path, "".join(text + "\n" for _, text in kept))
            self._written |= {text for step, text in kept if step == self.resumed_step}
            # A lone surrogate (half an emoji in somebody's data) becomes its JSON escape instead of an error.
            self._files[path] = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        self._append(self.run.metrics_file, step, [metrics])

    def samples(self, step: int, samples: Sequence[Sample], stage: str | None = None) -> None:
        named = {} if stage is None else {"stage": stage}
        self._append(self.run.samples_file, step, (named | asdict(sample) for sample in samples))

    def finish(self, status: str, exit_code: int, summary: Mapping[str, Any]) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def _append(self, path: Path, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        assert path in self._files, "start() opens the files, finish() closes them"
        for row in rows:
            text = json.dumps({"step": int(step), **_plain(row)}, ensure_ascii=False, allow_nan=False)
            if text not in self._written:
                self._files[path].write(text + "\n")
        self._files[path].flush()


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """One dict per logged step, in order of steps: what training and evaluation wrote for it, together.

    Reads a run that is still being written, too: a torn last line is left out.
    """
    merged: dict[int, dict[str, Any]] = {}
    for line in read_lines(run.metrics_file):
        numbers = {name: value if name == "stage" else _number(value) for name, value in line.items()}
        merged.setdefault(line["step"], {}).update(numbers)
    return [merged[step] for step in sorted(merged)]


def _lines_until(path: Path, last: int | None) -> Iterator[tuple[int, str]]:
    """(step, line) of the whole lines up to step `last`; nothing when `last` is None."""
    if last is None or not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                step = json.loads(text)["step"]
            except (json.JSONDecodeError, KeyError, TypeError):  # torn when the process was killed
                continue
            if step <= last:
                yield step, text.rstrip("\n")


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
