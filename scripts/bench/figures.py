"""Figures of a process, how those of one arm become a line, and how arms are compared."""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

EQUAL = 1e-4
"""Relative difference of a step's loss up to which two arms count as doing the same."""


class Arm(NamedTuple):
    """What is measured: a size of `setting.SIZES`, an objective, and who trains how."""

    size: str
    objective: str
    way: str

    def __str__(self) -> str:
        return "/".join(self)

    @classmethod
    def of(cls, text: str) -> Arm:
        return cls(*text.split("/"))


@dataclass(frozen=True)
class Figures:
    """Of one process. Seconds are means over the measured steps."""

    cpu: float  # all threads together
    wall: float
    peak_mb: float  # of the process, from its start on
    tokens: float  # of the sequences, padding not counted; a mean too
    losses: list[float]  # of every step, the one that warms up first


@dataclass
class Stopwatch:
    """Marks the end of every step; what is measured is between marks, so the fetching of rows is in it."""

    marks: list[tuple[float, float]] = field(default_factory=list)

    def mark(self) -> None:
        self.marks.append((time.process_time(), time.perf_counter()))

    def figures(self, losses: Sequence[float], tokens: Sequence[int], warm_up: int) -> Figures:
        """The first `warm_up` steps are not measured."""
        steps = len(self.marks) - warm_up
        (cpu, wall), (cpu_end, wall_end) = self.marks[warm_up - 1], self.marks[-1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        each = sum(tokens[warm_up:]) / steps
        return Figures((cpu_end - cpu) / steps, (wall_end - wall) / steps, peak, each, list(losses))


Found = dict[Arm, list[Figures]]


def read(file: Path | None) -> Found:
    """What earlier calls wrote; {} where there is nothing."""
    if file is None or not file.exists():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    return {Arm.of(arm): [Figures(**one) for one in runs] for arm, runs in content.items()}


def write(file: Path, found: Found) -> None:
    content = {str(arm): [asdict(one) for one in runs] for arm, runs in found.items()}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table(found: Mapping[Arm, Sequence[Figures]]) -> Iterator[str]:
    """A line per arm with the medians over its processes; arms of one size and objective stand together."""
    groups = dict.fromkeys((arm.size, arm.objective) for arm in found)
    for size, objective in groups:
        arms = [arm for arm in found if (arm.size, arm.objective) == (size, objective)]
        first = found[arms[0]]
        yield ""
        yield f"{objective}, {size}: {first[0].tokens:,.0f} tokens a step"
        yield f"  {'':26} {'wall s':>8} {'CPU s':>8} {'peak MB':>8} {'tokens/s':>9} {'times':>6}  runs"
        slowest = median(first, "wall")
        for arm in arms:
            yield _line(arm, found[arm], slowest, first[0].losses)


def _line(arm: Arm, runs: Sequence[Figures], slowest: float, losses: Sequence[float]) -> str:
    wall, cpu, peak = (median(runs, name) for name in ("wall", "cpu", "peak_mb"))
    speed, times = runs[0].tokens / wall, slowest / wall
    apart = max(difference(one.losses, losses) for one in runs)
    said = "" if apart <= EQUAL else f"   losses differ by {apart:.1e}"
    return f"  {arm.way:26} {wall:8.2f} {cpu:8.2f} {peak:8.0f} {speed:9.0f} {times:6.2f}  {len(runs):4}{said}"


def median(runs: Sequence[Figures], name: str) -> float:
    return statistics.median(getattr(one, name) for one in runs)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest relative one of the steps that both took."""
    return max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(ours, theirs, strict=False))
