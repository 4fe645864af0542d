"""Generation: one decoding loop for sampled negatives, the evaluation and samples shown during a run.

A completion is a function of the weights, its prompt, the sampling settings, the seed and the prompt's own number.
Which other prompts shared its batch, and which were answered before, changes nothing (but for the last bits of a sum:
kernels round differently in batches of different shapes). That is what makes generation resumable.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer

from uft.config.schema import Generate, Rollout
from uft.data.batch import sequence_batch
from uft.data.chat import Renderer
from uft.heartbeat import report_progress
from uft.model.load import pad_id
from uft.model.policy import Policy, common_length, evaluating, exact_products, trial_sequences

Tensor = torch.Tensor


SAMPLED_UNDER = ("temperature", "top_k", "top_p", "max_new_tokens", "system")
"""Keys of `generate` that are written beside samples: all but seeds and those that change no sample."""


class Interrupted(Exception):
    """Asked to stop: unfinished completions are lost."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Filters apply in the order temperature, top-k, top-p, as in transformers."""

    temperature: float = 0.0  # 0: greedy, whatever the filters
    top_k: int = 0  # 0: all; ties at the k-th place stay in
    top_p: float = 1.0  # 1: all; at least one token always stays
    max_new_tokens: int = 64

    @classmethod
    def of(cls, settings: Generate | Rollout) -> Sampling:
        return cls(settings.temperature, settings.top_k, settings.top_p, settings.max_new_tokens)


@dataclass
class Reply:
    """A completion. The token that ended it is not part of `ids`."""

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    """Of every token, the last one too, under what it was drawn from: temperature and filters count; greedy: 0."""
    end: int | None = None  # the stop token that ended it; None: it was cut by its length
    ended: bool = False  # by a rule of the caller's on its tokens

    @property
    def stopped(self) -> bool:
        return self.end is not None or self.ended

    @property
    def log_prob(self) -> float:
        """Of the whole completion with its end."""
        return sum(self.log_probs)

    def add(self, token: int, log_prob: float, stop_ids: Collection[int]) -> None:
        self.log_probs.append(log_prob)
        if token in stop_ids:
            self.end = token
        else:
            self.ids.append(token)


@torch.no_grad()
def complete(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seed: int,
    stop_ids: Collection[int],
    pad_id: int,
    batch_size: int,
    should_stop: Callable[[], bool] = lambda: False,
    numbers: Sequence[int] | None = None,
    ended: Callable[[Sequence[int]], bool] | None = None,
) -> list[Reply]:
    """One completion per prompt, in the prompts' order.

    The policy is left in the mode it was in, and torch's generators are not touched. `numbers` name the prompts for the
    randomness (default: their position). Prompt and completion together never exceed the model's positions. `ended`
    says of the ids so far whether a completion is over: where it ends at a text and not at a token.
    Raises Interrupted within one token of `should_stop()` becoming true.
    """
    assert all(len(prompt) for prompt in prompts), "an empty prompt has no last token to continue"
    numbers = range(len(prompts)) if numbers is None else numbers
    positions = policy.positions or sys.maxsize
    rows = []
    for prompt, number in zip(prompts, numbers, strict=True):
        room = max(0, min(sampling.max_new_tokens, positions - len(prompt)))
        rows.append(_Row(prompt, Reply(), uniforms(seed, number, room)))
    by_length = sorted(rows, key=lambda row: len(row.prompt))
    common = common_length(policy.base.config) or sys.maxsize
    together = [row for row in by_length if len(row.prompt) + len(row.uniform) <= common]
    batches = [together[start : start + batch_size] for start in range(0, len(together), batch_size)]
    batches += [[row] for row in by_length if len(row.prompt) + len(row.uniform) > common]
    with evaluating(policy.module):
        for number, batch in enumerate(batches):
            before = sum(map(len, batches[:number]))
            for done, share in _decode(policy, batch, sampling, frozenset(stop_ids), pad_id, should_stop, ended):
                report_progress(before + done, len(rows), "answers", (number + share) / len(batches))
    return [row.reply for row in rows]


def complete_for_seeds(
    policy: Policy,
    renderer: Renderer,
    prompts: Sequence[Sequence[int]],
    settings: Generate,
    numbers: Sequence[int],
    should_stop: Callable[[], bool],
) -> list[tuple[Reply, ...]]:
    """Per prompt one completion for each of `settings.seeds`; `numbers` as in :func:`complete`."""
    by_seed = [
        complete(
            policy,
            prompts,
            Sampling.of(settings),
            seed=seed,
            stop_ids=renderer.stop_ids,
            pad_id=pad_id(renderer.tokenizer),
            batch_size=settings.batch_size,
            should_stop=should_stop,
            numbers=numbers,
        )
        for seed in settings.seeds
    ]
    return list(zip(*by_seed, strict=True))


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


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(B, V) logits and (B,) draws in [0, 1) -> (B,) tokens and their log-probs under what they were drawn from.

    A token is the argmax, or the inverse of the cumulative distribution: one draw, however large the vocabulary.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1), torch.zeros_like(logits[:, 0])
    exact = _exact(logits.device)
    scores = filtered(logits, sampling)
    cumulative = scores.to(exact).softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    # strictly below the total: a product rounded up to it would fall behind the last token
    point = torch.minimum(uniform[:, None].to(exact) * total, total.nextafter(torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, point, right=True)
    return tokens.squeeze(1), scores.log_softmax(-1).gather(1, tokens).squeeze(1)


def _exact(device: torch.device) -> torch.dtype:
    """The dtype of cumulative probabilities; MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class _Row:
    """A prompt being answered: its reply so far, and a random draw for every token that the reply may have."""

    prompt: Sequence[int]
    reply: Reply
    uniform: np.ndarray

    @property
    def open(self) -> bool:
        """Whether another token may follow."""
        return not self.reply.stopped and len(self.reply.ids) < len(self.uniform)


def _decode(
    policy: Policy,
    rows: list[_Row],
    sampling: Sampling,
    stop_ids: frozenset[int],
    pad_id: int,
    should_stop: Callable[[], bool],
    ended: Callable[[Sequence[int]], bool] | None,
) -> Iterator[tuple[int, float]]:
    """Answer one batch of prompts, in place. A prompt that several rows have is read once; finished rows leave the
    batch once half of it is finished. Yields after every token how many are, and the share of the time at most."""
    size, longest = len(rows), max((len(row.uniform) for row in rows), default=0)
    rows, device = [row for row in rows if row.open], policy.device
    places = {prompt: number for number, prompt in enumerate(dict.fromkeys(tuple(row.prompt) for row in rows))}
    ids, mask = left_padded(list(places), pad_id, device)
    prompt_of_row = torch.tensor([places[tuple(row.prompt)] for row in rows], device=device)
    if policy.caches is None:
        with exact_products():
            policy.caches = _caches(policy)
    common = common_length(policy.base.config) or sys.maxsize
    caches = policy.caches and all(len(row.prompt) + len(row.uniform) <= common for row in rows)
    cache: Any = None
    step = 0
    while any(row.open for row in rows):
        if should_stop():
            raise Interrupted
        if caches:
            logits, cache = _last_logits(policy, ids, mask, cache)
            if step == 0 and len(places) < len(rows):
                cache.reorder_cache(prompt_of_row)
                logits, mask = logits[prompt_of_row], mask[prompt_of_row]
            if step == 0:  # windows and states of other kinds stay as they are
                room = max(len(row.uniform) for row in rows)
                for number, layer in enumerate(getattr(cache, "layers", ())):
                    if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
                        cache.layers[number] = _Preallocated(layer.keys, layer.values, room)
        else:
            logits = _plain_logits(policy, [[*row.prompt, *row.reply.ids] for row in rows])
        draws = [row.uniform[step] if row.open else 0.0 for row in rows]
        tokens, log_probs = choose(logits, sampling, torch.tensor(draws, dtype=_exact(device), device=device))
        for row, token, log_prob in zip(rows, tokens.tolist(), log_probs.tolist(), strict=True):
            if row.open:
                row.reply.add(token, log_prob, stop_ids)
                row.reply.ended = ended is not None and ended(row.reply.ids)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        ids = tokens[:, None]
        step += 1
        kept = [i for i, row in enumerate(rows) if row.open]
        yield size - len(kept), step / longest if kept else 1.0
        if 0 < len(kept) <= len(rows) // 2:
            index = torch.tensor(kept, device=device)
            if cache is not None:
                cache.reorder_cache(index)
                ids, mask = ids[index], mask[index]
            rows = [rows[i] for i in kept]


class _Preallocated(DynamicLayer):
    """Keys and values of a layer with room for those to come. One that grows by concatenation is copied at every token,
    which takes as long as all the products of a model of 30M parameters."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.room = room
        self._hold(keys, values)

    def _hold(self, *states: Tensor) -> None:
        """Keep (B, heads, L, D) states in tensors that have `room` more places."""
        self.held = [one.new_empty((*one.shape[:2], one.shape[2] + self.room, one.shape[3])) for one in states]
        self.keys, self.values = (held[:, :, : one.shape[2]] for held, one in zip(self.held, states, strict=True))
        for kept, one in zip((self.keys, self.values), states, strict=True):
            kept.copy_(one)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for held, new in zip(self.held, (key_states, value_states), strict=True):
            held[:, :, start:end] = new
        self.keys, self.values = (held[:, :, :end] for held in self.held)
        self.room -= end - start
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        assert self.keys is not None
        assert self.values is not None
        self._hold(self.keys.index_select(0, beam_idx), self.values.index_select(0, beam_idx))


def _last_logits(policy: Policy, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """(B, T) new tokens, (B, all) mask and the cache -> (B, V) float32 logits of the last position, the grown cache."""
    options: dict[str, Any] = {"logits_to_keep": 1} if policy.keeps_logits else {}
    if policy.takes_positions:
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :] + policy.first_position
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=policy.dtype == "bfloat16"):
        out = policy.module(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
    return out.logits[:, -1].float(), out.past_key_values


def _plain_logits(policy: Policy, sequences: Sequence[Sequence[int]]) -> Tensor:
    """(B, V) float32 logits after the last token of each sequence, all of them read anew."""
    lines = [np.array([*ids, 0]) for ids in sequences]  # the token that is asked for: any
    batch = sequence_batch([(ids, np.arange(len(ids)) == len(ids) - 1) for ids in lines], 0).to(policy.device)
    predictions = policy.predictions(batch)
    return predictions.log_softmax(predictions.states).float()


def _caches(policy: Policy) -> bool:
    """Whether a cache and padding on the left give what reading everything anew gives, on two small prompts.

    They do not where a model's state knows no padding (RWKV), or has no cache of transformers' kind (Mamba, GPT-1).
    """
    prompts = [ids[:n].tolist() for n, (ids, _) in zip((5, 2), trial_sequences(policy.vocabulary), strict=False)]
    following = [3 % policy.vocabulary, 1]
    expected = _plain_logits(policy, [[*ids, token] for ids, token in zip(prompts, following, strict=True)])
    ids, mask = left_padded(prompts, 0, policy.device)
    try:
        _, cache = _last_logits(policy, ids, mask, None)
        cache.reorder_cache(torch.arange(2, device=policy.device))
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        cached, _ = _last_logits(policy, torch.tensor(following, device=policy.device)[:, None], mask, cache)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # model code of any origin may raise anything here: the answer is the same
        return False
    expected, cached = expected.log_softmax(-1), cached.log_softmax(-1)
    likely = expected > math.log(1e-6)
    return policy.difference(cached[likely], expected[likely]) <= policy.tolerance(expected[likely])


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, L) ids and mask, int64: every prompt ends in the last column, where the next token is read off."""
    longest = max((len(prompt) for prompt in prompts), default=0)
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
