"""Write requirements-ci.txt: what CI installs, each file by its SHA-256, for the platform this runs on.

    python scripts/pin_hashes.py        after a change of constraints.txt or of what pyproject.toml asks for

pip resolves once without installing; every file it would take is named with its digest. torch's CPU build is on an
index of its own (https://download.pytorch.org/whl/cpu), which pip has to know of.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "requirements-ci.txt"


def platform_line() -> str:
    """The first line of the file: what its digests hold for."""
    return f"# {platform.system()} {platform.machine()}, Python {sys.version_info.major}.{sys.version_info.minor}"


def resolved() -> Mapping[str, Any]:
    """pip's report of what it would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        words = ["install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report)]
        what = ["-c", str(ROOT / "constraints.txt"), f"{ROOT}[test]"]
        subprocess.run([sys.executable, "-m", "pip", *words, *what], check=True)
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return found


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    for item in sorted(report["install"], key=lambda item: str(item["metadata"]["name"]).lower()):
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        if name != "uft-lm":
            yield f"{name}=={version} --hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}"


if __name__ == "__main__":
    # --no-deps, since pip's hash mode refuses dependencies with extras; the file names all of them
    command = f"pip install --no-deps --require-hashes -r {FILE.name}"
    head = [platform_line(), f"# Made by scripts/pin_hashes.py:  {command}"]
    FILE.write_text("\n".join([*head, *lines(resolved())]) + "\n", encoding="utf-8")
