"""`check` and `data` of a run of stages: each as far as it can be looked at before those before it have run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from uft.config.schema import Config
from uft.config.stages import Stage, stages_of
from uft.data.sources import load_sources
from uft.errors import GOOD
from uft.runs import Run
from uft.tracking.format import card
from uft.training.card import stage_card, stages_card
from uft.training.device import choose_device
from uft.training.jobs import console_for_tables, show_data
from uft.training.planning import largest_step
from uft.training.prepare import Stopped, check_start, prepare
from uft.training.signals import Stop, listening
from uft.training.stages_ground import handed, survey, waits

NOT_THERE = "its rows are made by a stage before it, and are checked when they are there"


def check(config: Config) -> int:
    """Prepare every stage as `train` does, in a folder that vanishes, and take its largest step; train nothing.

    Every stage is given the model that the run starts from: the ones that the stages leave are of the same shape.
    """
    console, device = console_for_tables(), choose_device(config.hardware)
    with tempfile.TemporaryDirectory(prefix="uft-check-") as folder, listening() as stop:
        run = Run(Path(folder))
        stages = stages_of(config)
        ground = survey(run, config, stages)
        lines = stages_card(run, config, stages, ground, "nothing is tracked")
        _say(console, card([line for line in lines if line[0] not in ("run", "output")]))
        try:
            for stage, title in _titled(stages):
                _say(console, f"\n{title}")
                if stage.name in ground.corpora:
                    own, given = handed(stage, config, config.model, ground)
                    prepared = prepare(run, own, device, stop, given=given)
                    _say(console, card(stage_card(prepared, ground.records[stage.name])))
                    check_start(prepared.trainer, prepared.reference)
                    _say(console, f"  {largest_step(prepared)}")
                    _pause(stop)
                else:
                    _say(console, f"  {_seen(stage)}")
        except Stopped:
            console.print("stopped", highlight=False)
            return stop.exit_code
    _say(console, "\nAll is well: the same request will train.  No run was made.")
    return GOOD


def data(config: Config) -> int:
    """The mixture of every stage as it will be drawn, and its rows as they are trained."""
    console = console_for_tables()
    stages = stages_of(config)
    ground = survey(Run(Path("no run")), config, stages)
    for stage, title in _titled(stages):
        console.print(f"[bold]{title}[/bold]\n", highlight=False)
        if stage.name in ground.corpora:
            show_data(stage.config, ground.corpora[stage.name], console)
        else:
            _say(console, f"  {_seen(stage)}")
        _say(console, "")
    return GOOD


JOBS: dict[str, Callable[[Config], int]] = {"check": check, "data": data}


def _titled(stages: list[Stage]) -> Iterator[tuple[Stage, str]]:
    for stage in stages:
        yield stage, f"stage {stage.number} of {len(stages)}: {stage.name} ({stage.do})"


def _seen(stage: Stage) -> str:
    """A stage of which there is nothing to show but its rows, if these."""
    if waits(stage.config.data):
        return NOT_THERE
    sources = load_sources(stage.config.data)
    return ", ".join(f"{s.name}: {len(s.rows):,} rows" for s in sources if stage.config.data.sources[s.name].share != 0)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _pause(stop: Stop) -> None:
    if stop():
        raise Stopped
