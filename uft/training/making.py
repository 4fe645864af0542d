"""Rows that a model makes or chooses: sampled completions, a column beside the rows, a selection of them.

Each is a job (`uft generate`, `uft annotate`, `uft select`) and the work of a stage.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from uft.config.frozen import source_overrides
from uft.config.messages import as_typed, config_dirs, groups
from uft.config.schema import Config, Data, Source
from uft.config.stages import ROWS
from uft.data.chat import Renderer
from uft.data.records import is_rows_file, write_rows
from uft.data.report import data_omissions
from uft.data.rows import Row, Turns
from uft.data.sources import LoadedSource, load_sources
from uft.data.table import keep_pandas_out, kinds
from uft.distributed import ranks
from uft.errors import FAILED, GOOD, Problem, UftError, raise_problems
from uft.heartbeat import activity
from uft.model.load import load_tokenizer
from uft.model.policy import Policy
from uft.rewards import judge, spec_of
from uft.runs import Run, cache_root, shown, typed_path
from uft.sampling.annotate import ANNOTATORS, Recipe, annotate_rows, frozen_settings
from uft.sampling.answers import Answer, answer_prompts, read_prompts
from uft.sampling.generate import Interrupted
from uft.sampling.negatives import Summary, generate_rows, summary_of
from uft.sampling.rollouts import score_of, unjudged, weights_of
from uft.tracking.console import printable_lines, table_console
from uft.training.choosing import choose_rows
from uft.training.dataset import make_renderer
from uft.training.liveness import listening
from uft.training.setup import Say, Stopped, Work, choose_device, loaded_policy

log = logging.getLogger(__name__)


def job_console() -> Console:
    """Silent in all processes but the first."""
    return table_console(quiet=not ranks().is_rank0)


def say_on(console: Console) -> Say:
    return lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)


def job(work_on: Callable[[Work], None]) -> Callable[[Config], int]:
    """The job that `work_on` does, which a signal ends at a safe point; it returns the exit code."""

    @wraps(work_on)
    def run(config: Config) -> int:
        say, device = say_on(job_console()), choose_device(config.hardware)
        with listening() as stop:
            work = Work(config, device, stop, say)
            try:
                work_on(work)
            except (Stopped, Interrupted):
                say(work.stopped)
                return stop.exit_code
        return GOOD

    return run


def drawn_sources(config: Config, say: Say = lambda line: None) -> list[LoadedSource]:
    """The sources with a share; `say` hears of what is not read of them."""
    keep_pandas_out()
    sources = [source for source in load_sources(config.data) if config.data.sources[source.name].share != 0]
    for line in data_omissions({source.name: source.omitted.record() for source in sources}):
        say(f"not read: {line}")
    return sources


# --- Sampling completions of the training prompts: the job `generate`, and stages that do it.


@job
def generate(work: Work) -> None:
    """Sample completions of the training prompts and write them as rows, or answer `generate.prompts`."""
    config, say = work.config, work.say
    if config.generate.prompts is not None:
        answer(work)
        return
    out = Path(config.generate.out or "generated.jsonl")
    work.stopped = f"stopped; what is done is in {out}. Run the same command to continue."
    summary = sample_rows(work, drawn_sources(config, say), out, config.model.path)
    repeats = ", or equal to the row's own" if config.generate.repeats == "drop" else ""
    with open(summary.path, encoding="utf-8") as handle:
        shown = [json.loads(line) for line in islice(handle, ANSWERS_SHOWN)]
    use = "objective=dpo data.unusable=drop" if config.generate.score else "objective=dft"
    use = "objective=sft" if shown and "negatives" not in shown[0] else use  # prompts got their replies
    say(
        f"{summary.rows} rows with {summary.negatives} completions in {summary.path}"
        f" ({summary.left_out} left out: without text, cut at generate.max_new_tokens before their end{repeats};"
        f" {summary.repeats} equal to the row's own,"
        f" {summary.without_good} rows without a good completion left out)"
    )
    for line in shown:
        prompt = line["prompt"] if isinstance(line["prompt"], str) else str(line["prompt"][-1]["content"])
        say("\n" + shown_answer(prompt, line.get("negatives") or [line["response"]]))
    say("\nyour own questions:  uft generate RUN 'a question'")
    path, name = typed_path(Path(config.model.path)), config.model.name  # an option, or the name of a folder
    known = name != "custom" and name in groups(config_dirs()).get("model", {})
    model = f"model={name}" if known else f"model.path={path}"
    if summary.rows:
        say(f"train on them:  uft train {use} data={typed_path(summary.path)} {model}")
    else:
        say(f"longer ones, if they were cut:  generate.max_new_tokens={4 * config.generate.max_new_tokens}")


def answer(work: Work) -> None:
    """Answer the prompts of `generate.prompts` and show the answers; the rows go to `generate.out`, if it is set."""
    config, settings = work.config, work.config.generate
    prompts = read_prompts(Path(str(settings.prompts)))[: settings.limit]
    out = Path(settings.out) if settings.out else None
    renderer, policy = load_sampler(config, work.device)

    def show(prompt: Turns, answers: Sequence[Answer]) -> None:
        work.say(shown_answer(prompt[-1].content, [one.told(settings) for one in answers]) + "\n")

    answer_prompts(
        policy,
        renderer,
        prompts,
        settings,
        out,
        sampled_by=config.model.path,
        show=show,
        should_stop=work.stop.between_passes,
    )
    if out:
        work.say(f"kept in {shown(out)}")


ANSWERS_SHOWN = 2  # whole ones, of the prompts that completions were sampled for


def shown_answer(prompt: str, answers: Sequence[str]) -> str:
    """A prompt and the whole answers to it, which cannot move the cursor."""
    lines = ["> " + printable_lines(prompt).replace("\n", "\n> ")]
    return "\n".join([*lines, *("  " + printable_lines(text).replace("\n", "\n  ") for text in answers)])


def generate_stage(work: Work, folder: Path, sampled_by: str) -> dict[str, Any]:
    """`rows.jsonl` in the stage's folder; counts of what was made. Goes on by whole lines after a stop.

    Raises Interrupted when asked to stop.
    """
    config = work.config
    out, part, sources = folder / ROWS, folder / ".rows.part.jsonl", drawn_sources(config, work.say)
    if out.is_file():  # the last session ended right after the rename
        made = summary_of(out, sources, config.generate)
    else:
        made = sample_rows(work, sources, part, sampled_by)
        if not made.rows:
            repeats = " or equal to the row's own" if config.generate.repeats == "drop" else ""
            why = f"all {made.left_out:,} samples are without text, cut before their end{repeats}: nothing to train on"
            raise UftError(Problem(f"generate.max_new_tokens={config.generate.max_new_tokens}", why), code=FAILED)
        ranks().on_rank0(lambda: os.replace(part, out))
    made_of = {"rows": made.rows, "completions": made.negatives, "left_out": made.left_out, "repeats": made.repeats}
    work.say("  ".join(f"{name}: {number:,}" for name, number in made_of.items()))
    return made_of


def sample_rows(work: Work, sources: Sequence[LoadedSource], out: Path, sampled_by: str) -> Summary:
    """Append samples of the rows to `out`. Raises Interrupted when asked to stop, and what `generate_rows` raises."""
    config = work.config
    score = make_scorer(config, sources) if config.generate.score else None
    renderer, policy = load_sampler(config, work.device)
    return generate_rows(
        policy,
        renderer,
        sources,
        config.generate,
        out,
        sampled_by=sampled_by,
        score=score,
        should_stop=work.stop.between_passes,
        progress=lambda done, of: work.say(f"{done} of {of} prompts"),
    )


def load_sampler(config: Config, device: torch.device) -> tuple[Renderer, Policy]:
    """The renderer and the policy of a configuration, to sample with."""
    tokenizer = load_tokenizer(config.model)
    renderer = make_renderer(tokenizer, config.data)
    within = any(Run(place).exists for place in Path(config.model.path).resolve().parents)
    renderer.learned = within and not config.rollout.completions
    return renderer, loaded_policy(config, device, tokenizer)


def make_scorer(config: Config, sources: Sequence[LoadedSource]) -> Callable[[Row, str], float]:
    """The score of a reply to a row, as of a rollout: `rollout.reward` of its source's checker. UftError about sources
    without one, and rows whose replies it cannot judge."""
    specs = {source.name: spec_of(config.reward, source.checker) for source in sources}
    problems = []
    for source in sources:
        key, spec = f"data.sources.{source.name}", specs[source.name]
        if spec is None:
            problems.append(Problem(f"{key}.checker", "is not set, and generate.score asks it"))
        else:
            problems += unjudged(key, source.rows, spec, weights_of(config.rollout, spec))
    raise_problems(problems, footer="Sample without a score:  generate.score=false")

    reported: set[str] = set()

    def score(row: Row, text: str) -> float:
        spec = specs[row.source]
        assert spec is not None
        (verdict,) = judge([(spec, row, text)])
        if verdict.reason and verdict.reason not in reported:
            log.warning("%s: samples that cannot be judged are scored 0: %s", row.source, verdict.reason)
            reported.add(verdict.reason)
        return score_of(verdict.figures, weights_of(config.rollout, spec))

    return score


# --- Writing a column beside the rows of a mixture: the job `annotate`, and stages that do it.


@dataclass(frozen=True)
class AnnotatedSource:
    """The files of a source that was annotated."""

    rows: Path  # all of its rows, those that data.holdout sets apart among them
    evaluation: Path | None  # its evaluation rows, where they lie in a place of their own; without the column
    completions: int
    without: int  # completions that have no such number


@job
def annotate(work: Work) -> None:
    """Write the column that `config.annotate` asks for."""
    config, say, column = work.config, work.say, work.config.annotate.column
    if column is None:
        advice = f"uft annotate COLUMN, one of  {', '.join(ANNOTATORS)}"
        raise UftError(Problem("uft annotate", "which column is not said", advice=(advice,)))
    work.stopped = "stopped; what the models said so far is kept. Run the same command to continue."
    written = write_column(work, Path(config.annotate.out or "annotated"))
    for name, one in written.items():
        number = f"{one.completions - one.without:,} of {one.completions:,} completions have {column}"
        say(f"{name}: {number}; in {one.rows}")
    say(f"train on them:  {train_command(config.data, column, written)}")


def annotate_stage(work: Work, folder: Path, sampled_by: str) -> dict[str, Any]:
    """`rows.jsonl` in the stage's folder, or `rows/SOURCE.jsonl` of several sources; counts of what was made.

    Raises Interrupted when asked to stop, with the models' numbers kept for the next session.
    """
    several = sum(source.share != 0 for source in work.config.data.sources.values()) > 1
    out = folder / ("rows" if several else ROWS)
    written = ranks().on_rank0(lambda: write_column(work, out)).values()
    return {"completions": sum(one.completions for one in written), "without": sum(one.without for one in written)}


@activity("rows were annotated", moving=True)
def write_column(work: Work, out: Path) -> dict[str, AnnotatedSource]:
    """Write the rows of every source that is drawn from with `annotate.column` (see ANNOTATORS) beside them.

    `out`: a .jsonl file, if there is one source, else a folder with one file per source. Files appear by rename once
    all is known. Precision and kernels of the models that are asked are those of `config.model`.
    Raises UftError about the data, the models or `out`, and Interrupted when told to stop, with the models' numbers
    kept for the next time.
    """
    config, column = work.config, str(work.config.annotate.column)
    sources = drawn_sources(config, work.say)
    files = {source.name: out if out.suffix == ".jsonl" else out / f"{source.name}.jsonl" for source in sources}
    if len(set(files.values())) < len(sources):
        why = f"one file holds one source, and there are {len(sources)}: {', '.join(files)}"
        raise UftError(Problem(f"annotate.out={out}", why, advice=(f"a folder:  annotate.out={out.with_suffix('')}",)))
    # in a folder of its own, so that a folder of rows never holds evaluation rows too
    apart = {source.name: files[source.name].parent / "eval" / files[source.name].name for source in sources}
    written_to = [*files.values(), *(apart[source.name] for source in sources if source.apart)]
    check_files(sources, written_to, config.data, "annotate")
    recipe = Recipe(
        device=work.device,
        cache=cache_root(config.data.cache),
        models=[frozen_settings(config.model, path) for path in config.annotate.models],
        temperature=config.annotate.temperature,
        batch_tokens=config.annotate.batch_tokens,
        too_long=config.data.too_long,
        should_stop=work.stop,
        say=work.say,
    )
    given = {}
    for source in sources:  # rows that data.holdout sets apart stay in their order in the file
        rows = source.rows if source.apart else (*source.rows, *source.held_out)
        given[source.name] = sorted(rows, key=lambda row: row.index)
    made = iter(annotate_rows([row for rows in given.values() for row in rows], column, recipe))
    annotated = {name: tuple(islice(made, len(rows))) for name, rows in given.items()}
    if not any(column in c.annotations for rows in annotated.values() for row in rows for c in row.completions):
        raise UftError(Problem(f"annotate.column={column}", ANNOTATORS[column].absent))
    written = {}
    for source in sources:
        name, rows = source.name, annotated[source.name]
        if source.apart:
            write_rows(apart[name], source.held_out)
        write_rows(files[name], rows)
        completions = [completion for row in rows for completion in row.completions]
        without = sum(column not in completion.annotations for completion in completions)
        written[name] = AnnotatedSource(files[name], apart[name] if source.apart else None, len(completions), without)
    return written


def check_files(sources: Sequence[LoadedSource], files: Sequence[Path], data: Data, job: str) -> None:
    """UftError about sources whose rows cannot stand in one file, and files that must not be replaced: those that the
    rows come from, and all that this job did not write."""
    problems = []
    for source in sources:
        sides = (source.rows,) if source.apart else (source.rows, source.held_out)
        found = sorted({kind.value for rows in sides for kind in kinds(rows)})
        if len(found) > 1:
            why = f"its rows are of several kinds ({', '.join(found)}), and one file holds one kind"
            advice = ("make a source of each of its files",)
            problems.append(Problem(f"data.sources.{source.name}", why, advice=advice))
    read = {Path(p).expanduser().resolve() for s in data.sources.values() for p in (s.path, s.eval_path) if p}
    problems += [Problem(f"{job}.out: {file}", why) for file in files if (why := unusable_file(file, read, job))]
    raise_problems(problems)


def unusable_file(file: Path, read: Collection[Path], job: str) -> str:
    """Why a job cannot write its rows to `file`, whose folder is made; "" where it can. `read`: the rows it reads."""
    place = file.resolve()
    if place in read or place.parent in read:
        return "would stand among the rows it is made from"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and not is_rows_file(place):
            return f"was not written by uft {job}; it is left as it is"
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return "" if os.access(place.parent, os.W_OK) else "cannot be written: no permission"


def annotated_data(data: Data, written: Mapping[str, AnnotatedSource]) -> Data:
    """The same mixture over the annotated files: shares, checkers and held-out rows are as they were."""
    sources = dict(data.sources)
    for name, one in written.items():
        source = sources[name]
        sources[name] = Source(
            path=str(one.rows),
            kind=source.kind,
            share=source.share,
            holdout=source.holdout,
            eval_path=None if one.evaluation is None else str(one.evaluation),
            checker=source.checker,
        )
    return replace(data, sources=sources)


def train_command(data: Data, column: str, written: Mapping[str, AnnotatedSource]) -> str:
    """The command that trains on the annotated files, by an objective that reads the column."""
    sources = [word for name, s in annotated_data(data, written).sources.items() for word in source_overrides(name, s)]
    return " ".join(["uft train", f"objective={ANNOTATORS[column].objective}", *as_typed(["data=files", *sources])])


# --- Choosing rows of a mixture: the job `select`, and stages that do it.


@job
def select(work: Work) -> None:
    """Write the rows that `config.select` chooses."""
    out, work.stopped = Path(work.config.select.out or "selected"), "stopped; nothing was written."
    counts = select_stage(work, out, "")
    work.say(f"{counts['rows']:,} of {counts['candidates']:,} candidates are kept; rows and scores.jsonl in {out}")
    work.say(f"train on them:  uft train data={typed_path(out / 'rows.jsonl')}")


def select_stage(work: Work, folder: Path, sampled_by: str) -> dict[str, Any]:
    """`rows.jsonl` in the stage's folder, or `rows/SOURCE.jsonl` of several sources; counts of what was chosen.

    Raises Interrupted when asked to stop; the next session begins again.
    """
    sources = drawn_sources(work.config, work.say)
    files = {source.name: folder / "rows" / f"{source.name}.jsonl" for source in sources}
    files = files if len(files) > 1 else dict.fromkeys(files, folder / ROWS)
    check_files(sources, list(files.values()), work.config.data, "select")
    chosen, counts = ranks().on_rank0(lambda: choose_rows(work, sources, folder))
    for name, file in files.items() if ranks().is_rank0 else ():
        write_rows(file, [row for row in chosen if row.source == name])
    ranks().barrier()
    return {"rows": len(chosen), **counts}


ROW_STAGES: dict[str, Callable[[Work, Path, str], dict[str, Any]]] = {
    "generate": generate_stage,
    "annotate": annotate_stage,
    "select": select_stage,
}
