"""The child that starts a run's processes and watches them: `torch.distributed.run`, without restarts.

    python -m uft.launch.agent [OPTIONS OF torchrun] -m uft.launch.worker RUN

It dies with its launcher, passes signals on and waits, and when one process ends the others are ended: which one it was
and why is said in a line. Nothing is restarted in place: a run goes on by `uft resume`, in fresh processes.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uft.environment import FOLDER, noted_code, reasons
from uft.errors import FAILED, GOOD
from uft.launch.process import EXIT_CODES, PARENT, cause, die_with_parent, oom_kills
from uft.runs import Run, write_json

OURS = (signal.SIGTERM, signal.SIGINT)
"""What ends a process because another one ended, or because somebody asked: never the cause."""


def main(arguments: Sequence[str]) -> int:
    """Run the processes to their end; the exit code of the request."""
    die_with_parent()
    os.environ[PARENT] = str(os.getpid())
    os.environ["PYTHONSAFEPATH"] = "1"  # the processes are started without -P
    os.environ["LOGLEVEL"] = "CRITICAL"  # of torch's launcher: what there is to say is said below
    os.environ.setdefault("OMP_NUM_THREADS", str(threads(arguments)))
    with tempfile.TemporaryDirectory(prefix="uft-ranks-") as folder:
        os.environ[FOLDER] = folder
        return launch(arguments, Path(folder))


def threads(arguments: Sequence[str]) -> int:
    """CPU threads of each process: the cores of this machine among those it is given."""
    count = next(int(word.partition("=")[2]) for word in arguments if word.startswith("--nproc-per-node="))
    return max(1, len(os.sched_getaffinity(0)) // count) if hasattr(os, "sched_getaffinity") else 1


def launch(arguments: Sequence[str], folder: Path) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    killed_before = oom_kills()
    try:
        run.run(run.parse_args(list(arguments)))
    except ChildFailedError as error:
        return told(error.failures, folder, Run(Path(arguments[-1])), oom_kills() - killed_before)
    except SignalException as error:
        code = noted_code(folder)
        return EXIT_CODES.get(error.sigval, FAILED) if code is None else code
    return GOOD


def told(failures: Mapping[int, Any], folder: Path, run: Run, oom: int) -> int:
    """Say why the processes ended, unless the first one has; the exit code. `oom`: of `cause`."""
    killed = {rank: -f.exitcode for rank, f in failures.items() if f.exitcode < 0 and -f.exitcode not in OURS}
    if killed:
        rank = min(killed, key=lambda rank: failures[rank].timestamp)  # the others may have had to be killed after it
        number = killed[rank]
        said = f"process {rank} was killed by {signal.Signals(number).name}{cause(number, oom)}"
        print(f"uft: {said}; the others were ended", file=sys.stderr)
        blame(run, said)
        return FAILED
    why, code = reasons(folder), noted_code(folder)
    if why and 0 not in why:
        rank, text = next(iter(why.items()))
        said = f"process {rank}: {text.rstrip()}"
        print(f"uft: {said}", file=sys.stderr)
        blame(run, said)
    elif not why and code is None:
        ends = ", ".join(f"process {rank} with exit code {f.exitcode}" for rank, f in sorted(failures.items()))
        print(f"uft: the run ended before it began: {ends}", file=sys.stderr)
    return FAILED if code is None else code


def blame(run: Run, said: str) -> None:
    """Put the cause into the result of the first process, which could only tell that it was left alone."""
    if run.result().get("status") == "failed":
        write_json(run.path / "result.json", {**run.result(), "error": said})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
