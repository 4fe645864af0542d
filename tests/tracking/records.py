"""What the tests of tracking log, and how they read it back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from uft.evaluation.evaluate import Sample
from uft.tracking.wandb import panel

SAMPLES = [
    Sample("sums", "sums.jsonl:1", "3+4?", "7", "7", {"accuracy": 1.0}),
    Sample("style", "style.jsonl:2", "hello", "hi\nthere", None, {}),
]


def curve(history: Iterable[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """By the name that metrics.jsonl has."""
    return [(row["step"], row[panel(name)]) for row in history if panel(name) in row]
