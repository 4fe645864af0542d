"""`uft sync [RUN | SWEEP ...]`: upload to W&B what it lacks of runs, and say what arrived."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from uft.errors import BAD_REQUEST, FAILED, GOOD, Problem, UftError, render
from uft.runs import find_runs, shown
from uft.tracking.sync import Upload, plan, send
from uft.tracking.wandb import has_key, reachable, wandb_server

ABOUT = """\
Rows are taken from metrics.jsonl and samples.jsonl, from the first one that the server lacks. What arrived is never
sent again. The exit code is 1 if something did not arrive, and 2 without an API key.

  uft sync                             every run in outputs
  uft sync outputs/2026-11-21/RUN      that run
  uft sync outputs/2026-11-21/SWEEP    all runs of that sweep
  uft sync --dry-run                   say what would be uploaded"""

LOG_IN = ("log in:  wandb login   (or set WANDB_API_KEY)",)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="uft sync",
        description="Upload what W&B lacks of runs that were offline or cut off, and say what arrived.",
        epilog=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="RUN", help="runs, sweeps or folders of them; outputs")
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded, and do nothing")
    parsed = parser.parse_args(arguments)
    missing = [folder for folder in parsed.folders if not find_runs(folder)]
    if missing:
        why = ("no such folder", "no run in this folder")
        raise UftError(*(Problem(str(folder), why[folder.is_dir()]) for folder in missing), footer="See:  uft ls")
    folders = parsed.folders or [Path("outputs")]
    found = {run.path.resolve(): run for folder in folders for run in find_runs(folder)}
    uploads = [plan(run) for run in found.values()]
    due = [upload for upload in uploads if upload.due]
    for idle in (upload for upload in uploads if not upload.due):
        if idle.why:
            print(f"  {shown(idle.run.path)}  {idle.why}")
        elif parsed.folders and not idle.arrived:  # asked for by name
            print(f"  {shown(idle.run.path)}  was not tracked by W&B")
    if before := sum(upload.arrived for upload in uploads):
        print(f"  {before} run{'s' if before != 1 else ''} arrived earlier")
    if not due:
        print("Nothing to upload.")
        return GOOD
    server = wandb_server()
    if parsed.dry_run:
        list_uploads(due, f"would be uploaded to {server.host}")
        return GOOD
    if not has_key(server):
        list_uploads(due, f"wait to be uploaded to {server.host}")
        error = UftError(Problem("uft sync", f"no W&B API key for {server.host}", advice=LOG_IN))
        print(render(error), file=sys.stderr)
        return BAD_REQUEST
    if not reachable(server.url):
        list_uploads(due, f"wait to be uploaded to {server.host}")
        print(f"\nuft: {server.host} does not answer; nothing was uploaded. Try again:  uft sync", file=sys.stderr)
        return FAILED
    print(f"Uploading {len(due)} runs to {server.host}", flush=True)
    send(due, lambda line: print(line, flush=True))
    print()
    for upload in due:
        state = f"arrived: {upload.steps} steps were missing" if upload.arrived else f"did NOT arrive: {upload.why}"
        print(f"  {shown(upload.run.path)}  {state}")
    lost = [upload for upload in due if not upload.arrived]
    if lost:
        print(f"\nuft: {len(lost)} of {len(due)} runs did not arrive. Try again:  uft sync", file=sys.stderr)
    return FAILED if lost else GOOD


def list_uploads(uploads: list[Upload], what: str) -> None:
    print(f"{len(uploads)} runs {what}:")
    for upload in uploads:
        print(f"  {shown(upload.run.path)}")
