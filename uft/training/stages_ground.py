"""What a run of stages reads before the first of them begins: every mistake in any stage's data is told then.

All stages are measured alike: the battery's rows are what the sources of all stages hold out, each source once. Rows
that an earlier stage makes are read when their stage begins; they are never measured on, and those whose prompt is
held out are left out of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from uft.config.schema import Config, Data, Model
from uft.config.stages import Stage, made, rows_of
from uft.data.identity import content_digest
from uft.data.many import pick, prompt_words
from uft.data.rows import Row
from uft.data.sources import LoadedSource, load_sources
from uft.data.templates import Renderer
from uft.errors import Problem, UftError
from uft.evaluation.battery import HeldOut
from uft.model.load import load_tokenizer
from uft.objectives import make
from uft.runs import Run, write_json
from uft.training.corpus import Corpus, Plan, encode_held_out, make_feed, plan, read_corpus
from uft.training.prepare import Given, refuse_other_data
from uft.training.records import data_record


@dataclass
class Ground:
    """The data of all stages. A corpus is there from the start, or once the rows it is made of are."""

    run: Run
    tokenizer: PreTrainedTokenizerBase
    held_out: list[HeldOut] = field(default_factory=list)
    corpora: dict[str, Corpus] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)  # data.json of every stage that trains

    @property
    def steps(self) -> int:
        """Of all stages whose rows are there."""
        return sum(horizon.steps for horizon in self.plans.values())

    @property
    def digest(self) -> str:
        """Of the data of all stages that was there from the start."""
        told = {name: record["run_digest"] for name, record in self.records.items()}
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def read(self, stage: Stage) -> None:
        """The rows of a stage that trains. Raises UftError with everything that is wrong with them."""
        config = located(stage.config, self.run)
        loaded = load_sources(config.data)
        if config.data is not stage.config.data:
            loaded = [self._without_held_out(s) if made(stage.config.data.sources[s.name].path) else s for s in loaded]
        corpus = read_corpus(config, self.tokenizer, loaded)
        horizon = plan(config, corpus)
        feed = make_feed(config, corpus, make(config.objective))
        self.corpora[stage.name], self.plans[stage.name] = corpus, horizon
        self.records[stage.name] = data_record(corpus, feed, horizon)

    def keep(self, stage: Stage) -> None:
        """Write what a stage's data came to. Raises UftError where it came to something else before."""
        folder = Run(self.run.path / stage.folder)
        folder.path.mkdir(parents=True, exist_ok=True)
        refuse_other_data(folder, self.corpora[stage.name])
        write_json(folder.path / "data.json", self.records[stage.name])

    @property
    def seen(self) -> int:
        """Held-out rows whose prompt some stage trains on."""
        trained = np.unique(_words(source.rows for corpus in self.corpora.values() for source in corpus.train))
        return int(np.isin(_words(held.rows for held in self.held_out), trained).sum())

    def _without_held_out(self, source: LoadedSource) -> LoadedSource:
        apart = np.isin(prompt_words(source.rows), _words(held.rows for held in self.held_out))
        rows = pick(source.rows, np.flatnonzero(~apart).tolist())
        return replace(source, rows=rows, digest=content_digest(rows))


def _words(sides: Iterable[Sequence[Row]]) -> np.ndarray:
    """(rows of all sides,) uint64, see prompt_words."""
    return np.concatenate([np.empty(0, np.uint64), *map(prompt_words, sides)])


def survey(run: Run, config: Config, stages: Sequence[Stage]) -> Ground:
    """Read what is there of the data of all stages. Raises UftError with everything that is wrong with any of it."""
    ground = Ground(run, load_tokenizer(config.model))
    problems: dict[Problem, None] = {}
    footer = ""
    for stage in stages:
        try:
            if stage.do == "fit" and not waits(stage.config.data):
                ground.read(stage)
            _hold_out(ground, stage)
        except UftError as error:
            problems |= dict.fromkeys(error.problems)
            footer = error.footer
    if problems:
        raise UftError(*problems, footer=footer)
    ground.held_out.sort(key=lambda held: held.name)
    return ground


def waits(data: Data) -> bool:
    """Whether some of the rows are made by a stage."""
    return any(made(source.path) for source in data.sources.values())


def located(config: Config, run: Run) -> Config:
    """`config` with the files that earlier stages made in the place of their names."""
    if not waits(config.data):
        return config
    sources = {
        name: replace(source, path=str(rows_of(run.path, source.path, name)), holdout=0.0)
        if made(source.path)
        else source
        for name, source in config.data.sources.items()
    }
    return replace(config, data=replace(config.data, sources=sources))


def _hold_out(ground: Ground, stage: Stage) -> None:
    """Add what the sources of a stage hold out. One name means the same rows in all stages."""
    config = stage.config
    corpus = ground.corpora.get(stage.name)
    if corpus is None:
        there = {name: source for name, source in config.data.sources.items() if not made(source.path)}
        loaded = load_sources(replace(config.data, sources=there)) if there else []
        renderer = Renderer(ground.tokenizer, config.data.template)
        encoded = encode_held_out(config, renderer, {s.name: s.held_out for s in loaded})
    else:
        loaded, encoded = corpus.loaded, corpus.held_out
    checkers = {source.name: source.checker for source in loaded}
    known = {held.name: held for held in ground.held_out}
    for source in encoded:
        held = HeldOut(source.source, source.rows, source.encoded, checkers[source.source])
        if held.name not in known:
            ground.held_out.append(held)
        elif content_digest(known[held.name].rows) != content_digest(held.rows):
            why = f"holds out other rows in stage {stage.name} than in a stage before it"
            raise UftError(Problem(f"data.sources.{held.name}", why, advice=("give one of the two another name",)))


def handed(stage: Stage, run: Config, model: Model, ground: Ground) -> tuple[Config, Given]:
    """(configuration of a stage that starts from `model`, what its run hands it)."""
    initial, config = run.model, replace(stage.config, model=model)
    if stage.reference == "initial" and model.path != initial.path:
        config = replace(config, reference=replace(config.reference, path=initial.path))
    # by its path, so that it is the same in every stage, with and without an adapter
    yardstick = replace(run.reference, path=run.reference.path or initial.path, mode="auto")
    return config, Given(
        tokenizer=ground.tokenizer,
        corpus=ground.corpora[stage.name],
        reference=(initial if config.reference.path == initial.path else model, config.reference),
        yardstick=(initial, yardstick) if ground.held_out else None,
    )


def describe(stages: Sequence[Stage], ground: Ground) -> Iterator[tuple[str, str]]:
    """A line per stage, for cards."""
    for stage in stages:
        config, horizon = stage.config, ground.plans.get(stage.name)
        how = {
            "fit": f"objective={config.objective['name']} data={config.data.name}",
            "generate": f"data={config.data.name}, {len(config.generate.seeds)} for every prompt",
            "annotate": f"data={config.data.name} column={config.annotate.column}",
        }[stage.do]
        steps = f", {horizon.steps} steps of {config.train.batch_size} rows" if horizon else ""
        later = ", as many steps as its rows will give" if stage.do == "fit" and not horizon else ""
        yield f"{stage.number} {stage.name}", f"{stage.do}  {how}{steps}{later}"
