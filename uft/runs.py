"""Run: a folder that holds everything about one training run. It can be moved and still be resumed and compared.

Layout (see `docs/runs.md`): `config.yaml overrides.yaml run.json data.json check.json metrics.jsonl samples.jsonl
items.jsonl checkpoints/step-000400/ model/ console.log result.json evals/ wandb/`. Files that are rewritten appear by
rename, so that a reader never sees half of one. Below are the helpers for files that other packages use: atomic
writes, errors of full and read-only disks, the cache folder. No torch here: `uft ls` must answer at once.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from uft.errors import BAD_REQUEST, FAILED, Problem, UftError, did_you_mean, redact, redacted, visible

OUTPUTS = Path("outputs")
SWEEP_FILE = "sweep.json"  # the request of a sweep; `uft.launch.sweep` writes it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LARGEST_YAML = 400_000  # bytes: some seconds of reading
MOST_VALUES = 1_000_000  # of one YAML file, each counted as often as anything refers to it
LEFT_AFTER = 24 * 3600  # seconds after which an unfinished temporary file is one of a killed process


class Damaged(UftError, ValueError):
    """A file does not hold what was written into it."""


def _inside(name: str) -> cached_property[Path]:
    return cached_property(lambda run: run.path / name)


@dataclass(frozen=True)
class Run:
    """A run folder. Construct it for any path; `open_run` checks that it is one."""

    path: Path

    config_file = _inside("config.yaml")
    metrics_file = _inside("metrics.jsonl")
    samples_file = _inside("samples.jsonl")
    items_file = _inside("items.jsonl")
    checkpoints_dir = _inside("checkpoints")
    model_dir = _inside("model")

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def exists(self) -> bool:
        """Whether this is a run: a `config.yaml` alone may be another program's (conf/ has one too)."""
        return os.path.isfile(self.config_file) and os.path.isfile(self.path / "run.json")  # no path raises these

    def config(self) -> dict[str, Any]:
        """The frozen, resolved configuration. Raises Damaged where it is none."""
        return dict(_read_yaml(self.config_file, dict))

    @property
    def runs_code(self) -> bool:
        """Whether its configuration lets code run that comes with a model."""
        model = self.config().get("model")
        return bool(model.get("trust_remote_code")) if isinstance(model, dict) else False

    def overrides(self) -> list[str]:
        """The words of the command line. They are for people to read: where the file is damaged, there are none."""
        try:
            return list(map(str, _read_yaml(self.path / "overrides.yaml", list)))
        except (Damaged, FileNotFoundError):
            return []

    def info(self) -> dict[str, Any]:
        """`run.json`: id, versions, commit, devices, data digest."""
        return read_json(self.path / "run.json")

    def result(self) -> dict[str, Any]:
        """`result.json`; {} while the run has not ended."""
        file = self.path / "result.json"
        return read_json(file, f"The run can do without it, and writes it anew:  rm {file}")

    def update_info(self, **values: Any) -> None:
        write_json(self.path / "run.json", self.info() | values)

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of the complete checkpoints, oldest first. They appear by rename: each is whole."""
        return _numbered(self.checkpoints_dir, CHECKPOINT.pattern)

    @property
    def stages(self) -> list[Run]:
        """The folders of the stages that a run of several stages has begun, in their order."""
        return [Run(path) for _, path in _numbered(self.path / "stages", r"(\d+)-.+")]

    @property
    def modified(self) -> float:
        """When its state last changed, in seconds since the epoch."""
        files = (self.path / name for name in ("config.yaml", "run.json", "result.json"))
        return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)

    @property
    def steps(self) -> int:
        """Optimiser steps that are on disk: of the result, else of the newest checkpoint; of all stages together."""
        done = self.result().get("steps")
        if done is not None:
            return int(done)
        own = max((step for step, _ in self.checkpoints()), default=0)
        return own + sum(stage.steps for stage in self.stages)

    @property
    def status(self) -> str:
        """finished, failed, stopped, running (its lock is held) or interrupted (it is not, and there is no result)."""
        return "running" if self.locked() else str(self.result().get("status", "interrupted"))

    def locked(self) -> bool:
        """Whether a living process holds this run."""
        lock = self.path / ".lock"
        if not lock.exists():
            return False
        with open(lock, "rb") as handle, suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        return True

    def orphaned(self) -> bool:
        """Whether the process that holds this run has lost its launcher, and so is on its way to a checkpoint and out.

        Known on Linux only; False elsewhere.
        """
        try:
            ancestors = [int(word) for word in (self.path / ".lock").read_text().split()]
            return any(_parent(child) != parent for child, parent in pairwise(ancestors))
        except (OSError, ValueError):
            return False

    def in_use(self) -> UftError:
        """The refusal of a run that another process holds."""
        problem = Problem(str(self.path), "another process is working in this run folder")
        return UftError(problem, footer="See what runs:  uft ls")

    def found(self, path: str) -> str:
        """A file or folder as the configuration names it, from where the run was started; any other word as it is."""
        there = Path(str(self.info().get("cwd", ".")), path)
        return str(there) if os.path.exists(there) else path

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run: a second process is refused; the kernel frees the lock of a dead one.

        The file names this process, its parent and, where the parent is torchrun's, the parent's.
        """
        lock = self.path / ".lock"
        with writing(lock, code=BAD_REQUEST):
            handle = open(lock, "a+b")  # noqa: SIM115
        with handle:
            deadline = time.monotonic() + 1.0  # `locked` of another process may hold it for a moment
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if time.monotonic() > deadline:
                        raise self.in_use() from error
                    time.sleep(0.01)
            ancestors = [os.getpid(), os.getppid()]
            if "LOCAL_WORLD_SIZE" in os.environ:
                with suppress(OSError):  # not Linux
                    ancestors.append(_parent(ancestors[-1]))
            with writing(lock):
                handle.truncate(0)
                handle.write(" ".join(map(str, ancestors)).encode())
                handle.flush()
            yield


def _numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """(number, path) of what is named so in `folder`, in the order of the numbers."""
    found = ((re.fullmatch(pattern, path.name), path) for path in folder.glob("*"))
    return sorted((int(match[1]), path) for match, path in found if match)


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def create_run(path: Path, config_text: str, overrides: list[str], **info: Any) -> Run:
    """A fresh run folder holding its frozen configuration. The W&B id is made here and never changes."""
    path.mkdir(parents=True, exist_ok=True)
    run = Run(path)
    write_atomically(path / "overrides.yaml", "".join(f"- {json.dumps(redact(item))}\n" for item in overrides))
    write_json(path / "run.json", {"id": uuid.uuid4().hex[:10], "name": path.name, **info})
    write_atomically(run.config_file, config_text)  # last: a folder with a config is a run
    return run


def open_run(word: str | Path) -> Run:
    """The run that a word names, or a UftError that says what the folder lacks."""
    run = Run(named_folder(word))
    if not run.exists:
        raise no_runs(run.path, "no config.yaml and run.json in this folder: it is not a run")
    return run


def named_folder(word: str | Path) -> Path:
    """The folder that a person means by RUN: its path, `last` (the run that was written to last), or its name.

    A name is that of a run or a sweep below outputs/, SWEEP/RUN, or a day; of several the newest is meant. A word that
    names nothing comes back as it is.
    """
    folder = Path(word)
    if os.path.isdir(folder) or folder.is_absolute() or ".." in folder.parts:
        return folder
    if str(word) == "last" and (runs := find_runs(OUTPUTS)):
        return max(runs, key=lambda run: (run.modified, run.path)).path
    patterns = (str(OUTPUTS / depth / glob.escape(str(word))) for depth in ("", "*", "*/*"))
    found = [Path(path) for pattern in patterns for path in glob.glob(pattern) if os.path.isdir(path)]
    return max(found, key=lambda path: path.parts[1], default=folder)


def no_runs(folder: Path, why: str = "no run in this folder") -> UftError:
    """The error about a word that names no run: `why` where it is a folder, else the names that are spelled like it."""
    there = os.path.isdir(folder)
    found = [] if there else [*(run.path for run in find_runs(OUTPUTS)), *find_sweeps(OUTPUTS)]
    names = dict.fromkeys([*(path.name for path in found), *(["last"] if found else [])])
    why = why if there else "no such folder, run or sweep"
    problem = Problem(str(folder), why, advice=did_you_mean(str(folder), names, 3))
    return UftError(problem, footer="See the runs here:  uft ls")


def find_runs(root: Path) -> list[Run]:
    """All runs below `root`, by path. Does not descend into runs."""
    return [Run(folder) for folder, _ in _walk(root) if Run(folder).exists]


def find_sweeps(root: Path) -> list[Path]:
    """All folders at and below `root` that a sweep was started in, by path. Does not descend into runs."""
    return [folder for folder, files in _walk(root) if SWEEP_FILE in files]


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names of its files) at and below `root`, by path, without the folders within runs."""
    for folder, children, files in os.walk(root):
        children[:] = [] if Run(Path(folder)).exists else sorted(children)
        yield Path(folder), files


def planned(sweep: Path) -> list[Run]:
    """All jobs of a sweep by its `sweep.json`, in their order, whether they have a folder yet or not.

    [] where that file is missing or damaged. A name that leads out of the sweep's folder is left out.
    """
    try:
        names = [job["name"] for job in read_json(sweep / SWEEP_FILE)["jobs"]]
        return [Run(sweep / name) for name in names if name and Path(name).name == name != ".."]
    except (KeyError, TypeError, ValueError):
        return []


def waiting(root: Path) -> list[Run]:
    """Jobs of the sweeps at and below `root` that have not started: runs without a folder."""
    return [run for sweep in find_sweeps(root) for run in planned(sweep) if not run.exists]


# --- Weights that a word names

CHOSEN = re.compile(r"(.+)@(best|\d+)")
CHECKPOINT = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class WeightsSource:
    """The weights that a word names: a model of its own, a run's final model, or a checkpoint of a run.

    `path` is what `model.path` takes for them. Of a checkpoint that is its folder: `uft.model.load` lays its weights
    over the model that the run trained, and merges the adapter.
    """

    path: str
    run: Run | None = None
    config: dict[str, Any] = field(default_factory=dict)  # of the run, or of the stage that they are of
    step: int | None = None  # of the whole run
    is_checkpoint: bool = False
    option: str | None = None  # of the group `model`, where that names them

    @property
    def model(self) -> dict[str, Any]:
        """The keys of the group `model` that load them, as a whole model without an adapter."""
        whole = {"path": self.path, "revision": None, "adapter": "none", "quantize": "none"}
        return {**self.config.get("model", {}), **whole}

    @property
    def name(self) -> str:
        """RUN, RUN@STEP of a checkpoint, or of a model its option or the last part of its path."""
        named = self.run.name if self.run else self.option or self.path.rstrip("/").rpartition("/")[2]
        return f"{named}@{self.step}" if self.is_checkpoint else named


def find_weights(word: str) -> WeightsSource:
    """The weights of RUN, RUN@best, RUN@STEP, a checkpoint's folder, or a model (folder, hub id, builtin:NAME).

    RUN is a folder, a name or `last`. Of a finished run it means the final model, of any other the newest checkpoint.
    Raises UftError where there is no such run or checkpoint.
    """
    match = CHOSEN.fullmatch(word)
    folder, which = named_folder(match[1] if match else word), match[2] if match else None
    if is_checkpoint(folder) and not match:
        owner = next((Run(place) for place in folder.resolve().parents if Run(place).exists), None)
        if owner is None:
            why = "is a checkpoint outside its run, whose config.yaml says of what model"
            raise UftError(Problem(shown(folder), why))
        return next(source for source in checkpoints_of(owner) if Path(source.path).resolve() == folder.resolve())
    run = Run(folder)
    if not run.exists:
        if match or not (os.path.exists(folder) or re.search(r"[/:]", word)):
            raise no_runs(folder, "no config.yaml and run.json in this folder: it is not a run")
        return WeightsSource(str(folder))
    final = run.model_dir.is_dir() and run.status == "finished"
    if final and which is None:
        return WeightsSource(str(run.model_dir), run, run.config(), run.steps)
    found = checkpoints_of(run)
    best = best_checkpoint(run) if which == "best" else None
    chosen = [s for s in found if which is None or (s.path == str(best) if which == "best" else s.step == int(which))]
    if chosen:
        return chosen[-1]
    there = ", ".join(str(source.step) for source in found)
    why = "has no weights: neither a final model nor a checkpoint" if which is None else f"has no checkpoint {which}"
    advice = f"checkpoints are of the steps {there}" if there else f"finish it:  uft resume {typed_path(run.path)}"
    done = "its steps are done, and it was trained with train.save_model=false"
    raise UftError(Problem(shown(run.path), why, advice=(done if run.status == "finished" and not there else advice,)))


def newest_weights() -> WeightsSource:
    """Those of the run that was written to last, of the runs below outputs/ that have a model or a checkpoint."""
    for run in sorted(find_runs(OUTPUTS), key=lambda run: (run.modified, run.path), reverse=True):
        with suppress(UftError):  # it waits, has taken no checkpoint yet, or is damaged
            return find_weights(str(run.path))
    problem = Problem(f"{OUTPUTS}{os.sep}", "no run here has a model or a checkpoint")
    raise UftError(problem, footer="See the runs here:  uft ls      Any model answers:  uft chat builtin:playground")


def is_checkpoint(folder: Path) -> bool:
    """Whether this is the folder of a checkpoint, by its name and files."""
    return bool(CHECKPOINT.fullmatch(folder.name)) and os.path.isfile(folder / "SHA256SUMS")


def checkpoints_of(run: Run) -> list[WeightsSource]:
    """The checkpoints of a run, of all its stages in their order; steps are those of the whole run."""
    found, before, config = list[WeightsSource](), 0, run.config()
    trained: Run | None = None
    for part in run.stages or [run]:
        own = config
        if part.path != run.path:
            whole = {key: value for key, value in config.items() if key != "stages"}
            own = whole | config["stages"][part.name.partition("-")[2]]["config"]
        if trained:  # a stage starts from the model of the last one before it that trained
            own = own | {"model": {**own["model"], "path": str(trained.model_dir), "revision": None}}
        for step, folder in part.checkpoints():
            found.append(WeightsSource(str(folder), run, own, before + step, True))
        before, trained = before + part.steps, part if part.model_dir.is_dir() else trained
    return found


def best_checkpoint(run: Run) -> Path | None:
    """The checkpoint of the best evaluation so far; None where there is none."""
    named = run.result().get("best_checkpoint")
    for part in [] if named else reversed(run.stages or [run]):  # it has not ended: the newest checkpoint knows
        for _, folder in part.checkpoints()[-1:]:
            step = read_json(folder / "state.json").get("progress", {}).get("best_step")
            named = named or (step is not None and os.path.relpath(part.checkpoints_dir / f"step-{step:06d}", run.path))
    return run.path / named if named else None


def lineage(info: Mapping[str, Any]) -> str:
    """Where a run's weights are from, by its run.json: `RUN@120, extended at 300`; "" of a run of its own."""
    start = info.get("init_from") or {}
    parts = [f"{start.get('run')}@{start.get('step')}"] if start else []
    return ", ".join([*parts, *(f"extended at {one['from']}" for one in info.get("extended") or ())])


def summary(run: Run) -> Mapping[str, Any]:
    """The entry of a list of runs: state, steps, where it started from, and the result's metrics."""
    own = {"name": run.name, "path": str(run.path), "status": run.status, "steps": run.steps}
    start = {"started_from": text} if (text := lineage(run.info())) else {}
    return own | start | run.result().get("final", {})


def shown(path: Path) -> str:
    """A path as one would name it here; characters that move the cursor are escapes."""
    here = Path.cwd()
    return visible(str(path.relative_to(here)) if path.is_relative_to(here) and path != here else str(path))


def typed_path(path: Path) -> str:
    """A path as a word of a command line."""
    return shlex.quote(shown(path))


# --- Reading and writing files


def write_atomically(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Write beside, flush to disk, rename: `path` is either the old content or the new, never half.

    Raises UftError (code 1) where the disk refuses it.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    content = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    needs = len(content) if isinstance(content, bytes) else None
    try:
        with writing(path, needs):
            with open(beside, "wb") as handle:
                handle.writelines([content] if isinstance(content, bytes) else content)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def file_digest(path: Path) -> str:
    """sha256 of a file's content."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Sync a file or the entries of a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """A JSON file; secrets in its texts are hidden."""
    write_atomically(path, json.dumps(redacted(value), indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path, footer: str = "") -> dict[str, Any]:
    """The file's object, or {} when there is none. Raises Damaged with `footer`, which says what to do."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except (ValueError, RecursionError) as error:
        raise Damaged(Problem(str(path), f"is damaged: {error}"), footer=footer, code=FAILED) from error
    return found


def _read_yaml(path: Path, kind: type) -> Any:
    """The file's content, an instance of `kind`. Raises Damaged."""
    import yaml

    try:
        found = yaml.safe_load(yaml_text(path))
        if not isinstance(found, kind):
            raise ValueError(f"it holds no {kind.__name__}")
        bounded(found)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Damaged(Problem(str(path), f"is damaged: {error}"), code=FAILED) from error
    return found


def yaml_text(path: Path) -> str:
    """The text of a YAML file. ValueError where it is larger than one that we write can be."""
    if path.stat().st_size > LARGEST_YAML:
        raise ValueError(f"is larger than {LARGEST_YAML:,} bytes")
    return path.read_text(encoding="utf-8")


def bounded(found: Any) -> None:
    """ValueError where anchors let a few lines of YAML stand for more than `MOST_VALUES` values."""
    counts: dict[int, int] = {}

    def count(value: Any) -> int:
        if not isinstance(value, dict | list):
            return 1
        if id(value) not in counts:
            counts[id(value)] = MOST_VALUES + 1  # a value that contains itself has no end
            counts[id(value)] = 1 + sum(map(count, value.values() if isinstance(value, dict) else value))
        return counts[id(value)]

    if count(found) > MOST_VALUES:
        raise ValueError(f"stands for more than {MOST_VALUES:,} values")


@contextmanager
def writing(path: Path, needs: int | None = None, code: int = FAILED) -> Iterator[None]:
    """Turn errors of the system while `path` is written, which takes about `needs` bytes, into a UftError about it.

    `code`: the exit code where writing is not allowed at all; a full disk is a failure (1) in any case.
    """
    try:
        yield
    except UftError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if type(error).__name__ == "SafetensorError" and (match := re.search(r"\(os error (\d+)\)", str(error))):
            number = int(match[1])
        if number is None:
            raise
        raise UftError(disk_problem(path, number, needs), code=FAILED if number in FULL else code) from error


def disk_problem(path: Path, number: int, needs: int | None = None) -> Problem:
    """The problem of a file that could not be written, by the system's error number."""
    if number not in FULL:
        return Problem(str(path), f"cannot be written: {os.strerror(number)}")
    need = f"; this needs {size(needs)}" if needs is not None else ""
    try:
        room = f"{size(shutil.disk_usage(_existing(path)).free)} are"
    except OSError:
        room = "an unknown amount is"
    why = f"no space is left for it ({os.strerror(number)}){need}, {room} free on its disk"
    return Problem(str(path), why, advice=("make room there, and go on: what was saved before is whole",))


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written in `folder`, which need not be there yet; None where it can."""
    there = _existing(folder)
    if not there.is_dir():
        return f"{there} is a file"
    if os.access(there, os.W_OK | os.X_OK):
        return None
    read_only = bool(os.statvfs(there).f_flag & os.ST_RDONLY)
    return f"{there} is on a read-only file system" if read_only else f"no permission to write in {there}"


def _existing(path: Path) -> Path:
    """`path`, or the nearest of its parents that is there."""
    path = Path(os.path.abspath(path))
    return next(place for place in (path, *path.parents) if place.exists())


def cache_root(folder: str | os.PathLike[str] | None = None) -> Path:
    """`folder`, else UFT_CACHE, else ~/.cache/uft."""
    return Path(folder or os.environ.get("UFT_CACHE") or "~/.cache/uft").expanduser()


def clear_left(folder: Path, pattern: str) -> None:
    """Remove half-written files and folders of killed processes: those named like `pattern` and a day old.

    By age, since a process of another machine may be writing beside this one.
    """
    for path in folder.glob(pattern):
        with suppress(OSError):  # another process removed it, or another user owns it
            parts = [path, *path.iterdir()] if path.is_dir() else [path]
            if max(part.stat().st_mtime for part in parts) > time.time() - LEFT_AFTER:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def as_umask_leaves(folder: Path) -> None:
    """Give weights the mode of the JSON beside them: safetensors writes files that their owner alone may read."""
    for path in folder.rglob("*.safetensors"):
        beside = next(path.parent.glob("*.json"), None)
        if beside is not None:
            path.chmod(beside.stat().st_mode & 0o777)


def size(count: int) -> str:
    """Bytes for people: 512 B, 3.4 MB, 1.2 GB."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
