"""Faults planted in a process from outside: at a moment that is counted, something happens that no program expects.

A moment is just before or just after something is made permanent (a file renamed, flushed, deleted, written) or a phase
of the work begins or ends. Every process writes the names of its moments to a log, so that a first run tells what there
is to hit; a second one is hit at the n-th of them. Nothing in the product knows of this: functions are replaced by
others that do the same, in a process that `sitecustomize` or a test started.
"""

from __future__ import annotations

import builtins
import errno
import importlib.abc
import importlib.machinery
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PLAN = "PLANTED_FAULT"

DISK = ("os:replace", "os:rename", "os:fsync", "os:unlink", "os:mkdir", "shutil:rmtree")
PHASES = (
    "safetensors.torch:save_file",
    "uft.data.tokens:_encode",
    "uft.data.tokens:_encode_chunk",
    "uft.model.reference:ReferenceColumn._compute",
    "uft.model.reference:LogProbStore.add",
    "uft.training.step:global_counts",
    "uft.training.step:all_reduce_terms",
    "uft.training.step:optimiser_step",
    "uft.training.trainer:Trainer.save_checkpoint",
    "uft.evaluation.evaluate:evaluate",
    "uft.sampling.generate:complete",
    "uft.sampling.negatives:append_records",
    "uft.model.export:export",
    "uft.model.export:plain_model",
    "uft.model.load:load_base",
    "uft.sampling.annotate:_mean",
)


@dataclass
class Fault:
    """What happens (`do`, see ACTIONS) at the `at`-th moment, counted from 0, among those whose name has `name` in it
    and, if it is about a file, whose path has `path` in it.

    `rank`: of which process of several; "": of one alone or all. `stays`: at all later ones of them too. `log`: a file
    that gets the name of every moment.
    """

    do: str = "nothing"
    at: int = 0
    name: str = ""
    path: str = ""
    rank: str = ""
    stays: bool = False
    log: str = ""
    roots: tuple[str, ...] = ()  # only files below these are watched

    def variable(self) -> dict[str, str]:
        """The environment variable by which a forked worker is told (program.py)."""
        return {PLAN: json.dumps(asdict(self))}

    def into(self, environment: dict[str, str]) -> dict[str, str]:
        """The environment of a process that is started, in which site/sitecustomize.py plants this fault."""
        here = Path(__file__).parent
        path = os.pathsep.join([str(here / "site"), str(here), environment.get("PYTHONPATH", "")])
        return environment | self.variable() | {"PYTHONPATH": path}


class Planted:
    def __init__(self, fault: Fault) -> None:
        self.fault, self.count = fault, 0
        self.log = os.open(fault.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if fault.log else None

    def moment(self, name: str, path: str = "") -> str | None:
        """Pass a moment; what the caller itself has to do ("half": write half of it, and die)."""
        if self.log is not None:
            os.write(self.log, f"{name} {Path(path).name if path else ''}\n".encode())
        if self.fault.name not in name or self.fault.path not in path:
            return None
        number, self.count = self.count, self.count + 1
        if number == self.fault.at or (self.fault.stays and number > self.fault.at):
            return ACTIONS[self.fault.do](path)
        return None

    def watched(self, path: str) -> bool:
        return any(path.startswith(root) for root in self.fault.roots)

    def around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        on_disk = name.partition(".")[0] in ("os", "shutil")

        def call(*arguments: Any, **keywords: Any) -> Any:
            path = str(arguments[0]) if on_disk and isinstance(arguments[0], (str, os.PathLike)) else ""
            if path and "dir_fd" not in keywords and not self.watched(path):
                return real(*arguments, **keywords)
            self.moment(f"before {name}", path)
            value = real(*arguments, **keywords)
            self.moment(f"after {name}", path)
            return value

        call.planted = True  # type: ignore[attr-defined]
        return call

    def open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Every file below the roots that is opened for writing is a moment, and so is all that is written to it."""

        def call(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
            path = str(file) if isinstance(file, (str, os.PathLike)) else ""
            if not set(mode) & set("wax+") or not self.watched(path):
                return real(file, mode, *arguments, **keywords)
            self.moment("before open", path)
            handle = real(file, mode, *arguments, **keywords)
            self.moment("after open", path)
            return Handle(handle, path, self)

        return call


class Handle:
    """A file whose writes are moments."""

    def __init__(self, handle: Any, path: str, planted: Planted) -> None:
        self._handle, self._path, self._planted = handle, path, planted

    def write(self, data: Any) -> int:
        if self._planted.moment("before write", self._path) == "half":
            self._handle.write(data[: len(data) // 2])
            self._handle.flush()
            ACTIONS["kill"](self._path)
        return self._handle.write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._handle.flush()
        self._planted.moment("after flush", self._path)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *problem: object) -> None:
        self._handle.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def __iter__(self) -> Any:
        return iter(self._handle)


# --- what happens


def send(number: int) -> Callable[[str], None]:
    return lambda path: os.kill(os.getpid(), number)


def full(path: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path or None)


def hang(path: str) -> None:
    while True:
        time.sleep(1)


def device_memory(path: str) -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.25 GiB. GPU 0 has a total capacity of 8 GiB")


def memory(path: str) -> None:
    raise MemoryError("Unable to allocate 7.25 GiB for an array")


def turn_clock(years: int) -> Callable[[str], None]:
    """The machine's clock is set; what is monotonic stays so."""
    real = time.time
    return lambda path: setattr(time, "time", lambda: real() + years * 365 * 86400)


ACTIONS: dict[str, Callable[[str], Any]] = {
    "nothing": lambda path: None,
    "kill": send(signal.SIGKILL),
    "half": lambda path: "half",
    "full": full,
    "hang": hang,
    "terminate": send(signal.SIGTERM),
    "warn": send(signal.SIGUSR1),
    "device_memory": device_memory,
    "memory": memory,
    "crash": send(signal.SIGSEGV),
    "clock_back": turn_clock(-10),
    "clock_forward": turn_clock(10),
}


# --- planting


def plant(fault: Fault) -> None:
    """From here on this process meets the fault."""
    planted = Planted(fault)
    for target in (*DISK, *PHASES):
        module, _, name = target.partition(":")
        if module in sys.modules:
            replace(planted, sys.modules[module], name)
        else:
            Later.hooks.setdefault(module, []).append(lambda m, n=name: replace(planted, m, n))
    if Later.hooks:
        sys.meta_path.insert(0, Later())
    for owner in (builtins, io):
        owner.open = planted.open(owner.open)  # type: ignore[attr-defined]


def replace(planted: Planted, module: Any, name: str) -> None:
    """Put a function that passes moments in the place of `name`, wherever it was imported to."""
    *owners, last = name.split(".")
    owner = module
    for part in owners:
        owner = getattr(owner, part)
    real = getattr(owner, last)
    made = planted.around(f"{module.__name__.rpartition('.')[2]}.{name}", real)
    setattr(owner, last, made)
    if owners:
        return
    for other in list(sys.modules.values()):
        if getattr(other, "__name__", "").startswith("uft") and getattr(other, last, None) is real:
            setattr(other, last, made)


class Later(importlib.abc.MetaPathFinder):
    """Replaces functions of modules right after they were imported."""

    hooks: dict[str, list[Callable[[Any], None]]] = {}

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in self.hooks:
            return None
        hooks = self.hooks.pop(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        real = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            real(module)
            for hook in hooks:
                hook(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def plant_from_environment() -> None:
    """In the worker alone, not in the program that starts it."""
    if "uft.launch.worker" in sys.orig_argv and (plan := os.environ.get(PLAN)):
        fault = Fault(**json.loads(plan))
        if fault.rank in ("", os.environ.get("RANK")):
            plant(fault)


assert shutil  # so that it is there when its functions are replaced
