"""The verbs over runs that are there: ls, resume, export, sync, compare."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import chdir, suppress
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from uft.cli import folded
from uft.errors import FAILED, GOOD, INTERRUPTED, STOPPED, Problem, UftError, problem_lines, tell
from uft.runs import (
    OUTPUTS,
    SWEEP_FILE,
    Run,
    find_runs,
    find_sweeps,
    find_weights,
    named_folder,
    no_runs,
    planned,
    read_json,
    shown,
    summary,
    waiting,
)
from uft.tracking.console import (
    HEADLINES,
    bare_table,
    duration,
    expect_durations,
    phase_status,
    printable,
    printable_lines,
    table_console,
)

if TYPE_CHECKING:
    from rich.table import Table

    from uft.report.compare import Options

METRICS = 4  # metrics shown at most
LONG = ("began", "trained", "objective", "lr")  # keys of a run that `uft ls -l` shows before its metrics
PAUSE = 3.0  # seconds between two tables of `uft compare --watch`
COLOURS = {
    "finished": "green",
    "running": "cyan",
    "stopped": "yellow",
    "interrupted": "yellow",
    "failed": "red",
    "waiting": "dim",
}
SIGNALLED = (STOPPED, INTERRUPTED)


class Parser(argparse.ArgumentParser):
    """Mistakes are told as those of all verbs are."""

    def error(self, message: str) -> NoReturn:
        raise UftError(Problem(self.prog, message, "command line"), footer=f"See:  {self.prog} --help")


def parser_of(verb: str, description: str, epilog: str = "") -> Parser:
    style = argparse.RawDescriptionHelpFormatter
    return Parser(f"uft {verb}", None, folded(description), folded(epilog), formatter_class=style, allow_abbrev=False)


# ls


def ls(arguments: list[str]) -> int:
    """`uft ls [FOLDER]`: the runs and sweeps here, their state, steps and headline metrics."""
    parser = parser_of("ls", "The runs here, by folder and name.")
    parser.add_argument("folder", nargs="?", type=named_folder, default=OUTPUTS, help="where to look; outputs")
    parser.add_argument("--json", action="store_true", help="one JSON list, all metrics")
    parser.add_argument("-l", "--long", action="store_true", help="when, how long it trained, objective, learning rate")
    parsed = parser.parse_args(arguments)
    if not parsed.folder.is_dir() and parsed.folder != OUTPUTS:
        raise no_runs(parsed.folder)
    rows = [describe(run) for run in find_runs(parsed.folder)]
    for run in waiting(parsed.folder):  # jobs of sweeps that have not started
        rows.append({"name": run.name, "path": str(run.path), "status": "waiting", "steps": 0})
    rows.sort(key=lambda row: (Path(row["path"]).parent.parts, Path(row["path"]).name))
    if parsed.json:
        print(json.dumps(rows, indent=2, default=str))
    elif rows:
        print_tables(rows, LONG if parsed.long else ())
    else:
        print(f"No runs in {parsed.folder}{os.sep}  Make one:  uft train objective=ift data=mix")
    return GOOD


def describe(run: Run) -> dict[str, Any]:
    """A run as a flat record; `total_steps` is None where only the worker knows it."""
    try:
        total = run.info().get("total_steps") or run.config().get("train", {}).get("steps")
        config, seconds = run.config(), run.result().get("seconds")
        long = (
            datetime.fromtimestamp(run.config_file.stat().st_mtime).strftime("%Y-%m-%d %H:%M"),
            duration(seconds) if seconds else "",
            str(config.get("objective", {}).get("name", "")),
            str(config.get("optim", {}).get("lr", "")),
        )
        more = {"total_steps": total, "error": run.result().get("error")}
        return {**summary(run), **more, **dict(zip(LONG, long, strict=True))}
    except Exception as error:  # a file that cannot be read is shown, not a reason to hide the other runs
        return {"name": run.name, "path": str(run.path), "status": f"unreadable ({type(error).__name__})", "steps": 0}


def print_tables(found: list[dict[str, Any]], long: Sequence[str] = ()) -> None:
    """A table per folder: a sweep, or the runs of a day. Metrics for which the terminal has no room are left out.

    `long`: keys of the runs that stand before their metrics.
    """
    from rich.text import Text

    console = table_console()
    metrics = [name for name in HEADLINES if any(f"eval/{name}" in row for row in found)][:METRICS]
    unbounded = console.options.update(width=10_000)
    for folder, inside in groupby(found, key=lambda row: Path(row["path"]).parent):
        rows = list(inside)
        tables = (runs_table(rows, metrics[:most], long) for most in range(len(metrics), 0, -1))
        fits = (table for table in tables if console.measure(table, options=unbounded).maximum <= console.width)
        problems = ((row["name"], problem_lines(str(row.get("error") or ""))) for row in rows)
        errors = [Text(printable(f"  {name}: {error[0]}"), style="red") for name, error in problems if error]
        console.print(Text(f"\n{printable(str(folder))}/", style="bold"))
        console.print(next(fits, None) or runs_table(rows, [], long), *errors, sep="\n", highlight=False)


def runs_table(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], long: Sequence[str] = ()) -> Table:
    """Runs of one folder with their state, steps and these metrics of the evaluation."""
    from rich.text import Text

    table = bare_table()
    table.add_column("  run", overflow="fold")
    texts = ["started from"] if any("started_from" in row for row in rows) else []
    for name in ("state", "steps", *long, *metrics, *texts):
        table.add_column(name, justify="left" if name in ("state", *texts) else "right", no_wrap=True)
    for row in rows:
        state = Text(printable(row["status"]), style=COLOURS.get(row["status"], "red"))
        values = [row.get(f"eval/{name}") for name in metrics]
        numbers = [f"{value:.4g}" if isinstance(value, (int, float)) else "" for value in values]
        start = [Text(printable(row.get("started_from", "")), style="dim") for _ in texts]
        table.add_row(
            Text(f"  {printable(row['name'])}"),
            state,
            step_of(row),
            *(printable(row.get(key, "")) for key in long),
            *numbers,
            *start,
        )
    return table


def step_of(row: Mapping[str, Any]) -> str:
    return f"{row['steps']}/{row['total_steps']}" if row.get("total_steps") else str(row["steps"])


# resume

UNFINISHED = ("stopped", "interrupted", "failed")
RESUME = """\
A finished run is left alone. In a sweep every unfinished run goes on, and jobs that never started are started, by the
launcher that they were asked for with; one failure does not stop the others.
Keys that change no result may be given anew (tracking.*, train.log_every, ...): any other change is refused with the
difference, since it would make another run of it. The horizon of a run with optim.schedule=constant can be extended,
with the state of its optimiser:  uft resume RUN train.steps=600"""


def resume(arguments: list[str]) -> int:
    """`uft resume RUN | SWEEP [key=value ...]`: go on with runs that were stopped."""
    parser = parser_of("resume", "Continue a run or a sweep that was stopped.", RESUME)
    parser.add_argument("run", nargs="?", help="a run or a sweep: its folder, its name, or last")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that change no result")
    parsed = parser.parse_args(arguments)
    if parsed.run is None or ("=" in parsed.run and not Path(parsed.run).is_dir()):
        raise UftError(unfinished_run(arguments), footer="See the runs here:  uft ls")
    folder = named_folder(parsed.run)
    runs, sweeps = find_runs(folder), find_sweeps(folder)
    if sweeps:
        return resume_sweeps(sweeps, runs, parsed.overrides)
    if not runs:
        raise no_runs(folder)
    if runs[0].path == folder:
        return resume_run(runs[0], parsed.overrides)
    return resume_runs(runs, parsed.overrides)


def unfinished_run(overrides: list[str]) -> Problem:
    """The question which run is meant, and the command that continues the newest one that can be."""
    rows = {run: describe(run) for run in find_runs(OUTPUTS)}
    unfinished = [run for run in rows if rows[run]["status"] in UNFINISHED]
    newest = max(unfinished, key=lambda run: (run.modified, run.path), default=None)
    if newest is None:
        return Problem("uft resume", "no run in outputs is unfinished", "command line")
    command = shlex.join(["uft", "resume", str(newest.path), *overrides])
    state = f"{rows[newest]['status']} at step {step_of(rows[newest])}"
    lines = [f"the newest unfinished one:  {command}   ({state})"]
    if newest.path.parent in find_sweeps(OUTPUTS):
        whole = shlex.join(["uft", "resume", str(newest.path.parent), *overrides])
        lines.insert(0, f"its sweep, with jobs that never started:  {whole}")
    return Problem("uft resume", "which run?", "command line", tuple(lines))


def resume_run(run: Run, overrides: list[str]) -> int:
    """Continue one run, its relative data paths read from where it was started."""
    from uft.config.compose import change
    from uft.launch.launcher import continue_run, refuse_untrusted

    started = str(run.info().get("cwd", "."))
    refuse_untrusted(run.path, run.runs_code, overrides)
    settings = change(run.config(), overrides) if overrides else None
    return continue_run(run, settings, extend=True, cwd=Path(started) if os.path.isdir(started) else None)


def resume_runs(runs: list[Run], overrides: list[str]) -> int:
    """Continue every unfinished run; a signal ends it, a failure is told of at the end."""
    unfinished, failed = [run for run in runs if run.status != "finished"], list[str]()
    for number, run in enumerate(unfinished, 1):
        print(f"\nuft: run {number} of {len(unfinished)}: {printable(run.name)}", flush=True)
        try:
            code = resume_run(run, overrides)
            why = "\n".join(problem_lines(str(run.result().get("error") or "")))
        except UftError as error:
            code, why = error.code, "; ".join(f"{problem.what}: {problem.why}" for problem in error.problems)
        if code in SIGNALLED:
            return code
        if code != GOOD:
            reason = why.splitlines()[0] if why else f"exit code {code}"
            failed.append(f"  {printable(str(run.path))}\n      {printable(reason)}")
    if not unfinished:
        print(f"uft: all {len(runs)} runs are finished; nothing to do")
    if failed:
        print(f"\nuft: {len(failed)} of {len(unfinished)} runs failed\n\n" + "\n".join(failed), file=sys.stderr)
    return FAILED if failed else GOOD


def resume_sweeps(sweeps: list[Path], runs: list[Run], overrides: list[str]) -> int:
    """Give the commands of every sweep again, then continue the runs that belong to none of them."""
    from uft.cli.verbs import train
    from uft.config.frozen import may_change
    from uft.launch.launcher import TYPED, refuse_untrusted
    from uft.launch.sweep import quote, resuming

    given = overrides
    for sweep in sweeps:
        with resuming(sweep) as commands:
            runs_code = any("trust_remote_code" in word for words, _ in commands for word in words)
        refuse_untrusted(sweep, runs_code, given)
        overrides = [word for word in overrides if not (runs_code and word == TYPED)]  # the commands say it
    # only keys that change no result and are not swept may be given anew
    swept = {key.lstrip("+") for sweep in sweeps for key in read_json(sweep / SWEEP_FILE).get("axes", ())}
    keys = {word: word.partition("=")[0].lstrip("+") for word in overrides}
    if wrong := [word for word, key in keys.items() if key in swept or not may_change(key)]:
        raise UftError(*(Problem(word, "would make other runs of this sweep's jobs", "command line") for word in wrong))
    codes = list[int]()
    for sweep in sweeps:
        place = f"hydra.sweep.dir={quote(str(sweep.resolve()))}"
        with resuming(sweep) as commands:
            for words, started in commands:
                with chdir(started if os.path.isdir(started) else "."):
                    try:
                        codes.append(train([*words, *overrides, place]))
                    except UftError as error:
                        codes.append(tell(error))
                if codes[-1] in SIGNALLED:
                    return codes[-1]
    theirs = {run.path for sweep in sweeps for run in planned(sweep)}
    others = [run for run in runs if run.path not in theirs]
    codes += [resume_runs(others, given)] if others else []
    return next((code for code in codes if code != GOOD), GOOD)


# export

EXPORT = """\
RUN is a folder, a name or last; of a run that was stopped the newest checkpoint is exported. The folder is read back
with plain transformers and compared with the policy that was trained; README.md is its model card.

  uft export last --to my-model                      a Hugging Face folder, an adapter merged
  uft export RUN@best --to DIR                       the best checkpoint; RUN@120 is that of a step
  uft export RUN --dtype bfloat16 --to DIR           half the size; model: the precision it came in
  uft export RUN --adapter --to DIR                  the LoRA adapter alone, for PEFT
  uft export RUN --gguf --ollama --to DIR            a GGUF file and an Ollama Modelfile too"""


def export(arguments: list[str]) -> int:
    """`uft export RUN --to DIR`: a run's weights, or those of a checkpoint, for other programs."""
    parser = parser_of("export", "Write the weights of a run to a folder for other programs.", EXPORT)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run: its folder, its name, or last; RUN@best and RUN@STEP are checkpoints")
    add("--to", type=Path, required=True, metavar="DIR", help="a new folder")
    add("--checkpoint", metavar="best|STEP", help="as RUN@best, RUN@STEP; the final model, else the newest checkpoint")
    precisions = ("float32", "bfloat16", "model")
    add("--dtype", choices=precisions, default="float32", help="precision of the weights; float32")
    add("--adapter", action="store_true", help="the LoRA adapter alone")
    add("--gguf", action="store_true", help="also a GGUF file, for llama.cpp")
    add("--ollama", action="store_true", help="also a GGUF file and a Modelfile, for Ollama")
    add("words", nargs="*", default=[], metavar="key=value", help="model.trust_remote_code=true")
    parsed = parser.parse_intermixed_args(arguments)
    source = find_weights(f"{parsed.run}@{parsed.checkpoint}" if parsed.checkpoint else parsed.run)
    if source.run is None:
        raise UftError(Problem(parsed.run, "is a model already, and no run", "command line"), footer="See:  uft ls")
    from uft.launch.launcher import refuse_untrusted
    from uft.launch.worker import silence_libraries

    refuse_untrusted(source.run.path, source.run.runs_code, parsed.words)
    silence_libraries()
    expect_durations(f"export {source.config['model']['path']}")
    with phase_status():
        from uft.training.exporting import Export, export_run

        options = {name: getattr(parsed, name) for name in ("to", "dtype", "adapter", "gguf", "ollama")}
        export_run(source, Export(**options), lambda text: print(printable_lines(text), flush=True))
    return GOOD


# sync

SYNC = """\
Rows are taken from metrics.jsonl and samples.jsonl, from the first one that the server lacks. What arrived is never
sent again. The exit code is 1 if something did not arrive, and 2 without an API key.

  uft sync                             every run in outputs
  uft sync outputs/2026-11-21/RUN      that run
  uft sync outputs/2026-11-21/SWEEP    all runs of that sweep
  uft sync --dry-run                   say what would be uploaded"""


def sync(arguments: list[str]) -> int:
    """`uft sync [RUN | SWEEP ...]`: upload to W&B what it lacks of runs, and say what arrived; the exit code.

    Without a key or a network nothing is touched, and the command says what waits.
    """
    from uft.tracking.wandb import has_key, reachable, upload, upload_state, wandb_server

    text = "Upload what W&B lacks of runs that were offline or cut off, and say what arrived."
    parser = parser_of("sync", text, SYNC)
    help = "runs, sweeps or folders of them; outputs"
    parser.add_argument("folders", nargs="*", type=named_folder, metavar="RUN", help=help)
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded, and do nothing")
    parsed = parser.parse_args(arguments)
    if missing := [no_runs(folder).problems[0] for folder in parsed.folders if not find_runs(folder)]:
        raise UftError(*missing, footer="See:  uft ls")
    found = {run.path.resolve(): run for folder in parsed.folders or [OUTPUTS] for run in find_runs(folder)}
    states = {run: upload_state(run) for run in found.values()}
    due = [run for run, state in states.items() if state == "due"]
    for run, state in states.items():
        if state == "running":
            print(f"  {shown(run.path)}  is running: upload it when it has ended")
        elif state == "untracked" and parsed.folders:  # asked for by name
            print(f"  {shown(run.path)}  was not tracked by W&B")
    if before := list(states.values()).count("arrived"):
        print(f"  {before} run{'s' if before != 1 else ''} arrived earlier")
    if not due:
        print("Nothing to upload." if states else f"No runs in {OUTPUTS}{os.sep}: nothing to upload.")
        return GOOD
    server = wandb_server()
    key = parsed.dry_run or has_key(server)
    if parsed.dry_run or not key or not reachable(server.url):
        print(f"{len(due)} runs {'would' if parsed.dry_run else 'wait to'} be uploaded to {server.host}:")
        print("\n".join(f"  {shown(run.path)}" for run in due))
        if parsed.dry_run:
            return GOOD
        if not key:
            log_in = ("log in:  wandb login   (or set WANDB_API_KEY)",)
            return tell(UftError(Problem("uft sync", f"no W&B API key for {server.host}", advice=log_in)))
        print(f"\nuft: {server.host} does not answer; nothing was uploaded. Try again:  uft sync", file=sys.stderr)
        return FAILED
    print(f"Uploading {len(due)} runs to {server.host}", flush=True)
    lost = 0
    for run in due:
        steps, why = upload(run)
        lost += bool(why)
        state = f"did NOT arrive: {why}" if why else f"arrived: {steps} steps were missing"
        print(f"  {shown(run.path)}  {state}", flush=True)
    if lost:
        print(f"\nuft: {lost} of {len(due)} runs did not arrive. Try again:  uft sync", file=sys.stderr)
    return FAILED if lost else GOOD


# compare

COMPARE = """\
Runs that differ in their seed alone are one configuration: its figures are means over seeds. Only finished runs count;
all others are shown with what went wrong. compare.html is one file that opens without a network, compare.md one to
paste into a report, compare.json holds the same for programs. What the statistics mean: uft docs compare.

  uft compare                                   the newest sweep
  uft compare outputs/2026-11-21/beta-sweep     that sweep
  uft compare beta-sweep 'outputs/*/ift-*'      by name, by pattern, together
  uft compare --metric instruct/exact_match     judged by this first
  uft compare --baseline 'dpo beta=0.1'         the margin over this one
  uft compare --watch                           the table, renewed while the sweep runs
  uft compare --latex > table.tex               means and intervals for a paper; --markdown, --csv"""


def compare(arguments: list[str]) -> int:
    """`uft compare [RUNS | SWEEP | pattern ...]`: runs side by side, in the terminal, as a page and as JSON."""
    text = "Runs side by side: which is best, by how much, and is it more than seed noise."
    parser = parser_of("compare", text, COMPARE)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="runs, sweeps or patterns; the newest sweep in outputs")
    metric = "judge by this first; may be repeated"
    add("--metric", action="append", default=[], metavar="NAME[:min|max]", help=metric)
    add("--baseline", metavar="NAME", help="a configuration or key=value; objective=sft, else the first")
    seed = "a key that is a seed; seed and seeds.*"
    add("--seed-key", action="append", default=[], metavar="KEY", help=seed)
    add("--out", type=Path, metavar="DIR", help="where the files go; the sweep's folder")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--json", action="store_true", help="print compare.json instead of the table")
    forms = {"csv": "a line per configuration and metric", "markdown": "for a page", "latex": "booktabs"}
    for form, what in forms.items():
        told = f"print means, intervals and seeds: {what}"
        instead.add_argument(f"--{form}", dest="form", action="store_const", const=form, help=told)
    instead.add_argument("--watch", action="store_true", help="renew the table while runs go on; Ctrl-C ends it")
    add("--open", action="store_true", help="open the page in a browser")
    add("--wandb", action="store_true", help="save a W&B workspace with the same panels")
    parsed = parser.parse_args(arguments)
    from uft.report.compare import Options, as_json, write
    from uft.report.compare import compare as compare_runs
    from uft.report.runs import select
    from uft.report.table import as_text, show
    from uft.report.workspace import require, save

    if parsed.wandb:
        require()
    selection = select(parsed.runs)
    options = Options(tuple(parsed.metric), parsed.baseline, tuple(parsed.seed_key))
    if parsed.watch:
        watch(parsed.runs or [str(selection.folder)], options)
        selection = select(parsed.runs or [str(selection.folder)])
    comparison = compare_runs(selection, options)
    if parsed.json or parsed.form:
        print(as_json(comparison) if parsed.json else as_text(comparison, parsed.form), end="")
    else:
        show(comparison)
    out = sys.stderr if parsed.json or parsed.form else sys.stdout
    folder = parsed.out or selection.folder
    try:
        files = write(comparison, folder)
    except OSError as error:
        why = f"cannot write there: {error.strerror}"
        raise UftError(Problem(str(folder), why, advice=("choose:  --out DIR",))) from error
    print(f"\n  {'  '.join(shown(path.resolve()) for path in files)}", file=out)
    if parsed.wandb:
        print("\n".join(f"  {line}" for line in save(comparison, selection.runs)), file=out)
    if parsed.open:
        import webbrowser

        webbrowser.open(next(path for path in files if path.suffix == ".html").resolve().as_uri())
    return GOOD


def watch(words: list[str], options: Options) -> None:
    """Show the table of these runs, anew every few seconds, until none is running or waiting, or Ctrl-C."""
    from rich.live import Live

    from uft.report.compare import compare as compare_runs
    from uft.report.runs import select
    from uft.report.table import standing

    console = table_console()
    with Live(console=console, auto_refresh=False, transient=True) as live, suppress(KeyboardInterrupt):
        while True:
            started, selection = time.monotonic(), select(words)
            comparison, jobs = compare_runs(selection, options), len(waiting(selection.folder))
            live.update(standing(comparison, jobs, console.width), refresh=True)
            if not jobs and not any(run["status"] == "running" for run in comparison["runs"]):
                return
            time.sleep(max(PAUSE, 2 * (time.monotonic() - started)))
