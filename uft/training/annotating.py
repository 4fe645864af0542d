"""The job `annotate`: the rows of a mixture with a further column, written as files that the reader takes back.

`annotate` works from a typed configuration and says where it wrote; `reads` is the same mixture over those files. Both
serve the verb as well as a stage of a pipeline.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console

from uft.alive import doing
from uft.config.frozen import adds
from uft.config.schema import Config, Data, Source
from uft.data.many import kinds
from uft.data.rows import Row
from uft.data.sources import LoadedSource, load_sources
from uft.data.writing import write_rows, written_here
from uft.errors import GOOD, Problem, UftError
from uft.sampling.annotate import ANNOTATORS, Recipe, annotate_rows
from uft.sampling.generate import Interrupted
from uft.sampling.likelihood import Bench, frozen
from uft.training.corpus import cache_dir
from uft.training.device import choose_device
from uft.training.signals import listening

SUFFIX = ".jsonl"
OUT = "annotated"


@dataclass(frozen=True)
class Written:
    """Where a source went."""

    rows: Path  # all of its rows, those that data.holdout sets apart among them
    evaluation: Path | None  # its evaluation rows, where they lie in a place of their own; without the column
    completions: int
    without: int  # completions that have no such number


@doing("rows were annotated", moving=True)
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


def job(config: Config) -> int:
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
