"""Where the numbers of a run go: `metrics.jsonl`, `samples.jsonl` and `items.jsonl`, W&B, a console for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from uft.runs import Run
from uft.tracking.metrics import Files
from uft.tracking.wandb import Wandb

if TYPE_CHECKING:  # it imports torch, and compare and ls read metrics
    from uft.evaluation.evaluate import Item, Sample


class Trackers:
    """Take what a run measures; none on every rank but the first. Calls: start, then log and samples, then finish."""

    def __init__(self, *trackers: Files | Wandb) -> None:
        self.trackers = trackers

    def start(self) -> None:
        """Open. Raises UftError if what was asked for cannot be had."""
        for tracker in self.trackers:
            tracker.start()

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Metrics after optimiser step `step` (0: before the first). The same step may come twice, with other names.

        The one text among them is `stage`, in a run that has stages.
        """
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def samples(self, step: int, samples: Sequence[Sample], stage: str | None = None) -> None:
        for tracker in self.trackers:
            tracker.samples(step, samples, stage)

    def items(self, step: int, items: Sequence[Item], stage: str | None = None, answers: bool = False) -> None:
        """What was measured of every held-out row, with its answer if asked for. They stay in the run folder."""
        for tracker in self.trackers:
            if isinstance(tracker, Files):
                tracker.items(step, items, stage, answers)

    def secure(self) -> None:
        """Bring everything so far to the disk: a checkpoint that stands after it is about to be published."""
        for tracker in self.trackers:
            if isinstance(tracker, Files):
                tracker.secure()

    def finish(self, status: str, exit_code: int, summary: Mapping[str, Any]) -> None:
        """Close as `status` (finished, failed, stopped), with the process's exit code. A second call does nothing."""
        for tracker in self.trackers:
            tracker.finish(status, exit_code, summary)

    @property
    def description(self) -> str:
        """One line for the start card, once started."""
        return next((tracker.description for tracker in self.trackers if isinstance(tracker, Wandb)), "")


def make_tracker(
    run: Run,
    config: Mapping[str, Any],
    *,
    resumed_step: int | None = None,
    rank: int = 0,
    say: Callable[[str], None] = print,
) -> Trackers:
    """The trackers of a run with this resolved configuration, not yet started.

    `resumed_step`: of the checkpoint that training continues from (None: a fresh start). `say` prints the few lines
    that W&B's state may need.
    """
    return Trackers(Files(run, resumed_step, say), Wandb(run, config, say)) if rank == 0 else Trackers()
