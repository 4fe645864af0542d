"""From a checked configuration to a run folder and the worker that fills it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from uft import __version__
from uft.config.compose import Examined, quoted
from uft.config.frozen import ABSENT, frozen, may_change, to_yaml
from uft.config.messages import as_typed, written
from uft.config.parameters import defaults_of, objective_of
from uft.config.stages import completed, data_nodes, differences
from uft.errors import BAD_REQUEST, FAILED, GOOD, INTERRUPTED, STOPPED, Problem, UftError, problem_lines, visible
from uft.launch.process import gpu_pool, node_rank, run_worker, torchrun_arguments
from uft.runs import (
    OUTPUTS,
    SWEEP_FILE,
    Run,
    cache_root,
    create_run,
    find_weights,
    read_json,
    shown,
    typed_path,
    unwritable,
    write_atomically,
    write_json,
)

PARALLEL_JOBS = ("check", "generate")
"""Jobs that several processes do better than one; the others read and write."""
JOIN_TIMEOUT = 600.0
"""Seconds that a machine waits for the first one to make the run."""
SOURCE_PATH = re.compile(r"(.+\.)?data\.sources\.\w+\.path$")
DEMONSTRATIONS = ("demonstration", "negatives")
UNFINISHED_CREATION = {".lock", "overrides.yaml", "run.json"}
PACKAGES = ("torch", "transformers", "datasets", "hydra-core", "omegaconf", "wandb", "peft", "safetensors", "numpy")


def launch_train(asked: Mapping[str, Any], overrides: Sequence[str] = (), quiet: bool = False) -> int:
    """Train one run of these settings in its folder, or continue the run that is there; the exit code.

    `quiet`: nothing is printed, console.log has all output (a job of a sweep, whose table shows its state).
    Raises UftError where the request cannot be carried out; whether the launcher or the worker refuses it, no folder
    is left.
    """
    settings, run_keys, hardware = dict(asked), asked["run"], asked["hardware"]
    if hardware["nodes"] > 1 and not run_keys["dir"]:
        why = "several machines work in one folder, and must be told which"
        raise UftError(Problem("run.dir=null", why, advice=("run.dir=FOLDER, one that every machine sees",)))
    run = Run(single_run_dir(settings))
    settings["run"] = {"name": run_keys["name"] or run.name, "dir": None}  # the folder is where the file lies
    if node_rank(hardware) > 0:
        return join_run(run, hardware, quiet)
    if run.exists:
        return continue_run(run, settings, quiet=quiet)
    if run.path.exists() and not run.path.is_dir():
        raise UftError(Problem(f"run.dir={run.path}", "is a file"))
    if run.path.is_dir() and {path.name for path in run.path.iterdir()} - UNFINISHED_CREATION:
        why = "the folder is not empty and is not a run"
        raise UftError(Problem(f"run.dir={run.path}", why, advice=("choose another folder",)))
    refuse_unwritable(run.path)
    while True:
        created = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
        try:
            run.path.mkdir(parents=True, exist_ok=bool(run_keys["name"] or run_keys["dir"]))
            break
        except FileExistsError:  # another run began in the same second
            run = Run(single_run_dir(asked))
            settings["run"]["name"] = run.name
        except OSError as error:  # no folder that the system lets one make, as below /proc
            why = f"the folder cannot be made: {error.strerror}"
            raise UftError(Problem(f"run.dir={shown(run.path)}", why, advice=("choose another folder",))) from error
    with run.lock():  # of two processes that make the same run, one makes it and the other finds it
        fresh = not run.exists
        if fresh:
            origin = started_from(settings["init_from"])
            sweep = settings["sweep"]["name"]
            create_run(run.path, to_yaml(settings), list(overrides), sweep=sweep, **origin, **provenance())
            if run.runs_code:
                trust(run.path)
    return run_session(run, created, quiet=quiet) if fresh else continue_run(run, settings, quiet=quiet)


def launch_job(job: str, settings: Mapping[str, Any]) -> int:
    """Run a job that leaves no run folder (uft/training/jobs.py: JOBS) in a worker; the exit code."""
    with tempfile.TemporaryDirectory(prefix="uft-") as folder:
        spec = Path(folder) / "config.yaml"
        spec.write_text(frozen(settings), encoding="utf-8")
        ranks = torchrun_arguments(settings["hardware"]) if job in PARALLEL_JOBS else ()
        return run_worker(["--job", job, str(spec)], torchrun=ranks)


def join_run(run: Run, hardware: Mapping[str, Any], quiet: bool) -> int:
    """On every machine but the first: join the run that the first one makes, in a folder that both see."""
    deadline = time.monotonic() + JOIN_TIMEOUT
    while not run.exists:
        if time.monotonic() > deadline:
            why = f"the first machine made no run here within {JOIN_TIMEOUT / 60:.0f} minutes"
            raise UftError(Problem(str(run.path), why, advice=("do both machines see this folder?",)))
        time.sleep(0.5)
    log = run.path.resolve() / f"console-{node_rank(hardware)}.log" if quiet else None
    return run_worker([str(run.path.resolve())], log=log, torchrun=torchrun_arguments(hardware))


def continue_run(
    run: Run,
    settings: Mapping[str, Any] | None = None,
    cwd: Path | None = None,
    quiet: bool = False,
    extend: bool = False,
) -> int:
    """Continue a run that was stopped; a finished one is left alone.

    `settings`: the wanted ones. Keys that change no result may differ and are written to the run; a difference in any
    other key raises UftError. `cwd`: the folder that relative paths of its data start from. `extend`: train.steps may
    be more than the run was to have, where its schedule allows that.
    """
    changes = [change for change in changed_keys(run, settings) if not may_change(change[0])] if settings else []
    extended = None
    if extend and settings and [key for key, _, _ in changes] == ["train.steps"]:
        extended, settings, changes = extension(run, settings), dict(settings), []
        settings["optim"] = {**settings["optim"], "warmup": float(extended["warmup"])}
    if changes:
        word = typed_path(run.path)
        other = further_training(run)
        footer = (
            "A run goes on under the configuration it began with (old -> new above).\n"
            f"Continue it as it is:  uft resume {word}\nor "
            + (other if extend else "give the new run its own name or folder:  run.name=NAME")
        )
        # a source that one of them lacks is told once, by its path
        lone = {key.removesuffix("path") for key, *values in changes if SOURCE_PATH.match(key) and ABSENT in values}
        changes = [one for one in changes if SOURCE_PATH.match(one[0]) or not one[0].startswith(tuple(lone))]
        problems = [Problem(key, f"{written(old)} -> {written(new)}", str(run.path)) for key, old, new in changes]
        raise UftError(*problems, footer=footer)
    if run.status == "finished" and not extended:
        if not quiet:
            print(f"uft: {visible(str(run.path))} is finished already; nothing to do")
        return GOOD
    if run.locked() and run.orphaned():  # its launcher was killed, so the worker saves a checkpoint and ends
        print(f"uft: waiting for the last worker in {visible(str(run.path))} to save its checkpoint", flush=True)
        while run.locked() and run.orphaned():
            time.sleep(0.1)
    if run.locked():
        raise run.in_use()
    refuse_unwritable(run.path)
    if extended:
        run.update_info(extended=[*(run.info().get("extended") or []), extended])
        if result := run.result():  # first: a run whose result is "finished" is never continued
            write_json(run.path / "result.json", {**result, "status": "stopped"})
    if settings is not None:
        write_atomically(run.config_file, to_yaml(settings))
    return run_session(run, cwd=cwd, quiet=quiet)


def further_training(run: Run) -> str:
    """The advice to train further from a run's weights, on its data with its objective."""
    own = ("run.", "sweep.", "train.steps=", "init_from=", "model=", "model.")
    words = [quoted(word) for word in as_typed(run.overrides()) if not word.lstrip("+").startswith(own)]
    return " ".join(["start another run from its weights:  uft train", f"init_from={typed_path(run.path)}", *words])


def extension(run: Run, settings: Mapping[str, Any]) -> dict[str, Any]:
    """How far the horizon of a run is extended, for its run.json: steps before and then, and its steps of warm-up,
    which stay what they were. UftError where the steps that were taken would have been others under the new horizon."""
    from uft.training.step import warmup_steps

    optim, steps, begun = settings["optim"], settings["train"]["steps"], run.config()
    before = begun["train"]["steps"] or run.info().get("total_steps")
    rollout, hints = settings["rollout"], settings["rollout"]["hint"]["schedule"]
    why, advice = "", f"{further_training(run)} train.steps={steps}"
    if begun.get("stages"):
        why = "a run of several stages has a horizon for each of them"
    elif optim["schedule"] != "constant":
        why = f"optim.schedule={optim['schedule']} ends at step {before}: only a constant schedule can be extended"
    elif steps is None or before is None or steps < before:
        why, advice = f"the run has {before} steps, and a horizon can only be extended", ""
    elif rollout["completions"] and hints in ("cosine", "staged"):
        why = f"rollout.hint.schedule={hints} falls over the run: hints would have been longer in a longer one"
    elif rollout["completions"] and before * settings["train"]["batch_size"] % (rollout["prompts"] or 1):
        why = f"the last rollout before step {before} was of fewer than rollout.prompts={rollout['prompts']} prompts"
    elif not run.checkpoints():
        why = "no checkpoint is left to go on from"
    if why:
        raise UftError(Problem(f"train.steps={steps}", why, shown(run.path), (advice,) if advice else ()))
    return {"from": before, "to": steps, "warmup": warmup_steps(optim["warmup"], int(before or 0))}


def changed_keys(run: Run, settings: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, the run's value, the wanted one); keys that a newer version brought count with their defaults."""
    began = run.config()
    wanted = settings["objective"]
    if began["objective"].get("method") == wanted["method"]:
        began["objective"] = {**defaults_of(wanted["method"], wanted), **began["objective"]}
    return differences(completed(began), settings)


def row_problems(examined: Iterable[Examined], refused: bool = True) -> tuple[list[Problem], str]:
    """(rows that cannot be read, footer), of every mixture once in this process.

    `refused`: the requests are refused for their settings anyway. Nothing is fetched from the hub then, and sources
    whose settings are wrong are left alone.
    """
    from uft.data.sources import can_be_judged

    distinct: dict[str, None] = {}
    for one in examined:
        wrong = {key.split(".")[2] for key in one.wrong if key.startswith("data.sources.")}
        for data in data_nodes(one.settings) if "data" not in one.wrong else ():
            found = {name: {**source, "share": None} for name, source in data["sources"].items() if name not in wrong}
            sources = {name: source for name, source in found.items() if not refused or can_be_judged(source)}
            if sources:
                distinct[_mixture(data, sources)] = None
    problems: dict[Problem, None] = {}
    footer = ""
    for mixture in distinct:
        try:
            _rows_by_kind(mixture, os.getcwd())
        except UftError as error:
            problems |= dict.fromkeys(error.problems)
            footer = error.footer or footer
    return list(problems), footer


def _mixture(data: Mapping[str, Any], sources: Mapping[str, Any]) -> str:
    """What of a mixture decides its rows, as a key."""
    return json.dumps({**data, "name": "", "ratio": None, "sources": sources}, sort_keys=True)


@cache
def _rows_by_kind(data: str, working_directory: str) -> dict[str, dict[str, int]]:
    """Source -> kind -> rows to train on. Raises UftError with the rows that cannot be read."""
    from uft.config.schema import data_settings
    from uft.data.sources import load_sources
    from uft.data.table import kinds

    loaded = load_sources(data_settings(json.loads(data)))
    return {source.name: {kind.value: count for kind, count in kinds(source.rows).items()} for source in loaded}


def unusable_rows(settings: Mapping[str, Any]) -> tuple[list[Problem], bool]:
    """(problems of rows that the objective of a request cannot use, by source and kind; whether rows are left that it
    can use).

    The worker tells the same at its start, and of single rows too. A request with stages is left to it. Raises
    UftError with the rows that cannot be read.
    """
    data, objective = settings["data"], settings["objective"]
    if settings.get("stages") or data["unusable"] == "drop":
        return [], True
    usable = {kind.value for kind in objective_of(objective).views}
    name_of_objective = objective.get("name") or objective["method"]
    sources = {name: {**source, "share": None} for name, source in data["sources"].items()}
    problems, some = [], False
    for name, counts in _rows_by_kind(_mixture(data, sources), os.getcwd()).items():
        shown = 2 * sum(counts[kind] for kind in counts if kind in DEMONSTRATIONS) > sum(counts.values())
        if data["sources"][name]["share"] != 0 and data["ratio"] != (0 if shown else 1):
            for kind in (kind for kind in counts if kind not in usable):
                why = f"objective={name_of_objective} cannot use {counts[kind]:,} {kind} rows"
                problems.append(Problem(f"data.sources.{name}", why))
            some |= not usable.isdisjoint(counts)
    return problems, some


def run_session(
    run: Run, created: Collection[Path] | None = None, *, cwd: Path | None = None, quiet: bool = False
) -> int:
    """Start the worker on a run and wait for its end; the exit code.

    `created`: of a new run, the folders that were made for it. They are removed again where the worker refuses the
    request before its first step. Raises UftError with the worker's words then if `quiet`.
    """
    log = run.path.resolve() / "console.log" if quiet else None
    hardware = run.config().get("hardware")
    if not isinstance(hardware, Mapping):  # the file is damaged, and the worker will say how
        hardware = {}
    with gpu_pool(hardware) as gpus:
        code = run_worker([str(run.path.resolve())], cwd, log, torchrun_arguments(hardware), gpus)
    if code == FAILED and not quiet and not run.result():  # it died, and could not say so itself
        print(f"uft: continue it:  uft resume {typed_path(run.path)}", file=sys.stderr)
    if code == BAD_REQUEST and created is not None and not (run.locked() or run.result() or run.steps):
        output = log.read_text(encoding="utf-8", errors="replace") if log else ""
        for path in run.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        with suppress(OSError):  # another run has come into one of them
            for folder in (run.path, *run.path.parents):
                if folder in created or folder.is_relative_to(OUTPUTS):
                    folder.rmdir()
        if log:  # without its head: it becomes part of the sweep's report
            raise UftError(output.rpartition("in this request\n")[2].strip() or "the worker refused it")
    return code


def refuse_unwritable(folder: Path) -> None:
    """UftError where nothing can be written in `folder`, which need not exist yet."""
    if why := unwritable(folder):
        raise UftError(Problem(f"run.dir={shown(folder)}", why, advice=("choose another folder",)))


# --- jobs of a sweep

JOB_KEYS = ("++run.dir=", "++sweep.name=")
"""Overrides that a sweep adds to its jobs: they tell a job, in whatever process it runs, where it belongs."""
STOPS = {STOPPED: "stopped by a signal", INTERRUPTED: "interrupted"}


class JobFailed(Exception):
    """A job of a sweep did not finish. Carries plain values: launchers send it between processes."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message

    @property
    def stopped(self) -> bool:
        """By a signal, which is meant for the whole sweep."""
        return self.code in STOPS


def is_sweep_job(overrides: Sequence[str]) -> bool:
    """Whether these are the overrides of a job of a sweep."""
    return any(line.startswith(JOB_KEYS[0]) for line in overrides)


def failure_reason(code: int, folder: Path) -> str:
    """One line about a job that did not finish: its error, else the last line that it or its launcher printed."""
    if code in STOPS:
        return STOPS[code]
    if error := problem_lines(str(Run(folder).result().get("error") or "")):
        return error[0]
    log = folder / "console.log"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1].removeprefix("uft: ") if lines else f"ended without a result, exit code {code}"


# --- names of runs. Never an = or a comma in them: Hydra could not read them back.


def slug(text: str) -> str:
    """`text` as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._+]+", "-", text).strip("-.") or "none"


def today(now: datetime | None = None) -> str:
    return (now or datetime.now()).strftime("%Y-%m-%d")


def single_run_dir(cfg: Mapping[str, Any], now: datetime | None = None) -> Path:
    """The folder of a run that is no job of a sweep: `run.dir`, else outputs/DATE/NAME.

    NAME is `run.name`, and the run of that name is continued; else it is objective and data (or the stages, those of
    one round), model, seed and time of day, with a number where such a folder exists.
    """
    if cfg["run"]["dir"]:
        return Path(cfg["run"]["dir"])
    if cfg["run"]["name"]:
        return OUTPUTS / today(now) / str(cfg["run"]["name"])
    stages, rounds = list(cfg.get("stages") or ()), cfg.get("rounds")
    if rounds:  # fit-1, fit-2, ...
        stages = list(dict.fromkeys(stage.rpartition("-")[0] for stage in stages))
    what = ["-then-".join(stages)] if stages else [cfg["objective"]["name"], cfg["data"]["name"]]
    what += [f"{rounds}rounds"] if rounds else []
    time_of_day = (now or datetime.now()).strftime("%H%M%S")
    name = slug("-".join(map(str, (*what, cfg["model"]["name"], f"seed{cfg['seed']}", time_of_day))))
    names = [name, *(f"{name}-{number}" for number in range(2, 10_000))]
    return next(path for name in names if not (path := OUTPUTS / today(now) / name).exists())


# --- provenance


def started_from(word: str | None) -> dict[str, Any]:
    """For `run.json`: the run whose weights these are at first. Its optimiser's state does not come along."""
    source = find_weights(word) if word else None
    if source is None or source.run is None:
        return {}
    origin = {"run": source.run.name, "path": str(source.run.path), "id": source.run.info().get("id")}
    return {"init_from": {**origin, "step": source.step}}


def versions() -> dict[str, str]:
    """Versions of everything that can change a result, without importing it."""
    known = dict.fromkeys(PACKAGES, "not installed")
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            known[package] = version(package)
    return {"uft": __version__, "python": platform.python_version(), "platform": platform.platform(), **known}


def provenance() -> dict[str, Any]:
    """For `run.json`. `code` is the repository of uft itself, `project` that of the working directory."""
    here = Path(__file__).resolve()
    return {
        "versions": versions(),
        "code": commit_of(here.parent) if git(here.parent, "ls-files", "--error-unmatch", here.name) else {},
        "project": commit_of(Path.cwd()),
        "command": sys.argv,
        "cwd": str(Path.cwd()),
        "host": platform.node(),
    }


def commit_of(folder: Path) -> dict[str, Any]:
    """Commit and a hash of uncommitted changes of the repository that `folder` is in; {} where there is none."""
    commit = git(folder, "rev-parse", "HEAD").strip()
    changes = git(folder, "diff", "HEAD", "--no-ext-diff") if commit else ""
    dirty = hashlib.sha256(changes.encode()).hexdigest()[:10] if changes else None
    return {"commit": commit, "dirty": dirty} if commit else {}


def git(folder: Path, *arguments: str) -> str:
    """Output of a git command; empty when git is missing, slow, or fails."""
    command = ["git", "-C", str(folder), *arguments]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=True).stdout
    return ""


# --- Trust in the code of models: which run and sweep folders this user began on this machine.
#
# A run folder from another machine may set `model.trust_remote_code: true`, and resuming it would run code that its
# sender chose. Folders begun here are recorded outside of run folders, by path and id.

TYPED = "model.trust_remote_code=true"


def trust(folder: Path) -> None:
    """Note that the user began what is in this folder, or typed that its code may run."""
    with suppress(OSError):  # where no note can be written, it has to be typed again
        _note(folder).parent.mkdir(parents=True, exist_ok=True)
        _note(folder).touch()


def refuse_untrusted(folder: Path, runs_code: bool, words: Iterable[str]) -> None:
    """Raise UftError about a folder that was not begun here and runs a model's code, unless `words` say that it may."""
    if not runs_code or _note(folder).is_file():
        return
    if TYPED not in words:
        why = "runs code that comes with its model, and was begun elsewhere, or by another user, or moved"
        raise UftError(Problem(shown(folder), why, advice=(f"read that code, then give the command with  {TYPED}",)))
    trust(folder)


def _note(folder: Path) -> Path:
    began = read_json(folder / "run.json").get("id") or read_json(folder / SWEEP_FILE).get("made")
    name = hashlib.sha256(f"{folder.resolve()}\n{began}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_root() / "trusted" / name
