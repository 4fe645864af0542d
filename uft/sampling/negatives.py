"""Negatives: `uft generate` samples answers of a model to the training prompts, as rows that `uft.data` reads.

Made for DFT (arXiv 2502.18679), whose negatives are samples of the base model, several seeds per prompt, often under a
system prompt that asks for bad answers. One line per row, in file order. A stopped job begins again with the batch in
which it stopped, and then the file equals, byte for byte, that of a job that never stopped: kernels round differently
in batches of another shape.

A line: `row` (id of the row it was made from), `prompt`, `response` (the row's own good completion), `negatives`,
`negative_log_probs` (of each sample with its end token, under the prompt, temperature and filters that it was sampled
with), `sampled_by`, `sampling` (the settings), and `answer` and `task` where the row has them. A sample that was cut at
`max_new_tokens` is left out: it would be trained with an end token that it never said.

Prompts that have no reply at all get theirs: where no row has a completion, a line is `row`, `prompt`, `response` (a
sample) and the rest, one for every sample, and reads back as a demonstration.

Two settings are for methods that learn from a model's own samples in pairs. `repeats: drop` leaves out samples with the
tokens of the row's own completion, from which a pair learns nothing; DFT wants them as they come. `score: true` writes
`score`, that of each sample by the source's checker and `rollout.reward`, and no `response`: a row of scored samples.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from uft.config.schema import Generate
from uft.data.chat import Renderer
from uft.data.records import append_records, turns_column
from uft.data.rows import Message, Row
from uft.data.sources import LoadedSource
from uft.distributed import ranks
from uft.errors import Problem, UftError
from uft.heartbeat import activity
from uft.model.policy import Policy
from uft.objectives.views import good_completion
from uft.sampling.generate import SAMPLED_UNDER, complete_for_seeds

Line = dict[str, Any]
Score = Callable[[Row, str], float]
START = b'{"row": "'
"""The beginning of every line: a torn last line is cut off only if it begins like this."""


@dataclass(frozen=True)
class Summary:
    """Content of the file of a finished job."""

    path: Path
    rows: int
    negatives: int
    left_out: int  # samples without text, cut before their end, or repeats that were to be dropped: not written
    repeats: int  # samples equal to the row's own good completion: written, as the theory wants
    resumed: int  # rows that were there before this job
    without_good: int  # rows that have no good completion to set the samples against: left out


@activity("completions were sampled")
def generate_rows(
    policy: Policy,
    renderer: Renderer,
    sources: Sequence[LoadedSource],
    settings: Generate,
    out: Path,
    *,
    sampled_by: str,
    score: Score | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Summary:
    """Sample one completion per seed for the training rows of every source and append them to `out`.

    `score`: of a reply to a row (`Generate.score`); then rows need no good completion. `progress` is called with (rows
    done, rows in all). Raises Interrupted when asked to stop, with all finished batches written; UftError when `out` is
    not an earlier part of this very job.
    """
    rows = [row for source in sources for row in source.rows[: settings.limit]]
    replies = are_prompts(rows) and not score
    usable = [row for row in rows if score or replies or good_completion(row) is not None]
    sampling = {name: getattr(settings, name) for name in SAMPLED_UNDER}
    sampling |= {"seeds": list(settings.seeds), "template": renderer.digest}
    sampling["log_probs"] = "as sampled"  # earlier versions wrote those at temperature 1 without filters
    sampling |= {"repeats": "drop"} if settings.repeats == "drop" else {}
    sampling |= {"score": True} if score else {"replies": True} if replies else {}
    recipe, group = {"sampled_by": sampled_by, "sampling": sampling}, ranks()
    lines = group.on_rank0(lambda: _earlier_lines(out, usable, recipe))
    done = {line["row"] for line in lines}
    resumed = handled = len(done)
    if group.is_rank0:
        append_records(out, [])

    sample = partial(_sample, policy, renderer, settings, recipe, score, should_stop)
    for batch in _batches(usable, done, group.size * settings.batch_size):
        sampled = group.map_shards(batch, sample)
        kept = [line for of_row in sampled for line in of_row if line["row"] not in done]
        if group.is_rank0:
            append_records(out, kept)
        lines += kept
        handled += sum(row.id not in done for row in batch)
        progress(handled, len(usable))
    return _summary(out, rows, lines, settings, resumed)


def summary_of(out: Path, sources: Sequence[LoadedSource], settings: Generate) -> Summary:
    """Summary of an earlier job that finished."""
    with open(out, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    rows = [row for source in sources for row in source.rows[: settings.limit]]
    return _summary(out, rows, lines, settings, resumed=len(lines))


def _summary(out: Path, rows: Sequence[Row], lines: Sequence[Line], settings: Generate, resumed: int) -> Summary:
    unneeded = settings.score or are_prompts(rows)
    without_good = 0 if unneeded else sum(good_completion(row) is None for row in rows)
    count = sum(len(line.get("negatives", "1")) for line in lines)
    left_out = len(settings.seeds) * (len(rows) - without_good) - count
    repeats = sum(negative == line.get("response") for line in lines for negative in line.get("negatives", ()))
    return Summary(out, len({line["row"] for line in lines}), count, left_out, repeats, resumed, without_good)


def are_prompts(rows: Sequence[Row]) -> bool:
    """Whether no row has any completion, so that samples become the replies."""
    return not any(row.completions for row in rows)


def _batches(rows: Sequence[Row], done: Set[str], size: int) -> Iterator[Sequence[Row]]:
    """The rows that are not `done`, by their ids, in batches as of a job that was never stopped.

    The batch of the last row that is done comes complete, should one of it be missing.
    """
    last = max((place for place, row in enumerate(rows) if row.id in done), default=-1)
    begun = max(last, 0) // size * size
    after = begun + size if last >= 0 else 0
    before = [row for row in rows[:begun] if row.id not in done]  # all of their samples were left out
    yield from (before[start : start + size] for start in range(0, len(before), size))
    if any(row.id not in done for row in rows[begun:after]):
        yield rows[begun:after]
    yield from (rows[start : start + size] for start in range(after, len(rows), size))


def number_of(row: Row) -> int:
    """The row's number for the randomness: its id alone, so that other sources and limits change nothing."""
    return int.from_bytes(hashlib.sha256(row.id.encode()).digest()[:8], "big")


def _sample(
    policy: Policy,
    renderer: Renderer,
    settings: Generate,
    recipe: Mapping[str, Any],
    score: Score | None,
    should_stop: Callable[[], bool],
    rows: Sequence[Row],
) -> list[list[Line]]:
    """The lines of each row of one batch, every seed; what is not to be written is already left out."""
    prompts = [renderer.start_ids(row, settings.system) for row in rows]
    sampled = complete_for_seeds(policy, renderer, prompts, settings, list(map(number_of, rows)), should_stop)
    lines = []
    for row, replies in zip(rows, sampled, strict=True):
        replied = [renderer.said(reply.ids, strip=False) for reply in replies]
        replied = [replace(one, content=one.content.lstrip()) for one in replied]
        kept = [(one, reply) for one, reply in zip(replied, replies, strict=True) if one.content and reply.stopped]
        if settings.repeats == "drop":
            kept = [(one, reply) for one, reply in kept if not _repeats(row, one, renderer)]
        samples: list[Line] = [{"response": turns_column((one,), "assistant")} for one, _ in kept]
        if "replies" not in recipe["sampling"]:
            all_of_them = {
                "negatives": [turns_column((one,), "assistant") for one, _ in kept],
                "negative_log_probs": [round(reply.log_prob, 4) for _, reply in kept],
                **({} if score is None else {"score": [score(row, one.content) for one, _ in kept]}),
            }
            samples = [all_of_them] if kept else []
        more = {name: value for name, value in (("answer", row.answer), ("task", row.task)) if value is not None}
        own = _own_fields(row, shown=score is None and bool(row.completions))
        lines.append([{**own, **one, **more, **row.facts, **recipe} for one in samples])
    return lines


def _repeats(row: Row, sample: Message, renderer: Renderer) -> bool:
    """Whether a sample has the tokens of the row's own good completion."""
    good = good_completion(row)
    if good is None:
        return False
    replies = [(row.prompt, good.turns), (row.prompt, (sample,))]
    own, sampled = renderer.encode_many(replies, [row.id, row.id])
    return own.ids.tolist() == sampled.ids.tolist()


def _own_fields(row: Row, shown: bool) -> Line:
    """The fields of a line that repeat the row, `row` first, with its good completion if that is `shown`. A single
    user turn and a single reply are plain text."""
    line = {"row": row.id, "prompt": turns_column(row.prompt, "user")}
    if not shown:
        return line
    good = good_completion(row)
    assert good is not None, row.id
    return {**line, "response": turns_column(good.turns, "assistant")}


# --- Resuming


def _earlier_lines(out: Path, rows: Sequence[Row], recipe: Mapping[str, Any]) -> list[Line]:
    """The lines of an earlier, stopped part of this job. A torn last line is cut off, once all others are known good.

    Raises UftError, and changes nothing, when the file is not an earlier part of this job.
    """
    if not out.is_file():
        return []
    content = out.read_bytes()
    complete_lines, _, torn = content.rpartition(b"\n")
    raws = complete_lines.split(b"\n") if complete_lines else []
    lines = []
    for number, raw in enumerate(raws, 1):
        try:
            line = json.loads(raw)
        except ValueError:  # broken JSON, or not UTF-8
            raise _foreign(out, number) from None
        columns = {"row", "prompt", "sampling", "response" if "replies" in recipe["sampling"] else "negatives"}
        if not isinstance(line, dict) or not columns <= line.keys():
            raise _foreign(out, number)
        lines.append(line)
    if torn and torn[: len(START)] != START[: len(torn)]:
        raise _foreign(out, len(lines) + 1)
    if problems := _differences(out, lines, rows, recipe):
        raise UftError(*problems, footer="Write to another file:  generate.out=FILE   or remove this one.")
    if "replies" in recipe["sampling"] and len(recipe["sampling"]["seeds"]) > 1:
        last = lines[-1]["row"] if lines else None  # of which samples may be missing: it is sampled again
        lines = [line for line in lines if line["row"] != last]
    whole = sum(len(raw) + 1 for raw in raws[: len(lines)])
    if whole < len(content):
        os.truncate(out, whole)
    return lines


def _foreign(out: Path, number: int) -> UftError:
    return UftError(
        Problem(str(out), "was not written by uft generate; it is left as it is", f"{out.name}:{number}"),
        footer="Write to another file:  generate.out=FILE",
    )


def _differences(out: Path, lines: Sequence[Line], rows: Sequence[Row], recipe: Mapping[str, Any]) -> list[Problem]:
    """The first line sampled with other settings, with every difference, and the first whose row has changed."""
    problems = []
    now = {"sampled_by": recipe["sampled_by"], **recipe["sampling"]}
    for number, line in enumerate(lines, 1):
        there = {"sampled_by": line.get("sampled_by"), **line["sampling"]}
        if there != now:
            changes = tuple(
                f"{name}: {there.get(name)!r} in the file, {now.get(name)!r} now"
                for name in sorted(there.keys() | now.keys())
                if there.get(name) != now.get(name)
            )
            why = "holds samples that were made in another way"
            problems.append(Problem(str(out), why, f"{out.name}:{number}", changes))
            break
    by_id = {row.id: row for row in rows}
    for number, line in enumerate(lines, 1):
        row = by_id.get(line["row"])
        shown = "score" not in line and "replies" not in line["sampling"]
        if row is not None and not _own_fields(row, shown).items() <= line.items():
            why = f"row {line['row']} is another one in the data now"
            problems.append(Problem(str(out), why, f"{out.name}:{number}"))
            break
    return problems
