"""Jobs that leave no run behind and make no rows: check and data; the table of all jobs."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from uft.config.schema import Config
from uft.config.stages import stages_of
from uft.data.report import coloured, data_cautions, data_omissions, length_histogram, merged_lengths, report_table
from uft.data.rows import Kind
from uft.errors import GOOD, UftError
from uft.heartbeat import activity
from uft.model.load import at_path, empty_policy
from uft.model.memory import estimate, matrix_rate, peak_memory, shape_of, step_flops, used_memory
from uft.model.policy import DTYPES
from uft.model.precision import resolve_dtype
from uft.model.reference import choose_mode
from uft.objectives import make
from uft.objectives.views import kind_table, uses_of
from uft.runs import Run
from uft.tracking.console import card, count
from uft.training.card import stage_card, start_card
from uft.training.dataset import StageData, has_made_rows, make_sampler, read_run_data
from uft.training.making import annotate, drawn_sources, generate, job, job_console, say_on, select
from uft.training.measuring import measure
from uft.training.setup import Prepared, Work, check_start, pause, prepare_stage, reference_settings
from uft.training.trainer import oom_advice, tokens_per_pass

ROWS_SHOWN = 3  # per source, with their trained tokens coloured
PREVIEW_ROWS = 200_000
"""Draws among which the largest step is looked for, or as many as show every row: a run may be endless."""
GIGABYTE = 1e9
NOT_THERE = "its rows are made by a stage before it, and are checked when they are there"


@job
def check(work: Work) -> None:
    """Prepare every stage as `train` does, in a folder that vanishes, and take its largest step; train nothing.

    Every stage starts from the run's first model here: the models that stages leave have the same shape.
    """
    config, say, stages = work.config, work.say, stages_of(work.config)
    for stage in stages:
        if stage.do == "fit":
            say(f"{stage.name} {paper_plan(stage.config, work.device)}".lstrip())
    say("")
    before = used_memory(work.device) if len(stages) == 1 else None
    with tempfile.TemporaryDirectory(prefix="uft-check-") as folder:
        run = Run(Path(folder))
        data = read_run_data(run, config, stages)
        pause(work.stop)
        for stage in stages:
            prepared = None
            if stage.name in data.stages:
                prepared = prepare_stage(replace(work, say=lambda text: None), stage, stage.config.model, data)
            if stage is stages[0]:
                lines = stage_card(prepared) if prepared and not stage.name else ()
                overview = start_card(run, config, stages, data, "nothing is tracked", lines)
                say(card([line for line in overview if line[0] not in ("run", "output")]))
            if stage.name:
                say(f"\nstage {stage.number} of {len(stages)}: {stage.name} ({stage.do})")
                own = [line for line in stage_card(prepared) if line[0] != "evaluation"] if prepared else []
                say(card(own) if prepared else f"  {rows_there(stage.config)}")
            if prepared:
                check_start(prepared.trainer, prepared.reference)
                say(f"\n{largest_step(prepared, before)}")
                pause(work.stop)
    say("\nAll is well: the same request will train.  No run was made.")


def show_data(config: Config) -> int:
    """Per stage: the mixture as it will be drawn, what the objective does with each kind, lengths, rows as trained."""
    console, stages = job_console(), stages_of(config)
    data = read_run_data(Run(Path("no run")), config, stages, refuse=False)
    for stage in stages:
        if stage.name:
            title = f"stage {stage.number} of {len(stages)}: {stage.name} ({stage.do})"
            console.print(f"[bold]{title}[/bold]\n", highlight=False)
        if stage.name in data.stages:
            show_stage_data(stage.config, data.stages[stage.name], console)
        else:
            say_on(console)(f"  {rows_there(stage.config)}")
        if stage is not stages[-1]:
            console.print()
    return GOOD


def show_stage_data(config: Config, data: StageData, console: Console) -> None:
    drawn = f"{data.horizon.total_rows:,} rows drawn in {data.horizon.steps:,} steps"
    uses = [[*cells] for cells in zip(*kind_table({data.objective.name: data.objective}), strict=True)]  # a kind a line
    if any(Kind.PROMPT in source.kinds for source in data.dataset.loaded):
        samples = Kind.PROMPT in data.sampler.views
        use = "completions that the policy samples" if samples else "stops: there is no reply"
        uses.append([Kind.PROMPT.value, use])
    for title, lines in {
        f"data={config.data.name}: {drawn}": report_table(data.record),
        "what the objective takes": uses,
    }.items():
        table = Table(title=title, title_justify="left", title_style="bold", box=None)
        table.pad_edge, table.padding = False, (0, 1, 0, 0)
        for column in lines[0]:
            table.add_column(column.replace(" ", "\n"), overflow="fold")  # 80 columns are enough
        for cells in lines[1:]:
            table.add_row(*cells)
        console.print(table, "")
    notes = [f"not read: {line}" for line in data_omissions(data.record["sources"])]
    notes += [f"caution: {line}" for line in data_cautions(data.record)]
    try:
        make_sampler(config, data.dataset, data.objective)
    except UftError as refused:
        for problem in refused.problems:
            notes += [f"training stops:  {problem.what}  {problem.why}", *(f"    {line}" for line in problem.advice)]
    for line in (*notes, "") if notes else ():
        console.print(line, markup=False, highlight=False)
    console.print("[bold]tokens per completion with its prompt[/bold]")
    for line in length_histogram(merged_lengths([source.report for source in data.dataset.train])):
        console.print(f"  {line}", highlight=False)
    shown_by, marks = ("coloured", ("", "")) if console.is_terminal else ("between « and »", ("«", "»"))
    console.print(f"\n[bold]rows as they are trained[/bold] (trained tokens {shown_by})")
    for source in data.dataset.train:
        for row, encoded in islice(zip(source.rows, source.encoded, strict=True), ROWS_SHOWN):
            console.print(f"\n  {row.id}  {row.kind.value}", style="dim", highlight=False)
            for one, use in zip(encoded, uses_of(row, data.objective), strict=True):
                console.print(f"  {use}", style="dim", markup=False, highlight=False)
                console.print(coloured(one, data.dataset.renderer.tokenizer, marks), soft_wrap=True)


def rows_there(config: Config) -> str:
    """A line about the rows of a stage that does not train, or whose rows are not there yet."""
    if has_made_rows(config.data):
        return NOT_THERE
    return ", ".join(f"{source.name}: {len(source.rows):,} rows" for source in drawn_sources(config))


# --- The cost of a run: memory by its configuration alone, and memory and time of the largest step that it can have.


def paper_plan(config: Config, device: torch.device) -> str:
    """Expected memory of each device in a line, before anything but the model's configuration was read."""
    needs, mode, other = make(config.objective).needs, None, None
    config = replace(config, model=resolve_dtype(config.model, device))
    if needs.reference:
        compared, key = reference_settings(config, needs)
        visits = config.train.epochs if config.train.steps is None else math.inf
        mode = choose_mode(config.model, compared, visits, needs.distributions)[0]
        if compared.path is not None and mode == "copy":
            other = shape_of(empty_policy(at_path(config.model, compared.path), key))
    policy = empty_policy(config.model)
    if config.hardware.sharding != "full":
        policy.cast_once()
    parts = estimate(config, shape_of(policy), tokens_per_pass(config), mode, other)
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
        rollouts, most = trainer.rollouts, config.rollout.max_new_tokens
        longest = rollouts.take(config.train.batch_size)
        lengths = [len(reply.log_probs) for group in rollouts.latest for reply in group.replies]
        mean = sum(lengths) / max(1, len(lengths))
        sampled = f"rollouts: {len(lengths)} completions of {mean:.0f} tokens on average in {rollouts.seconds:.1f} s"
        sampled += f", up to {rollouts.seconds * most / max(mean, 1):.1f} s if all had {most}\n"
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
    padded = max((batch.input_ids.numel() for batch in batches.micro_batches), default=0)
    expected = sum(prepared.planned(padded).values())
    memory = f"  the model took {count(peak - memory_before)}B of it; planned for this step: {count(expected)}B"
    share = shape.trained / max(1, trainer.policy.size)
    work = step_flops(shape, tokens, supervised, trained_share=share)
    rate = config.hardware.processes * config.hardware.nodes * matrix_rate(device, DTYPES[trainer.policy.dtype])
    pace = f"  {count(work)}FLOP at {count(rate)}FLOP/s, as large matrices are multiplied here"
    return "\n".join([line, memory, f"{pace}: {work / rate:.1f} s at best"])


JOBS: dict[str, Callable[[Config], int]] = {
    "check": check,
    "data": show_data,
    "generate": generate,
    "annotate": annotate,
    "select": select,
    "eval": measure,
}
