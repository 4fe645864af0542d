"""Sittings of a run in processes of their own that can be killed for good, without seconds of imports for each.

A fork server loads torch and the program once; every sitting is a fork of it, carries out the worker's own `main`, and
may have a fault planted in it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from planting import Fault, plant

import uft

CONTEXT = multiprocessing.get_context("forkserver")


def serve() -> None:
    """Start the fork server with everything loaded. It knows the path of its environment alone."""
    CONTEXT.set_forkserver_preload(["warm"])
    before = os.environ.get("PYTHONPATH")
    roots = [str(Path(__file__).parent), str(Path(uft.__file__).parents[1])]
    os.environ["PYTHONPATH"] = os.pathsep.join([*roots, *filter(None, [before])])
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@dataclass
class Ended:
    """How a sitting ended: its exit code (negative: the signal that ended it) and what it said."""

    code: int
    said: str


@dataclass
class Sitting:
    """A sitting that has been started."""

    process: Any
    out: Path

    def wait(self, seconds: float = 900) -> Ended:
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"the sitting did not end\n{self.said}")
        return Ended(self.process.exitcode, self.said)

    @property
    def said(self) -> str:
        """What it said so far; one that was killed at once has not even opened the file."""
        return self.out.read_text(encoding="utf-8", errors="replace") if self.out.exists() else ""


@dataclass
class Bench:
    """Starts sittings; `environment` is added to each one's, `folder` is where their output goes."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    count: int = 0

    def start(self, *arguments: str | Path, fault: Fault | None = None, **environment: str) -> Sitting:
        self.count += 1
        out = self.folder / f"sitting-{self.count}.txt"
        variables = self.environment | environment
        words = [str(word) for word in arguments]
        process = CONTEXT.Process(target=work, args=(words, variables, fault or Fault(), str(out)))
        process.start()
        return Sitting(process, out)

    def sit(self, *arguments: str | Path, fault: Fault | None = None, **environment: str) -> Ended:
        return self.start(*arguments, fault=fault, **environment).wait()


def work(arguments: list[str], environment: dict[str, str], fault: Fault, out: str) -> None:
    """In the fork: what `python -m uft.launch.worker ARGUMENTS` does."""
    os.setsid()
    os.environ.update(environment)
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    plant(fault)
    from uft.launch import worker

    code = worker.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
