"""Trust in the code of models: which run and sweep folders this user began on this machine.

A run folder from another machine may set `model.trust_remote_code: true`, and resuming it would run code that its
sender chose. Folders begun here are recorded outside of run folders, by path and id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from uft.errors import Problem, UftError
from uft.runs import SWEEP_FILE, cache_root, read_json, shown

TYPED = "model.trust_remote_code=true"


def remember(folder: Path) -> None:
    """Note that the user began what is in this folder, or typed that its code may run. Where no note can be written,
    it has to be typed again."""
    with suppress(OSError):
        _note(folder).parent.mkdir(parents=True, exist_ok=True)
        _note(folder).touch()


def refuse_untrusted(folder: Path, runs_code: bool, words: Iterable[str]) -> None:
    """Raise UftError about a folder that was not begun here and runs a model's code, unless `words` say that it may."""
    if not runs_code or _note(folder).is_file():
        return
    if TYPED not in words:
        why = "runs code that comes with its model, and was begun elsewhere, or by another user, or moved"
        raise UftError(Problem(shown(folder), why, advice=(f"read that code, then give the command with  {TYPED}",)))
    remember(folder)


def _note(folder: Path) -> Path:
    began = read_json(folder / "run.json").get("id") or read_json(folder / SWEEP_FILE).get("made")
    name = hashlib.sha256(f"{folder.resolve()}\n{began}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_root() / "trusted" / name
