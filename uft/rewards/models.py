"""Checkers that ask another model: how likely it finds the reply, or which class it puts it into.

A model is loaded once in a process, when its first reply comes, on the run's device and in evaluation mode. torch and
transformers are imported by then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from uft.data.rows import Message, Row
from uft.errors import Problem, UftError
from uft.heartbeat import beat
from uft.playground import world
from uft.rewards.base import Checker, Verdict, key

if TYPE_CHECKING:
    import torch

Job = tuple[Row, str]
MISSING = "???"  # a value that has to be given, as OmegaConf writes it


@dataclass(frozen=True)
class _Asked(Checker):
    """What both have: the model, and how many replies it gets at a time."""

    path: str = key(MISSING, "the model: hub id, folder, or builtin:playground")
    revision: str | None = key(None, "commit or tag of a hub model")
    batch_size: int = key(16, "replies per forward pass", ge=1)

    def problems(self) -> list[tuple[str, str]]:
        return [("path", "has no value")] if self.path == MISSING else []

    def verdicts(self, jobs: Sequence[Job], device: torch.device | None) -> list[Verdict]:
        """Replies of similar length share a batch, so that little of it is padding."""
        order = sorted(range(len(jobs)), key=lambda number: len(jobs[number][1]))
        found: dict[int, Verdict] = {}
        for start in range(0, len(order), self.batch_size):
            beat()
            numbers = order[start : start + self.batch_size]
            values = self.ask([jobs[number] for number in numbers], str(device or "cpu"))
            for number, value in zip(numbers, values, strict=True):
                found[number] = self.checked({self.figures[0]: value})
        return [found[number] for number in range(len(jobs))]

    def ask(self, jobs: Sequence[Job], device: str) -> list[float]:
        """The figure of every reply."""
        raise NotImplementedError

    def problem(self, why: str) -> UftError:
        return UftError(Problem(f"reward.path={self.path}", why))


@dataclass(frozen=True)
class Likelihood(_Asked):
    """`likelihood`: exp(mean log-prob / temperature) of the reply under another model, with its own chat template.

    At temperature 1 the inverse of the reply's perplexity. End-of-turn tokens count.
    """

    figures: ClassVar[tuple[str, ...]] = ("likelihood",)

    temperature: float = key(1.0, "larger ones bring unlikely replies nearer to likely ones", gt=0)

    def ask(self, jobs: Sequence[Job], device: str) -> list[float]:
        import torch

        model = _causal(self.path, self.revision, device)
        with self._told():
            encoded = [_renderer(self.path, self.revision).encode(row.prompt, _turn(reply)) for row, reply in jobs]
        room = getattr(model.config, "max_position_embeddings", None) or math.inf
        if (longest := max(one.length for one in encoded)) > room:
            raise self.problem(f"has {room} positions, and a prompt with its reply has {longest} tokens")
        width = max(one.length for one in encoded)
        ids, mask = torch.zeros(len(encoded), width, dtype=torch.long), torch.zeros(len(encoded), width)
        for number, one in enumerate(encoded):
            ids[number, : one.length] = torch.as_tensor(one.ids, dtype=torch.long)
            mask[number, : one.length] = 1
        ids, mask = ids.to(device), mask.to(device)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask).logits
        means = []
        for number, one in enumerate(encoded):
            places = torch.as_tensor(one.supervised).nonzero().flatten().to(device)
            log_probs = logits[number, places - 1].float().log_softmax(-1)
            means.append(float(log_probs.gather(-1, ids[number, places, None]).double().mean()))
        return [math.exp(min(mean, 0.0) / self.temperature) for mean in means]

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except UftError as error:
            raise self.problem(error.problems[0].why) from error


@dataclass(frozen=True)
class Classifier(_Asked):
    """`probability`: of one class of a sequence classifier of transformers, e.g. a sentiment or a reward model.

    A model with a single output gives its sigmoid. Where the tokenizer has a chat template the conversation is read
    with it, else the prompt's last turn and the reply as a pair of texts.
    """

    figures: ClassVar[tuple[str, ...]] = ("probability",)

    label: str | None = key(None, "the class, by its name in the model's id2label; null: the last one")
    reads: str = key("conversation", "what the model reads", choices=("conversation", "reply"))

    def ask(self, jobs: Sequence[Job], device: str) -> list[float]:
        import torch

        model, tokenizer = _classifier(self.path, self.revision, device)
        names = [str(name) for _, name in sorted(model.config.id2label.items())]
        if self.label is not None and self.label not in names:
            raise self.problem(f"has no class {self.label}; its classes: {', '.join(names)}")
        if self.reads == "reply":
            texts: list[Any] = [[reply for _, reply in jobs]]
        elif tokenizer.chat_template is not None:
            turns = ([*row.prompt, *_turn(reply)] for row, reply in jobs)
            chats = [[{"role": turn.role, "content": turn.content} for turn in chat] for chat in turns]
            texts = [[tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]]
        else:
            texts = [[row.prompt[-1].content for row, _ in jobs], [reply for _, reply in jobs]]
        special = tokenizer.chat_template is None or self.reads == "reply"
        batch = tokenizer(*texts, padding=True, truncation=True, add_special_tokens=special, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**batch.to(device)).logits.float()
        if logits.shape[-1] == 1:
            return list(map(float, logits[:, 0].sigmoid()))
        return list(map(float, logits.softmax(-1)[:, -1 if self.label is None else names.index(self.label)]))


def _turn(reply: str) -> tuple[Message, ...]:
    return (Message("assistant", reply),)


@cache
def _renderer(path: str, revision: str | None) -> Any:
    from uft.data.chat import Renderer

    return Renderer(_tokenizer(path, revision), lost_text="keep")


@cache
def _tokenizer(path: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    return _loaded(AutoTokenizer, path, revision)


@cache
def _causal(path: str, revision: str | None, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    return _loaded(AutoModelForCausalLM, path, revision).to(device).eval()


@cache
def _classifier(path: str, revision: str | None, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = _loaded(AutoModelForSequenceClassification, path, revision), _tokenizer(path, revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer


def _loaded(auto: Any, path: str, revision: str | None) -> Any:
    """Code that comes with a model is never run. Raises UftError where it cannot be loaded."""
    place = str(world.model_dir()) if path == "builtin:playground" else path
    try:
        return auto.from_pretrained(place, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        why = f"cannot be loaded: {str(error).strip().splitlines()[0]}"
        raise UftError(Problem(f"reward.path={path}", why)) from error
