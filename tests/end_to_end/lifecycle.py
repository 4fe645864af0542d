"""What tests of dying and stopping share: a run long enough to be hit, ways to find its worker, what it left."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evidence
from program import alive

KINDS = ("demonstrations", "pairs", "labels", "scores", "negatives")
USES = {
    "sft": KINDS,
    "ift": KINDS,
    "uft": KINDS,
    "una": ("pairs", "labels", "scores"),
    "dft": ("demonstrations", "pairs", "negatives"),
    "dft2": ("demonstrations", "pairs", "negatives"),
    "dpo": ("pairs", "negatives"),
}
"""Kinds of rows that each objective is trained on here."""
STEPS = 25
UNEVEN = (
    f"train.steps={STEPS}",
    "train.batch_size=6",
    "train.micro_batch_tokens=400",
    "train.log_every=2",
    "train.checkpoint_every=3",
    "train.eval_every=11",
    "train.keep_last=2",
    "data.holdout=0.2",
    "eval=default",
    "eval.max_new_tokens=12",
    "optim.lr=0.01",
)
"""Lines, evaluations, checkpoints and the end all fall on different steps."""
LORA = ("model.adapter=lora", "model.lora.rank=4", "model.lora.dropout=0.2")
WORDS = ("one", "two", "three", "four", "Paris", "France", "the", "of", "is", "and", "not", "a", "city", "sea", "red")


def _text(draw: random.Random, most: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))


def rows_of(kind: str, count: int = 10) -> list[dict[str, Any]]:
    """Random rows of one kind, unequal in length."""
    draw = random.Random(kind)
    made: list[dict[str, Any]] = []
    for _ in range(count):
        prompt, reply = _text(draw, 8), _text(draw, 12)
        made += {
            "demonstrations": [{"prompt": prompt, "response": reply}],
            "pairs": [{"prompt": prompt, "chosen": reply, "rejected": _text(draw, 12)}],
            "labels": [{"prompt": prompt, "completion": reply, "label": draw.random() < 0.5}],
            "scores": [{"prompt": prompt, "completion": _text(draw, 12), "score": score} for score in (0.9, 0.3)],
            "negatives": [{"prompt": prompt, "response": reply, "negatives": [_text(draw, 9) for _ in range(3)]}],
        }[kind]
    return made


def files_for(objective: str, folder: Path, write: Callable[..., Path]) -> dict[str, Path]:
    """A JSONL file per kind of row that the objective takes."""
    return {kind: write(folder / f"{kind}.jsonl", rows_of(kind)) for kind in USES[objective]}


# --- while it runs


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 90) -> Any:
    """The condition's value once it is true. The process must not end before that."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if process.poll() is not None:
            raise AssertionError("it ended with exit code {}\n{}".format(*end(process)))
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)
    return value


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl; -1 where there is none."""
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
    return max((json.loads(line)["step"] for line in lines), default=-1)


def at_step(run: Path, step: int) -> Callable[[], bool]:
    return lambda: last_step(run) >= step


def in_first_evaluation(run: Path) -> Callable[[], bool]:
    """The card is shown, and the evaluation before the first step not written yet."""
    log = run / "console.log"
    return lambda: log.is_file() and "tracking" in log.read_text(encoding="utf-8") and last_step(run) < 0


def begun(run: Path) -> Callable[[], bool]:
    """The worker holds the run and has not yet said anything. Before it, the program that starts it does: our child."""

    def held_by_a_worker() -> bool:
        lock = run / ".lock"
        line = lock.read_text().split() if lock.is_file() else []
        return len(line) > 1 and alive(int(line[0])) and int(line[1]) != os.getpid()

    return held_by_a_worker


def child_of(parent: int) -> int | None:
    """The process id of its worker (Linux)."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name, _, fields = (entry / "stat").read_text().rpartition(")")
            except OSError:  # it has just ended
                continue
            if int(fields.split()[1]) == parent and not name.endswith("uft-forkserver"):
                return int(entry.name)
    return None


def end(process: subprocess.Popen[str], seconds: float = 90) -> tuple[int, str]:
    """(exit code, everything it said)."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out + err


def kill_worker(process: subprocess.Popen[str]) -> tuple[int, str]:
    """SIGKILL to the process that trains; (exit code, output) of the one that the person started."""
    worker = child_of(process.pid)
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    return end(process)


# --- what it left


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def checkpoints_of(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def same(run: Path, whole: Path) -> None:
    """Assert that one run says what the other says, bit by bit and in all its stages, naming the first difference."""
    evidence.same(run, evidence.written(whole))
