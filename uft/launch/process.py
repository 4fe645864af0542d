"""The worker as a child: started in a session of its own, told of every signal, never left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import site
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from uft.errors import FAILED, INTERRUPTED, STOPPED
from uft.launch import forkserver

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
EXIT_CODES = {number: INTERRUPTED if number == signal.SIGINT else STOPPED for number in FORWARDED}
COMMAND = forkserver.WORKER
"""-P: a `datasets.py` in the folder one works in is not taken for the library."""

AGENT = (sys.executable, "-P", "-m", "uft.launch.agent")

PARENT = "UFT_PARENT_PID"
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """In a worker, first of all: when the launcher dies, even by SIGKILL, this process gets SIGTERM.

    Once the run listens to signals, that means a checkpoint and a clean stop. Until then a signal ends the process
    without a traceback. Elsewhere than on Linux nothing can be asked of the kernel, and a worker outlives its parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):  # it died before the line above
        sys.exit(FAILED)


def run_worker(
    arguments: Sequence[str],
    cwd: Path | None = None,
    log: Path | None = None,
    team: Sequence[str] = (),
    more: Mapping[str, str] | None = None,
) -> int:
    """Run `python -m uft.launch.worker ARGUMENTS` to its end; the exit code. In a sweep the worker is forked.

    `team`: what torch's launcher is told where several processes do the work of one (:mod:`uft.launch.team`);
    `more`: of its environment alone.

    With `log`, nothing of it is seen here: what it says besides its console.log, which is this file, goes there too.

    The child has a session of its own, so that Ctrl-C on the terminal reaches it once, through us, and not twice.
    A child that a signal of ours ended counts as stopped; one that anything else killed has failed.
    """
    sent, killed_before = list[int](), oom_kills()
    environment = {**os.environ, PARENT: str(os.getpid()), "PYTHONPATH": python_path(), **(more or {})}
    with forwarding(sent) as children, said_in(log) as streams:
        command = [*AGENT, *team, "-m", "uft.launch.worker", *arguments] if team else [*COMMAND, *arguments]
        child: Child | None = forkserver.fork(command, environment, cwd, streams, hurry=lambda: sent)
        if child is None:
            child = subprocess.Popen(command, start_new_session=True, env=environment, cwd=cwd, **streams)
        children.append(child)
        for number in sent:  # one came in before there was a child
            child.send_signal(number)
        code = to_the_end(child)
    if code >= 0:
        return code
    if sent:
        return EXIT_CODES[signal.Signals(sent[0])]
    with said_in(log) as streams:
        died = f"uft: the worker was killed by {signal.Signals(-code).name}{cause(-code, oom_kills() - killed_before)}"
        print(died, file=streams.get("stderr", sys.stderr))
    return FAILED


Child = subprocess.Popen[bytes] | forkserver.Child


def to_the_end(child: Child) -> int:
    """The child's exit code. Where something makes this process leave, the child saves its checkpoint first: a
    scheduler's signal may be an exception here."""
    try:
        return child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise


@contextmanager
def said_in(log: Path | None) -> Iterator[dict[str, Any]]:
    """Where a child's output goes: here, or nowhere and its complaints into the file `log`."""
    if log is None:
        yield {}
        return
    with open(log, "a", encoding="utf-8") as file:
        yield {"stdout": subprocess.DEVNULL, "stderr": file}


def cause(number: int, oom: int) -> str:
    """Why a signal that nobody here sent may have come; `oom`: processes that ran out of memory meanwhile."""
    if number != signal.SIGKILL:
        return " (a crash; where it was is above)" if number in CRASHES else ""
    if oom > 0:
        return ": the machine ran out of memory. Lower train.micro_batch_tokens, or give it more"
    return " (by somebody, or for want of memory: dmesg says)"


CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT)


def oom_kills(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """How many processes of our control group the kernel has ended for want of memory (Linux, cgroup 2; else 0)."""
    try:
        own = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
        text = (cgroups / own / "memory.events").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))


def python_path() -> str:
    """The child's PYTHONPATH: where this process has uft from comes first, unless it is installed there."""
    root, rest = str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")
    if root in (*site.getsitepackages(), site.getusersitepackages()):
        return rest
    return os.pathsep.join([root, rest]) if rest else root


@contextmanager
def forwarding(sent: list[int]) -> Iterator[list[Child]]:
    """While inside, signals are noted in `sent` and passed on to the children in the list that is yielded.

    SIGUSR2 is left to whoever listens to it already: submitit puts a job back in the queue by it.
    """
    children: list[Child] = []

    def receive(number: int, frame: FrameType | None) -> None:
        sent.append(number)
        for child in children:
            child.send_signal(number)

    ours = [n for n in FORWARDED if n != signal.SIGUSR2 or signal.getsignal(n) is signal.SIG_DFL]
    before = {number: signal.signal(number, receive) for number in ours}
    try:
        yield children
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
