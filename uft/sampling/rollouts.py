"""Rollouts: completions that the policy samples of each step's prompts, scored by checkers, as rows to learn from.

A :class:`RolloutSampler` stands in the place of a :class:`RowSampler`: it draws the same rows in the same order and
hands on, for each, a row with the policy's own completions. Each completion is a function of the weights, its prompt
and its number in the run, so that a resumed run samples the same ones and no generator's state is kept.

Own completions are trained as the tokens that were drawn, never as text that was tokenised again, and the end token is
a target only if it was drawn: a completion that was cut must not teach the policy to stop there.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from uft.config.schema import Hint, Rollout
from uft.data.batch import Example, micro_batches
from uft.data.chat import Renderer, Tokens
from uft.data.loader import RowSampler
from uft.data.mixture import RowIndex
from uft.data.rows import Completion, Kind, Message, Row, Selected, Selection, View
from uft.data.table import kinds
from uft.data.tokens import TokenizedSource
from uft.distributed import ranks
from uft.errors import Problem, raise_problems
from uft.heartbeat import activity
from uft.model.load import pad_id
from uft.model.policy import evaluating
from uft.objectives.policy_gradient import SPREAD
from uft.objectives.views import GOOD_ENOUGH, demonstrations
from uft.rewards import Spec, judge, make, parts
from uft.sampling.engines import Engine
from uft.sampling.generate import Reply, uniforms

log = logging.getLogger(__name__)
Figures = Mapping[str, float]

SAMPLED_BY_POLICY = "policy"
"""`Completion.sampled_by` of own completions."""
HINTS = 2**63
"""Added to a row's number for the draw of its hint, which must not be that of a completion."""


@dataclass(frozen=True)
class Group:
    """A drawn row and the policy's completions of its prompt; none where its source is not sampled."""

    draw: RowIndex
    hint: int = 0  # tokens of the demonstration that the prompt was followed by
    replies: tuple[Reply, ...] = ()
    figures: tuple[Figures, ...] = ()  # the checker's, of each; () where the source has no checker
    scores: tuple[float, ...] = ()
    old: tuple[tuple[float, ...], ...] = ()  # log-probs of each's tokens when it was sampled, by the trainer
    spread: float = 0.0  # of all scores of its step

    @property
    def flat(self) -> bool:
        """Whether all scores are equal, so that every advantage is 0."""
        return len(set(self.scores)) == 1


STEPS = TypeAdapter(list[list[Group]])
"""Groups by optimiser step, as a checkpoint has them."""


@dataclass(eq=False)
class RolloutSampler:
    """Draws rows and samples the policy's completions of their prompts, `rollout.prompts` rows at a time.

    `take` gives the examples of a step; `_sample` fills `waiting` with the groups of the next steps: it draws rows
    (`_draw`), scores completions (`_score`) and keeps old log-probs. `example` turns a group into what is trained on.
    """

    sampler: RowSampler
    engine: Engine
    _: KW_ONLY
    views: Mapping[Kind, View]  # the objective's own
    sampled: Mapping[str, Spec | None]  # the sources that are sampled, with their checkers
    batch_size: int
    total_rows: int
    tokens_per_pass: int
    keeps_old: bool  # whether updates after the first of a rollout need the log-probs that its tokens had
    drawn: int = 0  # rows, refills among them
    wanted: int = 0  # rows of all steps, without refills
    rollouts: int = 0
    waiting: list[list[Group]] = field(default_factory=list)  # sampled and not yet trained on, by optimiser step
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)  # sum and count since they were last taken
    seconds: float = 0.0  # all the time that sampling took
    latest: list[Group] = field(default_factory=list)  # of the step that was taken last
    reasons: set[str] = field(default_factory=set)  # why completions could not be judged, as far as it was logged

    def __post_init__(self) -> None:
        context = self.engine.context
        self.policy, self.renderer = context.policy, context.renderer
        self.settings, self.seed = context.rollout, context.seed
        self.prompts = self.settings.prompts or self.batch_size
        self.keeps_old = self.keeps_old and self.prompts > self.batch_size

    # --- the interface of a RowSampler

    def take(self, rows: int) -> list[Example]:
        """The examples of the next step of `rows` rows; fewer where groups of equal scores could not be replaced."""
        if not self.waiting:
            self._sample(max(rows, min(self.prompts, self.total_rows - self.wanted)))
        groups, *self.waiting = self.waiting
        self.latest = [group for group in groups if group.replies]
        return [example for group in groups if (example := self.example(group)) is not None]

    def mismatched(self, examples: Sequence[Example]) -> list[Example]:
        return self.sampler.mismatched(examples)

    def state_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("drawn", "wanted", "rollouts")}
        waiting = [[asdict(group) for group in step] for step in self.waiting]
        return {"rows": self.sampler.state_dict(), **counts, "waiting": waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sampler.load_state_dict(state["rows"])
        self.drawn, self.wanted, self.rollouts = state["drawn"], state["wanted"], state["rollouts"]
        self.waiting = STEPS.validate_python(state["waiting"])

    # --- one rollout: draw rows, sample, score, replace groups of equal scores, keep old log-probs

    @activity("completions were sampled")
    def _sample(self, rows: int) -> None:
        """Sample the groups of the next `rows` rows. Further draws replace groups of equal scores (`refill`)."""
        started, groups = time.perf_counter(), list[Group]()
        self.rollouts += 1
        self.wanted += rows
        for attempt in range(1 + self.settings.refill):
            self._add("refills", float(attempt > 0), count=attempt == 0)
            drawn = self._score(self._draw(rows - len(groups)))
            self._measure(drawn)
            groups += [group for group in drawn if not (group.flat and self.settings.refill)]
            if len(groups) == rows:
                break
        if self.keeps_old:  # later updates divide by the log-probs that tokens have under the policy as it is
            sampled = [group for group in groups if group.replies]
            old = iter(ranks().map_shards(sampled, self._old_log_probs))
            groups = [replace(group, old=next(old)) if group.replies else group for group in groups]
        for start in range(0, rows, self.batch_size):
            step = groups[start : start + self.batch_size]
            scores = [score for group in step for score in group.scores]
            spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
            self.waiting.append([replace(group, spread=spread) for group in step])
        self.seconds += time.perf_counter() - started

    def _draw(self, rows: int) -> list[Group]:
        """The next `rows` rows with completions of their prompts, shared out over ranks, not scored yet."""
        each, first, draws = self.settings.completions, self.drawn, self.sampler.mixture.take(rows)
        self.drawn += rows
        hinted = [(draw, self._hint(draw, number)) for number, draw in enumerate(draws, first)]
        requests = [
            (draw, hint, number * each + one)
            for number, (draw, hint) in enumerate(hinted, first)
            for one in range(each if self._is_sampled(draw) else 0)
        ]
        replies = iter(ranks().map_shards(requests, self._complete))
        return [
            Group(draw, hint, tuple(islice(replies, each))) if self._is_sampled(draw) else Group(draw)
            for draw, hint in hinted
        ]

    def _is_sampled(self, draw: RowIndex) -> bool:
        """Whether its source is sampled, and the objective can use what the row becomes."""
        return self._source(draw).source in self.sampled and self.sampler.is_usable(draw)

    def _source(self, draw: RowIndex) -> TokenizedSource:
        return self.sampler.sources[draw.source]

    def _hint(self, draw: RowIndex, number: int) -> int:
        """Length in tokens of the hint behind a prompt; `number`: of the drawn row in the run."""
        settings, source = self.settings.hint, self._source(draw)
        if settings.schedule == "none" or source.source not in self.sampled:
            return 0
        ends = piece_ends(demonstration_tokens(source, draw.index), settings, self.renderer)
        cuts = cut_points(len(ends), settings.chunks)
        last = max(1, round(settings.until * math.ceil(self.total_rows / self.prompts)))
        draw_of_hint = float(uniforms(self.seed, HINTS + number, 1)[0])
        chunks = chunks_shown(settings, len(cuts) - 1, self.rollouts, last, draw_of_hint)
        return ends[cuts[chunks] - 1] if cuts[chunks] else 0

    def _complete(self, requests: Sequence[tuple[RowIndex, int, int]]) -> list[Reply]:
        """The completions of this rank's share of (row, tokens of its hint, number of the completion in the run)."""
        prompts = [[*prompt, *hint] for prompt, hint in (self._prompt(*one[:2]) for one in requests)]
        return self.engine.complete(prompts, [number for _, _, number in requests]) if prompts else []

    def _prompt(self, draw: RowIndex, hint: int) -> tuple[list[int], list[int]]:
        """Token ids of a row's prompt, as they are trained, and of the first `hint` tokens of its demonstration."""
        tokens = demonstration_tokens(self._source(draw), draw.index)
        end = tokens.prompt_length
        return tokens.ids[:end].tolist(), tokens.ids[end : end + hint].tolist()

    def _score(self, groups: Sequence[Group]) -> list[Group]:
        """Groups with the checker's figures and scores, where their source has a checker."""
        specs = [self.sampled[self._source(group.draw).source] if group.replies else None for group in groups]
        jobs = []
        for group, spec in zip(groups, specs, strict=True):
            if spec is not None:
                row, hint = self._source(group.draw).rows[group.draw.index], self._prompt(group.draw, group.hint)[1]
                jobs += [(spec, row, self.renderer.said(hint + reply.ids).content) for reply in group.replies]
        judged = ranks().on_rank0(lambda: judge(jobs, self.policy.device))
        self._add("unjudged", *(verdict.reason is not None for verdict in judged))
        for reason in {verdict.reason for verdict in judged if verdict.reason} - self.reasons:
            log.warning("rollouts: completions that cannot be judged are scored 0: %s", reason)
            self.reasons.add(reason)
        verdicts, scored = iter(judged), []
        for group, spec in zip(groups, specs, strict=True):
            if spec is not None:
                figures, weights = tuple(next(verdicts).figures for _ in group.replies), weights_of(self.settings, spec)
                group = replace(group, figures=figures, scores=tuple(score_of(one, weights) for one in figures))
            scored.append(group)
        return scored

    @torch.no_grad()
    def _old_log_probs(self, groups: Sequence[Group]) -> list[tuple[tuple[float, ...], ...]]:
        """Of each group, the log-probs of every completion's tokens under the policy as it is."""
        whole = [
            Example(number, row, tuple(map(Selected, range(len(row.completions)))), encoded)
            for number, (row, encoded) in enumerate(self.row(group, shown=False) for group in groups)
        ]
        by_group: dict[int, list[tuple[float, ...]]] = {number: [] for number in range(len(groups))}
        pad = pad_id(self.renderer.tokenizer)
        with evaluating(self.policy.module):
            for batch in micro_batches(whole, self.tokens_per_pass, pad, self.policy.layout):
                log_probs = self.policy(batch.to(self.policy.device)).log_probs.cpu().split(batch.lengths.tolist())
                for number, values in zip(batch.example[batch.row].tolist(), log_probs, strict=True):
                    by_group[number].append(tuple(values.tolist()))
        return [tuple(by_group[number]) for number in range(len(groups))]

    # --- from a group to a row, and to what the objective takes of it

    def row(self, group: Group, shown: bool = True) -> tuple[Row, tuple[Tokens, ...]]:
        """A group as a row, with its completions' tokens: demonstrations or a hint (if `shown`), then own ones."""
        source, draw = self._source(group.draw), group.draw
        row, encoded = source.rows[draw.index], source.encoded[draw.index]
        prompt, hint = self._prompt(draw, group.hint)
        beside: list[tuple[Completion, Tokens]] = []  # demonstrations, or the hint
        if shown and self.settings.hint.schedule == "none":
            beside = [(Completion(row.completions[i].turns), encoded[i]) for i in demonstrations(row)]
        elif shown and hint:
            beside = [(Completion((self.renderer.said(hint),)), _tokens(prompt, hint))]
        own = []
        for number, reply in enumerate(group.replies):
            ids = reply.ids if reply.end is None else [*reply.ids, reply.end]
            learned = reply.stopped or self.settings.truncated == "keep"
            completion = Completion(
                (self.renderer.said([*hint, *reply.ids]),),
                sampled_by=SAMPLED_BY_POLICY,
                score=group.scores[number] if group.scores else None,
                log_prob=reply.log_prob,
                annotations={SPREAD: group.spread} if group.scores else {},
            )
            own.append((completion, _tokens([*prompt, *hint], ids, learned)))
        completions, tokens = zip(*beside, *own, strict=True)
        return replace(row, completions=completions), tokens

    def example(self, group: Group) -> Example | None:
        """What the objective takes of a group; None: nothing."""
        if not group.replies:
            return next(iter(self.sampler.examples_of([group.draw])), None)
        row, tokens = self.row(group)
        view = self.views.get(row.kind)
        parts = (view(row, group.draw.visit) if view else None) or ()
        if not parts:
            return None
        before = len(tokens) - len(group.replies)

        def column(values: Sequence[Sequence[float]]) -> tuple[np.ndarray, ...]:
            """Per part, (targets,): 0 for what was not sampled."""
            known = [np.zeros(one.targets, np.float32) for one in tokens]
            for number, own in enumerate(values, before):
                if tokens[number].targets:
                    known[number] = np.array(own, np.float32)
            return tuple(known[part.completion] for part in parts)

        columns = {"sampler": column([reply.log_probs for reply in group.replies])}
        columns |= {"old": column(group.old)} if group.old else {}
        number = self.sampler.first_example[group.draw.source] + group.draw.index
        return Example(number, row, parts, tuple(tokens[part.completion] for part in parts), None, columns)

    # --- metrics

    def _measure(self, groups: Iterable[Group]) -> None:
        """Add sums and counts of these groups to `metrics`, under the names that the metric lines have."""
        groups = [group for group in groups if group.replies]
        lengths = [len(reply.log_probs) for group in groups for reply in group.replies]
        if not lengths:
            return
        self._add("length", *lengths)
        self._add("length_min", min(lengths))
        self._add("length_max", max(lengths))
        self._add("cut", *(not reply.stopped for group in groups for reply in group.replies))
        if self.settings.hint.schedule != "none":
            self._add("hint", *(group.hint for group in groups))
        scored = [group for group in groups if group.scores]
        parts = {"reward": [group.scores for group in scored]}
        for name in dict.fromkeys(name for group in scored for found in group.figures for name in found):
            parts[name] = [tuple(found.get(name, 0.0) for found in group.figures) for group in scored]
        for name, values in parts.items() if scored else ():
            self._add(name, *(value for group in values for value in group))
            self._add(f"{name}_std", *(float(np.std(group, ddof=1)) for group in values if len(group) > 1))
        self._add("flat", *(group.flat for group in scored))
        self._add("solved", *(score >= GOOD_ENOUGH for group in scored for score in group.scores))

    def _add(self, name: str, *values: float, count: int | None = None) -> None:
        total, number = self.metrics.get(f"rollout/{name}", (0.0, 0.0))
        self.metrics[f"rollout/{name}"] = (total + sum(values), number + (len(values) if count is None else count))

    def pop_metrics(self) -> dict[str, tuple[float, float]]:
        """name -> sum and count since the last call."""
        metrics, self.metrics = self.metrics, {}
        return metrics


# --- Scores of completions, and tokens of rows.


def weights_of(settings: Rollout, spec: Spec) -> Mapping[str, float]:
    """Figures of a checker and what they count in a score; nothing said, the first alone."""
    return {name: weight for name, weight in settings.reward.items() if weight} or {figures_of(spec)[0]: 1.0}


def score_of(figures: Figures, weights: Mapping[str, float]) -> float:
    return min(1.0, sum(weight * figures.get(name, 0.0) for name, weight in weights.items()))


def figures_of(spec: Spec) -> list[str]:
    """The names of the figures that a checker gives."""
    return [figure for part in parts(spec) for figure in make(part).figures]


def _tokens(prompt: Sequence[int], ids: Sequence[int], learned: bool = True) -> Tokens:
    supervised = np.arange(len(prompt) + len(ids)) >= len(prompt)
    return Tokens(np.array([*prompt, *ids], np.int32), supervised & learned, len(prompt))


def demonstration_places(row: Row) -> list[int]:
    """The completions that stand as demonstrations of a row that is sampled: the good ones, else its first, if any."""
    return demonstrations(row) or [*range(len(row.completions))][:1]


def demonstration_tokens(source: TokenizedSource, index: int) -> Tokens:
    """The tokens of a row's first demonstration, or of its prompt alone."""
    return source.encoded[index][(demonstration_places(source.rows[index]) or [0])[0]]


# --- Hints: how much of a demonstration is shown (UFT, arXiv 2505.16984).


ENDS = {"line": re.compile(r"\n"), "sentence": re.compile(r"[.!?]['\")\]]*\s*$|\n"), "token": re.compile("")}


def piece_ends(tokens: Tokens, settings: Hint, renderer: Renderer) -> list[int]:
    """Ends of the pieces of a demonstration that may be shown, in tokens after the prompt."""
    ids = tokens.ids[tokens.prompt_length :].tolist()
    while ids and ids[-1] in renderer.stop_ids:
        ids.pop()
    texts = renderer.tokenizer.batch_decode([[one] for one in ids])
    ends = [n for n, text in enumerate(texts, 1) if ENDS[settings.cut].search(text)]
    ends += [len(ids)] if ids and ends[-1:] != [len(ids)] else []
    return ends[: max(0, len(ends) - settings.keep_last)]


def cut_points(count: int, chunks: int) -> list[int]:
    """Where a demonstration of so many pieces is cut: entry l, the pieces of a hint of l chunks."""
    whole = min(chunks, count)
    return [round(k * count / whole) for k in range(whole)] + [count] if whole else [0]


def chunks_shown(settings: Hint, chunks: int, rollout: int, last: int, uniform: float) -> int:
    """Chunks of a hint, out of `chunks`, in a rollout counted from 1; `uniform` in [0, 1) is the row's draw.

    cosine: binomial, with a chance that falls from `high` to `low` at rollout `last`; staged: one fewer at equal
    distances; uniform: any number, in all rollouts.
    """
    if settings.schedule == "uniform":
        return int(uniform * (chunks + 1))
    if rollout > last:
        return 0
    if settings.schedule == "staged":
        return max(0, chunks - rollout // max(1, last // (chunks + 1)))
    chance = settings.low + (settings.high - settings.low) / 2 * (1 + math.cos(math.pi * rollout / last))
    each = [math.comb(chunks, k) * chance**k * (1 - chance) ** (chunks - k) for k in range(chunks + 1)]
    return min(chunks, int(np.searchsorted(np.cumsum(each), uniform, side="right")))


# --- Before the first step: what the objective will take of rows that are not sampled yet, and what cannot be.


def expected_views(views: Mapping[Kind, View], settings: Rollout, sampled: Mapping[str, Any]) -> dict[Kind, View]:
    """Views of the rows as they are: what `views` take of the rows that they become, a demonstration standing for each
    own completion. Scores alternate between 1 and 0. `sampled`: sources that are sampled, with a checker or None.
    None for a prompt alone, of whose own completions `views` take nothing."""

    def expected(row: Row, visit: int) -> Selection | None:
        if row.source not in sampled:
            view = views.get(row.kind)
            return view(row, visit) if view else None
        shown = demonstration_places(row)
        turns = row.completions[0].turns if row.completions else (Message("assistant", ""),)
        scores = (float(i % 2 == 0) if sampled[row.source] is not None else None for i in range(settings.completions))
        own = [Completion(turns, sampled_by=SAMPLED_BY_POLICY, score=score, log_prob=-1.0) for score in scores]
        made = replace(row, completions=(*(Completion(row.completions[i].turns) for i in shown), *own))
        view = views.get(made.kind)
        parts = view(made, visit) if view else None
        if parts is None or (not row.completions and (not parts or sampled[row.source] is None)):
            return None
        places = [*shown, *(shown[:1] or [0]) * len(own)]
        return tuple(replace(part, completion=places[part.completion]) for part in parts)

    return dict.fromkeys(Kind, expected)


def refuse_unscored(
    sources: Sequence[TokenizedSource],
    views: Mapping[Kind, View],
    settings: Rollout,
    sampled: Mapping[str, Spec | None],
    max_length: int,
    renderer: Renderer,
    name: str,
) -> None:
    """Raise UftError with everything that stands in the way of sampling these sources for objective `name`.

    That is: no checker, or one without the figures that the reward asks for or without a verdict on a row; prompts with
    no room for a completion; demonstrations of which no hint can be shown.
    """
    problems, hints = list[Problem](), settings.hint.schedule != "none"
    showing = set[str]()  # sources with a demonstration of which a hint can be shown
    for source in sources if hints else ():
        demonstrated = (demonstration_tokens(source, place) for place in range(len(source.rows)))
        if any(piece_ends(tokens, settings.hint, renderer) for tokens in demonstrated):
            showing.add(source.source)
    for source in sources:
        if source.source not in sampled or not len(source.rows):
            continue
        key, spec = f"data.sources.{source.source}", sampled[source.source]
        unsampled = f"{key}.rollout=false   (its rows as they are)"
        if spec is None and Kind.NEGATIVES not in views:
            why = f"objective={name} learns from scores, and this source has no checker that gives them"
            problems.append(Problem(key, why, advice=(f"{key}.checker=final_number", unsampled)))
        elif spec is not None:
            problems += unjudged(key, source.rows, spec, weights_of(settings, spec), unsampled)
        room = source.encoded.longest_sides[0] + settings.max_new_tokens
        if room > max_length:
            why = f"a prompt with rollout.max_new_tokens={settings.max_new_tokens} has up to {room} tokens"
            problems.append(Problem(key, why, advice=(f"train.max_length={room}",)))
        prompts = set(kinds(source.rows)) == {Kind.PROMPT}
        if hints and source.source not in showing and not (prompts and showing):
            why = f"no demonstration has a piece to show: {settings.hint.keep_last} of its last are kept back"
            advice = ("rollout.hint.cut=token", "rollout.hint.schedule=none")
            problems.append(Problem(key, why, advice=advice))
    raise_problems(problems)


PROBE = "1"
"""A reply that every parser reads, so that it looks at all that a row says."""


def unjudged(
    key: str, rows: Sequence[Row], spec: Spec, weights: Mapping[str, float], *advice: str
) -> Iterator[Problem]:
    """The figures that a source's checker does not give, and, with `advice`, the rows whose replies it cannot judge; no
    model is names."""
    given = figures_of(spec)
    for name in (name for name in weights if name not in given):
        why = f"the checker of {key} does not give it"
        yield Problem(f"rollout.reward.{name}", why, advice=(f"it gives: {', '.join(given)}",))
    names = [part for part in parts(spec) if not hasattr(make(part), "path")]
    verdicts = judge([(names, row, PROBE) for row in rows]) if names else []
    silent = [(row, found) for row, found in zip(rows, verdicts, strict=False) if not found.figures]
    if silent:
        (row, found), *_ = silent
        why = f"{len(silent):,} of {len(rows):,} rows cannot be judged, so that replies have no score: {found.reason}"
        yield Problem(key, why, row.id, advice)
