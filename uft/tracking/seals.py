"""Seals: a checksum for every line of metrics.jsonl and samples.jsonl, so that a line the disk changed passes for none.

Beside `metrics.jsonl` lies `.metrics.jsonl.seals` with `STEP CRC32` for each of its lines. A seal is written before its
line, so that whatever dies in between leaves no line without one. A file without seals (copied alone, or of an earlier
version) is taken as it is.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

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
