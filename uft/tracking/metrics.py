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
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from uft.runs import Run, write_atomically, writing

if TYPE_CHECKING:  # it imports torch, and compare and ls read metrics
    from uft.evaluation.evaluate import Sample

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
        self._awaited: dict[Path, Seal] = {}  # of a line at that very step: written again soon, or lost

    def start(self) -> None:
        for path in (self.run.metrics_file, self.run.samples_file):
            self._written |= {text for step, text in self._take_over(path) if step == self.resumed_step}
            for file in (file_of(path), path):
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
        sealed: list[Seal] = []
        last = self.resumed_step
        if last is not None:
            found = check(path)
            kept = [(step, text) for step, text in _with_steps(found.lines) if step <= last]
            sealed = [of(step, text) for step, text in kept]
            lost = {step for step in (*found.damaged, *found.unsealed) if step <= last}
            if found.open_end and found.open_end[0] == last:  # a process may have died while it wrote that
                self._awaited[path] = found.open_end
                sealed.append(found.open_end)
            elif found.open_end and found.open_end[0] < last:
                lost.add(found.open_end[0])
            if lost:
                self.say(told(path.name, sorted(lost)))
        write_atomically(file_of(path), "".join(map(as_line, sealed)))
        write_atomically(path, "".join(text + "\n" for _, text in kept))
        return kept

    def _tell_lost(self, path: Path) -> None:
        """Nobody wrote it again, so that no process died over it. Its seal stays and tells other readers."""
        step, _ = self._awaited.pop(path)
        self.say(told(path.name, [step]))

    def _append(self, path: Path, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        assert path in self._files, "start() opens the files, finish() closes them"
        texts = [json.dumps({"step": int(step), **_plain(row)}, ensure_ascii=False, allow_nan=False) for row in rows]
        new = [text for text in texts if text not in self._written]
        if path in self._awaited and step > self._awaited[path][0]:
            self._tell_lost(path)
        for text in new:  # one after the other, so that whatever dies leaves one seal at most without its line
            seal = of(int(step), text)
            if seal == self._awaited.get(path):
                del self._awaited[path]  # and stands already
            else:
                self._write(file_of(path), as_line(seal))
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
    for step, text in _with_steps(check(run.metrics_file).lines):
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


# --- Seals: a checksum for every line of metrics.jsonl and samples.jsonl, so that a line the disk changed passes for
# none.
#
# Beside `metrics.jsonl` lies `.metrics.jsonl.seals` with `STEP CRC32` for each of its lines. A seal is written before
# its
# line, so that whatever dies in between leaves no line without one. A file without seals (copied alone, or of an
# earlier
# version) is taken as it is.


Seal = tuple[int, int]  # step, CRC-32 of the line without its end


@dataclass(frozen=True)
class Checked:
    """The lines that are what was written, and the steps of those that are not, or not there any more.

    The rest is damage unless a process died there: `open_end`, a last seal without a line (it was about to write it),
    and `unsealed`, steps past the last seal (it was about to drop what no checkpoint holds).
    """

    lines: list[str]
    damaged: list[int]
    torn: bool = field(default=False, compare=False)  # half a line follows, and nothing tells whether it was ever whole
    open_end: Seal | None = field(default=None, compare=False)
    unsealed: list[int] = field(default_factory=list, compare=False)

    @property
    def uncertain(self) -> set[int]:
        """Steps whose lines are damaged unless a process died there."""
        return {*self.unsealed, *([self.open_end[0]] if self.open_end else [])}


def file_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.seals")


def of(step: int, line: str) -> Seal:
    """The seal of a line without its end."""
    return step, zlib.crc32(line.encode("utf-8", "backslashreplace"))


def as_line(seal: Seal) -> str:
    step, crc = seal
    return f"{step} {crc:08x}\n"


def seal(step: int, line: str) -> str:
    """The seal of a line as it is written, with its end."""
    return as_line(of(step, line))


def check(path: Path) -> Checked:
    """Read `path`, also while it is being written: half a line at its end is left out and no damage."""
    *whole, rest = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    seals = _read(file_of(path))
    if seals is None:
        return Checked([line.decode("utf-8", "replace") for line in whole], [], torn=bool(rest))
    left = Counter(crc for _, crc in seals)
    good: list[str] = []
    unsealed: list[bytes] = []
    for line in whole:
        crc = zlib.crc32(line)
        if left[crc]:
            left[crc] -= 1
            good.append(line.decode("utf-8", "backslashreplace"))
        else:
            unsealed.append(line)
    last, open_end, beyond = seals[-1][0] if seals else -1, None, set[int]()
    if seals and left[seals[-1][1]] and (rest or len(whole) < len(seals)):
        left[seals[-1][1]] -= 1  # the process died between a seal and its line
        open_end = seals[-1]
    damaged = set(_steps(seals, left.copy()))
    if len(unsealed) > left.total():  # more than were changed: it is their seals that the disk took
        named = _named(unsealed)
        damaged |= {step for step in named if step <= last}
        beyond = named - damaged
    return Checked(good, sorted(damaged), open_end=open_end, unsealed=sorted(beyond))


def told(name: str, steps: Iterable[int]) -> str:
    """One line about lines that are damaged."""
    numbers = ", ".join(map(str, steps))
    return f"{name}: what was written at step {numbers} is damaged or lost (checksum), and left out"


def _steps(seals: list[Seal], left: Counter[int]) -> list[int]:
    found = set()
    for step, crc in reversed(seals):
        if left[crc]:
            left[crc] -= 1
            found.add(step)
    return sorted(found)


def _named(lines: Iterable[bytes]) -> set[int]:
    """The steps that lines without a seal speak of, as far as they can be read."""
    found = set()
    for line in lines:
        try:
            found.add(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
    return found


def _read(path: Path) -> list[Seal] | None:
    """The seals; None where there are none. What cannot be read of them ends them."""
    if not path.is_file():
        return None
    seals = []
    for line in path.read_text(encoding="ascii", errors="replace").split("\n")[:-1]:
        step, _, crc = line.partition(" ")
        try:
            seals.append((int(step), int(crc, 16)))
        except ValueError:
            continue
    return seals
