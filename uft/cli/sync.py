"""`uft sync [RUN | SWEEP ...]`: upload what runs kept for W&B while they were offline, and say what arrived."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from uft.errors import BAD_REQUEST, FAILED, GOOD, Problem, UftError, render
from uft.runs import find_runs, shown
from uft.tracking.sync import Upload, mend, plan, send
from uft.tracking.wandb import Server, has_key, reachable

ABOUT = """\
Files that a killed run left torn are cut at their last whole record first (the original stays beside until the
upload worked), and rows that W&B lost in the kill are taken from metrics.jsonl. What arrived is never sent again. The
exit code is 1 if something did not arrive, and 2 without an API key.

  uft sync                             every run in outputs
  uft sync outputs/2026-11-21/RUN      that run
  uft sync outputs/2026-11-21/SWEEP    all runs of that sweep
  uft sync --dry-run                   say what would be uploaded"""

LOG_IN = ("log in:  wandb login   (or set WANDB_API_KEY)",)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="uft sync",
        description="Upload what runs kept for W&B while they were offline, and say what arrived.",
        epilog=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="RUN", help="runs, sweeps or folders of them; outputs")
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded, and do nothing")
    parsed = parser.parse_args(arguments)
    uploads = chosen(parsed.folders)
    waiting = [upload for upload in uploads if upload.segments]
    tell_others(uploads, bool(parsed.folders))
    if not waiting:
        print("Nothing to upload.")
        return GOOD
    server = server_of_wandb()
    if parsed.dry_run:
        tell_plan(waiting, f"would be uploaded to {server.host}")
        return GOOD
    return upload(waiting, server)


def chosen(folders: list[Path]) -> list[Upload]:
    """What there is to do for the runs at and below `folders`."""
    missing = [folder for folder in folders if not find_runs(folder)]
    if missing:
        why = ("no such folder", "no run in this folder")
        raise UftError(*(Problem(str(folder), why[folder.is_dir()]) for folder in missing), footer="See:  uft ls")
    found = {run.path.resolve(): run for folder in folders or [Path("outputs")] for run in find_runs(folder)}
    return [plan(run) for run in found.values()]


def server_of_wandb() -> Server:
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    return Server(settings.base_url, settings.api_key)


def upload(waiting: list[Upload], server: Server) -> int:
    """Upload and report; the exit code. Without a key or a network nothing is touched, and it is said what waits."""
    if not has_key(server):
        tell_plan(waiting, f"wait to be uploaded to {server.host}")
        print(
            render(UftError(Problem("uft sync", f"no W&B API key for {server.host}", advice=LOG_IN))), file=sys.stderr
        )
        return BAD_REQUEST
    if not reachable(server.url):
        tell_plan(waiting, f"wait to be uploaded to {server.host}")
        print(f"\nuft: {server.host} does not answer; nothing was uploaded. Try again:  uft sync", file=sys.stderr)
        return FAILED
    print(f"Uploading {len(waiting)} runs to {server.host}", flush=True)
    for one in waiting:
        mend(one)
    send([one for one in waiting if one.segments and not one.why], lambda line: print(line, flush=True))
    return report(waiting)


def report(uploads: list[Upload]) -> int:
    """Tell per run what arrived and what did not; the exit code."""
    print()
    for one in uploads:
        count = f"{len(one.segments)} segment{'s' if len(one.segments) != 1 else ''}"
        state = f"{count} arrived" if one.arrived else f"did NOT arrive: {one.why}"
        print("\n".join([f"  {shown(one.run.path)}  {state}", *(f"      {note}" for note in one.notes)]))
    lost = [one for one in uploads if not one.arrived]
    if lost:
        print(f"\nuft: {len(lost)} of {len(uploads)} runs did not arrive. Try again:  uft sync", file=sys.stderr)
    return FAILED if lost else GOOD


def tell_others(uploads: list[Upload], named: bool) -> None:
    """A line about runs that have nothing to upload; each of them where somebody asked for it by name."""
    idle = [one for one in uploads if not one.segments]
    for one in idle:
        if one.why:
            print(f"  {shown(one.run.path)}  {one.why}")
        elif named and not one.before:
            print(f"  {shown(one.run.path)}  has no W&B files of its own")
    before = sum(1 for one in idle if one.before)
    if before:
        print(f"  {before} run{'s' if before != 1 else ''} arrived earlier")


def tell_plan(uploads: list[Upload], what: str) -> None:
    print(f"{len(uploads)} runs {what}:")
    for one in uploads:
        print(f"  {shown(one.run.path)}  {len(one.segments)} segment{'s' if len(one.segments) != 1 else ''}")
