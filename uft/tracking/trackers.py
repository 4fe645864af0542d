"""The trackers of a run: its files, and W&B, TensorBoard or Trackio, the latter two through their own libraries.

`metrics.jsonl` is the truth: what fails in another tracker costs nothing but its own figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import TYPE_CHECKING, Any, ClassVar

from uft.errors import Problem, UftError, first_line
from uft.runs import Run, shown
from uft.tracking.metrics import Files
from uft.tracking.wandb import Wandb, about, group_of, panel

if TYPE_CHECKING:
    from uft.evaluation.evaluate import Item, Sample


@dataclass
class Mirror:
    """A tracker with a library behind it. `resumed_step`: of the checkpoint that training continues from."""

    run: Run
    config: Mapping[str, Any]
    say: Callable[[str], None] = print
    resumed_step: int | None = None
    package: ClassVar[str]  # also the choice of tracking.tracker and the extra that installs it
    _handle: Any = field(default=None, init=False)

    def start(self) -> None:
        """Open. Raises UftError where the package is not installed."""
        try:
            with redirect_stdout(StringIO()):  # the console is the run's
                self._handle = self._open()
        except ImportError as error:
            advice = (f"pip install 'uft-lm[{self.package}]'",)
            what = f"tracking.tracker={self.package}"
            raise UftError(Problem(what, f"cannot be imported: {first_line(error)}", advice=advice)) from error

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        numbers = {panel(name): value for name, value in metrics.items() if isinstance(value, (int, float))}
        self._attempt(self._log, step, numbers)

    def samples(self, step: int, samples: Sequence[Sample], stage: str | None = None) -> None:
        self._attempt(self._samples, step, [asdict(sample) for sample in samples])

    def finish(self, status: str, exit_code: int, summary: Mapping[str, Any]) -> None:
        self._attempt(self._close, status)
        self._handle = None

    def _attempt(self, call: Callable[..., None], *arguments: Any) -> None:
        if self._handle is None:
            return
        try:
            with redirect_stdout(StringIO()):
                call(*arguments)
        except Exception as error:
            self._handle = None
            self.say(f"{self.package} stopped taking metrics ({first_line(error)}); metrics.jsonl has everything.")

    @property
    def description(self) -> str:
        """One line for the start card."""
        raise NotImplementedError

    def _open(self) -> Any:
        raise NotImplementedError

    def _log(self, step: int, numbers: Mapping[str, float]) -> None:
        raise NotImplementedError

    def _samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        raise NotImplementedError

    def _close(self, status: str) -> None:
        raise NotImplementedError


class TensorBoard(Mirror):
    """Event files in the run folder, for `tensorboard --logdir`."""

    package = "tensorboard"

    @property
    def description(self) -> str:
        return f"metrics.jsonl, TensorBoard: tensorboard --logdir {shown(self.run.path.parent)}"

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        later = None if self.resumed_step is None else self.resumed_step + 1  # these steps are trained again
        writer = SummaryWriter(str(self.run.path / "tensorboard"), purge_step=later)
        writer.add_text("run", "\n".join(f"    {name}: {value}" for name, value in about(self.run).items()))
        return writer

    def _log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._handle.add_scalar(name, value, step)

    def _samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        for place, sample in enumerate(samples):
            text = f"    {sample['prompt']}\n\n    {sample['reply']}"  # indented: Markdown takes it as it is
            self._handle.add_text(f"samples/{sample['source']}/{place}", text, step)

    def _close(self, status: str) -> None:
        self._handle.add_text("status", status)
        self._handle.close()


class Trackio(Mirror):
    """A project in Trackio's database on this machine, for `trackio show`."""

    package = "trackio"

    @property
    def description(self) -> str:
        return f"metrics.jsonl, Trackio: trackio show --project {self.config['tracking']['project']}"

    def _open(self) -> Any:
        import trackio

        return trackio.init(
            project=self.config["tracking"]["project"],
            name=f"{self.run.name}-{self.run.info()['id']}",
            group=group_of(self.run, self.config),
            config={**self.config, "run_info": about(self.run)},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def _log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._handle.log({name: value for name, value in numbers.items() if math.isfinite(value)}, step=step)

    def _samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        from pandas import DataFrame
        from trackio import Table

        self._handle.log({"samples": Table(dataframe=DataFrame(list(samples)).astype(str))}, step=step)

    def _close(self, status: str) -> None:
        import trackio

        trackio.finish()


MIRRORS: dict[str, type[Mirror]] = {mirror.package: mirror for mirror in (TensorBoard, Trackio)}


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
    mirror = MIRRORS.get(config["tracking"].get("tracker"))
    other = Wandb(run, config, say) if mirror is None else mirror(run, config, say, resumed_step)
    return Trackers(Files(run, resumed_step, say), other)
