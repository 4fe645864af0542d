"""The program as a real process, forked from a warm server: what `subprocess` gives, without seconds of imports.

`Popen(command, ...)` and `run(command, ...)` are those of `subprocess`. A command that starts uft (`-m uft`), its
worker or a script of the tests is a fork of one server for all tests of this process, which has the command line and
the worker imported; the workers that it starts are forks too, by the product's fork server. Every other command is
started as it stands, and so is one whose environment would have made the imports come out differently.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
ROOT = TESTS.parent
ABROAD = ("WANDB_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "UFT_", "HYDRA_", "PYTEST_")
"""Environment variables by which a person speaks to the outside, or to uft: no test sees them."""

OWN = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
"""Of every process that is forked."""

AT_IMPORT = ("PYTHON", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "OMP_", "MKL_", "OPENBLAS_", "TORCH", "PYTORCH", "LD_")
"""Environment variables that are read by imports."""

MODULES = ("uft", "uft.launch.worker")


def outside() -> dict[str, str]:
    """The environment of this process, without a person's settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ABROAD)}


def isolated(home: Path, cache: Path) -> dict[str, str]:
    """The environment of a process that sees and touches nothing of the person's: settings, caches and W&B."""
    own = {"HOME": str(home), "UFT_CACHE": str(cache), "WANDB_MODE": "offline", "WANDB_DIR": str(home)}
    return outside() | OWN | own


# --- in the tests


@functools.cache
def server() -> Any:
    """The warm server of this process's tests."""
    from uft.launch.forkserver import Server

    home = tempfile.TemporaryDirectory(prefix="uft-tests-")
    environment = outside() | OWN | {"HOME": home.name, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)])}
    started = Server.start(environment, "program")
    atexit.register(home.cleanup)
    atexit.register(started.close)
    return started


def at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(AT_IMPORT) and name != "HF_TOKEN"}


class Popen(subprocess.Popen):
    """`subprocess.Popen`, forked where it can be. `fork=False`: started as a person starts it."""

    _execute = inspect.signature(subprocess.Popen._execute_child)

    def __init__(self, args: Sequence[str | os.PathLike[str]], fork: bool = True, **options: Any) -> None:
        words = list(map(str, args))
        environment = options.get("env") or dict(os.environ)
        same = at_import(environment) == at_import(outside() | OWN) and sys.platform == "linux"
        known = words[:2] == [sys.executable, "-m"] and words[2] in MODULES
        known |= words[0] == sys.executable and words[1].startswith(f"{TESTS}{os.sep}")
        self.forked = words[1:] if fork and known and same else None
        super().__init__(words, **options)

    def _execute_child(self, *given: Any) -> None:
        if self.forked is None:
            super()._execute_child(*given)
            return
        asked = self._execute.bind(self, *given).arguments
        pipes = (("p2cread", 0), ("c2pwrite", 1), ("errwrite", 2))
        streams = [asked[name] if asked[name] != -1 else number for name, number in pipes]
        before = os.umask(asked["umask"]) if asked["umask"] >= 0 else None
        child = server().fork("program", self.forked, asked["env"] or os.environ, asked["cwd"], streams)
        if before is not None:
            os.umask(before)
        assert child is not None, "the fork server of the tests is lost"
        self.pid = child.pid
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[name] for name in ends))


def run(command: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run`, forked where it can be. Output is captured unless `stdout` or `stderr` say otherwise."""
    text, timeout, check = options.pop("input", None), options.pop("timeout", 120), options.pop("check", False)
    if options.pop("capture_output", False):
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options.setdefault("stdin", subprocess.DEVNULL if text is None else subprocess.PIPE)
    with Popen(command, **options) as process:
        try:
            out, err = process.communicate(text, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


# --- in the server, and in what is forked


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def preload() -> None:
    """What the command line and the worker import."""
    from hydra.core.plugins import Plugins

    import uft.cli.completion
    import uft.cli.manage
    import uft.cli.tools
    import uft.cli.verbs  # noqa: F401
    from uft.launch import worker

    worker.preload()
    Plugins.instance()


def main(arguments: Sequence[str]) -> int | None:
    """`-m uft ...`, `-m uft.launch.worker ...` or `SCRIPT ...`, as Python runs them."""
    sys.orig_argv = [sys.executable, *arguments]
    if arguments[0] != "-m":
        sys.argv = list(arguments)
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
        return 0
    module = import_module("uft.__main__" if arguments[1] == "uft" else arguments[1])
    sys.argv = [str(module.__file__), *arguments[2:]]
    sys.modules["__main__"] = module
    sys.path.insert(0, os.getcwd())
    if arguments[1] == "uft":
        serve_workers()
    elif "PLANTED_FAULT" in os.environ:
        plant()
    return module.main(sys.argv[1:])


def serve_workers() -> None:
    """A fork server for the workers of this process: a child of it, as one that it starts by itself would be."""
    from uft.launch import forkserver, process, worker

    if "PLANTED_FAULT" in os.environ:
        real = worker.main
        worker.main = lambda arguments: plant() or real(arguments)
    ours, theirs = socket.socketpair(*forkserver.PACKETS)
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        ours.close()
        os.setsid()
        for number in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        sys.exit(forkserver.serve(theirs, parent))
    theirs.close()
    forkserver.FREE = (*forkserver.FREE, "HYDRA_", "HF_HUB_OFFLINE")  # set by the program before its worker is there
    if os.environ.get(forkserver.SWITCH) != "off":
        environment = {**os.environ, "PYTHONPATH": process.python_path()}
        forkserver.Current.server = forkserver.Server(pid, ours, environment)


def plant() -> None:
    """Plant the fault that the environment asks for in this process: tests/faults/planting.py."""
    sys.path.insert(0, str(TESTS / "faults"))
    import_module("planting").plant_from_environment()
