"""Jobs that leave no run behind: `check`, `data` and `generate`."""

from __future__ import annotations

import sys
import tempfile
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from uft.config.schema import Config
from uft.data.report import coloured, length_histogram, merged_lengths, report_table
from uft.data.rows import Row
from uft.data.sources import load_sources
from uft.data.templates import Encoded, Renderer
from uft.errors import GOOD
from uft.model.load import check_vocabulary, load_policy, load_tokenizer
from uft.model.memory import used_memory
from uft.objectives import make
from uft.objectives.kinds import kind_table
from uft.parallel.ranks import ranks
from uft.runs import Run
from uft.sampling.generate import Interrupted
from uft.sampling.negatives import generate_rows
from uft.tracking.format import card
from uft.training.card import start_card
from uft.training.corpus import Corpus, make_feed, plan, read_corpus
from uft.training.device import choose_device
from uft.training.planning import largest_step, paper_plan
from uft.training.prepare import Stopped, check_start, prepare
from uft.training.records import data_record
from uft.training.signals import listening

ROWS_SHOWN = 3  # per source, with their trained tokens coloured
WIDE = 180


def console_for_tables() -> Console:
    """As wide as the terminal; wide enough for a table where there is none. One process's words are enough."""
    quiet = not ranks().first
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
        data = data_record(prepared.corpus, prepared.trainer.feed, prepared.plan)
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
    show_data(config, read_corpus(config, load_tokenizer(config.model)), console_for_tables())
    return GOOD


def show_data(config: Config, corpus: Corpus, console: Console) -> None:
    objective = make(config.objective)
    horizon = plan(config, corpus)
    feed = make_feed(config, corpus, objective, refuse=False)
    report = data_record(corpus, feed, horizon)
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


def _print_row(console: Console, row: Row, encoded: tuple[Encoded, ...], renderer: Renderer) -> None:
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
