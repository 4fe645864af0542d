"""Evaluation: the same metrics for every objective, on the same held-out rows, so that runs can be compared.

An evaluation changes nothing of a run: it computes no gradient, touches no state of an objective and no random
generator, and leaves the model in the mode it was in. The metrics themselves are in `measures.py`, one function each.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from uft.config.schema import Eval
from uft.data.batch import Example, make_example, micro_batches
from uft.data.chat import Renderer, Tokens
from uft.data.rows import Message, Row
from uft.distributed import ranks
from uft.evaluation.measures import Scored, ScoredRow, Sum, Tally, measured, pair_of
from uft.heartbeat import activity, report_progress
from uft.model.load import pad_id
from uft.model.policy import Policy, evaluating, preserved_rng
from uft.model.reference import Reference
from uft.objectives.views import pointwise
from uft.rewards import Spec, Verdict, gold, judge
from uft.sampling.generate import Interrupted, Reply, Sampling, complete

log = logging.getLogger(__name__)
Tensor = torch.Tensor

PROMPTS_PER_BATCH = 64


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows of one source; `encoded` has one entry per row and, in it, one per completion."""

    name: str
    rows: Sequence[Row]
    encoded: Sequence[tuple[Tokens, ...]]
    checker: Spec | None = None


@dataclass(frozen=True)
class Sample:
    """One greedy reply of the model to a held-out prompt, with its checker's verdict."""

    source: str  # name of the source in the mixture
    row: str  # id of the row
    prompt: str
    reply: str
    answer: str | None = None  # the right answer of a source with a checker; None where the row has none
    verdict: dict[str, float] = field(default_factory=dict)  # the checker's metrics, e.g. {"exact_match": 1.0}


@dataclass
class Item:
    """What was measured of one held-out row: a metric is the sum over all items divided by the count over them."""

    source: str  # name of the source in the mixture
    row: str  # id of the row
    prompt: str
    measures: Tally = field(default_factory=Tally)  # (sum, count) by metric, the checker's verdict among them
    log_probs: Sequence[float] = ()  # of each completion that was scored, in the row's order
    rewards: Sequence[float | None] = ()  # likewise; None: there is no reference
    reply: str | None = None  # the greedy answer, where one was made

    def record(self, answers: bool) -> dict[str, Any]:
        """The item as a line of items.jsonl, numbers to 1e-6; prompt and answer where they are wanted."""
        measures = {name: [rounded(total), rounded(count)] for name, (total, count) in self.measures.items() if count}
        scores = {"log_probs": [*map(rounded, self.log_probs)], "rewards": [*map(rounded, self.rewards)]}
        texts = {"prompt": self.prompt, "reply": self.reply} if answers else {}
        return {"source": self.source, "row": self.row, "measures": measures, **scores, **texts}


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


@dataclass(frozen=True)
class Evaluation:
    """`eval/<metric>` over all rows of all sources, `eval/<source>/<metric>`, what was measured of every row, and
    replies to fixed prompts."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)


@activity("the model was evaluated")
def evaluate(
    policy: Policy,
    reference: Reference | None,
    sources: Sequence[HeldOut],
    renderer: Renderer,
    settings: Eval,
    should_stop: Callable[[], bool] | None = None,
    *,
    micro_batch_tokens: int = 8192,
) -> Evaluation:
    """Evaluate the policy as it is now. Without a reference the metrics that compare with one are left out.

    Raises Interrupted, with nothing measured, within one batch or one generated token of `should_stop()` being true.
    """
    stop = should_stop or (lambda: False)
    evaluator = _Evaluator(policy, reference, renderer, settings, micro_batch_tokens, stop)
    overall, metrics, samples, items = Tally(), dict[str, float](), list[Sample](), list[Item]()
    with torch.no_grad(), evaluating(policy.module), preserved_rng(policy.device):
        if reference and reference.column:  # that of all sources at once: its model is loaded once
            encoded = (one for held in sources for row in islice(held.encoded, settings.rows) for one in row)
            if not reference.column.fill(encoded, batch_tokens=micro_batch_tokens, should_stop=stop):
                raise Interrupted
        for held in sources:
            tally, by_row = Tally(), dict[str, Item]()
            for row, scored in evaluator.score(held):
                item = by_row[row.id] = Item(held.name, row.id, prompt_text(row.prompt))
                item.log_probs = [one.log_prob for one in scored.completions]
                item.rewards = [one.reward for one in scored.completions]
                item.measures.add(measures := measured(scored))
                tally.add(measures)
            samples += evaluator.answer(held, tally, by_row)
            items += by_row.values()
            overall.add(tally)
            metrics |= {f"eval/{held.name}/{name}": value for name, value in tally.means().items()}
    return Evaluation({f"eval/{name}": value for name, value in overall.means().items()} | metrics, samples, items)


@dataclass(frozen=True)
class _Evaluator:
    """Scores and answers the rows of one source after the other."""

    policy: Policy
    reference: Reference | None
    renderer: Renderer
    settings: Eval
    micro_batch_tokens: int
    should_stop: Callable[[], bool]

    def score(self, held: HeldOut) -> list[tuple[Row, ScoredRow]]:
        """The first rows with every completion scored, whichever of them an objective would take."""
        rows = islice(zip(held.rows, held.encoded, strict=True), self.settings.rows)
        made = (make_example(row, encoded, number, 0, pointwise) for number, (row, encoded) in enumerate(rows))
        examples = [example for example in made if example is not None]
        if self.reference and (column := self.reference.column) is not None:
            examples = [replace(example, reference=tuple(map(column, example.encoded))) for example in examples]
        scored = ranks().map_shards(examples, self._score_shard)
        return list(zip((example.row for example in examples), scored, strict=True))

    def _score_shard(self, examples: Sequence[Example]) -> list[ScoredRow]:
        forward = self.reference.forward if self.reference else None
        scores: dict[int, list[Scored]] = {example.example: [] for example in examples}
        pad, layout = pad_id(self.renderer.tokenizer), self.policy.layout
        for batch in micro_batches(examples, self.micro_batch_tokens, pad, layout):
            if self.should_stop():
                raise Interrupted
            batch = batch.to(self.policy.device)
            lengths = batch.lengths.tolist()
            ours = self.policy(batch).log_probs.cpu().double().split(lengths)
            theirs = forward(batch).log_probs.cpu().double().split(lengths) if forward else [None] * len(lengths)
            numbers = batch.example[batch.row].tolist()
            for number, good, own, other in zip(numbers, batch.good.tolist(), ours, theirs, strict=True):
                reward = None if other is None else float((own - other).sum())
                scores[number].append(Scored(good, len(own), float(own.sum()), reward))
            report_progress(sum(map(bool, scores.values())), len(examples), "rows scored")
        rows = []
        for example in examples:
            # a completion that was cut to nothing is left out, and its pair with it
            parts = zip(example.parts, scores[example.example], strict=True)
            found = {part.completion: scored for part, scored in parts if scored.tokens}
            pair = pair_of(example.row)
            sides = (found[pair[0]], found[pair[1]]) if pair and found.keys() >= set(pair) else None
            rows.append(ScoredRow(tuple(found.values()), sides))
        return rows

    def answer(self, held: HeldOut, tally: Tally, items: dict[str, Item]) -> list[Sample]:
        """Answer prompts greedily: lengths and the checker's verdicts go to `tally` and, with the reply, to the row's
        item; the first replies are returned."""
        checked = self.settings.generate_rows if held.checker else 0
        rows = distinct_prompts(held.rows, max(self.settings.samples, checked))
        prompts = [self.renderer.start_ids(row) for row in rows]
        report_progress(0, len(prompts), f"prompts of {held.name} answered")
        replies = ranks().map_shards([(ids, 0) for ids in prompts], partial(self._complete, 0.0))
        texts = [self.renderer.said(reply.ids).content for reply in replies]
        verdicts = [Verdict({})] * len(rows)
        if held.checker:
            jobs = [(held.checker, row, text) for row, text in zip(rows, texts, strict=True)]
            verdicts = ranks().on_rank0(partial(judge_logged, held.name, jobs, self.policy.device))
        passed = self.passes(held, rows[:checked], prompts) if self.settings.draws else []
        samples = []
        for number, (row, reply, text, verdict) in enumerate(zip(rows, replies, texts, verdicts, strict=True)):
            measures: dict[str, Sum] = {"completion_length": (len(reply.ids), 1.0)}
            if number < checked:
                measures |= {name: (value, 1.0) for name, value in verdict.figures.items()}
                measures |= passed[number] if passed else {}
            tally.add(measures)
            item = items.setdefault(row.id, Item(held.name, row.id, prompt_text(row.prompt)))
            item.measures.add(measures)
            item.reply = text
            if number < self.settings.samples:
                answer = gold(row) if held.checker else row.answer
                samples.append(Sample(held.name, row.id, prompt_text(row.prompt), text, answer, verdict.figures))
        return samples

    def passes(self, held: HeldOut, rows: Sequence[Row], prompts: Sequence[list[int]]) -> list[dict[str, Sum]]:
        """Per row the chance that one of k answers at temperature 1 is right, k a power of two up to `eval.draws`: the
        unbiased estimate 1 - C(n - c, k) / C(n, k) of arXiv 2107.03374, eq. 1. Right: the checker's first figure is 1.
        """
        n = self.settings.draws
        requests = [(ids, number * n + one) for number, ids in enumerate(prompts[: len(rows)]) for one in range(n)]
        replies = ranks().map_shards(requests, partial(self._complete, 1.0))
        texts = [self.renderer.said(reply.ids).content for reply in replies]
        jobs = [(held.checker or "", rows[place // n], text) for place, text in enumerate(texts)]
        verdicts = ranks().on_rank0(partial(judge_logged, held.name, jobs, self.policy.device))
        chances = []
        for place in range(0, len(verdicts), n):
            firsts = [next(iter(v.figures.values())) for v in verdicts[place : place + n] if v.figures]
            wrong = sum(value < 1 for value in firsts)
            counts = [2**power for power in range(n.bit_length())] if firsts else []
            chances.append({f"pass@{k}": (1 - math.comb(wrong, k) / math.comb(n, k), 1.0) for k in counts})
        return chances

    def _complete(self, temperature: float, requests: Sequence[tuple[list[int], int]]) -> list[Reply]:
        """Answers to prompts, each with the number of its draws."""
        return complete(
            self.policy,
            [prompt for prompt, _ in requests],
            Sampling(temperature, max_new_tokens=self.settings.max_new_tokens),
            seed=0,
            numbers=[number for _, number in requests],
            stop_ids=self.renderer.stop_ids,
            pad_id=pad_id(self.renderer.tokenizer),
            batch_size=PROMPTS_PER_BATCH,
            should_stop=self.should_stop,
        )


def judge_logged(source: str, jobs: Sequence[tuple[Spec, Row, str]], device: torch.device) -> list[Verdict]:
    """The verdicts of a source's checker. How many answers it cannot judge, and why, is logged: they count as wrong, or
    not at all where the row lacks what they are judged by."""
    verdicts = judge(jobs, device)
    for (reason, counts), number in Counter((v.reason, bool(v.figures)) for v in verdicts if v.reason).items():
        effect = "scored 0" if counts else "left out"
        log.warning("%s: %d of %d answers %s: %s", source, number, len(verdicts), effect, reason)
    return verdicts


def distinct_prompts(rows: Sequence[Row], count: int) -> list[Row]:
    """The first `count` rows with different prompts: a prompt has one greedy answer, however many rows have it."""
    first: dict[tuple[Message, ...], Row] = {}
    for row in rows:
        if len(first) == count:
            break
        first.setdefault(row.prompt, row)
    return list(first.values())


def prompt_text(prompt: Sequence[Message]) -> str:
    """A prompt as text: a lone user turn as it is, a conversation with its roles."""
    if len(prompt) == 1:
        return prompt[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in prompt)


CAUSES = (
    "dropout is on in one of the two",
    "reference.path or a cached reference belongs to another model, template or precision",
    "the adapter does not start from zero",
)


def check_step_zero(policy_log_probs: Tensor, reference_log_probs: Tensor, tolerance: float) -> list[str]:
    """Compare log-probs of the same targets, (N,) each, before the first step, where policy and reference are equal.

    Returns the problem and its likely causes; [] where no token differs by more than `tolerance`.
    """
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
    problem = (
        f"policy and reference should be equal before the first step, but {count} of {total} log-probs differ by more "
        f"than {tolerance:g}, at most by {float(difference.max()):.3g}"
    )
    return [problem, *(f"likely: {cause}" for cause in CAUSES)]
