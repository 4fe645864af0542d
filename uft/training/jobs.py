"""Jobs that leave no run behind (check, data, generate, annotate), and the work of stages that make rows."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from uft.config.frozen import adds
from uft.config.schema import Config, Data, Source
from uft.config.stages import ROWS, stages_of
from uft.data.chat import Renderer
from uft.data.formats import is_rows_file, write_rows
from uft.data.report import (
    coloured,
    data_cautions,
    data_omissions,
    length_histogram,
    merged_lengths,
    report_table,
)
from uft.data.rows import Row, Turns
from uft.data.sources import LoadedSource, load_sources
from uft.data.table import kinds
from uft.distributed import ranks
from uft.errors import FAILED, GOOD, Problem, UftError
from uft.heartbeat import activity
from uft.model.load import check_vocabulary, empty_policy, load_policy, load_tokenizer
from uft.model.memory import matrix_rate, peak_memory, shape_of, step_flops, used_memory
from uft.model.policy import DTYPES, Policy
from uft.model.reference import choose_mode
from uft.objectives import make
from uft.objectives.views import kind_table
from uft.rewards import check as check_reply
from uft.rewards import spec_of
from uft.runs import Run, cache_root, shown
from uft.sampling.annotate import ANNOTATORS, Recipe, annotate_rows, frozen
from uft.sampling.answers import Answer, answer_prompts, read_prompts
from uft.sampling.generate import Interrupted
from uft.sampling.negatives import Summary, generate_rows, summary_of
from uft.sampling.rollouts import RolloutSampler, score_of, unjudged, weights_of
from uft.tracking.console import card, count, printable_lines
from uft.training.choosing import choose_rows
from uft.training.dataset import StageData, has_made_rows, keep_pandas_out, make_renderer, read_run_data
from uft.training.liveness import Stop, listening
from uft.training.measuring import measure
from uft.training.setup import (
    Prepared,
    Say,
    Stopped,
    check_start,
    choose_device,
    compared_with,
    pause,
    planned_memory,
    prepare_stage,
    settle_threads,
    stage_card,
    start_card,
)
from uft.training.trainer import oom_advice

ROWS_SHOWN = 3  # per source, with their trained tokens coloured
TABLE_WIDTH = 180  # without a terminal
PREVIEW_ROWS = 200_000
"""Draws among which the largest step is looked for, or as many as show every row: a run may be endless."""
GIGABYTE = 1e9
NOT_THERE = "its rows are made by a stage before it, and are checked when they are there"


def job_console() -> Console:
    """As wide as the terminal, or wide enough for a table; silent in all processes but the first."""
    quiet = not ranks().is_rank0
    return Console(quiet=quiet) if sys.stdout.isatty() else Console(width=TABLE_WIDTH, quiet=quiet)


def say_on(console: Console) -> Say:
    return lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)


def check(config: Config) -> int:
    """Prepare every stage as `train` does, in a folder that vanishes, and take its largest step; train nothing.

    Every stage starts from the run's first model here: the models that stages leave have the same shape.
    """
    console, stages = job_console(), stages_of(config)
    say = say_on(console)
    for stage in stages:
        if stage.do == "fit":
            say(f"{stage.name} {paper_plan(stage.config)}".lstrip())
    say("")
    device = choose_device(config.hardware)
    before = used_memory(device) if len(stages) == 1 else None
    with tempfile.TemporaryDirectory(prefix="uft-check-") as folder, listening() as stop:
        run = Run(Path(folder))
        try:
            data = read_run_data(run, config, stages)
            pause(stop)
            for stage in stages:
                prepared = None
                if stage.name in data.stages:
                    prepared = prepare_stage(
                        run, config, stage, stage.config.model, data, device, stop, lambda text: None
                    )
                if stage is stages[0]:
                    lines = stage_card(prepared) if prepared and not stage.name else ()
                    overview = start_card(run, config, stages, data, "nothing is tracked", lines)
                    say(card([line for line in overview if line[0] not in ("run", "output")]))
                if stage.name:
                    say(f"\nstage {stage.number} of {len(stages)}: {stage.name} ({stage.do})")
                    say(card(stage_card(prepared)) if prepared else f"  {rows_there(stage.config)}")
                if prepared:
                    check_start(prepared.trainer, prepared.reference)
                    say(f"\n{largest_step(prepared, before)}")
                    pause(stop)
        except Stopped:
            say("stopped")
            return stop.exit_code
    say("\nAll is well: the same request will train.  No run was made.")
    return GOOD


def show_data(config: Config) -> int:
    """Per stage: the mixture as it will be drawn, what the objective does with each kind, lengths, rows as trained."""
    console, stages = job_console(), stages_of(config)
    data = read_run_data(Run(Path("no run")), config, stages, refuse=False)
    for stage in stages:
        if stage.name:
            title = f"stage {stage.number} of {len(stages)}: {stage.name} ({stage.do})"
            console.print(f"[bold]{title}[/bold]\n", highlight=False)
        if stage.name in data.stages:
            show_stage_data(stage.config.data.name, data.stages[stage.name], console)
        else:
            say_on(console)(f"  {rows_there(stage.config)}")
        if stage is not stages[-1]:
            console.print()
    return GOOD


def show_stage_data(name: str, data: StageData, console: Console) -> None:
    drawn = f"{data.horizon.total_rows:,} rows drawn in {data.horizon.steps:,} steps"
    uses = kind_table({data.objective.name: data.objective})
    for title, lines in {f"data={name}: {drawn}": report_table(data.record), "what the objective takes": uses}.items():
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in lines[0]:
            table.add_column(column, overflow="fold")
        for cells in lines[1:]:
            table.add_row(*cells)
        console.print(table, "")
    told = [f"not read: {line}" for line in data_omissions(data.record["sources"])]
    told += [f"caution: {line}" for line in data_cautions(data.record)]
    for line in (*told, "") if told else ():
        console.print(line, markup=False, highlight=False)
    console.print("[bold]tokens per completion with its prompt[/bold]")
    for line in length_histogram(merged_lengths([source.report for source in data.dataset.train])):
        console.print(f"  {line}", highlight=False)
    shown_by, marks = ("coloured", ("", "")) if console.is_terminal else ("between « and »", ("«", "»"))
    console.print(f"\n[bold]rows as they are trained[/bold] (trained tokens {shown_by})")
    for source in data.dataset.train:
        for row, encoded in islice(zip(source.rows, source.encoded, strict=True), ROWS_SHOWN):
            console.print(f"\n  {row.id}  {row.kind.value}", style="dim", highlight=False)
            for one in encoded:
                console.print(coloured(one, data.dataset.renderer.tokenizer, marks), soft_wrap=True)


def rows_there(config: Config) -> str:
    """A line about the rows of a stage that does not train, or whose rows are not there yet."""
    if has_made_rows(config.data):
        return NOT_THERE
    return ", ".join(f"{source.name}: {len(source.rows):,} rows" for source in drawn_sources(config))


def drawn_sources(config: Config, say: Say = lambda line: None) -> list[LoadedSource]:
    """The sources with a share; `say` hears of what is not read of them."""
    keep_pandas_out()
    sources = [source for source in load_sources(config.data) if config.data.sources[source.name].share != 0]
    for line in data_omissions({source.name: source.omitted.record() for source in sources}):
        say(f"not read: {line}")
    return sources


# --- The cost of a run: memory by its configuration alone, and memory and time of the largest step that it can have.


def paper_plan(config: Config) -> str:
    """Expected memory of each device in a line, before anything but the model's configuration was read."""
    needs, mode, other = make(config.objective).needs, None, None
    if needs.reference:
        compared, key = compared_with(config, needs)
        visits = config.train.epochs if config.train.steps is None else math.inf
        mode = choose_mode(config.model, compared, visits, needs.distributions)[0]
        if compared.path is not None and mode == "copy":
            other = shape_of(empty_policy(config.model, compared.path, key))
    parts = planned_memory(config, shape_of(empty_policy(config.model)), mode, other=other)
    devices = config.hardware.processes * config.hardware.nodes
    where = f"each of {devices} devices" if devices > 1 else "one device"
    named = ", ".join(f"{part} {count(size)}B" for part, size in parts.items() if size)
    return f"plan: about {count(sum(parts.values()))}B on {where} ({named})"


@activity("the largest step was taken", moving=True)
def largest_step(prepared: Prepared, memory_before: int | None = None) -> str:
    """Take the largest step that there can be: forward, backward and update on a batch of the longest rows.

    Returns its cost in a line or more; the trainer is of no use afterwards. `memory_before`: bytes in use before the
    model was loaded, to compare with the planned memory.
    """
    trainer, config, device = prepared.trainer, prepared.trainer.config, prepared.trainer.device
    enough = min(prepared.data.horizon.total_rows, max(trainer.sampler.mixture.first_pass, PREVIEW_ROWS))
    longest = trainer.sampler.longest(trainer.sampler.preview(enough), config.train.batch_size)
    tokens, supervised, sampled = 0, 0, ""
    seconds = 0.0
    if trainer.rollouts:
        longest = trainer.rollouts.take(config.train.batch_size)
        sampled = rollout_cost(trainer.rollouts)
    if longest:
        batches = trainer.collator(longest)
        started = time.perf_counter()
        with oom_advice("the largest step", config, longest):
            step = trainer.update(batches)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        tokens, supervised = step.tokens, step.supervised_tokens
    peak = peak_memory(device)
    step_is = "a step on them" if trainer.rollouts else "largest step"
    line = f"{sampled}{step_is}: {tokens:,} tokens in {seconds:.1f} s; peak memory {peak / GIGABYTE:.2f} GB"
    if memory_before is None or not tokens:
        return line
    shape = shape_of(trainer.policy)
    padded = max((batch.input_ids.numel() for batch in batches.batches), default=0)
    expected = sum(prepared.planned(padded).values())
    memory = f"  the model took {count(peak - memory_before)}B of it; planned for this step: {count(expected)}B"
    share = shape.trained / max(1, sum(p.numel() for p in trainer.policy.module.parameters()))
    work = step_flops(shape, tokens, supervised, trained_share=share)
    rate = config.hardware.processes * config.hardware.nodes * matrix_rate(device, DTYPES[config.model.dtype])
    pace = f"  {count(work)}FLOP at {count(rate)}FLOP/s, as large matrices are multiplied here"
    return "\n".join([line, memory, f"{pace}: {work / rate:.1f} s at best"])


def rollout_cost(rollouts: RolloutSampler) -> str:
    """A line about the first rollout, and what it would take if every completion were as long as it may be."""
    lengths = [len(reply.log_probs) for group in rollouts.latest for reply in group.replies]
    seconds, most, mean = rollouts.seconds, rollouts.settings.max_new_tokens, sum(lengths) / max(1, len(lengths))
    line = f"rollouts: {len(lengths)} completions of {mean:.0f} tokens on average in {seconds:.1f} s"
    return f"{line}, up to {seconds * most / max(mean, 1):.1f} s if all had {most}\n"


# --- Sampling completions of the training prompts: the job `generate`, and stages that do it.


def generate(config: Config) -> int:
    """Sample completions of the training prompts and write them as rows, or answer `generate.prompts`."""
    say, device = say_on(job_console()), choose_device(config.hardware)
    if config.generate.prompts is not None:
        return answer(config, device, say)
    out = Path(config.generate.out or "generated.jsonl")
    with listening() as stop:
        try:
            progress = lambda done, of: say(f"{done}/{of} prompts")  # noqa: E731
            sources = drawn_sources(config, say)
            summary = sample_rows(config, sources, out, config.model.path, device, stop, progress)
        except Interrupted:
            say(f"stopped; what is done is in {out}. Run the same command to continue.")
            return stop.exit_code
    repeats = ", or equal to the row's own" if config.generate.repeats == "drop" else ""
    use = "objective=dpo data.unusable=drop" if config.generate.score else "objective=dft"
    say(
        f"{summary.rows} rows with {summary.negatives} completions in {summary.path}"
        f" ({summary.left_out} left out: without text, cut at generate.max_new_tokens before their end{repeats};"
        f" {summary.repeats} equal to the row's own,"
        f" {summary.without_good} rows without a good completion left out)"
    )
    for line in map(json.loads, first_lines(summary.path, ANSWERS_SHOWN)):
        say("\n" + shown_answer(said(line["prompt"]), line["negatives"]))
    say(
        f"\nyour own questions:  uft generate RUN 'a question'\n"
        f"train on them:  uft train {use} data=files +data.sources.negatives.path={summary.path}"
        f" model={config.model.name}"
    )
    return GOOD


def answer(config: Config, device: torch.device, say: Say) -> int:
    """Answer the prompts of `generate.prompts` and show the answers; the rows go to `generate.out`, if it is set."""
    settings = config.generate
    prompts = read_prompts(Path(str(settings.prompts)))[: settings.limit]
    out = Path(settings.out) if settings.out else None
    tokenizer, renderer, policy = sampler(config, device)

    def show(prompt: Turns, answers: Sequence[Answer]) -> None:
        cut = f"  (cut at generate.max_new_tokens={settings.max_new_tokens})"
        say(shown_answer(prompt[-1].content, [one.text + ("" if one.stopped else cut) for one in answers]) + "\n")

    with listening() as stop:
        try:
            answer_prompts(
                policy,
                tokenizer,
                renderer,
                prompts,
                settings,
                out,
                sampled_by=config.model.path,
                show=show,
                should_stop=stop.between_passes,
            )
        except Interrupted:
            say("stopped")
            return stop.exit_code
    if out:
        say(f"kept in {shown(out)}")
    return GOOD


ANSWERS_SHOWN = 2  # whole ones, of the prompts that completions were sampled for


def shown_answer(prompt: str, answers: Sequence[str]) -> str:
    """A prompt and the whole answers to it, which cannot move the cursor."""
    lines = ["> " + printable_lines(prompt).replace("\n", "\n> ")]
    return "\n".join([*lines, *("  " + printable_lines(text).replace("\n", "\n  ") for text in answers)])


def said(prompt: str | list[dict[str, Any]]) -> str:
    """The last turn of a prompt as rows hold it."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def first_lines(file: Path, count: int) -> list[str]:
    with open(file, encoding="utf-8") as handle:
        return list(islice(handle, count))


def generate_stage(
    config: Config, folder: Path, sampled_by: str, device: torch.device, stop: Stop, say: Say
) -> dict[str, Any]:
    """`rows.jsonl` in the stage's folder; counts of what was made. Goes on by whole lines after a stop.

    Raises Interrupted when asked to stop.
    """
    out, part, sources = folder / ROWS, folder / ".rows.part.jsonl", drawn_sources(config, say)
    if out.is_file():  # the last session ended right after the rename
        made = summary_of(out, sources, config.generate)
    else:
        progress = lambda done, of: say(f"{done} of {of} prompts")  # noqa: E731
        made = sample_rows(config, sources, part, sampled_by, device, stop, progress)
        if not made.rows:
            repeats = " or equal to the row's own" if config.generate.repeats == "drop" else ""
            why = f"all {made.left_out:,} samples are without text, cut before their end{repeats}: nothing to train on"
            raise UftError(Problem(f"generate.max_new_tokens={config.generate.max_new_tokens}", why), code=FAILED)
        ranks().on_rank0(lambda: os.replace(part, out))
    told = {"rows": made.rows, "completions": made.negatives, "left_out": made.left_out, "repeats": made.repeats}
    say("  ".join(f"{name}: {number:,}" for name, number in told.items()))
    return told


def sample_rows(
    config: Config,
    sources: Sequence[LoadedSource],
    out: Path,
    sampled_by: str,
    device: torch.device,
    stop: Stop,
    progress: Callable[[int, int], None],
) -> Summary:
    score = scorer(config, sources) if config.generate.score else None
    tokenizer, renderer, policy = sampler(config, device)
    return generate_rows(
        policy,
        tokenizer,
        renderer,
        sources,
        config.generate,
        out,
        sampled_by=sampled_by,
        score=score,
        should_stop=stop.between_passes,
        progress=progress,
    )


def sampler(config: Config, device: torch.device) -> tuple[PreTrainedTokenizerBase, Renderer, Policy]:
    """What samples from the model of a configuration."""
    tokenizer = load_tokenizer(config.model)
    renderer = make_renderer(tokenizer, config.data)
    policy = load_policy(config.model, device, config.seeds.init)
    settle_threads(config.hardware, policy)
    check_vocabulary(policy.module, tokenizer)
    return tokenizer, renderer, policy


def scorer(config: Config, sources: Sequence[LoadedSource]) -> Callable[[Row, str], float]:
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
    if problems:
        raise UftError(*problems, footer="Sample without a score:  generate.score=false")

    def score(row: Row, text: str) -> float:
        spec = specs[row.source]
        assert spec is not None
        return score_of(check_reply(spec, row, text), weights_of(config.rollout, spec))

    return score


# --- Writing a column beside the rows of a mixture: the job `annotate`, and stages that do it.


@dataclass(frozen=True)
class AnnotatedSource:
    """The files of a source that was annotated."""

    rows: Path  # all of its rows, those that data.holdout sets apart among them
    evaluation: Path | None  # its evaluation rows, where they lie in a place of their own; without the column
    completions: int
    without: int  # completions that have no such number


def annotate(config: Config) -> int:
    """Write the column that `config.annotate` asks for."""
    say, column = say_on(Console()), config.annotate.column
    if column is None:
        advice = f"uft annotate COLUMN, one of  {', '.join(ANNOTATORS)}"
        raise UftError(Problem("uft annotate", "which column is not said", advice=(advice,)))
    out, device = Path(config.annotate.out or "annotated"), choose_device(config.hardware)
    with listening() as stop:
        try:
            written = write_column(config, out, device, stop, say)
        except Interrupted:
            say("stopped; what the models said so far is kept. Run the same command to continue.")
            return stop.exit_code
    for name, one in written.items():
        number = f"{one.completions - one.without:,} of {one.completions:,} completions have {column}"
        say(f"{name}: {number}; in {one.rows}")
    say(f"train on them:  {train_command(config.data, column, written)}")
    return GOOD


def annotate_stage(
    config: Config, folder: Path, sampled_by: str, device: torch.device, stop: Stop, say: Say
) -> dict[str, Any]:
    """`rows.jsonl` in the stage's folder, or `rows/SOURCE.jsonl` of several sources; counts of what was made.

    Raises Interrupted when asked to stop, with the models' numbers kept for the next session.
    """
    several = sum(source.share != 0 for source in config.data.sources.values()) > 1
    out = folder / ("rows" if several else ROWS)
    written = ranks().on_rank0(lambda: write_column(config, out, device, stop, say)).values()
    return {"completions": sum(one.completions for one in written), "without": sum(one.without for one in written)}


@activity("rows were annotated", moving=True)
def write_column(
    config: Config,
    out: Path,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
    say: Say = lambda line: None,
) -> dict[str, AnnotatedSource]:
    """Write the rows of every source that is drawn from with `config.annotate.column` (see ANNOTATORS) beside them.

    `out`: a .jsonl file, if there is one source, else a folder with one file per source. Files appear by rename once
    all is known. Precision and kernels of the models that are asked are those of `config.model`.
    Raises UftError about the data, the models or `out`, and Interrupted when told to stop, with the models' numbers
    kept for the next time.
    """
    column, sources = str(config.annotate.column), drawn_sources(config, say)
    files = {source.name: out if out.suffix == ".jsonl" else out / f"{source.name}.jsonl" for source in sources}
    if len(set(files.values())) < len(sources):
        why = f"one file holds one source, and there are {len(sources)}: {', '.join(files)}"
        raise UftError(Problem(f"annotate.out={out}", why, advice=(f"a folder:  annotate.out={out.with_suffix('')}",)))
    # in a folder of its own, so that a folder of rows never holds evaluation rows too
    apart = {source.name: files[source.name].parent / "eval" / files[source.name].name for source in sources}
    written_to = [*files.values(), *(apart[source.name] for source in sources if source.apart)]
    check_files(sources, written_to, config.data, "annotate")
    recipe = Recipe(
        device=device,
        cache=cache_root(config.data.cache),
        models=[frozen(config.model, path) for path in config.annotate.models],
        temperature=config.annotate.temperature,
        batch_tokens=config.annotate.batch_tokens,
        too_long=config.data.too_long,
        should_stop=should_stop,
        say=say,
    )
    given = {source.name: own_rows(source) for source in sources}
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


def own_rows(source: LoadedSource) -> list[Row]:
    """The rows of a source's own place in their order there, those that data.holdout sets apart among them."""
    rows = source.rows if source.apart else (*source.rows, *source.held_out)
    return sorted(rows, key=lambda row: row.index)


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
    for file in files:
        place, why = file.resolve(), ""
        if place in read or place.parent in read:
            why = "would stand among the rows it is made from"
        else:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                if place.exists() and not is_rows_file(place):
                    why = f"was not written by uft {job}; it is left as it is"
                elif not os.access(place.parent, os.W_OK):
                    why = "cannot be written: no permission"
            except OSError as error:
                why = f"cannot be written: {error.strerror}"
        if why:
            problems.append(Problem(f"{job}.out: {file}", why))
    if problems:
        raise UftError(*problems)


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
    sources = [word for name, s in annotated_data(data, written).sources.items() for word in adds(name, s)]
    return " ".join(["uft train", f"objective={ANNOTATORS[column].objective}", "data=files", *sources])


# --- Choosing rows of a mixture: the job `select`, and stages that do it.


def select(config: Config) -> int:
    """Write the rows that `config.select` chooses."""
    say, device, out = say_on(Console()), choose_device(config.hardware), Path(config.select.out or "selected")
    with listening() as stop:
        try:
            told = select_stage(config, out, "", device, stop, say)
        except Interrupted:
            say("stopped; nothing was written.")
            return stop.exit_code
    say(f"{told['rows']:,} of {told['candidates']:,} candidates are kept; rows and scores.jsonl in {out}")
    return GOOD


def select_stage(
    config: Config, folder: Path, sampled_by: str, device: torch.device, stop: Stop, say: Say
) -> dict[str, Any]:
    """`rows.jsonl` in the stage's folder, or `rows/SOURCE.jsonl` of several sources; counts of what was chosen.

    Raises Interrupted when asked to stop; the next session begins again.
    """
    sources = drawn_sources(config, say)
    files = {source.name: folder / "rows" / f"{source.name}.jsonl" for source in sources}
    files = files if len(files) > 1 else dict.fromkeys(files, folder / ROWS)
    check_files(sources, list(files.values()), config.data, "select")
    chosen = ranks().on_rank0(lambda: choose_rows(config, sources, folder, device, stop, say))
    for name, file in files.items() if ranks().is_rank0 else ():
        write_rows(file, chosen.rows_of(name))
    ranks().barrier()
    return {"rows": len(chosen.rows), **chosen.counts}


JOBS: dict[str, Callable[[Config], int]] = {
    "check": check,
    "data": show_data,
    "generate": generate,
    "annotate": annotate,
    "select": select,
    "eval": measure,
}

ROW_STAGES: dict[str, Callable[[Config, Path, str, torch.device, Stop, Say], dict[str, Any]]] = {
    "generate": generate_stage,
    "annotate": annotate_stage,
    "select": select_stage,
}
