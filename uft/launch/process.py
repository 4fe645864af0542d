"""The worker as a child process: how it is started, gets its signals and ends; its GPUs and its ranks.

The child has a session of its own, is sent every signal that this process gets, and is never left behind.
"""

from __future__ import annotations

import fcntl
import os
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from uft.errors import FAILED, SIGNALS, Problem, UftError, signals_to, stop_code
from uft.launch import forkserver
from uft.training.liveness import STOPPING

CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT)
COMMAND = forkserver.WORKER
"""-P: a `datasets.py` in the working directory is not imported in place of the library."""

AGENT = (*COMMAND, "--elastic")
"""Followed by the options of `torchrun` and the worker's command line."""

PARENT = "UFT_PARENT_PID"

GRACE = 600
"""Seconds that the ranks of a run have for their checkpoint once one of them failed or a signal came."""

POLL = 0.5
"""Seconds between two looks for free GPUs."""


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies, even by SIGKILL; the first thing a worker does.

    Once the run handles signals, SIGTERM means a checkpoint and a clean stop. Until then a signal ends the process
    without a traceback. Linux only: elsewhere a worker outlives its parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    forkserver.prctl(forkserver.PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before the line above
        sys.exit(FAILED)


def run_worker(
    arguments: Sequence[str],
    cwd: Path | None = None,
    log: Path | None = None,
    torchrun: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> int:
    """Run `python -m uft.launch.worker ARGUMENTS` to its end; the exit code. In a sweep the worker is forked.

    `torchrun`: its options where several processes train one model (`torchrun_arguments`); `variables`: added to the
    child's environment.

    With `log` (its console.log) nothing is printed here, and its stderr is appended to that file.

    The child has a session of its own, so that Ctrl-C on the terminal reaches it once, through us, and not twice.
    A child that was ended by a signal we forwarded counts as stopped; one killed by anything else has failed.
    """
    before, killed_before = len(signalled), oom_kills()
    env = {**os.environ, PARENT: str(os.getpid()), "PYTHONPATH": python_path(), **(variables or {})}
    command = [*AGENT, *torchrun, "-m", "uft.launch.worker", *arguments] if torchrun else [*COMMAND, *arguments]
    with forwarding(quiet=log is not None) as children, ExitStack() as files:
        out, err = 1, 2
        if log is not None:
            out, err = (files.enter_context(open(path, "a")).fileno() for path in (os.devnull, log))
        child: Child | None = None
        if server := None if torchrun else forkserver.server_for(command, env):
            children[:] = [server.process]  # a signal that comes while it still imports ends it
            child = None if signalled[before:] else server.fork(COMMAND[-1], arguments, env, cwd, (0, out, err))
            if child is None:  # it is lost: from here on Popen
                forkserver.Current.close()
        child = child or subprocess.Popen(command, start_new_session=True, env=env, cwd=cwd, stdout=out, stderr=err)
        children[:] = [child]
        for number in signalled[before:]:  # one came in before there was a child
            child.send_signal(number)
        try:
            code = child.wait()
        except BaseException:  # a scheduler's signal may be one: the child ends too, after its checkpoint
            child.send_signal(signal.SIGTERM)
            child.wait()
            raise
        if code >= 0:
            return code
        if sent := signalled[before:]:
            return stop_code(sent[0])
        why = cause(-code, oom_kills() - killed_before)
        os.write(err, f"uft: the worker was killed by {signal.Signals(-code).name}{why}\n".encode())
    return FAILED


Child = subprocess.Popen[bytes] | forkserver.Child


def cause(number: int, oom: int) -> str:
    """The probable reason for a signal that was not forwarded; `oom`: processes the kernel killed meanwhile."""
    if number != signal.SIGKILL:
        return " (a crash; where it was is above)" if number in CRASHES else ""
    if oom > 0:
        return ": the machine ran out of memory. Lower train.micro_batch_tokens, or give it more"
    return " (sent from outside, or by the kernel when memory ran out: see dmesg)"


def oom_kills(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Out-of-memory kills in this process's control group so far (Linux, cgroup 2; else 0)."""
    try:
        own = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
        text = (cgroups / own / "memory.events").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))


def python_path() -> str:
    """PYTHONPATH for a child: the folder that holds this `uft` comes first, unless it is an installed package."""
    root, rest = str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")
    if root in (*site.getsitepackages(), site.getusersitepackages()):
        return rest
    return os.pathsep.join([root, rest]) if rest else root


signalled: list[int] = []
"""Signals that this process forwarded to its workers, in their order; the table of a sweep looks at it too."""


@contextmanager
def forwarding(quiet: bool) -> Iterator[list[Child]]:
    """Note every signal in `signalled` and forward it to the children in the list that is yielded.

    Where they are `quiet`, the first Ctrl-C is acknowledged here. SIGUSR2 is left alone where it has a handler:
    submitit puts a job back in the queue by it.
    """
    children, before = list[Child](), len(signalled)

    def receive(number: int) -> None:
        signalled.append(number)
        if quiet and signalled[before:] == [signal.SIGINT]:
            with suppress(OSError):
                os.write(2, STOPPING)
        for child in children:
            child.send_signal(number)

    with signals_to(receive, [n for n in SIGNALS if n != signal.SIGUSR2 or signal.getsignal(n) is signal.SIG_DFL]):
        yield children


@contextmanager
def gpu_pool(hardware: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Reserve `hardware.processes` GPUs of `hardware.pool`; the environment variables that give them to a run.

    Waits until enough are free at once, and holds none while it waits. {} without a pool, and under a scheduler, which
    has chosen already. A GPU is reserved by a lock on a file that all users of this machine share; the kernel frees the
    lock of a dead holder.
    """
    pool: Sequence[int] | None = hardware.get("pool")
    if pool is None or "SLURM_JOB_ID" in os.environ:
        yield {}
        return
    folder = Path(tempfile.gettempdir()) / "uft-gpus"
    with suppress(FileExistsError):
        folder.mkdir()
        folder.chmod(0o1777)  # for all users, whatever the umask
    while True:
        with ExitStack() as held:
            numbers: list[str] = []
            for number in pool:
                file = folder / f"{number}.lock"
                with suppress(FileExistsError):  # another user's file may be read, and not be opened to create
                    file.touch(0o644, exist_ok=False)
                handle = held.enter_context(open(file, "rb"))
                with suppress(OSError):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    numbers.append(str(number))
                if len(numbers) == hardware.get("processes", 1):
                    yield {"CUDA_VISIBLE_DEVICES": ",".join(numbers)}
                    return
        time.sleep(POLL)


def torchrun_arguments(hardware: Mapping[str, Any]) -> list[str]:
    """Options of `torch.distributed.run` for the configuration's `hardware`; none for a single process.

    Raises UftError where the rank of this machine, or the place of the rendezvous, is neither configured nor Slurm's.
    """
    processes, nodes = hardware.get("processes", 1), hardware.get("nodes", 1)
    if processes * nodes == 1:
        return []
    options = [
        f"--nproc-per-node={processes}",
        "--max-restarts=0",  # restarting in place hangs too often; `uft resume` starts fresh processes
        "--monitor-interval=0.1",
        f"--shutdown-timeout={GRACE}",
        f"--signals-to-handle={','.join(number.name for number in SIGNALS)}",
    ]
    if nodes == 1:
        return [*options, "--standalone"]
    rank, endpoint, job = node_rank(hardware), hardware["rendezvous"], os.environ.get("SLURM_JOB_ID")
    if not endpoint:
        names = os.environ.get("SLURM_JOB_NODELIST")
        if names is None or job is None:
            why = "where do the machines meet? This is no job of Slurm"
            raise UftError(Problem("hardware.rendezvous=null", why, advice=("HOST:PORT of the first machine",)))
        listed = subprocess.run(["scontrol", "show", "hostnames", names], capture_output=True, text=True, check=True)
        endpoint = f"{listed.stdout.split()[0]}:{20000 + int(job) % 20000}"  # the same on all machines of the job
    return [
        *options,
        f"--nnodes={nodes}",
        f"--node-rank={rank}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-id={job or endpoint}",
        f"--rdzv-conf=is_host={str(rank == 0).lower()}",
    ]


def node_rank(hardware: Mapping[str, Any]) -> int:
    """The rank of this machine: 0 makes the run folder, the others join. Raises UftError where it is not known."""
    if hardware.get("nodes", 1) == 1:
        return 0
    given = hardware.get("node_rank")
    if given is None and "SLURM_NODEID" not in os.environ:
        why = "which of the machines is this? Nobody says"
        raise UftError(Problem("hardware.node_rank=null", why, advice=("0 on the first, 1 on the second, ...",)))
    return int(os.environ["SLURM_NODEID"]) if given is None else int(given)
