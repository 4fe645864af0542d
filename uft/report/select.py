"""What the words of `uft compare` mean: run folders, folders of runs, patterns, names of sweeps, or nothing at all."""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from uft.errors import Problem, UftError

OUTPUTS = Path("outputs")
FILES = frozenset(("config.yaml", "run.json", "metrics.jsonl", "result.json"))
SEE = "See the runs here:  uft ls"


@dataclass(frozen=True)
class Selection:
    """Runs to compare, a title for them, and where the report goes when nothing else is said."""

    runs: tuple[Path, ...]
    title: str
    folder: Path


def select(words: Sequence[str]) -> Selection:
    """The runs that `words` mean. Raises UftError with every word that means none."""
    if not words:
        return newest()
    problems: list[Problem] = []
    found: dict[Path, Path] = {}
    for word in words:
        runs = [run for folder in meant(word) for run in runs_below(folder)]
        if not runs:
            problems.append(
                Problem(word, "no run in this folder" if Path(word).exists() else "no such folder or sweep")
            )
        for run in runs:
            found.setdefault(run.resolve(), run)
    if problems:
        raise UftError(*problems, footer=SEE)
    return selection(found.values())


def selection(runs: Iterable[Path]) -> Selection:
    paths = tuple(sorted(runs))
    folder = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    here = Path.cwd()
    shown = folder.relative_to(here) if folder.is_relative_to(here) else folder
    return Selection(paths, folder.name or str(folder), shown)


def meant(word: str) -> list[Path]:
    """Folders: the path as it is, else as a pattern, else what has this name below outputs/."""
    if Path(word).is_dir():
        return [Path(word)]
    name = glob.escape(word)
    for pattern in (word, f"{OUTPUTS}/*/{name}", f"{OUTPUTS}/*/*/{name}"):
        found = [Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if os.path.isdir(path)]
        if found:
            return found if pattern == word else found[-1:]  # of sweeps of one name, the newest
    return []


def runs_below(root: Path) -> list[Path]:
    """Run folders at or below `root`, by path; also those that lack a file or two. Does not descend into runs."""
    found: list[Path] = []
    for folder, children, files in os.walk(root):
        if len(FILES.intersection(files)) > 1:
            found.append(Path(folder))
            children.clear()
        children.sort()
    return found


def newest() -> Selection:
    """The runs of the newest sweep below outputs/, a sweep being a folder within a day's; else all runs there."""
    runs = runs_below(OUTPUTS)
    if not runs:
        raise UftError(
            Problem(f"{OUTPUTS}/", "no runs here"),
            footer="Make some:  uft train -m objective=sft,ift data=mix seed=1,2,3",
        )
    sweeps: dict[Path, list[Path]] = defaultdict(list)
    for run in runs:
        if len(run.relative_to(OUTPUTS).parts) > 2:
            sweeps[run.parent].append(run)
    return selection(max(sweeps.values(), key=lambda jobs: max(map(written, jobs))) if sweeps else runs)


def written(run: Path) -> float:
    """When the run last wrote of itself."""
    times = (os.stat(run / name).st_mtime for name in ("run.json", "config.yaml") if (run / name).exists())
    return max(times, default=0.0)
