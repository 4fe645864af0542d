"""Random rows in the words of the small models of these tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

VOCABULARY = 61


class Rows:
    """Random rows; `scale` is the most words of a prompt or a completion."""

    def __init__(self, seed: int = 0, scale: int = 9) -> None:
        self.random, self.scale = random.Random(seed), scale

    def text(self) -> str:
        return " ".join(f"w{self.random.randrange(3, VOCABULARY)}" for _ in range(self.random.randint(1, self.scale)))

    def demonstration(self) -> dict[str, Any]:
        return {"prompt": self.text(), "completion": self.text()}

    def preference(self) -> dict[str, Any]:
        return {"prompt": self.text(), "chosen": self.text(), "rejected": self.text()}

    def binary(self) -> dict[str, Any]:
        return {"prompt": self.text(), "completion": self.text(), "label": self.random.random() < 0.5}

    def scored(self) -> dict[str, Any]:
        return {"prompt": self.text(), "completion": self.text(), "score": round(self.random.random(), 2)}

    def negatives(self) -> dict[str, Any]:
        return {"prompt": self.text(), "response": self.text(), "negatives": [self.text() for _ in range(3)]}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
