"""Sessions of a run: workers that can be killed for good, and that a fault may be planted in; what they are asked."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from planting import Fault
from program import OWN, Popen, outside

SINGLE = (
    "objective=uft",
    "data=files",
    *(f"+data.sources.{name}.path={name}.jsonl" for name in ("instruct", "pairs", "binary", "scored")),
    "data.sources.pairs.checker=playground",
    "train.steps=7",
    "reference.mode=cached",
    "model.adapter=lora",
    "model.lora.dropout=0.1",
)
"""One training on every kind of row; dropout, so that the generators matter."""

LOOP = ("experiment=loop",)
"""Several stages, one of which makes rows: conftest.py."""

COLUMN = ("experiment=column",)
"""Two stages, the first of which writes a column: conftest.py."""


@dataclass
class Ended:
    """How a session ended: its exit code (negative: the signal that ended it) and what it said."""

    code: int
    said: str


@dataclass
class Session:
    """A session that has been started."""

    process: Popen
    out: Path

    def wait(self, seconds: float = 900) -> Ended:
        try:
            return Ended(self.process.wait(seconds), self.said)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the session did not end\n{self.said}") from None

    @property
    def said(self) -> str:
        return self.out.read_text(encoding="utf-8", errors="replace")


@dataclass
class Bench:
    """Starts sessions; `environment` is added to each one's, `folder` is where their output goes."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    count: int = 0

    def start(self, *arguments: str | Path, fault: Fault | None = None, **environment: str) -> Session:
        self.count += 1
        out = self.folder / f"session-{self.count}.txt"
        variables = outside() | OWN | self.environment | environment | (fault.variable() if fault else {})
        command = [sys.executable, "-m", "uft.launch.worker", *map(str, arguments)]
        with open(out, "w") as file:
            return Session(Popen(command, env=variables, stdout=file, stderr=subprocess.STDOUT), out)

    def sit(self, *arguments: str | Path, code: int | None = None, fault: Fault | None = None, **env: str) -> Ended:
        """A session from its start to its end, which is `code` unless that is None."""
        ended = self.start(*arguments, fault=fault, **env).wait()
        assert code is None or ended.code == code, f"exit code {ended.code} after {fault}\n{ended.said}"
        return ended
