"""From a checked configuration to a run folder and the worker that fills it."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from uft.config.compose import completed
from uft.config.freeze import free, frozen, plain, to_yaml
from uft.config.register import defaults_of
from uft.config.stages import data_nodes, differences
from uft.config.suggest import written
from uft.errors import BAD_REQUEST, FAILED, GOOD, Problem, UftError
from uft.launch.names import OUTPUTS, single_run_dir
from uft.launch.process import run_worker
from uft.launch.provenance import provenance
from uft.launch.slots import slots
from uft.launch.team import node_rank, team
from uft.runs import Run, create_run, shown, unwritable, write_atomically

TOGETHER = ("check", "generate")
"""Jobs that several processes do better than one; the others read and write."""

PATIENCE = 600.0
"""Seconds that a machine waits for the first one to make the run."""

UNFINISHED_CREATION = {".lock", "overrides.yaml", "run.json"}


def launch_train(cfg: DictConfig | Mapping[str, Any], overrides: Sequence[str] = (), quiet: bool = False) -> int:
    """Train one run in its folder, or continue what is there; the exit code.

    `quiet`: nothing is printed, console.log has it all (a job of a sweep, whose table shows how it goes).
    Raises UftError, with nothing written, where the request cannot be carried out.
    """
    settings = plain(cfg)
    if settings["hardware"]["nodes"] > 1 and not settings["run"]["dir"]:
        why = "several machines work in one folder, and must be told which"
        raise UftError(Problem("run.dir=null", why, advice=("run.dir=FOLDER, one that every machine sees",)))
    run, asked = Run(single_run_dir(settings)), dict(settings["run"])
    settings["run"] = {"name": asked["name"] or run.name, "dir": None}  # the folder is where the file lies
    if node_rank(settings["hardware"]) > 0:
        return lend_a_hand(run, settings, quiet=quiet)
    if run.exists:
        return continue_run(run, settings, quiet=quiet)
    refuse_foreign(run.path)
    refuse_unwritable(run.path)
    check_sources(settings)
    while not (asked["name"] or asked["dir"]) and not claimed(run.path):  # another one began in the same second
        run = Run(single_run_dir({**settings, "run": asked}))
        settings["run"]["name"] = run.name
    run.path.mkdir(parents=True, exist_ok=True)
    with run.lock():  # of two processes that make the same run one makes it, the other finds it
        made = not run.exists
        if made:
            create_run(run.path, to_yaml(settings), list(overrides), **provenance())
    return sit(run, fresh=True, quiet=quiet) if made else continue_run(run, settings, quiet=quiet)


def claimed(folder: Path) -> bool:
    """Make the folder, unless somebody was quicker."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def launch_job(job: str, cfg: DictConfig | Mapping[str, Any]) -> int:
    """Run a job that leaves no run folder (check, data, generate, annotate) in a worker; the exit code."""
    with tempfile.TemporaryDirectory(prefix="uft-") as folder:
        spec = Path(folder) / "config.yaml"
        spec.write_text(frozen(cfg), encoding="utf-8")
        return run_worker(["--job", job, str(spec)], team=team(plain(cfg)["hardware"]) if job in TOGETHER else ())


def lend_a_hand(run: Run, settings: Mapping[str, Any], quiet: bool) -> int:
    """On every machine but the first: join the run that the first one makes, in a folder that both see."""
    deadline = time.monotonic() + PATIENCE
    while not run.exists:
        if time.monotonic() > deadline:
            why = f"the first machine made no run here within {PATIENCE / 60:.0f} minutes"
            raise UftError(Problem(str(run.path), why, advice=("do both machines see this folder?",)))
        time.sleep(0.5)
    log = run.path.resolve() / f"console-{node_rank(settings['hardware'])}.log" if quiet else None
    return run_worker([str(run.path.resolve())], log=log, team=team(settings["hardware"]))


def continue_run(
    run: Run, settings: Mapping[str, Any] | None = None, cwd: Path | None = None, quiet: bool = False
) -> int:
    """Go on with a run that was stopped; a finished one is left alone.

    `settings` are the wanted ones: keys that change no result may differ and are written to the run, all others must
    not. `cwd` is where relative paths of its data start.
    """
    if settings is not None:
        refuse_changes(run, settings)
    if run.status == "finished":
        if not quiet:
            print(f"uft: {run.path} is finished already; nothing to do")
        return GOOD
    if run.locked() and not let_go(run):
        raise UftError(
            Problem(str(run.path), "another process is working in this run folder"), footer="See what runs:  uft ls"
        )
    refuse_unwritable(run.path)
    if settings is not None:
        write_atomically(run.config_file, to_yaml(settings))
    return sit(run, cwd=cwd, quiet=quiet)


def let_go(run: Run) -> bool:
    """Wait for a worker whose launcher was killed: it saves a checkpoint and ends. False: somebody works here."""
    if run.orphaned():
        print(f"uft: waiting for the last worker in {run.path} to save its checkpoint", flush=True)
    while run.locked() and run.orphaned():
        time.sleep(0.1)
    return not run.locked()


def sit(run: Run, *, fresh: bool = False, cwd: Path | None = None, quiet: bool = False) -> int:
    """One sitting of the worker. A run that turned out to be a bad request before its first step leaves no folder."""
    log = run.path.resolve() / "console.log" if quiet else None
    found = run.config().get("hardware")
    hardware = found if isinstance(found, Mapping) else {}  # whoever damaged it, the worker tells of it
    with slots(hardware) as chosen:
        code = run_worker([str(run.path.resolve())], cwd, log, team(hardware), chosen)
    if code == FAILED and not quiet and not run.result():  # it died, and could not say so itself
        print(f"uft: continue it:  uft resume {shown(run.path)}", file=sys.stderr)
    if code == BAD_REQUEST and fresh and not run.locked() and not run.result() and not run.steps:
        said = log.read_text(encoding="utf-8", errors="replace") if log else ""
        discard(run.path)
        if log:  # what nobody has seen yet, without its head: it becomes part of another report
            raise UftError(said.rpartition("in this request\n")[2].strip() or "the worker refused it")
    return code


def discard(folder: Path) -> None:
    """Remove a run folder, and the folders that were made for it alone."""
    shutil.rmtree(folder, ignore_errors=True)
    for parent in folder.parents:
        if not parent.is_relative_to(OUTPUTS) or any(parent.iterdir()):
            break
        parent.rmdir()


def refuse_foreign(folder: Path) -> None:
    """A run does not move into a folder that holds something else."""
    if folder.exists() and not folder.is_dir():
        raise UftError(Problem(f"run.dir={folder}", "is a file"))
    if folder.is_dir() and {path.name for path in folder.iterdir()} - UNFINISHED_CREATION:
        raise UftError(
            Problem(f"run.dir={folder}", "the folder is not empty and is not a run", advice=("choose another folder",))
        )


def refuse_unwritable(folder: Path) -> None:
    """Said before anything is read: a run that cannot write its folder cannot run."""
    if why := unwritable(folder):
        raise UftError(Problem(f"run.dir={shown(folder)}", why, advice=("choose another folder",)))


def refuse_changes(run: Run, settings: Mapping[str, Any]) -> None:
    """UftError with every key whose change would make another run of it."""
    changes = [change for change in changed_keys(run, settings) if not free(change[0])]
    if changes:
        problems = [Problem(key, f"{written(old)} -> {written(new)}", str(run.path)) for key, old, new in changes]
        footer = (
            "A run goes on under the configuration it began with (old -> new above).\n"
            f"Continue it as it is:  uft resume {run.path}\nor give the new run its own name or folder."
        )
        raise UftError(*problems, footer=footer)


def changed_keys(run: Run, settings: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, the run's value, the wanted one); keys that a newer version brought count with their defaults."""
    began = run.config()
    wanted = settings["objective"]
    if began["objective"].get("method") == wanted["method"]:
        began["objective"] = {**defaults_of(wanted["method"], wanted), **began["objective"]}
    return differences(completed(began), settings)


def check_sources(settings: Mapping[str, Any]) -> None:
    """Read every row once, so that a bad one is told of before anything is written."""
    problems: dict[Problem, None] = {}
    for data in data_nodes(settings):
        try:
            _read_sources(to_yaml(data))
        except UftError as error:
            problems |= dict.fromkeys(error.problems)
            footer = error.footer
    if problems:
        raise UftError(*problems, footer=footer)


@lru_cache(maxsize=64)
def _read_sources(data: str) -> None:
    """Once per mixture: the jobs of a sweep share theirs. An exception is not remembered."""
    import yaml

    from uft.data.sources import load_sources

    load_sources(yaml.safe_load(data))
