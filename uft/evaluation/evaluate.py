"""The battery: the same figures for every objective, on the same held-out rows, so that runs can be compared.

Nothing of a run changes by measuring it: no gradient, no state of an objective, no random number, and the model is in
the mode it was in. The figures themselves are in `measures.py`, one function each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from transformers import PreTrainedTokenizerBase

from uft.config.schema import Eval
from uft.data.batch import Batch, Example, make_example, micro_batches
from uft.data.chat import Renderer, Tokens
from uft.data.rows import Message, Row
from uft.distributed import ranks
from uft.evaluation.checkers import CHECKERS, gold
from uft.evaluation.measures import Scored, ScoredRow, Tally, pair_of
from uft.heartbeat import activity
from uft.model.load import pad_id
from uft.model.policy import Policy
from uft.model.reference import Reference
from uft.objectives.base import Forward
from uft.objectives.views import pointwise
from uft.sampling.generate import Interrupted, Reply, Sampling, complete, evaluating

Tensor = torch.Tensor
ShouldStop = Callable[[], bool]

PROMPTS_PER_BATCH = 64
LARGEST_RATIO = 20.0
"""log(ref / pi) of one token is taken as at most this in `kl`, whose exponential would otherwise leave float64."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows of one source; `encoded` has one entry per row and, in it, one per completion."""

    name: str
    rows: Sequence[Row]
    encoded: Sequence[tuple[Tokens, ...]]
    checker: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """`eval/<metric>` over all rows of all sources, `eval/<source>/<metric>`, and replies to fixed prompts."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)


@activity("the battery was measured")
def evaluate(
    policy: Policy,
    reference: Reference | None,
    sources: Sequence[HeldOut],
    renderer: Renderer,
    tokenizer: PreTrainedTokenizerBase,
    settings: Eval,
    should_stop: ShouldStop | None = None,
    *,
    micro_batch_tokens: int = 8192,
) -> Evaluation:
    """Measure the policy as it is now. Without a reference the figures that compare with one are left out.

    Raises Interrupted, with nothing measured, within one batch or one generated token of `should_stop()` being true.
    """
    stop = should_stop or (lambda: False)
    bench = _Bench(policy, reference, renderer, tokenizer, settings, micro_batch_tokens, stop)
    overall, per_source, samples = Tally(), {}, []
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.no_grad(), evaluating(policy.module), torch.random.fork_rng(devices=devices):
        bench.recall(sources)
        for held in sources:
            tally = Tally()
            tally.add_rows(bench.score(held))
            samples += bench.answer(held, tally)
            overall.include(tally)
            per_source[held.name] = tally.means()
    metrics = {f"eval/{name}": value for name, value in overall.means().items()}
    for source, means in per_source.items():
        metrics |= {f"eval/{source}/{name}": value for name, value in means.items()}
    return Evaluation(metrics, samples)


@dataclass(frozen=True)
class _Bench:
    """What every source is measured with."""

    policy: Policy
    reference: Reference | None
    renderer: Renderer
    tokenizer: PreTrainedTokenizerBase
    settings: Eval
    micro_batch_tokens: int
    should_stop: ShouldStop

    def recall(self, sources: Sequence[HeldOut]) -> None:
        """Compute what a cached reference does not know yet, of all sources at once: its model is loaded once."""
        column = self.reference.column if self.reference else None
        if column is None:
            return
        encoded = (e for held in sources for row in islice(held.encoded, self.settings.rows) for e in row)
        if not column.fill(encoded, batch_tokens=self.micro_batch_tokens, should_stop=self.should_stop):
            raise Interrupted

    def score(self, held: HeldOut) -> list[ScoredRow]:
        """The first rows with every completion scored, whatever an objective would take of them."""
        return ranks().map_shards(self._items(held), self._score)

    def _score(self, items: Sequence[Example]) -> list[ScoredRow]:
        forward = self.reference.forward if self.reference else None
        found: dict[int, list[Scored]] = {item.example: [] for item in items}
        pad, layout = pad_id(self.tokenizer), self.policy.layout
        for batch in micro_batches(items, self.micro_batch_tokens, pad, layout) if items else ():
            if self.should_stop():
                raise Interrupted
            for example, scored in _score(self.policy, forward, batch.to(self.policy.device)):
                found[example].append(scored)
        return [_scored_row(item, found[item.example]) for item in items]

    def _items(self, held: HeldOut) -> list[Example]:
        """Items with all completions; with their cached reference log-probs, if that is where those come from."""
        rows = islice(zip(held.rows, held.encoded, strict=True), self.settings.rows)
        made = (make_example(row, encoded, number, 0, pointwise) for number, (row, encoded) in enumerate(rows))
        items = [item for item in made if item is not None]
        column = self.reference.column if self.reference else None
        if column is None:
            return items
        return [replace(item, reference=tuple(map(column, item.encoded))) for item in items]

    def answer(self, held: HeldOut, tally: Tally) -> list[Sample]:
        """Greedy replies: their lengths and what the checker says go to `tally`; the first few are returned."""
        check = CHECKERS[held.checker] if held.checker else None
        checked = self.settings.generate_rows if check else 0
        rows = distinct(held.rows, max(self.settings.samples, checked))
        samples = []
        for number, (row, reply) in enumerate(zip(rows, self._replies(rows), strict=True)):
            text = str(self.tokenizer.decode(reply.ids, skip_special_tokens=True)).strip()
            verdict = check(row, text) if check else {}
            tally.add("completion_length", (len(reply.ids), 1.0))
            if number < checked:
                tally.add_verdict(verdict)
            if number < self.settings.samples:
                answer = gold(row) if check else row.answer
                samples.append(Sample(held.name, row.id, shown(row.prompt), text, answer, verdict))
        return samples

    def _replies(self, rows: Sequence[Row]) -> list[Reply]:
        return ranks().map_shards([self.renderer.prompt_ids(row.prompt) for row in rows], self._complete)

    def _complete(self, prompts: Sequence[Sequence[int]]) -> list[Reply]:
        return complete(
            self.policy.module,
            prompts,
            Sampling(max_new_tokens=self.settings.max_new_tokens),
            seed=0,
            stop_ids=self.renderer.stop_ids,
            pad_id=pad_id(self.tokenizer),
            batch_size=PROMPTS_PER_BATCH,
            should_stop=self.should_stop,
            dtype=self.policy.dtype,
        )


def _score(policy: Forward, reference: Forward | None, batch: Batch) -> Iterator[tuple[int, Scored]]:
    """(row's number, its next completion) for every sequence, in the batch's order. Sums are float64, on the CPU."""
    lengths = batch.lengths.tolist()
    policy_parts = policy(batch).log_probs.cpu().double().split(lengths)
    reference_parts = reference(batch).log_probs.cpu().double().split(lengths) if reference else [None] * len(lengths)
    sequences = zip(batch.example[batch.row].tolist(), batch.good.tolist(), policy_parts, reference_parts, strict=True)
    for example, good, ours, theirs in sequences:
        scored = Scored(good, len(ours), float(ours.sum()))
        if theirs is not None:
            log_ratio = (theirs - ours).clamp(max=LARGEST_RATIO)
            divergence = float((log_ratio.expm1() - log_ratio).sum())
            scored = replace(scored, reward=float((ours - theirs).sum()), divergence=divergence)
        yield example, scored


def _scored_row(item: Example, scored: Sequence[Scored]) -> ScoredRow:
    """The row's completions and its pair; a completion that was cut to nothing is left out, and the pair with it."""
    numbered = {part.completion: one for part, one in zip(item.parts, scored, strict=True) if one.tokens}
    pair = pair_of(item.row)
    sides = (numbered[pair[0]], numbered[pair[1]]) if pair and numbered.keys() >= set(pair) else None
    return ScoredRow(tuple(numbered.values()), sides)


def distinct(rows: Sequence[Row], count: int) -> list[Row]:
    """The first `count` rows whose prompts differ: a prompt has one greedy answer, however many rows ask it."""
    first: dict[tuple[Message, ...], Row] = {}
    following = iter(rows)
    while len(first) < count and (row := next(following, None)) is not None:
        first.setdefault(row.prompt, row)
    return list(first.values())


def shown(prompt: Sequence[Message]) -> str:
    """A prompt for the eye: a lone user turn as it is, a conversation with its roles."""
    if len(prompt) == 1:
        return prompt[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in prompt)


# --- Before the first step the policy is the reference.
#
# What follows if it is not would be no fine-tuning from that reference, and losses would start from the wrong number.


CAUSES = (
    "dropout is on in one of the two",
    "reference.path or a cached reference belongs to another model, template or precision",
    "the adapter does not start from zero",
)


def check_step_zero(policy_log_probs: Tensor, reference_log_probs: Tensor, tolerance: float) -> list[str]:
    """What is wrong with the log-probs of the same targets, (N,) each; [] if they agree to `tolerance` per token."""
    problems = [
        f"{int(bad.sum())} of {bad.numel()} log-probs of the {name} are not finite"
        for name, values in (("policy", policy_log_probs), ("reference", reference_log_probs))
        if (bad := ~values.isfinite()).any()
    ]
    if problems or not policy_log_probs.numel():
        return problems
    difference = (policy_log_probs.detach().float() - reference_log_probs.detach().float()).abs()
    if float(difference.max()) <= tolerance:
        return []
    count, total = int((difference > tolerance).sum()), difference.numel()
    what = (
        f"policy and reference should be equal before the first step, but {count} of {total} log-probs differ by more "
        f"than {tolerance:g}, at most by {float(difference.max()):.3g}"
    )
    return [what, *(f"likely: {cause}" for cause in CAUSES)]


# --- Sample: one greedy answer of the model to a held-out prompt, and what a checker said of it.


@dataclass(frozen=True)
class Sample:
    source: str  # name of the source in the mixture
    row: str  # id of the row
    prompt: str
    reply: str
    answer: str | None = None  # what a checker expects; None where the row has no such thing
    verdict: dict[str, float] = field(default_factory=dict)  # the checker's metrics, e.g. {"exact_match": 1.0}
