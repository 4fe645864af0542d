"""Fork server for workers: one process imports torch, transformers and uft, and every job of a sweep is a fork of it.

A worker that is started by itself spends seven CPU seconds on imports; a fork spends none. Everything else is as with
`subprocess.Popen`: the job is a child of the launcher (not of the server) in a session of its own, with its own working
folder, environment and standard streams, so that signals, exit codes and the death of the launcher reach it in the same
way, and a crash takes that job alone.

    launcher --starts--> server --forks--> intermediate --forks--> job
                                            (exits at once: the kernel gives the job to the launcher)

The launcher is a subreaper (prctl(2)) for the moment of a fork, which is why it gets the orphan. This needs Linux;
elsewhere, and wherever a fork would differ from a fresh process, there is no server and the caller uses Popen.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, cast

WORKER = (sys.executable, "-P", "-m", "uft.launch.worker")
SWITCH = "UFT_FORKSERVER"
"""`UFT_FORKSERVER=off`: every worker is started by Popen."""

FREE = ("UFT_", "CUDA_VISIBLE_DEVICES")
"""Prefixes of the environment variables that no import reads. A job may have others of these than the server; where
anything else differs (OMP_NUM_THREADS, HF_HOME, ...), the imports would have come out differently."""

PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36
NAME, JOB_NAME = "uft-forkserver", "uft-worker"  # in the list of processes: all have the server's command line
PACKETS = (socket.AF_UNIX, socket.SOCK_SEQPACKET)  # a request is one message
LARGEST_REQUEST = 1 << 20  # bytes of a request


# --- in the launcher


class Child:
    """A forked job: the part of `subprocess.Popen` that launchers use. It is a child of this process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self, flags: int = os.WNOHANG) -> int | None:
        """The exit code, negative for a signal; None while it lives."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, flags)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        code = self.poll(0)
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Server:
    """A fork server as its launcher sees it. `pid`: its process, a child of this one that `socket` leads to."""

    def __init__(self, pid: int, socket: socket.socket, environment: Mapping[str, str]) -> None:
        self.process, self.socket, self.environment = Child(pid), socket, dict(environment)

    @classmethod
    def start(cls, environment: Mapping[str, str], target: str) -> Server:
        """A new process that imports what `target` needs: its function `preload()`."""
        ours, theirs = socket.socketpair(*PACKETS)
        command = [sys.executable, "-P", "-m", "uft.launch.forkserver", str(theirs.fileno()), str(os.getpid()), target]
        silent: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        with theirs:
            process = subprocess.Popen(
                command, env=dict(environment), pass_fds=[theirs.fileno()], start_new_session=True, **silent
            )
        process.returncode = 0  # it is reaped by its Child, so that Popen has nothing to warn of
        return cls(process.pid, ours, environment)

    def fork(
        self,
        target: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        cwd: Path | None,
        streams: Sequence[int],
    ) -> Child | None:
        """A job that runs `target`'s `main(arguments)`; None if the server is lost. `streams`: descriptors 0 to 2."""
        umask = os.umask(0o077)
        os.umask(umask)
        request = {
            "target": target,
            "arguments": list(arguments),
            "environment": dict(environment),
            "cwd": str(cwd or Path.cwd()),
            "umask": umask,
            "launcher": os.getpid(),
        }
        answer, written_by_job = os.pipe()
        prctl(PR_SET_CHILD_SUBREAPER, 1)  # the job, whose parent ends at once, becomes a child of this process
        try:
            with open(answer, "rb") as reply:
                try:
                    socket.send_fds(self.socket, [json.dumps(request).encode()], [written_by_job, *streams])
                finally:
                    os.close(written_by_job)
                pid = reply.read()
        except OSError:
            return None
        finally:
            prctl(PR_SET_CHILD_SUBREAPER, 0)
        return Child(int(pid)) if pid else None

    def close(self) -> None:
        self.socket.close()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Current:
    """The server of this process: wanted by a sweep, started by its first job, given up when it is lost."""

    wanted = False
    server: Server | None = None

    @classmethod
    def close(cls) -> None:
        if cls.server:
            cls.server.close()
        cls.wanted, cls.server = False, None


@contextmanager
def forkserver() -> Iterator[None]:
    """Within, workers that are started one after the other are forks of one server; the first of them starts it."""
    if sys.platform != "linux" or os.environ.get(SWITCH) == "off" or Current.server:
        yield
        return
    Current.wanted = True
    try:
        yield
    finally:
        Current.close()


def server_for(command: Sequence[str], environment: Mapping[str, str]) -> Server | None:
    """The server whose forks are what Popen would start with this command and environment; None where it has none."""
    if tuple(command[: len(WORKER)]) != WORKER:
        return None
    if Current.wanted and Current.server is None:
        Current.server = Server.start(environment, WORKER[-1])
    server = Current.server
    same = server is not None and read_by_imports(server.environment) == read_by_imports(environment)
    return server if same else None


def read_by_imports(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(FREE)}


def prctl(option: int, argument: Any) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0)


# --- in the server


def main(arguments: Sequence[str]) -> int:
    """`python -m uft.launch.forkserver DESCRIPTOR PARENT TARGET`: import what TARGET needs, then serve."""
    descriptor, parent, target = int(arguments[0]), int(arguments[1]), arguments[2]
    atexit.register(leave)  # first, and so the last one that a job runs
    gc.disable()  # no garbage among imports
    import_module(target).preload()
    return serve(socket.socket(fileno=descriptor), parent)


def serve(connection: socket.socket, parent: int) -> int:
    """Fork a job for every request until the launcher is gone. Returns in the jobs alone: their exit codes."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_NAME, NAME.encode())
    files = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            files.append(os.readlink(f"/proc/self/fd/{number}"))
    # a device that is open: a context of CUDA does not survive a fork
    if os.getppid() != parent or any(file.startswith(("/dev/nvidia", "/dev/kfd", "/dev/dri")) for file in files):
        os._exit(1)
    gc.disable()
    gc.freeze()  # a collection in a job would write to all these pages, and so copy them
    while True:
        request, descriptors, _, _ = socket.recv_fds(connection, LARGEST_REQUEST, 4)
        if not request:
            os._exit(0)
        child = os.fork()
        if child == 0:
            intermediate = os.getpid()
            if os.fork():
                os._exit(0)
            connection.close()
            return run(json.loads(request), intermediate, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        os.waitpid(child, 0)


_exit_code = [1]  # of this process where it is a job: exit handlers are not told


def run(request: Mapping[str, Any], intermediate: int, answer: int, *streams: int) -> int:
    """In the job: become what a fresh process would be, say that it is there, and do the work; the exit code."""
    while os.getppid() == intermediate:
        time.sleep(0.0005)
    if os.getppid() != request["launcher"]:  # it is gone, or was given no orphan
        os._exit(1)
    os.setsid()
    prctl(PR_SET_NAME, JOB_NAME.encode())
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        cast(io.TextIOWrapper, stream).reconfigure(line_buffering=number == 2 or os.isatty(number))
    module = import_module(request["target"])
    sys.argv = [str(module.__file__), *request["arguments"]]
    sys.orig_argv = [*WORKER[:-1], request["target"], *request["arguments"]]
    sys.modules["__main__"] = module
    gc.enable()
    os.write(answer, str(os.getpid()).encode())
    os.close(answer)
    try:
        _exit_code[0] = module.main(request["arguments"]) or 0
    except SystemExit as end:
        _exit_code[0] = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except KeyboardInterrupt:
        _exit_code[0] = -signal.SIGINT
        raise
    return _exit_code[0]


def leave() -> NoReturn:
    """The last exit handler of a job: end without the teardown of modules, which would copy the pages shared by all."""
    if _exit_code[0] < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), -_exit_code[0])
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        os._exit(_exit_code[0] or 120)  # as Python says of a stream that cannot be flushed at exit
    os._exit(_exit_code[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
