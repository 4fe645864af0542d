"""Upload runs that W&B lacks something of, from their metrics.jsonl and samples.jsonl, and know what arrived.

The server tells which steps it has, and only later rows are sent. What arrived is noted in `run.json`, so that a second
call has nothing to do; an upload that broke off goes on where the server's rows end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from uft.errors import FAILED, GOOD, STOPPED, UftError
from uft.runs import Run
from uft.tracking.wandb import Wandb, first_line, shut_down, unsent

PATIENCE = 900.0  # seconds after which the upload of a run is given up
EXIT_CODES = {"finished": GOOD, "stopped": STOPPED}


@dataclass
class Upload:
    """What is to be done for a run, and how it went."""

    run: Run
    due: bool = False  # W&B may lack something of it
    arrived: bool = False  # everything is there
    why: str = ""  # it did not arrive, or is not tried
    steps: int = 0  # that the server lacked


def plan(run: Run) -> Upload:
    """What is to be done for a run. Nothing is touched."""
    if run.status == "running":
        return Upload(run, why="is running: upload it when it has ended")
    tracked = run.info().get("wandb", {}).get("mode", "disabled") != "disabled"
    due = tracked and unsent(run)
    return Upload(run, due, arrived=tracked and not due)


def send(uploads: Sequence[Upload], say: Callable[[str], None], patience: float = PATIENCE) -> None:
    """Upload these runs one after the other. Afterwards each has `arrived` or has its `why`."""
    for upload in uploads:
        run, status = upload.run, upload.run.status
        with tempfile.TemporaryDirectory(prefix="uft-sync-", ignore_cleanup_errors=True) as folder:
            try:
                tracker = Wandb(run, run.config(), lambda line: None, folder=Path(folder), uploads=True)
                tracker.finish_timeout = patience
                tracker.connect()
                summary = {**run.result().get("final", {}), "steps": run.steps}
                tracker.finish(status, EXIT_CODES.get(status, FAILED), summary)
                upload.steps, upload.why = len(tracker.sent), tracker.failure
            except UftError as error:
                upload.why = "; ".join(f"{problem.what} {problem.why}" for problem in error.problems)
            except Exception as error:
                upload.why = first_line(error)
                shut_down()
        upload.arrived = not upload.why
        if upload.arrived:
            say(f"  {run.name} arrived")
