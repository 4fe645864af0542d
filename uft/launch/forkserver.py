"""Fork server for workers: one process imports torch, transformers and uft, and every job of a sweep is a fork of it.

A worker that is started by itself spends seven CPU seconds on imports; a fork spends none. Everything else is as with
`subprocess.Popen`: the job is a child of the launcher (not of the server) in a session of its own, with its own working
folder, environment and standard streams, so that signals, exit codes and the death of the launcher reach it in the same
way, and a crash takes that job alone.

    launcher --starts--> server --forks--> intermediate --forks--> job
                                            (exits at once: the kernel gives the job to the launcher)

The launcher is a subreaper (prctl(2)) for the moment of a fork, which is why it gets the orphan. This needs Linux;
elsewhere, and wherever a fork would differ from a fresh process, :func:`fork` returns None and the caller uses Popen.
"""

from __future__ import annotations

import ctypes
import gc
import io
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, cast

WORKER = (sys.executable, "-P", "-m", "uft.launch.worker")
SWITCH = "UFT_FORKSERVER"
"""`UFT_FORKSERVER=off`: every worker is started by Popen."""

FREE = ("UFT_", "CUDA_VISIBLE_DEVICES")
"""Prefixes of the environment variables that no import reads. A job may have others of these than the server; where
anything else differs (OMP_NUM_THREADS, HF_HOME, ...), the imports would have come out differently."""

PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 1, 15, 36, 37
NAME, JOB_NAME = "uft-forkserver", "uft-worker"  # in the list of processes: all have the server's command line
LENGTH = struct.Struct("!Q")
TICK = 0.1  # seconds between two looks at whether a signal asks the launcher to stop waiting for the server


# --- in the launcher


class Child:
    """A forked job: the part of `subprocess.Popen` that launchers use. It is a child of this process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it lives."""
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        code = self._reap(0)
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _reap(self, flags: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, flags)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


class Server:
    """A fork server as its launcher sees it. `pid`: its process, a child of this one that `socket` leads to."""

    def __init__(self, pid: int, socket: socket.socket, environment: Mapping[str, str]) -> None:
        self.process, self.socket, self.environment = Child(pid), socket, dict(environment)

    @classmethod
    def start(cls, environment: Mapping[str, str], target: str) -> Server:
        """A new process that imports what `target` needs: its function `preload()`."""
        ours, theirs = socket.socketpair()
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
        hurry: Callable[[], object] = lambda: False,
    ) -> Child | None:
        """A job that runs `target`'s `main(arguments)`; None if the server is lost.

        `streams`: its descriptors 0, 1 and 2. `hurry`: when it becomes true, the server is given up if it is not ready.
        """
        ours, theirs = socket.socketpair()
        request = {
            "target": target,
            "arguments": list(arguments),
            "environment": dict(environment),
            "cwd": str(cwd or Path.cwd()),
            "umask": current_umask(),
            "launcher": os.getpid(),
        }
        payload = json.dumps(request).encode()
        with ours, adopting_orphans():
            try:
                with theirs:
                    socket.send_fds(self.socket, [LENGTH.pack(len(payload))], [theirs.fileno(), *streams])
                self.socket.sendall(payload)
                while not select.select([ours], [], [], TICK)[0]:
                    if hurry():
                        self.process.kill()
                answer = ours.recv(LENGTH.size, socket.MSG_WAITALL)
            except OSError:
                return None
        return Child(LENGTH.unpack(answer)[0]) if len(answer) == LENGTH.size else None

    def close(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()


class _Current:
    """The server of this process: wanted by a sweep, started by its first job, given up when it is lost."""

    wanted = False
    server: Server | None = None


@contextmanager
def forkserver() -> Iterator[None]:
    """Within, workers that are started one after the other are forks of one server; the first of them starts it."""
    if sys.platform != "linux" or os.environ.get(SWITCH) == "off" or _Current.server:
        yield
        return
    _Current.wanted = True
    try:
        yield
    finally:
        _Current.wanted = False
        if _Current.server:
            _Current.server.close()
        _Current.server = None


def use(server: Server) -> None:
    """Fork this process's workers from a server that is there already."""
    _Current.server = server


def fork(
    command: Sequence[str],
    environment: Mapping[str, str],
    cwd: Path | None,
    streams: Mapping[str, Any],
    hurry: Callable[[], object] = lambda: False,
) -> Child | None:
    """The process that `subprocess.Popen(command, env=environment, cwd=cwd, start_new_session=True, **streams)` would
    be, as a fork. None where there is no server, where `command` is no worker, or where a fork would be another."""
    if tuple(command[: len(WORKER)]) != WORKER:
        return None
    if _Current.server is None and _Current.wanted:
        _Current.server, _Current.wanted = Server.start(environment, WORKER[-1]), False
    server = _Current.server
    if server is None or same_for_imports(server.environment) != same_for_imports(environment):
        return None
    with ExitStack() as opened:
        descriptors = [0, 1, 2]
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            given = streams.get(name)
            if given == subprocess.DEVNULL:
                given = opened.enter_context(open(os.devnull, "r+b", buffering=0))
            if given is not None:
                descriptors[number] = given.fileno()
        child = server.fork(WORKER[-1], command[len(WORKER) :], environment, cwd, descriptors, hurry)
    if child is None:  # the server is lost: from here on Popen
        server.close()
        _Current.server = None
    return child


def same_for_imports(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(FREE)}


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Within, a grandchild whose parent ends becomes a child of this process."""
    before = ctypes.c_int()
    prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, before.value)


def prctl(option: int, argument: Any) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0)


def current_umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


# --- in the server


def main(arguments: Sequence[str]) -> NoReturn:
    """`python -m uft.launch.forkserver DESCRIPTOR PARENT TARGET`: import what TARGET needs, then serve."""
    descriptor, parent, target = int(arguments[0]), int(arguments[1]), arguments[2]
    gc.disable()  # no garbage among imports
    import_module(target).preload()
    serve(socket.socket(fileno=descriptor), parent)


def serve(connection: socket.socket, parent: int) -> NoReturn:
    """Fork a job for every request until the launcher is gone. Returns in no process: a job ends in :func:`run`."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_NAME, NAME.encode())
    if os.getppid() != parent or device_files():
        os._exit(1)
    gc.disable()
    gc.freeze()  # a collection in a job would write to all these pages, and so copy them
    while True:
        try:
            length, descriptors, _, _ = socket.recv_fds(connection, LENGTH.size, 4)
            if len(length) < LENGTH.size:
                os._exit(0)
            payload = b""
            while len(payload) < LENGTH.unpack(length)[0]:
                payload += connection.recv(1 << 20) or os._exit(0)
        except OSError:
            os._exit(0)
        child = os.fork()
        if child == 0:
            intermediate = os.getpid()
            if os.fork() == 0:
                connection.close()
                run(json.loads(payload), intermediate, *descriptors)
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        os.waitpid(child, 0)


def device_files() -> list[str]:
    """Devices that this process has opened: a context of CUDA does not survive a fork."""
    files = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            files.append(os.readlink(f"/proc/self/fd/{number}"))
    return [file for file in files if file.startswith(("/dev/nvidia", "/dev/kfd", "/dev/dri"))]


def run(request: Mapping[str, Any], intermediate: int, answer: int, *streams: int) -> NoReturn:
    """In the job: become what a fresh process would be, say that it is there, do the work, and end as Python ends."""
    code = 1
    try:
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
        os.write(answer, LENGTH.pack(os.getpid()))
        os.close(answer)
        code = exit_code(lambda: module.main(request["arguments"]))
    finally:
        os._exit(code)


def exit_code(work: Callable[[], int]) -> int:
    """What the process that does this and nothing else would exit with, after its threads and exit handlers."""
    import atexit
    import threading

    try:
        code = work()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        if isinstance(leave.code, str):
            print(leave.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or 120  # as Python says of a stream that cannot be flushed at exit
    return code


if __name__ == "__main__":
    main(sys.argv[1:])
