"""`uft resume RUN | SWEEP [key=value ...]`: go on with what was stopped."""

from __future__ import annotations

import argparse
import sys
from contextlib import chdir
from pathlib import Path

from uft.cli import tell
from uft.errors import FAILED, GOOD, INTERRUPTED, STOPPED, Problem, UftError
from uft.runs import Run, find_runs, find_sweeps, planned

ABOUT = """\
A finished run is left alone. In a sweep every unfinished run goes on, and jobs that never started are started, by the
launcher that they were asked for with; one failure does not stop the others.
Keys that change no result may be given anew (tracking.*, train.log_every, ...): any other change is refused with the
difference, since it would make another run of it."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="uft resume",
        description="Continue a run or a sweep that was stopped.",
        epilog=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="a run folder, or a folder of runs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that change no result")
    parsed = parser.parse_args(arguments)
    runs, sweeps = find_runs(parsed.folder), find_sweeps(parsed.folder)
    if sweeps:
        return resume_sweeps(sweeps, runs, parsed.overrides)
    if not runs:
        why = "no run in this folder" if parsed.folder.is_dir() else "no such folder"
        raise UftError(Problem(str(parsed.folder), why), footer="See the runs here:  uft ls")
    if runs[0].path == parsed.folder:
        return resume(runs[0], parsed.overrides)
    return resume_all(runs, parsed.overrides)


def resume(run: Run, overrides: list[str]) -> int:
    """Continue one run, its relative data paths read from where it was started."""
    from uft.config.change import changed
    from uft.config.freeze import plain
    from uft.launch.launcher import continue_run

    started = Path(run.info().get("cwd", "."))
    settings = plain(changed(run.config(), overrides)) if overrides else None
    return continue_run(run, settings, cwd=started if started.is_dir() else None)


def resume_sweeps(sweeps: list[Path], runs: list[Run], overrides: list[str]) -> int:
    """Give the commands of every sweep again, then continue the runs that belong to none of them."""
    refuse_other_keys(overrides, sweeps)
    codes: list[int] = []
    for sweep in sweeps:
        codes += ask_again(sweep, overrides)
        if codes and codes[-1] in (STOPPED, INTERRUPTED):
            return codes[-1]
    theirs = {run.path for sweep in sweeps for run in planned(sweep)}
    others = [run for run in runs if run.path not in theirs]
    codes += [resume_all(others, overrides)] if others else []
    return next((code for code in codes if code != GOOD), GOOD)


def ask_again(sweep: Path, overrides: list[str]) -> list[int]:
    """The exit codes of the commands that `sweep` came from, up to one that was stopped."""
    from uft.cli import train
    from uft.launch.sweep import quote, resuming

    place, codes = f"hydra.sweep.dir={quote(str(sweep.resolve()))}", []
    with resuming(sweep) as commands:
        for words, started in commands:
            with chdir(started if started.is_dir() else "."):
                try:
                    codes.append(train.main([*words, *overrides, place]))
                except UftError as error:
                    codes.append(tell(error))
            if codes[-1] in (STOPPED, INTERRUPTED):
                break
    return codes


def refuse_other_keys(overrides: list[str], sweeps: list[Path]) -> None:
    """Only what changes no result, and is not swept, may be given anew: jobs would become other runs."""
    from uft.config.freeze import free
    from uft.launch.sweep import swept_keys

    swept = {key.lstrip("+") for sweep in sweeps for key in swept_keys(sweep)}
    keys = {word: word.partition("=")[0].lstrip("+") for word in overrides}
    wrong = [word for word, key in keys.items() if key in swept or not free(key)]
    if wrong:
        raise UftError(*(Problem(word, "would make other runs of this sweep's jobs", "command line") for word in wrong))


def resume_all(runs: list[Run], overrides: list[str]) -> int:
    """Continue every unfinished run of a sweep; a signal ends the sweep, a failure is told of at the end."""
    waiting = [run for run in runs if run.status != "finished"]
    failed: list[str] = []
    for number, run in enumerate(waiting, 1):
        print(f"\nuft: run {number} of {len(waiting)}: {run.name}", flush=True)
        try:
            code, why = resume(run, overrides), str(run.result().get("error") or "")
        except UftError as error:
            code, why = error.code, "; ".join(f"{problem.what}: {problem.why}" for problem in error.problems)
        if code in (STOPPED, INTERRUPTED):
            return code
        if code != GOOD:
            failed.append(f"  {run.path}\n      {why.splitlines()[0] if why else f'exit code {code}'}")
    if not waiting:
        print(f"uft: all {len(runs)} runs are finished; nothing to do")
    if failed:
        print(f"\nuft: {len(failed)} of {len(waiting)} runs failed\n\n" + "\n".join(failed), file=sys.stderr)
    return FAILED if failed else GOOD
