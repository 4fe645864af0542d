"""What a run was made with: versions, the commit of the code, and whether it was changed since."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from uft import __version__

PACKAGES = ("torch", "transformers", "datasets", "hydra-core", "omegaconf", "wandb", "peft", "safetensors", "numpy")


HERE = Path(__file__).resolve().parent


def versions() -> dict[str, str]:
    """Versions of what can change a result, without importing any of it."""
    found = {"uft": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_state(folder: Path) -> dict[str, Any]:
    """Commit and a hash of uncommitted changes of the repository that `folder` is in; {} where there is none."""
    commit = git(folder, "rev-parse", "HEAD")
    if not commit:
        return {}
    changes = git(folder, "diff", "HEAD", "--no-ext-diff")
    dirty = hashlib.sha256(changes.encode()).hexdigest()[:10] if changes else None
    return {"commit": commit.strip(), "dirty": dirty}


def git(folder: Path, *arguments: str) -> str:
    """Output of a git command; empty when git is missing, slow, or unwilling."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def provenance() -> dict[str, Any]:
    """For `run.json`. `code` is the repository of uft itself, `project` that of the folder one works in."""
    return {
        "versions": versions(),
        "code": git_state(HERE) if git(HERE, "ls-files", "--error-unmatch", Path(__file__).name) else {},
        "project": git_state(Path.cwd()),
        "command": sys.argv,
        "cwd": str(Path.cwd()),
        "host": platform.node(),
    }
