"""Data report: the figures of `data.json` per source, and the same as text for a terminal."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from uft.data.mixture import Mixture
from uft.data.rows import Kind, Tokens, View
from uft.data.sources import LoadedSource
from uft.data.table import claims, grouped, like, prompt_words
from uft.data.tokens import LengthReport, TokenizedSource

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

BAR = "█"
ODDITIES = {
    "equal_pairs": "both sides of the pair are the same: they teach nothing",
    "contrary_scores": "the rejected side has the better score",
    "repeated_prompts": "completions begin with their prompt: it is learned as a part of the reply",
    "rendered_prompts": "the prompt ends with the header of a reply, so it was rendered before: it is rendered twice, "
    "unless data.template=plain data.special_text=tokens",
    "null_fields": "a tool or a call of one has fields that are null, as tables leave them that were joined: the "
    "template writes them as null",
    "text_arguments": "a call of a tool has arguments that are a text and no JSON object: templates write it as a text",
    "void_replies": "a reply is nothing but None, null or NaN, as a program writes an empty cell",
    "written_stops": "a reply ends with a mark of its end that is written out (###, END, [EOS]): it is learned as "
    "text, before the end-of-turn token",
    "written_speakers": "a reply spells who speaks (Assistant:, Human:): it is learned as text",
    "repeated_reasoning": "a reply has its reasoning in a field and <think> in its text: both are learned",
    "stray_results": "the result of a tool names a call that no turn before it makes",
    "template_marks": "a text spells marks of chat templates (<|im_start|>): letters, unless data.special_text=tokens",
}
"""The sentence of each of :func:`uft.data.rows.oddities`, after the number of its rows."""
CONTRADICTED = "the same reply is labelled good and bad, or the sides of a pair are swapped"
UNEVEN = 10
"""Labels of one side for each of the other from which on they are called uneven."""
SUMS = {
    "rows": ("rows",),
    "held out": ("held_out",),
    "drawn": ("rows_drawn",),
    "cut": ("truncated",),
    "dropped": ("dropped_bad", "dropped_long", "dropped_unusable"),
    "tokens lost": ("supervised_tokens_lost",),
}
"""Columns of the table that are sums, of these keys of a source's entry and over the sources."""
SHARES = {"asked": "share_asked", "of rows": "share_rows", "of tokens": "share_supervised_tokens"}
HEADER = (
    *("source", "kind", "rows", "held out", "asked", "drawn"),
    *("of rows", "of tokens", "cut", "dropped", "tokens lost"),
)
COUNTED = 200_000
"""Draws that are counted one by one before a run begins: a second or two."""


def data_report(
    loaded: Sequence[LoadedSource],
    tokenized: Sequence[TokenizedSource],
    mixture: Mixture,
    rows: int,
    views: Mapping[Kind, View] | None = None,
    unusable: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """`data.json`: per source the share asked for, the result of `rows` draws of a fresh mixture, and the losses.

    `loaded`, `tokenized` and the mixture's sources are in the same order. With `views` a row's supervised tokens are
    those of the completions the objective takes, else of all. `unusable`: rows per source that it could not use.
    `held_out_seen` counts held-out rows whose prompt some source trains on.
    """
    drawn, taught = _simulate(tokenized, mixture, rows, views)
    seen = np.unique(np.concatenate([np.empty(0, np.uint64), *(prompt_words(source.rows) for source in loaded)]))
    sources = {}
    for number, (source, tokens) in enumerate(zip(loaded, tokenized, strict=True)):
        labels: Counter[str] = Counter()  # of training rows; none where no row has a label
        for row, count in grouped(source.rows) if Kind.BINARY in source.kinds else ():
            if row.kind is Kind.BINARY:
                labels["good" if row.completions[0].label else "bad"] += count
        sources[source.name] = {
            "path": source.path,
            "kinds": {kind.value: count for kind, count in source.kinds.items()},
            "rows": mixture.sizes[number],
            "held_out": len(source.held_out),
            "held_out_seen": int(np.isin(prompt_words(source.held_out), seen).sum()),
            "share_asked": mixture.weights[number],
            "share_rows": drawn[number] / sum(drawn) if sum(drawn) else 0.0,
            "share_supervised_tokens": taught[number] / sum(taught) if sum(taught) else 0.0,
            "rows_drawn": drawn[number],
            "passes": drawn[number] / mixture.sizes[number] if mixture.sizes[number] else 0.0,
            "supervised_tokens_drawn": taught[number],
            "tokens": tokens.report.tokens,
            "supervised_tokens": tokens.report.supervised,
            "longest": tokens.report.longest,
            "dropped_bad": len(source.omitted.bad),
            "dropped_long": tokens.report.dropped,
            "dropped_unusable": (unusable or {}).get(source.name, 0),
            "truncated": tokens.report.touched,
            "supervised_tokens_lost": tokens.report.supervised_lost,
            "lengths": [list(pair) for pair in tokens.report.lengths],
            "template_notes": [list(note) for note in tokens.report.notes],
            "digest": source.digest,
            "cache": tokens.cache,
            **source.omitted.record(),
            **{oddity: source.omitted.oddities[oddity] for oddity in ODDITIES},
            "labels": {side: labels[side] for side in ("good", "bad")} if labels else {},
        }
    contents = "\n".join(f"{source.name} {source.digest}" for source in loaded)
    digest = hashlib.sha256(contents.encode()).hexdigest()
    repeated, contradicted = claims([source.rows for source in loaded])
    counts = {"rows_drawn": sum(drawn), "repeated": repeated, "contradicted": contradicted}
    return {**counts, "digest": digest, "seed": mixture.seed, "sources": sources}


def data_omissions(sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Per source the columns, with the rows in which they say something, and files of a folder that are not read.

    `sources`: those of a report, or :meth:`uft.data.sources.Omissions.record` of each.
    """
    lines = []
    for name, entry in sources.items():
        said = {column if column.strip() else repr(column): count for column, count in entry["unread"].items()}
        columns = [f"{column} ({count:,} row{'s' * (count != 1)})" for column, count in said.items()]
        lines += [f"{name}: {', '.join(columns)}"] if columns else []
        lines += [f"{name}: files {', '.join(entry['left_out'])}"] if entry["left_out"] else []
    return lines


def data_cautions(report: Mapping[str, Any]) -> list[str]:
    """Sentences about rows that may not be meant so, and about feedback that teaches little."""
    lines = [
        f"{name}: in {entry[oddity]:,} of its rows {sentence}"
        for name, entry in report["sources"].items()
        for oddity, sentence in ODDITIES.items()
        if entry[oddity]
    ]
    if contradicted := report.get("contradicted"):
        lines.append(f"rows contradict each other in {contradicted:,} case{'s' * (contradicted > 1)}: {CONTRADICTED}")
    if repeated := report.get("repeated"):
        lines.append(f"{repeated:,} of the training rows repeat another one, prompt and completions")
    good, bad = (sum(entry["labels"].get(side, 0) for entry in report["sources"].values()) for side in ("good", "bad"))
    if good + bad and not (good and bad):
        lines.append(f"every labelled row is {'good' if good else 'bad'}: nothing tells good completions from bad ones")
    elif max(good, bad) >= UNEVEN * min(good, bad) > 0:
        lines.append(f"labels are uneven: {good:,} good, {bad:,} bad")
    return lines


def report_table(report: Mapping[str, Any]) -> list[list[str]]:
    """The report as rows of text for a terminal: a header, one row per source, and their sums."""
    sources = report["sources"]

    def sums(entries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
        known = list(entries)
        return {column: f"{sum(entry[key] for entry in known for key in keys):,}" for column, keys in SUMS.items()}

    lines = [
        {"source": name, "kind": ", ".join(entry["kinds"]), **sums([entry])}
        | {column: f"{entry[key]:.1%}" for column, key in SHARES.items()}
        for name, entry in sources.items()
    ]
    lines.append({"source": "all", **sums(sources.values())})
    return [[*HEADER], *([line.get(column, "") for column in HEADER] for line in lines)]


MIXTURE_COLUMNS = ("source", "kind", "rows", "held out", "asked", "of rows", "of tokens")


def mixture_table(record: Mapping[str, Any]) -> list[list[str]]:
    """The columns of :func:`report_table` that the start card and the model card show."""
    header, *rows = report_table(record)
    kept = [header.index(name) for name in MIXTURE_COLUMNS if name in header]
    return [[line[place] for place in kept] for line in (header, *rows)]


def length_histogram(lengths: Sequence[Sequence[int]], width: int = 40) -> list[str]:
    """Text bars of a report's `lengths`: one line per range of lengths, the longest bar `width` wide."""
    if not lengths:
        return []
    most = max(count for _, count in lengths)
    digits = len(f"{lengths[-1][0]:,}")
    return [
        f"<= {edge:>{digits},}  {BAR * max(1, round(width * count / most)):<{width}} {count:,}"
        for edge, count in lengths
    ]


def merged_lengths(reports: Sequence[LengthReport]) -> list[tuple[int, int]]:
    """The length counts of several sources in one histogram."""
    counts: Counter[int] = Counter()
    for report in reports:
        counts.update(dict(report.lengths))
    return sorted(counts.items())


def coloured(encoded: Tokens, tokenizer: PreTrainedTokenizerBase, marks: tuple[str, str] = ("", "")) -> Text:
    """A row's text as the model reads it, the trained tokens highlighted, and between `marks` where colour is lost."""
    from rich.text import Text

    text = Text()
    start = 0
    for end in range(1, encoded.length + 1):
        if end < encoded.length and encoded.supervised[end] == encoded.supervised[start]:
            continue  # runs are decoded whole: one character may be several tokens
        decoded = str(tokenizer.decode(encoded.ids[start:end].tolist(), clean_up_tokenization_spaces=False))
        supervised = encoded.supervised[start]
        text.append(decoded.join(marks) if supervised else decoded, style="bold green" if supervised else "dim")
        start = end
    return text


def _simulate(
    tokenized: Sequence[TokenizedSource], mixture: Mixture, rows: int, views: Mapping[Kind, View] | None
) -> tuple[list[int], list[int]]:
    """(rows, supervised tokens) of each source in the first `rows` draws; those after COUNTED in proportion."""
    fresh = Mixture(mixture.names, mixture.sizes, mixture.weights, mixture.seed)
    taught, counted = [0] * len(tokenized), min(rows, COUNTED)
    for draw in fresh.draws(counted):
        source = tokenized[draw.source]
        used: slice | list[int] = slice(None)
        if views is not None:
            row = like(source.rows, draw.index)
            view = views.get(row.kind)
            used = [part.completion for part in (view(row, draw.visit) or () if view else ())]
        taught[draw.source] += int(source.encoded.targets_of(draw.index)[used].sum())
    if counted == rows:
        return fresh.counts, taught
    return [round(rows * weight) for weight in mixture.weights], [round(tokens * rows / counted) for tokens in taught]
