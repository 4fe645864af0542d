"""Checkers that ask another model: how likely it finds the reply, or which class it puts it into.

A model is loaded once in a process, when its first reply comes, on the run's device and in evaluation mode. torch and
transformers are imported by then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from uft.data.rows import Message, Row
from uft.errors import Problem, UftError, first_line
from uft.heartbeat import report_progress
from uft.playground import world
from uft.rewards.base import Checker, Verdict, key

if TYPE_CHECKING:
    import torch

Encoded = dict[str, list[int]]  # "input_ids", and other sequences as long as that
MISSING = "???"  # a value that has to be given, as OmegaConf writes it


@dataclass(frozen=True)
class _Asked(Checker):
    """Base of both: the model, and batches of replies of similar lengths."""

    path: str = key(MISSING, "the model: hub id, folder, or builtin:playground")
    revision: str | None = key(None, "commit or tag of a hub model")
    batch_size: int = key(16, "replies per forward pass", ge=1)

    auto: ClassVar[str] = ""  # the class of transformers that loads the model

    def problems(self) -> list[tuple[str, str]]:
        return [("path", "has no value")] if self.path == MISSING else []

    def encode(self, tokenizer: Any, row: Row, reply: str) -> Encoded:
        """The input of the model. Raises UftError where its template refuses the reply."""
        raise NotImplementedError

    def score(self, model: Any, batch: Mapping[str, torch.Tensor]) -> list[float]:
        """The figure of every reply of a batch, whose tensors are (replies, longest)."""
        raise NotImplementedError

    def verdicts(self, jobs: Sequence[tuple[Row, str]], device: torch.device | None) -> list[Verdict]:
        import torch

        model, tokenizer = _loaded(self.auto, self.path, self.revision, str(device or "cpu"))
        room = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or math.inf)
        found, encoded = dict[int, Verdict](), dict[int, Encoded]()
        for number, (row, reply) in enumerate(jobs):
            try:
                encoded[number] = self.encode(tokenizer, row, reply)
            except UftError as error:
                found[number] = self.failed(error.problems[0].why)
                continue
            if len(encoded[number]["input_ids"]) > room:
                del encoded[number]
                found[number] = self.failed(f"is longer than the {room} positions of {self.path}")
        order = sorted(encoded, key=lambda number: len(encoded[number]["input_ids"]))
        for start in range(0, len(order), self.batch_size):
            report_progress(start, len(order), "answers judged")
            numbers = order[start : start + self.batch_size]
            with torch.inference_mode():
                values = self.score(model, _batch([encoded[number] for number in numbers], model))
            for number, value in zip(numbers, values, strict=True):
                found[number] = self.checked({self.figures[0]: value})
        return [found[number] for number in range(len(jobs))]


@dataclass(frozen=True)
class Likelihood(_Asked):
    """`likelihood`: exp(mean log-prob / temperature) of the reply under another model, with its own chat template.

    At temperature 1 the inverse of the reply's perplexity. End-of-turn tokens count.
    """

    figures: ClassVar[tuple[str, ...]] = ("likelihood",)
    auto: ClassVar[str] = "AutoModelForCausalLM"

    temperature: float = key(1.0, "larger ones bring unlikely replies nearer to likely ones", gt=0)

    def encode(self, tokenizer: Any, row: Row, reply: str) -> Encoded:
        tokens = _renderer(tokenizer).encode(row.prompt, (Message("assistant", reply),))
        return {"input_ids": tokens.ids.tolist(), "supervised": tokens.supervised.tolist()}

    def score(self, model: Any, batch: Mapping[str, torch.Tensor]) -> list[float]:
        ids, supervised = batch["input_ids"], batch["supervised"]
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
        means = []
        for place in range(len(ids)):
            targets = supervised[place].nonzero()
            log_probs = logits[place, targets[:, 0] - 1].float().log_softmax(-1).gather(-1, ids[place, targets])
            means.append(float(log_probs.double().mean()))
        return [math.exp(min(mean, 0.0) / self.temperature) for mean in means]


@dataclass(frozen=True)
class Classifier(_Asked):
    """`probability`: of one class of a sequence classifier of transformers, e.g. a sentiment or a reward model.

    A model with a single output gives its sigmoid. Where the tokenizer has a chat template the conversation is read
    with it, else the prompt's last turn and the reply as a pair of texts.
    """

    figures: ClassVar[tuple[str, ...]] = ("probability",)
    auto: ClassVar[str] = "AutoModelForSequenceClassification"

    label: str | None = key(None, "the class, by its name in the model's id2label; null: the last one")
    reads: str = key("conversation", "what the model reads", choices=("conversation", "reply"))

    def encode(self, tokenizer: Any, row: Row, reply: str) -> Encoded:
        if self.reads == "reply":
            return dict(tokenizer(reply))
        if tokenizer.chat_template is None:
            return dict(tokenizer(row.prompt[-1].content, reply))
        turns = [{"role": turn.role, "content": turn.content} for turn in row.prompt]
        chat = [*turns, {"role": "assistant", "content": reply}]
        return dict(tokenizer.apply_chat_template(chat, return_dict=True))

    def score(self, model: Any, batch: Mapping[str, torch.Tensor]) -> list[float]:
        names = [str(name) for _, name in sorted(model.config.id2label.items())]
        if self.label is not None and self.label not in names:
            why = f"{self.path} has no such class; its classes: {', '.join(names)}"
            raise UftError(Problem(f"reward.label={self.label}", why))
        logits = model(**batch).logits.float()
        if len(names) == 1:
            return list(map(float, logits[:, 0].sigmoid()))
        return list(map(float, logits.softmax(-1)[:, -1 if self.label is None else names.index(self.label)]))


def _batch(encoded: Sequence[Encoded], model: Any) -> dict[str, torch.Tensor]:
    """Sequences of a batch as tensors (replies, longest), padded on the right, on the model's device."""
    import torch

    pad = {"input_ids": getattr(model.config, "pad_token_id", None) or 0}
    columns = {name: [torch.tensor(one[name]) for one in encoded] for name in encoded[0]}
    columns["attention_mask"] = [torch.ones(len(one["input_ids"]), dtype=torch.long) for one in encoded]
    return {
        name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad.get(name, 0)).to(model.device)
        for name, rows in columns.items()
    }


@cache
def _renderer(tokenizer: Any) -> Any:
    from uft.data.chat import Renderer

    return Renderer(tokenizer, lost_text="keep")


@cache
def _loaded(auto: str, path: str, revision: str | None, device: str) -> tuple[Any, Any]:
    """(model, tokenizer). Code that comes with a model is never run. Raises UftError where it cannot be loaded."""
    import transformers

    place = str(world.model_dir()) if path == "builtin:playground" else path
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, revision=revision)
        model = getattr(transformers, auto).from_pretrained(place, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        why = f"cannot be loaded: {first_line(error)}"
        raise UftError(Problem(f"reward.path={path}", why)) from error
    if model.config.pad_token_id is None:  # by which a classifier finds the last token of a sequence
        model.config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer
