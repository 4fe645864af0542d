"""Who this process is, by what torch's launcher put into its environment, and what it leaves for whoever started it.

No torch here: a launcher reads it, and workers before they have imported anything.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = "UFT_FAILURES"
"""Where the processes of a run leave word for the one that started them."""


class PeerLost(Exception):
    """Another process of the run ended: whatever it was asked for will never come."""


def launched() -> int:
    """How many processes torch's launcher started; 1 where it started none."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    return int(os.environ["RANK"]) if launched() > 1 else 0


def local_rank() -> int:
    """This process among those of its machine: which of its devices it takes."""
    return int(os.environ["LOCAL_RANK"]) if launched() > 1 else 0


def note(text: str) -> None:
    """Why this process failed. The first one says so itself; nobody would hear the others."""
    _write(f"why-{rank()}", text)


def note_code(code: int) -> None:
    """The exit code of the request, which is the first process's."""
    if rank() == 0:
        _write("code", str(code))


def reasons(folder: Path) -> dict[int, str]:
    """Process -> what it said."""
    files = sorted(folder.glob("why-*"))
    return {int(file.name.removeprefix("why-")): file.read_text(encoding="utf-8") for file in files}


def noted_code(folder: Path) -> int | None:
    file = folder / "code"
    return int(file.read_text()) if file.is_file() else None


def _write(name: str, text: str) -> None:
    folder = os.environ.get(FOLDER)
    if folder:
        Path(folder, name).write_text(text, encoding="utf-8", errors="replace")
