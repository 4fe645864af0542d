"""The child process in which isolated checkers judge: `python -m uft.rewards.child SECONDS MEMORY`.

It reads jobs from its standard input, a line of JSON each, and writes verdicts to what was its standard output. The
kernel holds its limits: CPU time per answer (SIGPROF with its default action, which no code in here can catch), memory,
and no byte to any file. What is parsed is never evaluated; should a parser have a hole all the same, an audit hook
refuses processes, sockets and files.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

from uft.data.rows import Message, Row
from uft.rewards import make

REFUSED = ("subprocess.", "socket.", "ctypes.", "os.exec", "os.fork", "os.posix_spawn", "os.system", "os.kill")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit(memory: int) -> None:
    """Bound memory, and refuse files and memory images of a crash."""
    for what, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(what, (most, most))
        except (ValueError, OSError):  # macOS knows no limit of the address space; the other limits hold
            continue


judging = False  # between answers, libraries are imported


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook: raises PermissionError for what no parser has to do."""
    writes = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & WRITING)
    if judging and (writes or event.startswith(REFUSED)):
        raise PermissionError(f"{event} is not for parsers of answers")


def answer(line: bytes, seconds: float) -> list[Any]:
    """[figures or null, reason or null] of one job."""
    global judging
    settings, turns, right, task, facts, reply = json.loads(line)
    checker = make(settings)
    checker.prepare()
    row = Row("", 0, tuple(Message(*turn) for turn in turns), (), right, task, facts)
    judging = True
    signal.setitimer(signal.ITIMER_PROF, seconds)
    verdict = checker.verdict(row, reply)
    signal.setitimer(signal.ITIMER_PROF, 0)
    judging = False
    return [verdict.figures or None, verdict.reason]


def main(seconds: float, memory: int) -> None:
    stdout = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing that a library prints gets between the verdicts
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for asked_to_stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(asked_to_stop, signal.SIG_IGN)  # for the parent, whose end is the end of the input
    limit(memory)
    sys.addaudithook(refuse)
    stdout.write(b"ready\n")
    stdout.flush()
    for line in sys.stdin.buffer:
        stdout.write(json.dumps(answer(line, seconds)).encode() + b"\n")
        stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
