"""Completions of prompts: one decoding loop for the negatives, the battery and a look at the model.

A completion is a function of the weights, its prompt, the sampling settings, the seed and the prompt's own number.
Which other prompts shared its batch, and which were answered before, changes nothing (but for the last bits of a sum:
kernels round differently in batches of different shapes). That is what makes generation resumable.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

Tensor = torch.Tensor


class Interrupted(Exception):
    """Somebody asked to stop; what was not finished is lost."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Filters apply in the order temperature, top-k, top-p, as in transformers."""

    temperature: float = 0.0  # 0: greedy, whatever the filters
    top_k: int = 0  # 0: all; ties at the k-th place stay in
    top_p: float = 1.0  # 1: all; at least one token always stays
    max_new_tokens: int = 64


@dataclass
class Reply:
    """A completion. The token that ended it is not part of `ids` but its log-prob is of `log_prob`."""

    ids: list[int] = field(default_factory=list)
    log_prob: float = 0.0  # under the model itself: temperature 1, no filters
    stopped: bool = False  # ended by a stop token, not by its length


@torch.no_grad()
def complete(
    module: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seed: int,
    stop_ids: Collection[int],
    pad_id: int,
    batch_size: int,
    should_stop: Callable[[], bool] | None = None,
    on_batch: Callable[[int], None] | None = None,
    numbers: Sequence[int] | None = None,
    dtype: str = "float32",
) -> list[Reply]:
    """One completion per prompt, in the prompts' order.

    `module` is a causal language model of transformers, or a PEFT model around one; it is left in the mode it was in
    and torch's generators are not touched. `numbers` name the prompts for the randomness (default: their position);
    `dtype` bfloat16 runs under autocast; `on_batch` hears how many prompts each finished batch had. Prompt and
    completion together never exceed the model's positions.
    Raises Interrupted within one token of `should_stop()` becoming true.
    """
    assert all(len(prompt) for prompt in prompts), "an empty prompt has no last token to continue"
    numbers = range(len(prompts)) if numbers is None else numbers
    model = _Model(module, dtype)
    found = [Reply() for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with evaluating(module):
        for start in range(0, len(prompts), batch_size):
            group = by_length[start : start + batch_size]
            rows = [
                _Row(prompts[i], found[i], uniforms(seed, numbers[i], sampling.max_new_tokens), model.room(prompts[i]))
                for i in group
            ]
            _decode(model, rows, sampling, frozenset(stop_ids), pad_id, should_stop)
            if on_batch:
                on_batch(len(group))
    return found


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout), and back to whatever it was."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def uniforms(seed: int, number: int, count: int) -> np.ndarray:
    """(count,) float64 in [0, 1): the draws of one completion. Counter-based, so that any can be made alone."""
    key = [seed % 2**64, number % 2**64]
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) logits -> (B, V) float32 scores, -inf for tokens that are not to be drawn. Needs temperature > 0."""
    scores = logits.float() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[1]:
        smallest = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -math.inf)
    if sampling.top_p < 1:
        ascending, order = scores.sort(-1)
        out = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        out[:, -1] = False
        scores = scores.masked_fill(out.scatter(1, order, out), -math.inf)
    return scores


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """(B, V) logits and (B,) draws in [0, 1) -> (B,) tokens: the argmax, or the inverse of the cumulative distribution.

    One draw per token, however large the vocabulary.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    exact = _exact(logits.device)
    cumulative = filtered(logits, sampling).to(exact).softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    # strictly below the total: a product rounded up to it would fall behind the last token
    point = torch.minimum(uniform[:, None].to(exact) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True).squeeze(1)


def _exact(device: torch.device) -> torch.dtype:
    """What cumulative probabilities are summed in; MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class _Model:
    """A transformers model as the loop uses it: logits of the last position only, where the model can do that."""

    def __init__(self, module: Any, dtype: str) -> None:
        self.module = module
        self.base = module.get_base_model() if hasattr(module, "peft_config") else module
        self.device = next(module.parameters()).device
        self.bfloat16 = dtype == "bfloat16"
        accepts = inspect.signature(self.base.forward).parameters
        self.options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}
        self.takes_positions = "position_ids" in accepts
        self.positions = getattr(self.base.config.get_text_config(), "max_position_embeddings", None) or math.inf

    def room(self, prompt: Sequence[int]) -> float:
        """Tokens that fit behind the prompt."""
        return self.positions - len(prompt)

    def __call__(self, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """(B, T) new tokens and (B, all) mask -> (B, V) float32 logits of the last position, and the grown cache."""
        options = dict(self.options)
        if self.takes_positions:
            options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with self._autocast():
            out = self.module(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
        return out.logits[:, -1].float(), out.past_key_values

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16)


@dataclass
class _Row:
    """A prompt on its way: what it says so far, its draws, and the tokens that still fit."""

    prompt: Sequence[int]
    reply: Reply
    uniform: np.ndarray  # (max_new_tokens,)
    room: float

    def take(self, token: int, log_prob: float, stop_ids: frozenset[int]) -> bool:
        """Add a token; whether more is to come."""
        self.reply.log_prob += log_prob
        if token in stop_ids:
            self.reply.stopped = True
            return False
        self.reply.ids.append(token)
        return len(self.reply.ids) < min(len(self.uniform), self.room)


def _decode(
    model: _Model,
    rows: list[_Row],
    sampling: Sampling,
    stop_ids: frozenset[int],
    pad_id: int,
    should_stop: Callable[[], bool] | None,
) -> None:
    """Answer one batch of prompts, in place. Rows that are done leave the batch once half of it is done."""
    rows = [row for row in rows if min(len(row.uniform), row.room) > 0]
    ids, mask = left_padded([row.prompt for row in rows], pad_id, model.device)
    going = [True] * len(rows)
    cache: Any = None
    step = 0
    while any(going):
        if should_stop and should_stop():
            raise Interrupted
        logits, cache = model(ids, mask, cache)
        uniform = torch.tensor([row.uniform[step] for row in rows], dtype=_exact(model.device), device=model.device)
        tokens = choose(logits, sampling, uniform)
        log_probs = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1).tolist()
        for i, token in enumerate(tokens.tolist()):
            going[i] = going[i] and rows[i].take(token, log_probs[i], stop_ids)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        ids = tokens[:, None]
        step += 1
        if 0 < sum(going) <= len(going) // 2:
            kept = [i for i, more in enumerate(going) if more]
            index = torch.tensor(kept, device=model.device)
            cache.reorder_cache(index)
            ids, mask = ids[index], mask[index]
            rows, going = [rows[i] for i in kept], [True] * len(kept)


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, L) ids and mask, int64: every prompt ends in the last column, where the next token is read off."""
    longest = max((len(prompt) for prompt in prompts), default=0)
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
