"""This process: its umask, its place among those that torch's launcher started, its notes for that launcher.

Without torch: launchers read this, and workers before they have imported anything.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = "UFT_FAILURES"
"""Environment variable: the folder where the ranks of a run leave their notes."""


class PeerLost(Exception):
    """Another process of the run ended, so that a collective operation will never complete."""


def launched() -> int:
    """The number of processes that torch's launcher started; 1 where it started none."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    return int(os.environ["RANK"]) if launched() > 1 else 0


def local_rank() -> int:
    """The rank among the processes of this machine, which is the number of its device."""
    return int(os.environ["LOCAL_RANK"]) if launched() > 1 else 0


def note(text: str, name: str = "") -> None:
    """Leave word why this rank failed: rank 0 alone is heard on the console."""
    if folder := os.environ.get(FOLDER):
        Path(folder, name or f"why-{rank()}").write_text(text, encoding="utf-8", errors="replace")


def note_code(code: int) -> None:
    """Leave the exit code of the request: that of the first process of this machine, rank 0 on the first one."""
    if local_rank() == 0:
        note(str(code), "code")


def reasons(folder: Path) -> dict[int, str]:
    """Rank -> its note."""
    files = sorted(folder.glob("why-*"))
    return {int(file.name.removeprefix("why-")): file.read_text(encoding="utf-8") for file in files}


def noted_code(folder: Path) -> int | None:
    file = folder / "code"
    return int(file.read_text()) if file.is_file() else None


def keep_others_out() -> None:
    """Tighten the umask: files of this process and its children are never writable by everybody."""
    os.umask(os.umask(0o022) | 0o002)
