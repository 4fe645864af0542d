"""Completions that the policy samples while it trains: what is trained of them, and that nothing but weights, prompt
and number decides what they are."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from dying import LORA, UNEVEN, StopAt, lines
from stage_runs import sit, survive, written

from uft import rewards
from uft.data.rows import Role
from uft.errors import GOOD, STOPPED, UftError
from uft.runs import Run
from uft.sampling.rollouts import chunks_shown, cut_points, piece_ends

STEPS = ("train.steps=6", "optim.lr=0.01")
OWN = ("rollout.completions=3", "rollout.max_new_tokens=5")


def even_words(row, reply):
    """The share of a reply's words with an even number."""
    words = [int(word[1:]) % 2 == 0 for word in reply.split()]
    return {"exact_match": sum(words) / len(words) if words else 0.0, "long": float(len(words) > 3)}


@pytest.fixture(autouse=True)
def judged_by(monkeypatch):
    """judged_by(rule): the checker `exact` of these runs, `even_words` to begin with."""

    def register(rule):
        class Rule(rewards.Checker):
            figures = ("exact_match", "long")
            judge = staticmethod(rule)

        monkeypatch.setitem(rewards.checkers(), "exact", Rule)
        rewards._made.cache_clear()

    register(even_words)
    yield register
    rewards._made.cache_clear()


@pytest.fixture
def rollouts(configure, files):
    """rollouts("grpo", ...): a configuration that samples the prompts of the demonstrations."""

    def make(objective, *settings, checker="exact", own=OWN, more=()):
        sources = {"shown": files["demonstration"], **{kind: files[kind] for kind in more}}
        config = configure(objective, *own, *settings, sources=sources)
        shown = replace(config.data.sources["shown"], checker=checker)
        others = {kind: replace(config.data.sources[kind], rollout=False) for kind in more}
        return replace(config, data=replace(config.data, sources={"shown": shown, **others}))

    return make


@pytest.fixture
def built(rollouts, tmp_path):
    from uft.runs import create_run
    from uft.training.setup import Work, prepare

    def make(*arguments, **options):
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        return prepare(create_run(folder, "{}\n", []), Work(rollouts(*arguments, **options)))

    return make


def curve(folder, *names):
    return [[line[name] for name in names] for line in lines(Run(folder).metrics_file) if names[0] in line]


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("grpo", ("train.packing=packed",)),
        ("dr_grpo", ("train.packing=padded", *LORA)),
        ("uft_rl", ("rollout.hint.schedule=cosine", "rollout.hint.cut=token", "rollout.hint.until=1.0")),
    ],
)
def test_what_is_trained_is_what_was_sampled(objective, settings, rollouts, tmp_path):
    """The trainer's log-probs are the sampler's at every step: no other weights, mask, template, tokens or dropout.

    The adapter has dropout in training, and so has the gap; LoRA's own is left out here.
    """
    settings = [s for s in settings if "dropout" not in s]
    config = rollouts(objective, *STEPS, *settings, "train.log_every=1")
    assert sit(tmp_path / "run", config) == GOOD
    gaps = [gap for (gap,) in curve(tmp_path / "run", "objective/sampler_gap")]
    assert len(gaps) == 6
    assert max(gaps) < 1e-5
    if objective == "uft_rl":
        assert max(hint for (hint,) in curve(tmp_path / "run", "rollout/hint")) > 0


def test_completions_do_not_depend_on_their_batch_and_differ_by_seed(rollouts, tmp_path):
    """The first step: after it, weights may differ in their last bits, since kernels round by shape."""
    names = ("rollout/reward", "rollout/length", "rollout/cut", "rollout/length_max")
    found = {}
    for name, changes in {
        "together": ("rollout.batch_size=64",),
        "alone": ("rollout.batch_size=1",),
        "another seed": ("seeds.sampling=5",),
        "more completions": ("rollout.completions=4",),
    }.items():
        assert sit(tmp_path / name, rollouts("grpo", "train.steps=1", *changes)) == GOOD
        found[name] = curve(tmp_path / name, *names)
    assert found["together"] == found["alone"]
    assert found["together"] != found["another seed"]


@pytest.mark.slow
def test_a_rewarded_habit_is_learned(rollouts, tmp_path):
    config = rollouts("grpo", "train.steps=60", "optim.lr=0.02", "train.log_every=20", own=("rollout.completions=8",))
    config = replace(config, rollout=replace(config.rollout, max_new_tokens=4))
    assert sit(tmp_path / "run", config) == GOOD
    rewards = [reward for (reward,) in curve(tmp_path / "run", "rollout/reward")]
    assert rewards[0] < 0.6
    assert rewards[-1] > 0.95


# --- resuming


BUFFERED = ("rollout.prompts=15", "eval.rows=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "settings", "stride"),
    [
        ("gspo", BUFFERED, 60),
        pytest.param("uft_rl", (*BUFFERED, "rollout.hint.schedule=staged"), 7, marks=pytest.mark.slow),
    ],
)
def test_death_at_any_moment_changes_nothing(objective, settings, stride, rollouts, death, tmp_path):
    cut = ("rollout.hint.cut=token",) if "hint" in str(settings) else ()
    config = rollouts(objective, "train.steps=7", *UNEVEN, *settings, *cut)
    expected = written(survive(tmp_path / "whole", config, death))
    for moment in range(3, len(death.moments), stride):
        assert written(survive(tmp_path / f"died-{moment}", config, death, moment)) == expected, moment


@pytest.mark.slow
def test_a_stop_at_any_token_changes_nothing(rollouts, tmp_path):
    config = rollouts("dapo", "train.steps=5", *UNEVEN, *BUFFERED, "rollout.refill=1", "eval.samples=0")
    watch = StopAt()
    assert sit(tmp_path / "whole", config, watch) == GOOD
    expected = written(tmp_path / "whole")
    for number in range(2, watch.looks - 1, 17):
        folder = tmp_path / f"stopped-{number}"
        assert sit(folder, config, StopAt(number)) == STOPPED, number
        assert sit(folder, config) == GOOD
        assert written(folder) == expected, number


# --- the rows of a step


def examples(prepared, rows=8):
    return prepared.trainer.rollouts.take(rows)


def test_the_end_is_a_target_only_where_it_was_drawn(built):
    for truncated in ("keep", "mask"):
        prepared = built("luffy", "rollout.max_new_tokens=30", f"rollout.truncated={truncated}")
        stops, cut, ended = prepared.trainer.rollouts.renderer.stop_ids, 0, 0
        for example in examples(prepared):
            shown, *own = zip(example.parts, example.encoded, strict=True)
            assert shown[0].role is Role.POSITIVE
            assert shown[1].ids[-1] in stops  # a demonstration has its end
            for part, tokens in own:
                assert part.role is Role.OWN
                learned = tokens.ids[tokens.supervised]
                assert (tokens.ids[: tokens.prompt_length] == shown[1].ids[: tokens.prompt_length]).all()
                is_cut = tokens.ids[-1] not in stops
                assert len(learned) == (0 if is_cut and truncated == "mask" else len(tokens.ids) - tokens.prompt_length)
                cut, ended = cut + is_cut, ended + (not is_cut)
        assert cut
        assert ended


def test_scores_are_weighted_figures(built):
    weights = ("rollout.reward.exact_match=0.5", "rollout.reward.long=0.25")
    prepared = built("grpo", *weights)
    examples(prepared)
    for group in prepared.trainer.rollouts.latest:
        for figures, score in zip(group.figures, group.scores, strict=True):
            assert score == pytest.approx(0.5 * figures["exact_match"] + 0.25 * figures["long"])


def test_old_log_probs_are_those_of_the_weights_that_sampled(rollouts, tmp_path):
    config = rollouts("gspo", *STEPS, "rollout.prompts=16", "train.log_every=1", "optim.lr=0.05")
    assert sit(tmp_path / "run", config) == GOOD
    ratios = [ratio for (ratio,) in curve(tmp_path / "run", "objective/ratio")]
    assert ratios[::2] == pytest.approx([1.0] * 3, abs=1e-5)  # the first of two updates with one rollout
    assert all(abs(ratio - 1) > 1e-4 for ratio in ratios[1::2])


def test_flat_groups_are_replaced_as_often_as_allowed(built, judged_by):
    judged_by(lambda row, reply: {"exact_match": float(row.index % 2 and len(reply) % 2), "long": 0.0})
    drawn = {}
    for refill in (0, 3):
        prepared = built("dapo", f"rollout.refill={refill}", "train.steps=4")
        examples(prepared)
        latest = prepared.trainer.rollouts.latest
        drawn[refill] = prepared.trainer.rollouts.drawn
        assert any(group.flat for group in latest) == (refill == 0)
    assert drawn[0] == 8
    assert drawn[3] > 8


def test_a_rollout_serves_as_many_updates_however_often_it_was_refilled(rollouts, tmp_path, judged_by):
    judged_by(lambda row, reply: {"exact_match": float(len(reply) % 2), "long": 0.0})
    buffered = ("train.steps=8", "train.batch_size=4", "rollout.prompts=8", "rollout.refill=3", "train.log_every=1")
    assert sit(tmp_path / "run", rollouts("gspo", *buffered, "optim.lr=0.01")) == GOOD
    drawn = [line["step"] for line in lines(Run(tmp_path / "run").metrics_file) if "rollout/refills" in line]
    assert drawn == [1, 3, 5, 7]


def test_completions_that_cannot_be_judged_are_told(rollouts, tmp_path, judged_by, caplog):
    def rule(row, reply):
        if len(reply.split()) > 3:
            raise ValueError("too much of it")
        return even_words(row, reply)

    judged_by(rule)
    assert sit(tmp_path / "run", rollouts("grpo", "train.steps=2", "train.log_every=1")) == GOOD
    assert all(0 < share <= 1 for (share,) in curve(tmp_path / "run", "rollout/unjudged"))
    assert caplog.text.count("are scored 0: ValueError: too much of it") == 1


def test_rows_of_a_source_that_is_not_sampled_pass_as_they_are(built):
    prepared = built("chord_mu", more=("preference",))
    found = {}
    for example in examples(prepared):
        found.setdefault(example.row.source, set()).update(Role(part.role).name for part in example.parts)
    assert found == {"shown": {"POSITIVE", "OWN"}, "preference": {"POSITIVE"}}


def test_without_a_checker_own_completions_are_negatives(built):
    prepared = built("irft", "rollout.completions=2", checker=None)
    for example in examples(prepared):
        assert [Role(part.role).name for part in example.parts] == ["POSITIVE", "NEGATIVE", "NEGATIVE"]
        assert example.row.kind.value == "negatives"


def test_own_completions_are_shown_with_their_advantage(rollouts, tmp_path):
    assert sit(tmp_path / "run", rollouts("grpo", "train.steps=1", "train.eval_every=0")) == GOOD
    own = [line for line in lines(Run(tmp_path / "run").samples_file) if line["source"] == "shown (own)"]
    assert len(own) == 3
    assert {*own[0]["verdict"]} == {"exact_match", "long", "reward", "advantage"}
    assert sum(line["verdict"]["advantage"] for line in own) == pytest.approx(0, abs=1e-5)


def test_what_cannot_be_sampled_is_told_before_the_first_step(built):
    def told(*arguments, **options):
        with pytest.raises(UftError) as error:
            built(*arguments, **options)
        return str(error.value)

    assert "has no checker" in (text := told("grpo", checker=None))
    assert "data.sources.shown.checker=" in text
    assert "rollout.reward.right" in (text := told("grpo", "rollout.reward.right=1.0"))
    assert "exact_match, long" in text
    text = told("grpo", "train.max_length=20", "rollout.max_new_tokens=18")
    assert "train.max_length=" in text
    text = told("grpo", "train.max_length=200", "rollout.max_new_tokens=60")
    assert "the model has 64 positions" in text
    assert re.search(r"rollout\.max_new_tokens=5\d", text.partition("positions")[2])
    text = told("uft_rl", "rollout.hint.schedule=cosine", "rollout.hint.cut=line")
    assert "rollout.hint.cut=token" in text
    assert "no cache" in told("grpo", "objective.kl=0.1", "reference.mode=cached")


def test_a_row_without_a_verdict_is_told(built, judged_by):
    def rule(row, reply):
        if row.index == 3:
            raise rewards.Unjudged("it has no answer")
        return even_words(row, reply)

    judged_by(rule)
    with pytest.raises(UftError, match=r"1 of 12 rows cannot be judged.*it has no answer"):
        built("grpo")


# --- hints


def test_hints_are_cut_and_drawn_as_specified(built):
    cuts = {3: [0, 1, 2, 3], 4: [0, 1, 2, 3, 4], 7: [0, 1, 3, 4, 6, 7], 9: [0, 2, 4, 5, 7, 9], 12: [0, 2, 5, 7, 10, 12]}
    assert {count: cut_points(count, 5) for count in cuts} == cuts
    assert cut_points(30, 5) == [0, 6, 12, 18, 24, 30]
    assert cut_points(0, 5) == [0]
    prepared = built("uft_rl", "rollout.hint.schedule=cosine", "rollout.hint.cut=token")
    hint = prepared.trainer.config.rollout.hint
    assert [chunks_shown(hint, 5, 75, 300, u) for u in (0.0005, 0.1, 0.5, 0.9)] == [1, 3, 4, 5]
    draws = np.random.default_rng(0).random(4000)
    for t, chance in ((1, 0.949975), (100, 0.725), (250, 0.110289)):
        mean = np.mean([chunks_shown(hint, 5, t, 300, float(u)) for u in draws])
        assert mean == pytest.approx(5 * chance, abs=4 * math.sqrt(5 * chance * (1 - chance) / 4000))
    assert chunks_shown(hint, 5, 301, 300, 0.999) == 0
    staged = replace(hint, schedule="staged")
    assert [chunks_shown(staged, 5, t, 300, 0.5) for t in (1, 50, 100, 150, 200, 250)] == [5, 4, 3, 2, 1, 0]
    uniform = replace(hint, schedule="uniform")
    assert [chunks_shown(uniform, 5, 9999, 300, u) for u in (0.0, 0.5, 0.999)] == [0, 3, 5]
    source = prepared.trainer.sampler.sources[0]
    tokens, renderer = source.encoded[0][0], prepared.data.dataset.renderer
    words = len(source.rows[0].completions[0].text.split())
    assert piece_ends(tokens, hint, renderer) == list(range(1, words))  # the last is never shown
    assert piece_ends(tokens, replace(hint, keep_last=0), renderer) == list(range(1, words + 1))


def test_a_hint_is_the_same_for_a_row_and_learned_once(built):
    settings = ("rollout.hint.schedule=uniform", "rollout.hint.cut=token", "rollout.hint.keep_last=0")
    prepared = built("uft_rl", *settings)
    seen = 0
    for example in examples(prepared):
        shown = [
            tokens for part, tokens in zip(example.parts, example.encoded, strict=True) if part.role == Role.POSITIVE
        ]
        own = [tokens for part, tokens in zip(example.parts, example.encoded, strict=True) if part.role == Role.OWN]
        assert len(own) == 3
        starts = {tuple(tokens.ids[: tokens.prompt_length]) for tokens in own}
        assert len(starts) == 1
        for hint in shown:  # all of the hint and no end
            assert tuple(hint.ids) in starts
            assert hint.ids[-1] not in prepared.trainer.rollouts.renderer.stop_ids
            seen += 1
    assert seen
