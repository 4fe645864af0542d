"""The trackers of a run: its files, and W&B, TensorBoard or Trackio, the latter two through their own libraries.

`metrics.jsonl` is the truth: what fails in another tracker costs nothing but its own figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from uft.errors import Problem, UftError, first_line
from uft.runs import Run, shown
from uft.tracking.metrics import Files
from uft.tracking.wandb import Wandb, about, group_of, panel

if TYPE_CHECKING:
    from uft.evaluation.evaluate import Item, Sample


@dataclass
class TensorBoard:
    """Event files in the run folder, for `tensorboard --logdir`."""

    run: Run
    config: Mapping[str, Any]
    resumed_step: int | None  # of the checkpoint that training continues from

    @property
    def description(self) -> str:
        return f"metrics.jsonl, TensorBoard: tensorboard --logdir {shown(self.run.path.parent)}"

    def start(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        later = None if self.resumed_step is None else self.resumed_step + 1  # these steps are trained again
        self.writer = SummaryWriter(str(self.run.path / "tensorboard"), purge_step=later)
        self.writer.add_text("run", "\n".join(f"    {name}: {value}" for name, value in about(self.run).items()))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        for place, sample in enumerate(samples):
            text = f"    {sample.prompt}\n\n    {sample.reply}"  # indented: Markdown takes it as it is
            self.writer.add_text(f"samples/{sample.source}/{place}", text, step)

    def finish(self, status: str) -> None:
        self.writer.add_text("status", status)
        self.writer.close()


@dataclass
class Trackio:
    """A project in Trackio's database on this machine, for `trackio show`."""

    run: Run
    config: Mapping[str, Any]
    resumed_step: int | None

    @property
    def description(self) -> str:
        return f"metrics.jsonl, Trackio: trackio show --project {self.config['tracking']['project']}"

    def start(self) -> None:
        import trackio

        self.handle = trackio.init(
            project=self.config["tracking"]["project"],
            name=f"{self.run.name}-{self.run.info()['id']}",
            group=group_of(self.run, self.config),
            config={**self.config, "run_info": about(self.run)},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.handle.log({name: value for name, value in metrics.items() if math.isfinite(value)}, step=step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        from pandas import DataFrame
        from trackio import Table

        table = Table(dataframe=DataFrame([asdict(one) for one in samples]).astype(str))
        self.handle.log({"samples": table}, step=step)

    def finish(self, status: str) -> None:
        import trackio

        trackio.finish()


MIRRORS: dict[str, type[TensorBoard | Trackio]] = {"tensorboard": TensorBoard, "trackio": Trackio}
"""By the choice of tracking.tracker, which is the name of the package and of the extra that installs it."""


@dataclass
class Mirror:
    """A tracker with a library behind it, which prints nothing, and whose failure costs its own figures alone."""

    package: str
    tracker: TensorBoard | Trackio
    say: Callable[[str], None]
    open: bool = False

    def start(self) -> None:
        """Open. Raises UftError where the package is not installed."""
        try:
            with redirect_stdout(StringIO()):  # the console is the run's
                self.tracker.start()
            self.open = True
        except ImportError as error:
            advice = (f"pip install 'uft-lm[{self.package}]'",)
            what = f"tracking.tracker={self.package}"
            raise UftError(Problem(what, f"cannot be imported: {first_line(error)}", advice=advice)) from error

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        numbers = {panel(name): value for name, value in metrics.items() if isinstance(value, (int, float))}
        self._attempt(self.tracker.log, step, numbers)

    def samples(self, step: int, samples: Sequence[Sample], stage: str | None = None) -> None:
        self._attempt(self.tracker.samples, step, samples)

    def finish(self, status: str, exit_code: int, summary: Mapping[str, Any]) -> None:
        self._attempt(self.tracker.finish, status)
        self.open = False

    def _attempt(self, call: Callable[..., None], *arguments: Any) -> None:
        if not self.open:
            return
        try:
            with redirect_stdout(StringIO()):
                call(*arguments)
        except Exception as error:
            self.open = False
            self.say(f"{self.package} stopped taking metrics ({first_line(error)}); metrics.jsonl has everything.")

    @property
    def description(self) -> str:
        """One line for the start card."""
        return self.tracker.description


@dataclass
class Trackers:
    """Take what a run measures; without trackers, on every rank but the first, nothing. Calls: start, then log, samples
    and items, then finish."""

    files: Files | None = None
    other: Wandb | Mirror | None = None

    @property
    def trackers(self) -> list[Files | Wandb | Mirror]:
        return [tracker for tracker in (self.files, self.other) if tracker]

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
        if self.files:
            self.files.items(step, items, stage, answers)

    def secure(self) -> None:
        """Bring everything so far to the disk: a checkpoint that stands after it is about to be published."""
        if self.files:
            self.files.secure()

    def finish(self, status: str, exit_code: int, summary: Mapping[str, Any]) -> None:
        """Close as `status` (finished, failed, stopped), with the process's exit code. A second call does nothing."""
        for tracker in self.trackers:
            tracker.finish(status, exit_code, summary)

    @property
    def description(self) -> str:
        """One line for the start card, once started."""
        return self.other.description if self.other else ""


def make_tracker(
    run: Run, config: Mapping[str, Any], *, resumed_step: int | None = None, say: Callable[[str], None] = print
) -> Trackers:
    """The trackers of a run with this resolved configuration, not yet started.

    `resumed_step`: of the checkpoint that training continues from (None: a fresh start). `say` prints the few lines
    that W&B's state may need.
    """
    name, files = config["tracking"].get("tracker"), Files(run, resumed_step, say)
    if name in MIRRORS:
        return Trackers(files, Mirror(name, MIRRORS[name](run, config, resumed_step), say))
    return Trackers(files, Wandb(run, config, say))
