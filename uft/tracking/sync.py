"""Upload what runs wrote for W&B while they were offline, and know what arrived.

`wandb sync` does the transport. Around it: torn segments are cut at their last whole record first (it would stop there
and not upload what follows, with exit code 0), rows that a kill took from W&B's memory are written again from
metrics.jsonl, and what counts as arrived is the mark that it leaves beside a file that it sent to the end. A second
call finds these marks and has nothing to do. A segment whose upload broke off is sent again from its start: wandb has
noted at which of the server's steps it began.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from uft.errors import FAILED, GOOD, STOPPED
from uft.runs import Run
from uft.tracking import wandb
from uft.tracking.metrics import read_metrics

AT_ONCE = 4  # runs; the segments of one run go one after the other
PATIENCE = 900.0  # seconds without a word, after which the upload is given up
OF_A_RUN = (
    "WANDB_MODE",
    "WANDB_PROJECT",
    "WANDB_ENTITY",
    "WANDB_RUN_ID",
    "WANDB_SWEEP_ID",
    "WANDB_SILENT",
    "WANDB_DIR",
)
"""Variables that would change what a segment says about itself, or hide what is told."""

EXIT_CODES = {"finished": GOOD, "stopped": STOPPED}


@dataclass
class Segment:
    """The log of one sitting."""

    file: Path

    @property
    def online(self) -> bool:
        return not self.file.parent.name.startswith("offline-")

    @property
    def arrived(self) -> bool:
        return self.file.with_suffix(".wandb.synced").exists()

    @property
    def original(self) -> Path:
        """Where a torn file is kept as it was until the rest of it has arrived."""
        return self.file.with_suffix(".wandb.torn")


@dataclass
class Upload:
    """What is to be uploaded of a run, and how it went."""

    run: Run
    segments: list[Segment] = field(default_factory=list)
    before: int = 0  # segments that had arrived already
    notes: list[str] = field(default_factory=list)
    why: str = ""  # it did not arrive, or is not tried

    @property
    def arrived(self) -> bool:
        return all(segment.arrived for segment in self.segments)


def plan(run: Run) -> Upload:
    """What is to be done for a run. Nothing is touched."""
    upload = Upload(run)
    if run.status == "running":
        upload.why = "is running: upload it when it has ended"
        return upload
    found = segments_of(run)
    unsent = set(run.info().get("wandb", {}).get("unsent", ()))
    upload.before = sum(segment.arrived for segment in found)
    upload.segments = [s for s in found if not s.arrived and (not s.online or owes(s, run, unsent))]
    return upload


def segments_of(run: Run) -> list[Segment]:
    """All segments of a run in the order they were written: their folders' names begin with the time."""
    folders = {path.parent.resolve(): path for path in run.path.glob("wandb/*run-*/run-*.wandb")}
    return [Segment(folders[key]) for key in sorted(folders, key=lambda folder: folder.name.partition("run-")[2])]


def owes(segment: Segment, run: Run, unsent: set[str]) -> bool:
    """Whether an online segment is known not to have arrived: W&B said so, or its process was killed."""
    name = os.path.relpath(segment.file.parent, run.path)
    return name in unsent or "exit" not in wandb.kinds(segment.file)


def mend(upload: Upload) -> None:
    """Make the segments of an upload whole: cut torn ones, leave out empty ones, add the rows that they lack."""
    damaged = [segment for segment in upload.segments if not wandb.readable(segment.file)]
    if damaged:  # one of them would keep wandb from uploading anything, of any run
        upload.why = f"{damaged[0].file.parent.name} is no W&B log any more: its first bytes are damaged"
        return
    kept = []
    for segment in upload.segments:
        cut = wandb.repair(segment.file, segment.original)
        if cut:
            upload.notes.append(f"{segment.file.parent.name} was torn: {cut} bytes of a half-written record cut")
        if "run" in wandb.kinds(segment.file):
            kept.append(segment)
        else:
            upload.notes.append(f"{segment.file.parent.name} is empty: W&B was killed before it wrote anything")
    upload.segments = kept
    lost = lost_rows(upload.run)
    if lost:
        write_again(upload.run)
        upload.segments.append(segments_of(upload.run)[-1])
        upload.notes.append(f"{lost} rows that W&B had lost in a kill are taken from metrics.jsonl")


def lost_rows(run: Run) -> int:
    """Steps of metrics.jsonl after the last one that W&B's logs have."""
    steps = (wandb.last_step(segment.file) for segment in segments_of(run))
    known = max((step for step in steps if step is not None), default=-1)
    return sum(line["step"] > known for line in read_metrics(run))


def write_again(run: Run) -> None:
    """One more offline segment, with the rows that the others lack: what resuming the run would do first."""
    from uft.tracking.wandb import Wandb

    config, status = run.config(), run.status
    config["tracking"]["mode"] = "offline"
    tracker = Wandb(run, config, say=lambda line: None)
    tracker.start()
    tracker.finish(status, EXIT_CODES.get(status, FAILED), run.result().get("final", {}))


def send(uploads: Sequence[Upload], say: Callable[[str], None], patience: float = PATIENCE) -> None:
    """Upload all segments of these runs. Afterwards each is `arrived` or has its `why`."""
    if not uploads:
        return
    errors: list[str] = []
    files = [str(segment.file.resolve()) for upload in uploads for segment in upload.segments]
    for line in spoken(files, patience):
        if "ERROR" in line or line.startswith("Error"):
            errors.append(line.partition("ERROR")[2].strip() or line)
        done = line.partition("Finished syncing ")[2]
        for upload in uploads:
            if done and upload.segments[-1].file.parent.name in done:
                say(f"  {upload.run.name} arrived")
    for upload in uploads:
        settle(upload, errors)


def settle(upload: Upload, errors: Sequence[str]) -> None:
    """Note how it went; originals of what arrived are not needed any more."""
    missing = [segment for segment in upload.segments if not segment.arrived]
    for segment in upload.segments:
        if segment.arrived:
            segment.original.unlink(missing_ok=True)
    if not missing:
        wandb = upload.run.info().get("wandb", {})
        if "unsent" in wandb:
            upload.run.update_info(wandb={key: value for key, value in wandb.items() if key != "unsent"})
        return
    named = [error for error in errors if missing[0].file.parent.name in error]
    general = [error for error in errors if "/wandb/" not in error]
    upload.why = (named or general or ["wandb sync gave no reason"])[0]


def spoken(files: Sequence[str], patience: float) -> Iterator[str]:
    """The lines of `wandb sync FILES` as they come."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_RUN}
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", "-n", str(AT_ONCE), *files]
    with tempfile.TemporaryDirectory(prefix="uft-sync-") as cwd:  # it writes logs where it stands
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        )
        assert process.stdout is not None
        with given_up(process, patience) as heard:
            for line in process.stdout:
                heard()
                yield line.removeprefix("wandb: ").rstrip("\n")
        if process.wait() < 0:
            yield f"Error: nothing was heard for {patience:.0f} s; the upload was given up"


@contextmanager
def given_up(process: subprocess.Popen[str], patience: float) -> Iterator[Callable[[], None]]:
    """End the process when nothing is heard of it for `patience` seconds, or when an error ends us. Yields a function
    that says it was heard."""
    heard, left = threading.Event(), threading.Event()

    def watch() -> None:
        while heard.wait(patience):
            heard.clear()
            if left.is_set():
                return
        process.kill()

    watcher = threading.Thread(target=watch, daemon=True, name="uft-sync")
    watcher.start()
    try:
        yield heard.set
    except BaseException:
        process.kill()
        raise
    finally:
        left.set()
        heard.set()
        watcher.join()
