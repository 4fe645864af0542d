"""What the watchdog takes for a sign of life, in processes of their own: it ends them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from uft.heartbeat import activity, beat, heartbeat
from uft.training.liveness import watching

SECONDS = 2.0
PROGRAM = f"""
import sys, time
sys.path[:0] = {sys.path!r}
from pathlib import Path
from uft.heartbeat import doing, sign
from uft.training.liveness import Stop
from uft.training.liveness import watching

def work(act, seconds=3 * {SECONDS}):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        act()
        time.sleep(0.05)

def move():
    with open("moved", "wb") as file:
        file.write(b"." * 2**21)

def fill():
    held.append(bytearray(2**21))

held = []
with watching({SECONDS}, Path(), print):
    {{}}
print("whole", flush=True)
"""


ALIVE = {
    "row after row": 'with doing("rows were tokenised"): work(sign)',
    "asked whether to stop": 'with doing("it trained"): work(Stop())',
    "phase after phase": 'for _ in range(120):\n    with doing("one of many was done"): time.sleep(0.05)',
    "writes": 'with doing("a file was written", moving=True): work(move)',
    "fills memory": 'with doing("a model was loaded", moving=True): work(fill)',
    "outside of any phase": "work(move)",
}
HUNG = {
    "counts, and moves bytes": ('with doing("rows were tokenised"): work(move)', "rows were tokenised"),
    "moves nothing": ('with doing("a model was loaded", moving=True): work(int)', "a model was loaded"),
    "moves nothing outside of any phase": ("work(int)", "it was prepared"),
    "the phase within": (
        'with doing("rows were annotated", moving=True), doing("rows were tokenised"): work(int)',
        "rows were tokenised",
    ),
    "the phase around": (
        'with doing("it trained"):\n    with doing("it was measured"): pass\n    work(int)',
        "it trained",
    ),
}


@dataclass(frozen=True)
class Outcome:
    code: int
    said: str
    folder: Path


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Of every program above, by what it does; all at once, since they mostly wait."""
    started = {}
    for name, lines in (ALIVE | {name: lines for name, (lines, _) in HUNG.items()}).items():
        folder = tmp_path_factory.mktemp("program")
        program = PROGRAM.format(lines.replace("\n", "\n    "))
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        started[name] = subprocess.Popen([sys.executable, "-c", program], cwd=folder, **pipes), folder
    said = {name: process.communicate(timeout=120)[0] for name, (process, _) in started.items()}
    return {name: Outcome(process.returncode, said[name], folder) for name, (process, folder) in started.items()}


@pytest.mark.parametrize("name", ALIVE)
def test_what_works_on_for_longer_than_is_waited_is_not_ended(outcomes: dict[str, Outcome], name: str) -> None:
    assert (outcomes[name].code, outcomes[name].said) == (0, "whole\n")


@pytest.mark.parametrize(("name", "phase"), [(name, phase) for name, (_, phase) in HUNG.items()], ids=HUNG)
def test_what_gives_no_sign_is_ended_and_its_phase_named(outcomes: dict[str, Outcome], name: str, phase: str) -> None:
    found = outcomes[name]
    assert found.code == 1
    assert f"hung: no sign of life for 00:02 while {phase} (hardware.watchdog=2). Where it stood: " in found.said
    assert "in work" in (found.folder / "hang.txt").read_text()


def test_a_watchdog_that_is_off_watches_nothing(tmp_path: Path) -> None:
    before = threading.active_count()
    with watching(0.0, tmp_path, print):
        assert threading.active_count() == before
    with watching(60.0, tmp_path, print):
        assert threading.active_count() == before + 1
    assert not (tmp_path / "hang.txt").exists()


def test_a_phase_is_over_also_by_an_error() -> None:
    @activity("it was tried", moving=False)
    def attempt() -> None:
        assert (heartbeat.doing, heartbeat.moving) == ("it was tried", False)
        raise ZeroDivisionError

    before, signs = (heartbeat.doing, heartbeat.moving), heartbeat.signs
    with pytest.raises(ZeroDivisionError):
        attempt()
    assert (heartbeat.doing, heartbeat.moving) == before
    assert heartbeat.signs == signs + 2
    beat()
    assert heartbeat.signs == signs + 3


TOGETHER = f"""
import os, sys, time
sys.path[:0] = {sys.path!r}
from pathlib import Path
from uft.heartbeat import doing, sign
from uft.distributed import rank
from uft.distributed import joined
from uft.training.liveness import watching

with joined() as group:
    group.barrier()
    with watching(3.0, Path(), lambda why: Path(f"why-{{rank()}}").write_text(why)), doing("it trained"):
        end = time.monotonic() + 10
        while rank() == 0 and time.monotonic() < end:
            sign()
            time.sleep(0.05)
        if rank() == 0 and sys.argv[1] == "hangs":
            time.sleep(600)
        group.barrier()
    Path(f"whole-{{rank()}}").touch()
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["works", "hangs"])
def test_who_waits_for_another_lives_as_long_as_that_one(way: str, tmp_path: Path) -> None:
    """One of two works on alone, for longer than is waited; then it hangs, or does not."""
    (tmp_path / "program.py").write_text(TOGETHER)
    words = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "program.py", way]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    left = sorted(file.name for file in tmp_path.iterdir() if file.name != "program.py")
    if way == "works":
        assert (done.returncode, left) == (0, ["whole-0", "whole-1"]), done.stderr
    else:
        assert (done.returncode, left) == (1, ["hang-rank1.txt", "hang.txt", "why-0", "why-1"]), done.stderr
        assert "parallel/ranks.py" in (tmp_path / "hang-rank1.txt").read_text()
        assert time.monotonic() - begun < 200
