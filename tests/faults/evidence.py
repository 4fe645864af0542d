"""What a run left, without what may differ: times, process ids, where it lies."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

CLOCKS = {"seconds", "wall_seconds", "making_seconds", "tokens_per_second", "mfu", "peak_memory_bytes"}
PASSING = re.compile(r"\.\d+\.tmp|[0-9a-f]{16,}|\.[a-z0-9_]{8}$|\d{6}")
"""Process ids, digests, random names and step numbers in the name of a file."""


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: timeless(item) for name, item in value.items() if name not in CLOCKS}
    return value


def written(run: Path) -> dict[str, Any]:
    """Everything that a finished run says, bit by bit, in all its stages."""
    curve = [list(json.loads(line).items()) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "curve": [[pair for pair in line if pair[0] not in CLOCKS] for line in curve],
        "samples": (run / "samples.jsonl").read_text(),
        "items": (run / "items.jsonl").read_text(),
        "results": [timeless(json.loads(file.read_text())) for file in sorted(run.rglob("result.json"))],
        "models": [file.read_bytes() for file in sorted(run.rglob("model.safetensors"))],
        "tensors": [file.read_bytes() for file in sorted(run.rglob("tensors.safetensors"))],
        "checkpoints": sorted(path.relative_to(run).as_posix() for path in run.rglob("*step-*")),
        "rows": [file.read_text() for file in sorted(run.rglob("rows.jsonl"))],
    }


def same(run: Path, whole: dict[str, Any]) -> None:
    """Assert that a run says what another one said, naming the first difference."""
    ours = written(run)
    for number, (line, expected) in enumerate(zip(ours["curve"], whole["curve"], strict=False), 1):
        assert line == expected, f"line {number} of metrics.jsonl"
    for name, value in whole.items():
        assert ours[name] == value, name


def kinds(log: Path) -> dict[str, list[int]]:
    """The moments of a session by what happens there, whatever the file is called this time: their numbers."""
    found: dict[str, list[int]] = {}
    for number, moment in enumerate(log.read_text(encoding="utf-8", errors="replace").splitlines()):
        found.setdefault(PASSING.sub("*", moment), []).append(number)
    return found
