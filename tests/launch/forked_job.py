"""A job of a fork server that does as it is told: what a worker would, in milliseconds."""

import atexit
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

from uft.launch.process import die_with_parent


def preload() -> None:
    pass


def main(arguments: list[str]) -> int:
    die_with_parent()
    what, *rest = arguments
    if what == "describe":
        atexit.register(print, "an exit handler")
        description = {
            "parent": os.getppid(),
            "leads a session": os.getsid(0) == os.getpid(),
            "cwd": os.getcwd(),
            "umask": oct(os.umask(0o022)),
            "argv": sys.argv[1:],
            "environment": dict(os.environ),
            "open": sorted(int(name) for name in os.listdir("/proc/self/fd")),
            "signals": [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)],
            "main": sys.modules["__main__"].__name__.rpartition(".")[2],
        }
        print(json.dumps(description))
    if what == "ask":
        print(sys.stdin.readline().strip(), "was read")
        print("a complaint", file=sys.stderr)
    if what == "raise":
        raise ValueError("it broke")
    if what == "leave":
        sys.exit("in words")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "crash":
        ctypes.string_at(0)
    if what == "wait":
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
        Path(rest[0]).write_text(str(os.getpid()))
        time.sleep(60)
    return int(rest[0]) if what == "exit" else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
