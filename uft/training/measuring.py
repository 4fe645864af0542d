"""The job `eval`: the evaluation of any model on held-out rows, or tasks of lm-evaluation-harness; a table and a file.

`evals/NAME.json` holds the figures with what they can be compared by, `evals/NAME.items.jsonl` what was measured of
every row. `uft compare` reads both.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from uft import __version__
from uft.config.schema import Config
from uft.data.report import data_omissions
from uft.data.sources import load_sources
from uft.data.table import keep_pandas_out
from uft.errors import Problem, UftError
from uft.evaluation.evaluate import HeldOut, evaluate
from uft.evaluation.measures import mean_stderr
from uft.model.layout import settle_layout
from uft.model.load import load_tokenizer
from uft.model.policy import Policy
from uft.model.precision import resolve_dtype
from uft.model.reference import make_reference
from uft.rewards import spec_of
from uft.runs import cache_root, shown, write_atomically, write_json
from uft.tracking.console import bare_table, printable
from uft.tracking.metrics import collapses
from uft.training.dataset import make_renderer, tokenize_held_out
from uft.training.making import job, job_console
from uft.training.setup import Say, Work, loaded_policy
from uft.training.trainer import tokens_per_pass

FORMAT = 1
PAUSE = 5.0  # seconds between two lines of progress
LONGEST_TASK_NAMES = 60


@dataclass(frozen=True)
class Measured:
    """Content of `evals/NAME.json`, and the lines of the file beside it."""

    figures: dict[str, dict[str, Any]]  # by name: value, stderr, n and what the figure can be compared by
    about: dict[str, Any]
    items: list[dict[str, Any]]


@job
def measure(work: Work) -> None:
    """Evaluate `config.model` on the tasks that are asked for, else on rows; print the table and write the files."""
    config, say, started = work.config, work.say, time.perf_counter()
    if config.eval.tasks and find_spec("lm_eval") is None:
        advice = ("pip install 'uft-lm[lmeval]'",)
        raise UftError(Problem("eval.tasks", "needs lm-evaluation-harness, which is not installed", advice=advice))
    say(f"measuring {config.model.path}")
    work.stopped = "stopped; nothing was written"
    measured = on_tasks(work) if config.eval.tasks else on_rows(work)
    for table in tables(measured):
        job_console().print(table)
    file = output_file(config)
    made = datetime.now().astimezone().isoformat(timespec="seconds")
    about = {"format": FORMAT, "uft": __version__, "made": made, "seconds": time.perf_counter() - started}
    model = {"model": config.model.path, "dtype": resolve_dtype(config.model, work.device).dtype}
    measured, notes = with_earlier(measured, file, model)
    for line in notes:
        say(line)
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(item, ensure_ascii=False) for item in measured.items)
    write_atomically(file.with_suffix(".items.jsonl"), "".join(f"{line}\n" for line in lines))
    write_json(file, about | model | measured.about | {"figures": measured.figures})
    say(f"\n  {shown(file.resolve())}  {shown(file.with_suffix('.items.jsonl').resolve())}")


def with_earlier(measured: Measured, file: Path, model: Mapping[str, Any]) -> tuple[Measured, list[str]]:
    """Merge figures (of a checker, say) of an earlier measurement in the same file that this one did not ask for; the
    merged measurement, and lines about them.

    They stay where they are of the same rows, settings and weights: both agree in all that both measured of a row.
    """
    beside = file.with_suffix(".items.jsonl")
    if not (file.is_file() and beside.is_file()):
        return measured, []
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        items = [json.loads(line) for line in beside.read_text(encoding="utf-8").splitlines()]
        lost = before["figures"].keys() - measured.figures.keys()
        same = all(before.get(key) == value for key, value in {**model, **measured.about}.items())
        known = {(item["source"], item["row"]): item for item in items} if "harness" not in measured.about else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        return measured, [f"{shown(file)} was no measurement, and is replaced"]
    if not lost:
        return measured, []
    both = [(known[key], item) for item in measured.items if (key := (item.get("source"), item.get("row"))) in known]
    names = ", ".join(sorted(lost))
    if not (same and both and all(agree(*pair) for pair in both)):
        return measured, [f"{shown(file)} had other figures too, of other rows, settings or weights; gone are {names}"]
    figures = {**before["figures"], **measured.figures}
    for name, one in before["figures"].items():
        if one["n"] > figures[name]["n"]:  # lengths of the answers that a checker asked for
            figures[name] = one
    whole = {(item["source"], item["row"]): item for item in measured.items}
    for key, item in known.items():
        now = whole.get(key, item)
        whole[key] = {**now, "measures": item["measures"] | now["measures"], "reply": now["reply"] or item["reply"]}
    return replace(measured, figures=figures, items=[*whole.values()]), [f"figures from before are kept: {names}"]


def agree(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two measurements of a row are of the same weights, as far as both measured the same."""
    replies = {before["reply"], now["reply"]} - {None}
    shared = before["measures"].keys() & now["measures"].keys()
    sums = [(before["measures"][name][0], now["measures"][name][0]) for name in shared]
    return len(replies) < 2 and all(math.isclose(ours, theirs, rel_tol=1e-4, abs_tol=1e-4) for ours, theirs in sums)


def now_and_then(say: Say) -> Say:
    """Progress, of which a line is told every few seconds."""
    last = time.monotonic()

    def tell(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= PAUSE:
            last = time.monotonic()
            say(f"  {text}")

    return tell


def output_file(config: Config) -> Path:
    """`eval.out`, or a file in that folder that is named after the tasks or sources; without it one in evals/, named
    after the model too."""
    out = Path(config.eval.out or "evals")
    if out.suffix == ".json":
        return out
    sources = [*config.data.sources] if config.data.name == "files" else [config.data.name]
    names = "+".join([task.task for task in config.eval.tasks] or sources)[:LONGEST_TASK_NAMES]
    model = "" if config.eval.out else f"{re.split('[/:]', config.model.path.rstrip('/'))[-1]}-"
    return out / f"{re.sub(r'[^A-Za-z0-9_.+-]', '_', model + names)}.json"


def load_evaluated(work: Work, tokenizer: PreTrainedTokenizerBase, longest: int) -> Policy:
    """The model, in the layout of `train.packing`; `longest`: tokens of the longest sequence."""
    policy = loaded_policy(work.config, work.device, tokenizer)
    settle_layout(policy, work.config.train.packing, min(longest, policy.positions or longest))
    return policy


# --- On rows


def on_rows(work: Work) -> Measured:
    """The evaluation of training, on the held-out rows of every source, or on all rows of one that holds none out."""
    keep_pandas_out()
    config, say = work.config, work.say
    tokenizer = load_tokenizer(config.model)
    renderer = make_renderer(tokenizer, config.data)
    loaded = load_sources(config.data)
    for line in data_omissions({source.name: source.omitted.record() for source in loaded}):
        say(f"not read: {line}")
    whole = {source.name for source in loaded if not source.held_out}
    measured = [replace(source, held_out=source.held_out or source.rows) for source in loaded]
    checkers = {source.name: spec_of(config.reward, source.checker) for source in loaded}
    tokenized = tokenize_held_out(config, renderer, measured)
    if not tokenized:
        raise UftError(Problem("data", "no source has a row to measure", advice=("rows of yours:  data=FILE",)))
    held = [HeldOut(one.source, one.rows, one.encoded, checkers[one.source]) for one in tokenized]
    longest = max(int(one.encoded.longest.max(initial=0)) for one in tokenized)
    policy = load_evaluated(work, tokenizer, longest)
    reference = None
    if config.reference.path is not None:
        reference = make_reference(
            policy,
            config.model,
            replace(config.reference, mode="copy"),
            device=policy.device,
            tokenizer=tokenizer,
            visits_per_row=1.0,
            cache=cache_root(config.data.cache),
            longest_row=longest,
        )
    rows = {one.name: {"rows": min(config.eval.rows, len(one.rows)), "of": len(one.rows)} for one in held}
    for name, counts in rows.items():
        kind = "rows, none of which is held out" if name in whole else "held-out rows"
        say(f"{name}: {counts['rows']:,} of {counts['of']:,} {kind} (eval.rows={config.eval.rows})")
    stop, budget = work.stop.between_passes, tokens_per_pass(config)
    scored = evaluate(policy, reference, held, renderer, config.eval, stop, micro_batch_tokens=budget)
    digests = {source.name: source.digest for source in loaded}
    about = {"data": config.data.name, "sources": rows, "digests": digests, "template": renderer.digest}
    about |= {name: getattr(config.eval, name) for name in ("rows", "generate_rows", "max_new_tokens")}
    figures = {}
    for name, value in scored.metrics.items():  # with its standard error over rows, and the number of rows that have it
        source, _, metric = name.removeprefix("eval/").rpartition("/")
        items = [item.measures for item in scored.items if source in ("", item.source)]
        column = [measures[metric] for measures in items if measures.get(metric, (0.0, 0.0))[1] > 0]
        figures[name] = {"value": value, "stderr": mean_stderr([column], [value]), "n": len(column)}
    return Measured(figures, about, [item.record(answers=True) for item in scored.items])


# --- On tasks


def on_tasks(work: Work) -> Measured:
    """The tasks of `eval.tasks` over the model's own tokenizer, and its chat template where a task wants it."""
    from uft.evaluation.harness import PackedLM, load_tasks, run_tasks

    config = work.config
    tokenizer = load_tokenizer(config.model)
    tasks = load_tasks(tokenizer, config.eval, work.say)
    policy = load_evaluated(work, tokenizer, config.train.max_length)
    lm = PackedLM(policy, tokenizer, tokens_per_pass(config), work.stop.between_passes, now_and_then(work.say))
    figures, items = run_tasks(lm, tasks, config.eval, work.say)
    about = {"harness": f"lm_eval {version('lm_eval')}", "task_rows": config.eval.task_rows}
    return Measured(figures, about | {"task_tokens": config.eval.task_tokens}, items)


# --- The table


def tables(measured: Measured) -> list[Table | Text]:
    """Of rows: a line per metric, a column for all of them and for each source. Of tasks: a line per figure."""
    if "harness" in measured.about:
        table = bare_table()
        for name in ("  figure", "value ± standard error", "rows", "shots", "chat template", "task version"):
            table.add_column(name, justify="left" if name == "  figure" else "right", overflow="fold")
        for name, one in measured.figures.items():
            left = f" ({one['left_out']} left out)" if one["left_out"] else ""
            template = "yes" if one["template"] else "no"
            cells = (with_error(one), f"{one['n']}{left}", str(one["shots"]), template, one["task_version"])
            table.add_row(f"  {printable(name)}", *cells)
        return [Text(""), table, Text(f"  {measured.about['harness']}", style="dim")]
    sources = [*measured.about["sources"]]
    columns = ["", *(f"{name}/" for name in sources)] if len(sources) > 1 else [""]
    table = bare_table()
    for name in ("  metric", "all rows", *sources)[: 1 + len(columns)]:
        table.add_column(printable(name), justify="left" if name == "  metric" else "right", overflow="fold")
    metrics = [name.removeprefix("eval/") for name in measured.figures if name.count("/") == 1]
    for metric in metrics:
        found_in = (measured.figures.get(f"eval/{column}{metric}") for column in columns)
        table.add_row(f"  {printable(metric)}", *map(with_error, found_in))
    notes = collapses([{name: figure["value"] for name, figure in measured.figures.items()}]).values()
    last = [Text(f"\n  {printable(note)}") for note in notes]
    return [Text(""), table, Text("  mean ± standard error over rows", style="dim"), *last]


def with_error(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return ""
    return f"{one['value']:.4g}" + ("" if one["stderr"] is None else f" ± {one['stderr']:.2g}")
