"""Jobs that leave no run behind: `check`, `data` and `generate`."""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from uft.config.schema import Config, Data, Model, Source
from uft.config.stages import ROWS, Stage, made, maker, stages_of
from uft.config.typed import adds
from uft.data.chat import Renderer, Tokens
from uft.data.formats import write_rows, written_here
from uft.data.report import coloured, length_histogram, merged_lengths, report_table
from uft.data.rows import Row
from uft.data.sources import LoadedSource, load_sources
from uft.data.table import kinds
from uft.distributed import ranks
from uft.errors import GOOD, Problem, UftError
from uft.heartbeat import activity
from uft.model.load import check_vocabulary, empty_policy, load_policy, load_tokenizer
from uft.model.memory import matrix_rate, peak_memory, shape_of, step_flops, used_memory
from uft.model.policy import DTYPES
from uft.model.reference import choose_mode
from uft.objectives import make
from uft.objectives.views import kind_table
from uft.runs import Run
from uft.sampling.annotate import ANNOTATORS, Bench, Recipe, annotate_rows, frozen
from uft.sampling.generate import Interrupted
from uft.sampling.negatives import Summary, generate_rows, summary_of
from uft.tracking.console import card, count
from uft.training.card import stage_card, stages_card, start_card
from uft.training.device import choose_device, oom_advice, settle_threads
from uft.training.liveness import Stop, listening
from uft.training.setup import (
    Prepared,
    Say,
    Stopped,
    TrainData,
    cache_dir,
    check_start,
    data_record,
    located,
    make_horizon,
    make_sampler,
    planned,
    prepare,
    read_pipeline_data,
    read_train_data,
    stage_inputs,
    waits,
)

ROWS_SHOWN = 3  # per source, with their trained tokens coloured
WIDE = 180


def console_for_tables() -> Console:
    """As wide as the terminal; wide enough for a table where there is none. One process's words are enough."""
    quiet = not ranks().is_rank0
    return Console(quiet=quiet) if sys.stdout.isatty() else Console(width=WIDE, quiet=quiet)


def check(config: Config) -> int:
    """Prepare as `train` does, in a folder that vanishes, and take the largest step there can be; train nothing."""
    console = console_for_tables()
    console.print(f"{paper_plan(config)}\n", highlight=False, soft_wrap=True)
    device = choose_device(config.hardware)
    before = used_memory(device)
    with tempfile.TemporaryDirectory(prefix="uft-check-") as folder, listening() as stop:
        run = Run(Path(folder))
        try:
            prepared = prepare(run, config, device, stop)
        except Stopped:
            console.print("stopped", highlight=False)
            return stop.exit_code
        data = data_record(prepared.corpus, prepared.trainer.sampler, prepared.plan)
        lines = [
            line for line in start_card(prepared, run, data, "nothing is tracked") if line[0] not in ("run", "output")
        ]
        console.print(card(lines), highlight=False, markup=False)
        check_start(prepared.trainer, prepared.reference)
        largest = largest_step(prepared, before)
    console.print(
        f"\n{largest}\nAll is well: the same request will train.  No run was made.",
        highlight=False,
    )
    return GOOD


def data(config: Config) -> int:
    """The mixture as it will be drawn, what the objective does with each kind, lengths, and rows as trained."""
    show_data(config, read_train_data(config, load_tokenizer(config.model)), console_for_tables())
    return GOOD


def show_data(config: Config, corpus: TrainData, console: Console) -> None:
    objective = make(config.objective)
    horizon = make_horizon(config, corpus)
    sampler = make_sampler(config, corpus, objective, refuse=False)
    report = data_record(corpus, sampler, horizon)
    drawn = f"{horizon.total_rows:,} rows drawn in {horizon.steps:,} steps"
    _print_table(console, f"data={config.data.name}: {drawn}", report_table(report))
    _print_table(console, "what the objective takes", kind_table({objective.name: objective}))
    console.print("[bold]tokens per completion with its prompt[/bold]")
    for line in length_histogram(merged_lengths([source.report for source in corpus.train])):
        console.print(f"  {line}", highlight=False)
    shown_by = "coloured" if console.is_terminal else "between « and »"
    console.print(f"\n[bold]rows as they are trained[/bold] (trained tokens {shown_by})")
    for source in corpus.train:
        for row, encoded in islice(zip(source.rows, source.encoded, strict=True), ROWS_SHOWN):
            _print_row(console, row, encoded, corpus.renderer)


def _print_table(console: Console, title: str, lines: list[list[str]]) -> None:
    header, *rows = lines
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


def _print_row(console: Console, row: Row, encoded: tuple[Tokens, ...], renderer: Renderer) -> None:
    console.print(f"\n  {row.id}  {row.kind.value}", style="dim", highlight=False)
    for one in encoded:
        marks = ("", "") if console.is_terminal else ("«", "»")
        console.print(coloured(one, renderer.tokenizer, marks), soft_wrap=True)


def generate(config: Config) -> int:
    """Sample completions of the training prompts and write them as rows."""
    console = console_for_tables()
    device = choose_device(config.hardware)
    sources = [source for source in load_sources(config.data) if config.data.sources[source.name].share != 0]
    tokenizer = load_tokenizer(config.model)
    renderer = Renderer(tokenizer, config.data.template)
    policy = load_policy(config.model, device, config.seeds.init)
    check_vocabulary(policy.module, tokenizer)
    out = Path(config.generate.out or "generated.jsonl")
    with listening() as stop:
        try:
            summary = generate_rows(
                policy,
                tokenizer,
                renderer,
                sources,
                config.generate,
                out,
                sampled_by=config.model.path,
                should_stop=stop,
                progress=lambda done, of: console.print(f"{done}/{of} prompts", highlight=False),
            )
        except Interrupted:
            console.print(f"stopped; what is done is in {out}. Run the same command to continue.", highlight=False)
            return stop.exit_code
    console.print(
        f"{summary.rows} rows with {summary.negatives} completions in {summary.path}"
        f" ({summary.empty} empty ones left out, {summary.repeats} equal to the row's own,"
        f" {summary.without_good} rows without a good completion left out)\n"
        f"train on them:  uft train objective=dft data=files +data.sources.negatives.path={summary.path}"
        f" model={config.model.name}",
        highlight=False,
        soft_wrap=True,
    )
    return GOOD


# --- `check` and `data` of a run of stages: each as far as it can be looked at before those before it have run.


NOT_THERE = "its rows are made by a stage before it, and are checked when they are there"


def check_stages(config: Config) -> int:
    """Prepare every stage as `train` does, in a folder that vanishes, and take its largest step; train nothing.

    Every stage is given the model that the run starts from: the ones that the stages leave are of the same shape.
    """
    console, device = console_for_tables(), choose_device(config.hardware)
    with tempfile.TemporaryDirectory(prefix="uft-check-") as folder, listening() as stop:
        run = Run(Path(folder))
        stages = stages_of(config)
        ground = read_pipeline_data(run, config, stages)
        lines = stages_card(run, config, stages, ground, "nothing is tracked")
        _say(console, card([line for line in lines if line[0] not in ("run", "output")]))
        try:
            for stage, title in _titled(stages):
                _say(console, f"\n{title}")
                if stage.name in ground.corpora:
                    own, given = stage_inputs(stage, config, config.model, ground)
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


def data_of_stages(config: Config) -> int:
    """The mixture of every stage as it will be drawn, and its rows as they are trained."""
    console = console_for_tables()
    stages = stages_of(config)
    ground = read_pipeline_data(Run(Path("no run")), config, stages)
    for stage, title in _titled(stages):
        console.print(f"[bold]{title}[/bold]\n", highlight=False)
        if stage.name in ground.corpora:
            show_data(stage.config, ground.corpora[stage.name], console)
        else:
            _say(console, f"  {_seen(stage)}")
        _say(console, "")
    return GOOD


JOBS: dict[str, Callable[[Config], int]] = {"check": check_stages, "data": data_of_stages}


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


# --- What a run will cost: memory and time, by its configuration alone, and against the largest step it can have.


GIGABYTE = 1e9
LOOKED_AT = 200_000
"""Draws among which the largest step is looked for, or as many as show every row: one may be longer when it comes again
with other completions, and a run may be endless."""


def paper_plan(config: Config) -> str:
    """Memory of each device in a line, before anything but the model's configuration was read."""
    objective, mode = make(config.objective), None
    if objective.needs.reference:
        visits = config.train.epochs if config.train.steps is None else math.inf
        mode = choose_mode(config.model, config.reference, visits, objective.needs.distributions)[0]
    parts = planned(config, shape_of(empty_policy(config.model)), mode)
    devices = config.hardware.processes * config.hardware.nodes
    where = f"each of {devices} devices" if devices > 1 else "one device"
    named = ", ".join(f"{part} {count(size)}B" for part, size in parts.items() if size)
    return f"plan: about {count(sum(parts.values()))}B on {where} ({named})"


@dataclass(frozen=True)
class Largest:
    """The largest step there can be, as it was taken."""

    tokens: int  # of all processes
    supervised: int
    forwarded: int  # tokens of the largest micro-batch of this one, padding counted
    seconds: float


@activity("the largest step was taken", moving=True)
def worst_step(prepared: Prepared) -> Largest:
    """Forward, backward and update on a whole batch of the longest rows the objective takes. The trainer is spoilt."""
    trainer = prepared.trainer
    cfg = trainer.config.train
    enough = max(trainer.sampler.mixture.first_pass, LOOKED_AT)
    draws = trainer.sampler.preview(min(prepared.plan.total_rows, enough))
    longest = trainer.sampler.longest(draws, cfg.batch_size)
    if not longest:
        return Largest(0, 0, 0, 0.0)

    batches = trainer.collator(longest)
    started = time.perf_counter()
    with oom_advice("the largest step", trainer.config, longest):
        step = trainer.update(batches)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    seconds = time.perf_counter() - started
    forwarded = max((b.input_ids.numel() for b in batches.batches), default=0)
    return Largest(step.tokens, step.supervised_tokens, forwarded, seconds)


def largest_step(prepared: Prepared, before: int | None = None) -> str:
    """The worst-case step, taken, in a line or more. `before`: bytes in use before the model was loaded, to compare
    with what was planned."""
    largest, trainer = worst_step(prepared), prepared.trainer
    peak = peak_memory(trainer.device)
    told = f"largest step: {largest.tokens:,} tokens in {largest.seconds:.1f} s; peak memory {peak / GIGABYTE:.2f} GB"
    if before is None or not largest.tokens:
        return told
    shape = shape_of(trainer.policy)
    mode = prepared.reference.mode if prepared.reference else None
    expected = sum(planned(trainer.config, shape, mode, largest.forwarded).values())
    memory = f"  the model took {count(peak - before)}B of it; planned for this step: {count(expected)}B"
    share = shape.trained / max(1, sum(p.numel() for p in trainer.policy.module.parameters()))
    work = step_flops(shape, largest.tokens, largest.supervised, trained_share=share)
    devices = trainer.config.hardware.processes * trainer.config.hardware.nodes
    rate = devices * matrix_rate(trainer.device, DTYPES[trainer.config.model.dtype])
    ideal = work / rate
    pace = f"  {count(work)}FLOP at {count(rate)}FLOP/s, as large matrices are multiplied here: {ideal:.1f} s at best"
    return "\n".join([told, memory, pace])


# --- The job `annotate`: the rows of a mixture with a further column, written as files that the reader takes back.
#
# `annotate` works from a typed configuration and says where it wrote; `reads` is the same mixture over those files.
# Both
# serve the verb as well as a stage of a pipeline.


SUFFIX = ".jsonl"
OUT = "annotated"


@dataclass(frozen=True)
class Written:
    """Where a source went."""

    rows: Path  # all of its rows, those that data.holdout sets apart among them
    evaluation: Path | None  # its evaluation rows, where they lie in a place of their own; without the column
    completions: int
    without: int  # completions that have no such number


@activity("rows were annotated", moving=True)
def annotate(
    config: Config,
    *,
    column: str,
    models: Sequence[str],
    out: Path,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Written]:
    """Write the rows of every source that is drawn from with `column` (see sampling.annotate.ANNOTATORS) beside them.

    `out`: a .jsonl file, if there is one source, else a folder with one file per source. Files appear by rename once
    all is known. Precision and kernels of `models` (paths as in model.path) are those of `config.model`, and
    `config.annotate` gives the temperature and the tokens per forward pass.
    Raises UftError about the data, the models or `out`, and Interrupted when told to stop, with what models said kept
    for the next time.
    """
    sources = [source for source in load_sources(config.data) if config.data.sources[source.name].share != 0]
    places = _places(out, sources)
    if problems := [*_mixed(sources), *_occupied(places, sources, config.data)]:
        raise UftError(*problems)
    bench = Bench(
        device=device,
        cache=cache_dir(config),
        batch_tokens=config.annotate.batch_tokens,
        too_long=config.data.too_long,
        should_stop=should_stop,
        say=say,
    )
    recipe = Recipe(bench, [frozen(config.model, path) for path in models], config.annotate.temperature)
    given = {source.name: _everything(source) for source in sources}
    made = iter(annotate_rows([row for rows in given.values() for row in rows], column, recipe))
    annotated = {name: tuple(islice(made, len(rows))) for name, rows in given.items()}
    if not any(column in c.annotations for rows in annotated.values() for row in rows for c in row.completions):
        raise UftError(Problem(f"annotate.column={column}", ANNOTATORS[column].absent))
    for source in sources:
        if source.apart:
            write_rows(_evaluation(places[source.name]), source.held_out)
        write_rows(places[source.name], annotated[source.name])
    return {s.name: _written(places[s.name], s.apart, annotated[s.name], column) for s in sources}


def reads(data: Data, written: Mapping[str, Written]) -> Data:
    """The same mixture over what was written: shares, checkers and held-out rows are as they were."""
    sources = {name: _reads(s, written[name]) if name in written else s for name, s in data.sources.items()}
    return replace(data, sources=sources)


def annotate_job(config: Config) -> int:
    """The verb: what `config.annotate` asks for, told as it goes."""
    asked, console = config.annotate, Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    if asked.column is None:
        advice = f"one of  {', '.join(ANNOTATORS)}"
        raise UftError(Problem("uft annotate", "which column is not said", advice=(f"uft annotate COLUMN, {advice}",)))
    with listening() as stop:
        try:
            written = annotate(
                config,
                column=asked.column,
                models=asked.models,
                out=Path(asked.out or OUT),
                device=choose_device(config.hardware),
                should_stop=stop,
                say=say,
            )
        except Interrupted:
            say("stopped; what the models said so far is kept. Run the same command to continue.")
            return stop.exit_code
    for name, one in written.items():
        number = f"{one.completions - one.without:,} of {one.completions:,} completions have {asked.column}"
        say(f"{name}: {number}; in {one.rows}")
    say(f"train on them:  {next_command(config.data, asked.column, written)}")
    return GOOD


def next_command(data: Data, column: str, written: Mapping[str, Written]) -> str:
    """How to train on what was written, by an objective that reads the column."""
    sources = [word for name, source in reads(data, written).sources.items() for word in adds(name, source)]
    return " ".join(["uft train", f"objective={ANNOTATORS[column].objective}", "data=files", *sources])


def _everything(source: LoadedSource) -> list[Row]:
    """The rows of a source's own place, as they stand there."""
    rows = source.rows if source.apart else (*source.rows, *source.held_out)
    return sorted(rows, key=lambda row: row.index)


def _written(place: Path, apart: bool, rows: Sequence[Row], column: str) -> Written:
    completions = [c for row in rows for c in row.completions]
    without = sum(column not in c.annotations for c in completions)
    return Written(place, _evaluation(place) if apart else None, len(completions), without)


def _reads(source: Source, written: Written) -> Source:
    apart = written.evaluation
    return Source(
        path=str(written.rows),
        kind=source.kind,
        share=source.share,
        holdout=source.holdout,
        eval_path=None if apart is None else str(apart),
        checker=source.checker,
    )


# --- where to write


def _places(out: Path, sources: Sequence[LoadedSource]) -> dict[str, Path]:
    """Source -> its file."""
    if out.suffix != SUFFIX:
        return {source.name: out / f"{source.name}{SUFFIX}" for source in sources}
    if len(sources) > 1:
        why = f"one file holds one source, and there are {len(sources)}: {', '.join(s.name for s in sources)}"
        raise UftError(Problem(f"annotate.out={out}", why, advice=(f"a folder:  annotate.out={out.with_suffix('')}",)))
    return {source.name: out for source in sources}


def _evaluation(place: Path) -> Path:
    """Beside, in a folder of its own, so that a folder of rows never holds evaluation rows too."""
    return place.parent / "eval" / place.name


def _mixed(sources: Sequence[LoadedSource]) -> list[Problem]:
    """Sources whose rows cannot stand in one file."""
    found = {s.name: {**kinds(s.rows), **({} if s.apart else kinds(s.held_out))} for s in sources}
    several = {name: sorted(kind.value for kind in of) for name, of in found.items() if len(of) > 1}
    return [
        Problem(
            f"data.sources.{name}",
            f"its rows are of several kinds ({', '.join(of)}), and one file holds one kind",
            advice=("make a source of each of its files",),
        )
        for name, of in several.items()
    ]


def _occupied(places: Mapping[str, Path], sources: Sequence[LoadedSource], data: Data) -> list[Problem]:
    """Files that must not be replaced: those the rows come from, and everything that this job did not write."""
    read = {Path(p).expanduser().resolve() for s in data.sources.values() for p in (s.path, s.eval_path) if p}
    files = [*places.values(), *(_evaluation(places[source.name]) for source in sources if source.apart)]
    return [Problem(f"annotate.out: {file}", why) for file in files if (why := _reason(file, read))]


def _reason(file: Path, read: Collection[Path]) -> str | None:
    """Why not to write there."""
    place = file.resolve()
    if place in read or place.parent in read:
        return "would stand among the rows it is made from"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and not written_here(place):
            return "was not written by uft annotate; it is left as it is"
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return None if os.access(place.parent, os.W_OK) else "cannot be written: no permission"


# --- Stages that make rows: completions that the model so far samples, and columns that other models write.
#
# The rows are in the stage's folder once the stage is done: `rows.jsonl`, or `rows/SOURCE.jsonl` where several
# sources
# were annotated. A stage that was stopped goes on: sampling by whole lines, annotation by what each model had said.


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


def generate_stage(place: Place) -> dict[str, Any]:
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
    ranks().on_rank0(lambda: os.replace(part, out))
    return _made(summary)


def _made(summary: Summary) -> dict[str, Any]:
    return {"rows": summary.rows, "completions": summary.negatives, "empty": summary.empty, "repeats": summary.repeats}


def write_column(place: Place) -> dict[str, Any]:
    """Write the stage's rows with a column beside them; what was made. Raises Interrupted when asked to stop."""
    config = place.config
    drawn = [name for name, source in config.data.sources.items() if source.share != 0]
    written = ranks().on_rank0(
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


MAKERS: dict[str, Callable[[Place], dict[str, Any]]] = {"generate": generate_stage, "annotate": write_column}
