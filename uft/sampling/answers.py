"""Answers to prompts of one's own: prompts of any shape are read, answered, shown whole, and kept as rows.

A line of the file that is kept: `prompt`, `response`, `sampled_by`, `seed` and `sampling` (the settings). It reads back
as demonstrations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uft.config.schema import Generate
from uft.data.chat import Renderer
from uft.data.formats import read_instruction, rename
from uft.data.messages import Unreadable, check_prompt, is_blank, read_conversation, read_prompt, with_context
from uft.data.readers import reader_of
from uft.data.records import append_records, turns_column
from uft.data.rows import Kind, Message, Turns
from uft.errors import Problem, UftError
from uft.heartbeat import activity
from uft.model.policy import Policy
from uft.sampling.generate import SAMPLED_UNDER, complete_for_seeds

ASKED = ("prompt", "question", "instruction", "messages", "conversations", "text")
"""Columns that hold a prompt, the first of them that a record has."""


@dataclass(frozen=True)
class Answer:
    """A sampled reply."""

    said: Message
    stopped: bool  # ended by the model itself; False: cut at generate.max_new_tokens
    seed: int

    def told(self, settings: Generate) -> str:
        """The text, and whether it was cut."""
        cut = f"  (cut at generate.max_new_tokens={settings.max_new_tokens})"
        return self.said.content + ("" if self.stopped else cut)


def read_prompts(file: Path) -> list[Turns]:
    """The prompts of a file: every line of a text file; of JSONL, CSV or Parquet the column in ASKED, with system and
    history, and the input or context of an instruction. Messages that end with a reply are asked without it.

    Raises UftError with every record that holds no prompt.
    """
    reader = reader_of(file) or _lines
    prompts, problems = list[Turns](), list[Problem]()
    for number, record in reader(file):
        try:
            prompts.append(_prompt(record))
        except Unreadable as error:
            problems.append(Problem(str(file), str(error), f"{file.name}:{number}"))
    if problems or not prompts:
        raise UftError(*problems or [Problem(str(file), "holds no prompt")])
    return prompts


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UftError(Problem(str(file), "is not UTF-8 text")) from None
    yield from ((n, {"prompt": line.strip()}) for n, line in enumerate(text.split("\n"), 1) if line.strip())


def _prompt(record: Mapping[str, Any] | str) -> Turns:
    if isinstance(record, str):
        raise Unreadable(record)
    record = rename(record, {}, Kind.PROMPT.value)
    column = next((name for name in ASKED if record.get(name) is not None), None)
    if column is None:
        raise Unreadable(f"has none of the columns {', '.join(ASKED)} (there are: {', '.join(map(str, record))})")
    if column == "instruction":
        return with_context(read_instruction(record), record)
    beside = next((name for name in ("input", "context") if not is_blank(record.get(name))), None)
    if beside and str(record[beside]).strip() not in str(record[column]):
        raise Unreadable(f"its {beside} is not in its {column}: write both as one, or call the {column} instruction")
    if column not in ("messages", "conversations"):
        return with_context(read_prompt(record[column], column), record)
    turns = read_conversation(record[column], column)
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    return with_context(check_prompt(turns, column), record)


@activity("prompts were answered")
def answer_prompts(
    policy: Policy,
    renderer: Renderer,
    prompts: Sequence[Turns],
    settings: Generate,
    out: Path | None,
    *,
    sampled_by: str,
    show: Callable[[Turns, Sequence[Answer]], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Answer every prompt once for each of `settings.seeds`, `show` it, and append it to `out`.

    Raises Interrupted when asked to stop; finished batches are shown and written.
    """
    size = settings.batch_size
    recipe = {"sampled_by": sampled_by, "sampling": {name: getattr(settings, name) for name in SAMPLED_UNDER}}
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        answers = sample(policy, renderer, batch, settings, should_stop, first=start)
        for prompt, given in zip(batch, answers, strict=True):
            show(prompt, given)
        lines = [
            {
                "prompt": turns_column(prompt, "user"),
                "response": turns_column((answer.said,), "assistant"),
                "seed": answer.seed,
                **recipe,
            }
            for prompt, given in zip(batch, answers, strict=True)
            for answer in given
        ]
        if out is not None:
            append_records(out, lines)


def sample(
    policy: Policy,
    renderer: Renderer,
    prompts: Sequence[Turns],
    settings: Generate,
    should_stop: Callable[[], bool] = lambda: False,
    first: int = 0,
) -> list[list[Answer]]:
    """The answers to each prompt, one for each seed; `first` is the number of the first prompt for the randomness."""
    ids = [renderer.asked_ids(prompt, settings.system) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if policy.positions and len(tokens) >= policy.positions:
            why = f"has {len(tokens)} tokens, the model has {policy.positions} positions"
            raise UftError(Problem(f"the prompt {prompt[-1].content[:40]!r}", why))
    numbers = range(first, first + len(ids))
    sampled = complete_for_seeds(policy, renderer, ids, settings, numbers, should_stop)
    return [
        [Answer(renderer.said(r.ids), r.stopped, seed) for seed, r in zip(settings.seeds, replies, strict=True)]
        for replies in sampled
    ]
