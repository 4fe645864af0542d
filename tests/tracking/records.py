"""What the tests of tracking log, and how they read it back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from uft.evaluation.evaluate import Sample

SAMPLES = [
    Sample("sums", "sums.jsonl:1", "3+4?", "7", "7", {"accuracy": 1.0}),
    Sample("style", "style.jsonl:2", "hello", "hi\nthere", None, {}),
]


def curve(history: Iterable[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in history if name in row]
