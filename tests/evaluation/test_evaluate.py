from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from uft.config.schema import Eval, Lora, Model, ReferenceModel, data_settings
from uft.data.chat import Renderer
from uft.data.rows import Completion, Message, Row
from uft.data.sources import load_sources
from uft.evaluation.evaluate import HeldOut, check_step_zero, distinct_prompts, evaluate, prompt_text
from uft.model.load import load_base, load_model, load_tokenizer
from uft.model.policy import Policy
from uft.model.reference import make_reference
from uft.objectives.views import best_against_worst, reward
from uft.sampling.generate import Interrupted

CPU = torch.device("cpu")
MODEL = Model(name="playground", path="builtin:playground")
LORA = Model(name="playground", path="builtin:playground", adapter="lora", lora=Lora(rank=2))
SETTINGS = Eval(rows=6, samples=2, generate_rows=5, max_new_tokens=8)
NAMES = ("binary", "instruct", "negatives", "pairs", "scored")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(tokenizer)


@pytest.fixture(scope="module")
def held(renderer):
    sources = load_sources(
        data_settings(
            {
                "name": "all",
                "sources": {name: {"path": f"builtin:playground/{name}", "checker": "playground"} for name in NAMES},
            }
        )
    )
    return [held_out(source.name, source.rows[:8], renderer) for source in sources]


def held_out(name, rows, renderer, checker="playground"):
    encoded = [tuple(renderer.encode(row.prompt, c.turns) for c in row.completions) for row in rows]
    return HeldOut(name, rows, encoded, checker)


def moved(model=MODEL, seed=1):
    """A policy that has left its reference."""
    policy = Policy(load_model(model, CPU, 0))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return policy


@pytest.fixture
def measure(tokenizer, renderer, held, tmp_path):
    def run(policy, mode=None, sources=None, *, model=MODEL, settings=SETTINGS, should_stop=None, **options):
        reference = mode and make_reference(
            policy,
            model,
            ReferenceModel(mode=mode),
            device=CPU,
            tokenizer=tokenizer,
            visits_per_row=1.0,
            cache=Path(tmp_path),
        )
        sources = held if sources is None else sources
        return evaluate(policy, reference, sources, renderer, settings, should_stop, **options)

    return run


@torch.no_grad()
def independent(module, encoded):
    """(tokens,) log-probs of the supervised tokens by plain transformers."""
    ids = torch.as_tensor(encoded.ids, dtype=torch.long)
    logits = module(ids[None]).logits[0].double().log_softmax(-1)
    places = torch.as_tensor(encoded.supervised).nonzero().squeeze(1)
    return logits[places - 1, ids[places]]


def test_items_add_up_to_the_figures(measure):
    found = measure(moved(), "copy")
    ids = [item.row for item in found.items]
    assert len(set(ids)) == len(ids)
    for name, value in found.metrics.items():
        source, _, metric = name.removeprefix("eval/").rpartition("/")
        own = [item.record(False) for item in found.items if source in ("", item.source)]
        sums = [record["measures"][metric] for record in own if metric in record["measures"]]
        assert math.fsum(s for s, _ in sums) / math.fsum(n for _, n in sums) == pytest.approx(value, abs=1e-5), name
    first = next(item for item in found.items if item.source == "instruct")  # one completion, which is good
    assert (first.log_probs, first.rewards) == ([first.measures["log_prob"][0]], [first.measures["chosen_reward"][0]])
    asked = [item for item in found.items if item.reply is not None]
    assert len(asked) == 5 * len(NAMES)
    assert asked[0].record(True)["reply"] == found.samples[0].reply


def test_figures_equal_an_independent_computation(measure, held):
    policy = moved()
    policy.eval()
    base = load_model(MODEL, CPU, 0).eval()
    found = measure(policy, "copy").metrics
    totals = dict.fromkeys(("nll", "log_ratio", "tokens"), 0.0)
    for source in held:
        sums = {name: [] for name in ("log_prob", "chosen_reward", "rejected_reward", "margin", "pair_accuracy")}
        tokens = nll = 0
        for row, encoded in list(zip(source.rows, source.encoded, strict=True))[: SETTINGS.rows]:
            ours = [independent(policy.module, e) for e in encoded]
            theirs = [independent(base, e) for e in encoded]
            rewards = [float((a - b).sum()) for a, b in zip(ours, theirs, strict=True)]
            for completion, a, z in zip(row.completions, ours, rewards, strict=True):
                good = reward(completion) >= 0.5
                sums["chosen_reward" if good else "rejected_reward"].append(z)
                if good:
                    sums["log_prob"].append(float(a.sum()))
                    nll, tokens = nll - float(a.sum()), tokens + len(a)
                    totals["log_ratio"] += z
            if pair := best_against_worst(row, 0):
                better, worse = (part.completion for part in pair)
                sums["margin"].append(rewards[better] - rewards[worse])
                sums["pair_accuracy"].append(float(ours[better].sum() > ours[worse].sum()))
        for name, values in sums.items():
            key = f"eval/{source.name}/{name}"
            assert (key in found) == bool(values), key
            if values:
                assert found[key] == pytest.approx(math.fsum(values) / len(values), abs=1e-4), key
        assert found[f"eval/{source.name}/nll"] == pytest.approx(nll / tokens, abs=1e-5)
        totals["nll"] += nll
        totals["tokens"] += tokens
    assert found["eval/nll"] == pytest.approx(totals["nll"] / totals["tokens"], abs=1e-5)
    assert found["eval/log_ratio"] == pytest.approx(totals["log_ratio"] / totals["tokens"], abs=1e-5)
    assert abs(found["eval/log_ratio"]) > 0.001
    assert not any(name.endswith("/kl") for name in found), (
        "a divergence cannot be estimated on rows that the policy did not sample"
    )


def test_before_the_first_step_nothing_differs_from_the_reference(measure):
    metrics = measure(Policy(load_model(MODEL, CPU, 0)), "cached").metrics
    for name in ("log_ratio", "margin", "chosen_reward", "rejected_reward"):
        assert metrics[f"eval/{name}"] == pytest.approx(0, abs=1e-4)
    assert metrics["eval/reward_accuracy"] == 0.5


def test_neither_the_kind_of_reference_nor_the_size_of_batches_changes_a_figure(measure):
    policy = moved()
    compared, alone = measure(policy, "copy").metrics, measure(policy).metrics
    for changed in (measure(policy, "cached"), measure(policy, "copy", micro_batch_tokens=16)):
        assert compared == pytest.approx(changed.metrics, abs=1e-4)
    adapted = moved(LORA)
    off = measure(adapted, "adapter_off", model=LORA)
    assert off.metrics == pytest.approx(measure(adapted, "cached", model=LORA).metrics, abs=1e-4)
    assert abs(off.metrics["eval/log_ratio"]) > 1e-4
    missing = {key.rpartition("/")[2] for key in compared.keys() - alone.keys()}
    assert missing == {"log_ratio", "margin", "reward_accuracy", "chosen_reward", "rejected_reward"}
    assert {key: compared[key] for key in alone} == alone


def test_measuring_changes_nothing(measure):
    policy = moved(LORA).train()
    before = {name: parameter.clone() for name, parameter in policy.trainable().items()}
    random = torch.get_rng_state()
    measure(policy, "adapter_off", model=LORA, settings=Eval(rows=2, samples=1, generate_rows=1, max_new_tokens=4))
    assert policy.module.training
    assert torch.equal(torch.get_rng_state(), random)
    for name, parameter in policy.trainable().items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_samples_are_the_first_prompts_with_the_checkers_word(measure, held):
    policy = Policy(load_model(MODEL, CPU, 0))
    found = measure(policy)
    by_source = {source.name: [s for s in found.samples if s.source == source.name] for source in held}
    for source in held:
        rows = distinct_prompts(source.rows, SETTINGS.samples)
        assert [sample.row for sample in by_source[source.name]] == [row.id for row in rows]
        assert [sample.prompt for sample in by_source[source.name]] == [row.prompt[0].content for row in rows]
        assert all(sample.answer == row.answer for sample, row in zip(by_source[source.name], rows, strict=True))
        assert all(sample.verdict.keys() == {"exact_match", "correct", "plain"} for sample in by_source[source.name])
    pairs = found.metrics
    assert pairs["eval/pairs/correct"] > pairs["eval/instruct/correct"]  # the base model knows the old tasks alone
    assert 1 <= pairs["eval/pairs/completion_length"] <= SETTINGS.max_new_tokens


def test_every_checked_row_counts_once(measure, held):
    policy = Policy(load_model(MODEL, CPU, 0))
    everything = measure(policy, settings=Eval(rows=0, samples=5, generate_rows=5, max_new_tokens=8))
    pairs = [sample.verdict for sample in everything.samples if sample.source == "pairs"]
    assert len(pairs) == 5
    for name in ("exact_match", "correct", "plain"):
        assert everything.metrics[f"eval/pairs/{name}"] == pytest.approx(sum(v[name] for v in pairs) / 5)
    count = sum(len(distinct_prompts(source.rows, 5)) for source in held)
    mean = sum(s.verdict["correct"] for s in everything.samples) / count
    assert everything.metrics["eval/correct"] == pytest.approx(mean)
    assert "eval/nll" not in everything.metrics


def test_pass_at_k_is_the_chance_that_one_of_k_answers_is_right(measure, held):
    instruct = [one for one in held if one.name == "pairs"]
    settings = Eval(rows=0, samples=0, generate_rows=6, draws=8, max_new_tokens=8)
    found = measure(Policy(load_model(MODEL, CPU, 0)), sources=instruct, settings=settings).metrics
    assert [name for name in found if name.startswith("eval/pass@")] == [f"eval/pass@{k}" for k in (1, 2, 4, 8)]
    chances = [found[f"eval/pass@{k}"] for k in (1, 2, 4, 8)]
    assert chances == sorted(chances)
    assert 0 < chances[0] < chances[-1] <= 1
    assert chances[0] * 6 * 8 == pytest.approx(round(chances[0] * 6 * 8))  # a share of all answers
    greedy = measure(Policy(load_model(MODEL, CPU, 0)), sources=instruct, settings=replace(settings, draws=0)).metrics
    assert {name: value for name, value in found.items() if "pass@" not in name} == greedy


def test_nothing_asked_for_is_nothing_done(measure):
    found = measure(Policy(load_model(MODEL, CPU, 0)), settings=Eval(rows=0, samples=0, generate_rows=0))
    assert (found.metrics, found.samples) == ({}, [])


def test_the_model_behind_a_cached_reference_is_loaded_once_for_all_sources(measure, held, monkeypatch):
    loads = []
    policy = moved()
    monkeypatch.setattr("uft.model.load.load_base", lambda *a: loads.append(a) or load_base(*a))
    assert len(held) > 1
    assert measure(policy, "cached").metrics == measure(policy, "cached").metrics
    assert len(loads) == 1


def test_a_source_without_checker_is_answered_for_the_eye_only(measure, held, renderer):
    instruct = next(source for source in held if source.name == "instruct")
    unchecked = held_out("mine", instruct.rows, renderer, checker=None)
    found = measure(moved(), sources=[unchecked])
    assert len(found.samples) == SETTINGS.samples
    assert all(sample.verdict == {} for sample in found.samples)
    assert not any("exact_match" in key for key in found.metrics)
    assert "eval/mine/completion_length" in found.metrics


def test_a_request_to_stop_ends_it_and_leaves_the_mode(measure):
    policy = moved().train()
    for polls in (0, 1, 4, 9):
        left = iter(range(polls))
        with pytest.raises(Interrupted):
            measure(policy, "cached", should_stop=lambda left=left: next(left, None) is None)
        assert policy.module.training


def test_a_prompt_is_answered_once_and_shown_as_text():
    prompt = (Message("system", "Be brief."), Message("user", "Hi"))
    assert prompt_text(prompt) == "system: Be brief.\nuser: Hi"
    assert prompt_text(prompt[1:]) == "Hi"
    answer = (Completion((Message("assistant", "x"),)),)
    rows = [Row("s", n, (Message("user", p),), answer) for n, p in enumerate("aab")]
    assert [row.index for row in distinct_prompts(rows, 5)] == [0, 2]
    assert [row.index for row in distinct_prompts(rows, 1)] == [0]


# --- before the first step


def test_a_difference_is_measured_and_explained():
    log_probs = torch.tensor([-1.0, -2.0, -1e4])
    assert check_step_zero(log_probs, log_probs + 1e-5, 1e-3) == []
    assert check_step_zero(torch.zeros(0), torch.zeros(0), 1e-3) == []
    first, *causes = check_step_zero(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -2.5, -3.0]), 1e-3)
    assert "1 of 3" in first
    assert "0.5" in first
    assert any("dropout" in cause for cause in causes)
    assert any("reference.path" in cause for cause in causes)


def test_what_is_not_finite_is_never_within_tolerance():
    broken = torch.tensor([-1.0, float("nan")])
    assert check_step_zero(broken, broken, 1.0) == [
        "1 of 2 log-probs of the policy are not finite",
        "1 of 2 log-probs of the reference are not finite",
    ]
