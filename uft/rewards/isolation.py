"""The child process that parses what models wrote, seen from the training process: one for each process that judges.

Jobs go in as lines of JSON and verdicts come out as lines of JSON, in the same order (:mod:`uft.rewards.child`). The
child is started when it is first needed, ends when its input does, and is replaced when it dies. The answer that it
died of gets the reason, the others of the batch go to the next one. Where another process killed it (the system, short
of memory), the answer goes there too, once. Only data crosses: whatever takes over the child could at most write
numbers from 0 to 1.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any

from uft.data.rows import Row
from uft.errors import FAILED, Problem, UftError
from uft.heartbeat import beat
from uft.rewards.base import Checker, Verdict, gold

SECONDS = 2.0
"""CPU time of one answer. Time on the wall would depend on what else the machine does, and the reward with it."""
MEMORY = 2 << 30
"""Bytes of address space of the child."""
LONGEST_REPLY = 400_000
"""Characters of a reply that is looked at."""
WALL = 120.0
"""Seconds without a verdict after which the child is taken for lost: it sleeps, or the machine does."""
WINDOW = 32_000
"""Bytes of jobs under way, less than a pipe holds: neither side ever waits for the other to read."""
LINE = 10_000
"""Bytes of a verdict's line, at most."""


@dataclass
class Child:
    """A running child that takes and gives lines, and the part of its output that was not looked at yet."""

    process: subprocess.Popen[bytes]
    owner: int = field(default_factory=os.getpid)  # a process forked from this one must not talk to its child
    unread: bytes = b""

    @classmethod
    def start(cls) -> Child:
        """Raises UftError where no such process can be had: nothing is parsed without one."""
        known = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "LC_ALL")}
        search = os.pathsep.join(os.path.abspath(place) for place in sys.path if place)
        # the same hash seed for all, since sympy's order of terms depends on it; no secret of the environment goes in
        env = {**known, "PYTHONPATH": search, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        words = [sys.executable, "-P", "-m", "uft.rewards.child", str(SECONDS), str(MEMORY)]
        try:
            pipe, null = subprocess.PIPE, subprocess.DEVNULL
            process = subprocess.Popen(
                words, stdin=pipe, stdout=pipe, stderr=null, env=env, cwd="/", bufsize=0, start_new_session=True
            )
        except OSError as error:
            raise _unavailable(f"cannot be started: {error}") from error
        child = cls(process)
        if child.read_line() != b"ready":
            child.close()
            raise _unavailable(f"ended as it began: {child.cause()}")
        return child

    def send(self, lines: bytes) -> None:
        """Write them; that the child is gone is found when its next line is read."""
        assert self.process.stdin is not None
        view = memoryview(lines)
        with suppress(BrokenPipeError):
            while view:
                view = view[self.process.stdin.write(view) or 0 :]

    def read_line(self) -> bytes | None:
        """The next line; None where the child ended, said too much or nothing for too long."""
        deadline = time.monotonic() + WALL
        while b"\n" not in self.unread:
            ended = not self.receive(min(1.0, max(0.0, deadline - time.monotonic())))
            if ended or time.monotonic() > deadline or (len(self.unread) > LINE and b"\n" not in self.unread):
                return None
        line, _, self.unread = self.unread.partition(b"\n")
        return line

    def receive(self, seconds: float) -> bool:
        """Add output to `unread`, for which it waits so long at most; False where the output has ended."""
        assert self.process.stdout is not None
        beat()
        ready = select.select([self.process.stdout], [], [], seconds)[0]
        more = self.process.stdout.read(65_536) if ready else b""
        self.unread += more or b""
        return bool(more) or not ready

    def close(self) -> None:
        """End the child, whatever it does."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def was_killed(self) -> bool:
        """Whether another process killed the child, whose output ended: an answer may be judged again."""
        with suppress(subprocess.TimeoutExpired):  # its output ends a moment before it does
            self.process.wait(1.0)
        return self.process.returncode == -signal.SIGKILL

    def cause(self) -> str:
        """Why an ended child ended, in words."""
        code = self.process.returncode
        if code == -signal.SIGPROF:
            return f"took more than {SECONDS:g} s of CPU time"
        if code == -signal.SIGKILL:
            return f"gave no verdict within {WALL:g} s, or the system ended the process"
        return f"ended the process that judges ({signal.Signals(-code).name if code < 0 else f'status {code}'})"


def _unavailable(why: str) -> UftError:
    what = "the process in which answers are judged"
    return UftError(Problem(what, why, advice=("a checker that needs none:  reward=final_number",)), code=FAILED)


_child: Child | None = None
_lock = Lock()


def judge_apart(jobs: Sequence[tuple[Checker, Row, str]]) -> list[Verdict]:
    """Verdicts from the child, in the order of the jobs."""
    global _child
    verdicts: dict[int, Verdict] = {}
    lines: dict[int, bytes] = {}
    for number, (checker, row, reply) in enumerate(jobs):
        if len(reply) > LONGEST_REPLY:
            verdicts[number] = checker.failed(f"is longer than {LONGEST_REPLY:,} characters")
        else:
            lines[number] = _job(checker, row, reply)
    waiting, tried = list(lines), set[int]()  # numbers; those whose child was killed
    with _lock:
        while waiting:
            if _child is None or _child.owner != os.getpid():
                _child = Child.start()
            under_way, size = list[int](), 0
            for number in waiting:
                size += len(lines[number])
                if under_way and size > WINDOW:
                    break
                under_way.append(number)
            _child.send(b"".join(lines[number] for number in under_way))
            for number in under_way:
                checker, line = jobs[number][0], _child.read_line()
                verdict = None if line is None else _verdict(checker, line)
                if verdict is None:
                    again = line is None and number not in tried and _child.was_killed()
                    _child.close()
                    if not again:
                        verdicts[number] = checker.failed(_child.cause())
                    tried.add(number)
                    _child = None
                    break
                verdicts[number] = verdict
            waiting = [number for number in waiting if number not in verdicts]
    return [verdicts[number] for number in range(len(jobs))]


def _job(checker: Checker, row: Row, reply: str) -> bytes:
    """One line: the checker by its settings, what it may read of the row, the reply."""
    turns = [[turn.role, turn.content] for turn in row.prompt]
    return json.dumps([asdict(checker), turns, gold(row), row.task, dict(row.facts), reply]).encode() + b"\n"


def _verdict(checker: Checker, line: bytes) -> Verdict | None:
    """A line of the child's; None where it is none: whatever wrote it is not the child that was started."""
    try:
        figures, reason = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return None
    if figures is None:
        return Verdict({}, str(reason)[:200])
    found: Any = checker.checked(figures)
    return Verdict(found.figures, found.reason or (None if reason is None else str(reason)[:200]))
