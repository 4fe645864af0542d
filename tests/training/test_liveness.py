"""The watchdog, in processes of their own since it ends them; and stopping on a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from uft.errors import INTERRUPTED, SIGNALS, STOPPED
from uft.heartbeat import activity, beat, heartbeat
from uft.training.liveness import listening, watching

SECONDS = 2.0
PROGRAM = f"""
import faulthandler, sys, time
sys.path[:0] = {sys.path!r}
from pathlib import Path
from uft.heartbeat import activity, beat
from uft.training.liveness import Stop, watching

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

def hold_the_lock():
    import ctypes
    ctypes.PyDLL(None).sleep(600)

held = []
faulthandler.enable()
with watching({SECONDS}, Path(), print):
    print("begun", flush=True)
    {{}}
print("whole", flush=True)
"""
ALIVE = {
    "row after row": 'with activity("rows were tokenised"): work(beat)',
    "asked whether to stop": 'with activity("it trained"): work(Stop())',
    "phase after phase": 'for _ in range(120):\n    with activity("one of many was done"): time.sleep(0.05)',
    "writes": 'with activity("a file was written", moving=True): work(move)',
    "fills memory": 'with activity("a model was loaded", moving=True): work(fill)',
    "outside of any phase": "work(move)",
    "suspended": 'with activity("it trained"): work(beat)',
}
HUNG = {
    "counts, and moves bytes": ('with activity("rows were tokenised"): work(move)', "rows were tokenised"),
    "moves nothing": ('with activity("a model was loaded", moving=True): work(int)', "a model was loaded"),
    "moves nothing outside of any phase": ("work(int)", "it was prepared"),
    "the phase within": (
        'with activity("rows were annotated", moving=True), activity("rows were tokenised"): work(int)',
        "rows were tokenised",
    ),
    "the phase around": (
        'with activity("it trained"):\n    with activity("it was measured"): pass\n    work(int)',
        "it trained",
    ),
}
LOCKED = {"holds the interpreter's lock": 'with activity("it trained"): hold_the_lock()'}


@dataclass(frozen=True)
class Outcome:
    code: int
    said: str
    errors: str
    folder: Path


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of every program above, by what it does; all at once, since they mostly wait."""
    started = {}
    for name, lines in (ALIVE | {name: lines for name, (lines, _) in HUNG.items()} | LOCKED).items():
        folder = tmp_path_factory.mktemp("program")
        program = PROGRAM.format(lines.replace("\n", "\n    "))
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started[name] = subprocess.Popen([sys.executable, "-c", program], cwd=folder, **pipes), folder
    suspended = started["suspended"][0]
    assert suspended.stdout is not None
    assert suspended.stdout.readline() == "begun\n"
    suspended.send_signal(signal.SIGSTOP)
    time.sleep(2.5 * SECONDS)
    suspended.send_signal(signal.SIGCONT)
    texts = {name: process.communicate(timeout=120) for name, (process, _) in started.items()}
    return {name: Outcome(process.returncode, *texts[name], folder) for name, (process, folder) in started.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIVE)
def test_a_process_that_works_on_or_is_suspended_is_not_ended(outcomes, name):
    assert (outcomes[name].code, outcomes[name].said.removeprefix("begun\n")) == (0, "whole\n"), outcomes[name].errors


@pytest.mark.parametrize(("name", "phase"), [(name, phase) for name, (_, phase) in HUNG.items()], ids=HUNG)
def test_a_process_without_a_sign_of_life_is_ended_and_its_phase_named(outcomes, name, phase):
    found = outcomes[name]
    assert found.code == 1
    assert f"hung: no sign of life for 00:02 while {phase} (hardware.watchdog=2). Where it stood: " in found.said
    assert "in work" in (found.folder / "hang.txt").read_text()
    assert "in work" in found.errors


def test_a_process_that_hangs_with_the_interpreter_s_lock_is_aborted(outcomes):
    (found,) = (outcomes[name] for name in LOCKED)
    assert (found.code, found.said) == (-signal.SIGABRT, "begun\n")
    assert "in hold_the_lock" in found.errors


def test_a_watchdog_that_is_off_watches_nothing(tmp_path):
    before = threading.active_count()
    with watching(0.0, tmp_path, print):
        assert threading.active_count() == before
    with watching(60.0, tmp_path, print):
        assert threading.active_count() == before + 1
    assert not (tmp_path / "hang.txt").exists()


def test_a_phase_is_over_also_by_an_error():
    @activity("it was tried", moving=False)
    def attempt() -> None:
        assert (heartbeat.phase.doing, heartbeat.phase.moving) == ("it was tried", False)
        raise ZeroDivisionError

    before, signs = (heartbeat.phase.doing, heartbeat.phase.moving), heartbeat.signs
    with pytest.raises(ZeroDivisionError):
        attempt()
    assert (heartbeat.phase.doing, heartbeat.phase.moving) == before
    assert heartbeat.signs == signs + 2
    beat()
    assert heartbeat.signs == signs + 3


TOGETHER = f"""
import os, sys, time
sys.path[:0] = {sys.path!r}
from pathlib import Path
from uft.distributed import process_group
from uft.environment import rank
from uft.heartbeat import activity, beat
from uft.training.liveness import watching

with process_group() as group:
    group.barrier()
    with watching(3.0, Path(), lambda why: Path(f"why-{{rank()}}").write_text(why)), activity("it trained"):
        end = time.monotonic() + 10
        while rank() == 0 and time.monotonic() < end:
            beat()
            time.sleep(0.05)
        if rank() == 0 and sys.argv[1] == "hangs":
            time.sleep(600)
        group.barrier()
    Path(f"whole-{{rank()}}").touch()
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["works", "hangs"])
def test_a_rank_that_waits_for_another_lives_as_long_as_that_one(way, tmp_path):
    """One of two works on alone, for longer than is waited; then it hangs, or does not."""
    (tmp_path / "program.py").write_text(TOGETHER)
    words = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "program.py", way]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    begun = time.monotonic()
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, **options)
    left = sorted(file.name for file in tmp_path.iterdir() if file.name != "program.py")
    if way == "works":
        assert (done.returncode, left) == (0, ["whole-0", "whole-1"]), done.stderr
    else:
        assert (done.returncode, left) == (1, ["hang-rank1.txt", "hang.txt", "why-0", "why-1"]), done.stderr
        assert "uft/distributed.py" in (tmp_path / "hang-rank1.txt").read_text()
        assert time.monotonic() - begun < 200


# --- signals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_and_has_its_exit_code(number):
    with listening() as stop:
        assert (stop(), stop.signal) == (False, None)
        os.kill(os.getpid(), number)
        assert stop()
        if number != signal.SIGINT:
            os.kill(os.getpid(), number)  # also the second one waits for the safe point
    code = INTERRUPTED if number == signal.SIGINT else STOPPED
    assert (stop.signal, stop.exit_code) == (number, code)


def test_handlers_are_put_back_also_after_an_error():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), listening():
        1 / ([signal.getsignal(number) for number in SIGNALS] == before)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_second_interrupt_ends_the_process_at_once_also_before_torch_is_imported():
    program = (
        "import os, signal, sys\n"
        "from uft.training.liveness import listening\n"
        "assert 'torch' not in sys.modules\n"
        "with listening():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('not any more', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (INTERRUPTED, "still here\n")
    assert "stopping at the next safe point" in done.stderr, "said at once"
