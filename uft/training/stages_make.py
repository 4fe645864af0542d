"""Stages that make rows: completions that the model so far samples, and columns that other models write.

The rows are in the stage's folder once the stage is done: `rows.jsonl`, or `rows/SOURCE.jsonl` where several sources
were annotated. A stage that was stopped goes on: sampling by whole lines, annotation by what each model had said.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from uft.config.schema import Config, Model
from uft.config.stages import ROWS, Stage, made, maker
from uft.data.sources import load_sources
from uft.data.templates import Renderer
from uft.model.load import check_vocabulary, load_policy, load_tokenizer
from uft.parallel.ranks import ranks
from uft.runs import Run
from uft.sampling.negatives import Summary, generate_rows, summary_of
from uft.training.annotating import annotate
from uft.training.device import settle_threads
from uft.training.prepare import Say
from uft.training.signals import Stop
from uft.training.stages_ground import located

PART = ".rows.part.jsonl"


@dataclass(frozen=True)
class Place:
    """Where a stage stands: its run, the model so far, and who made that model."""

    run: Run
    stage: Stage
    model: Model
    made_by: str
    models: Callable[[str], Path]  # folder of the model that an earlier stage left
    device: torch.device
    stop: Stop
    say: Say

    @property
    def folder(self) -> Path:
        return self.run.path / self.stage.folder

    @property
    def config(self) -> Config:
        return replace(located(self.stage.config, self.run), model=self.model)


def generate(place: Place) -> dict[str, Any]:
    """Sample completions of the training prompts; what was made. Raises Interrupted when asked to stop."""
    config, out, part = place.config, place.folder / ROWS, place.folder / PART
    sources = [source for source in load_sources(config.data) if config.data.sources[source.name].share != 0]
    if out.is_file():  # it has its name: the last sitting ended right after that
        return _made(summary_of(out, sources, config.generate))
    tokenizer = load_tokenizer(config.model)
    policy = load_policy(config.model, place.device, config.seeds.init)
    settle_threads(config.hardware, policy)
    check_vocabulary(policy.module, tokenizer)
    summary = generate_rows(
        policy,
        tokenizer,
        Renderer(tokenizer, config.data.template),
        sources,
        config.generate,
        part,
        sampled_by=place.made_by,
        should_stop=place.stop.between_passes,
        progress=lambda done, of: place.say(f"{done} of {of} prompts"),
    )
    ranks().from_first(lambda: os.replace(part, out))
    return _made(summary)


def _made(summary: Summary) -> dict[str, Any]:
    return {"rows": summary.rows, "completions": summary.negatives, "empty": summary.empty, "repeats": summary.repeats}


def write_column(place: Place) -> dict[str, Any]:
    """Write the stage's rows with a column beside them; what was made. Raises Interrupted when asked to stop."""
    config = place.config
    drawn = [name for name, source in config.data.sources.items() if source.share != 0]
    written = ranks().from_first(
        lambda: annotate(
            config,
            column=str(config.annotate.column),
            models=[str(place.models(maker(path))) if made(path) else path for path in config.annotate.models],
            out=place.folder / (ROWS if len(drawn) == 1 else "rows"),
            device=place.device,
            should_stop=place.stop,
            say=place.say,
        )
    )
    return {
        "completions": sum(source.completions for source in written.values()),
        "without": sum(source.without for source in written.values()),
    }


MAKERS: dict[str, Callable[[Place], dict[str, Any]]] = {"generate": generate, "annotate": write_column}
