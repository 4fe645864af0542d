"""Engines of rollouts: each must give what the own sampler gives (of the likeliest token alone, the same tokens; else
the same distribution), with ends, cuts and log-probs as the trainer needs them.

In the place of vLLM stands a module with the names and arguments of its interface, which refuses others."""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from uft.config.schema import Rollout
from uft.errors import UftError
from uft.model.layout import settle_layout
from uft.model.policy import Policy
from uft.sampling.engines import EngineContext, make_engine
from uft.sampling.generate import Interrupted

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [5, 6, 7]]
STOPS = frozenset({2, 4})


class Chat:
    """What engines ask of a renderer."""

    stop_ids = STOPS

    class tokenizer:
        pad_token_id = eos_token_id = 2


@pytest.fixture
def context():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
    policy = Policy(model)
    settle_layout(policy, "packed", 64)
    rollout = Rollout(completions=2, max_new_tokens=12, batch_size=3)
    return EngineContext(policy, Chat(), rollout, seed=3, longest=32, should_stop=lambda: False)


STAND_IN = '''
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM


@dataclass(kw_only=True)
class SamplingParams:
    """The fields of vllm.SamplingParams that are asked for, with its defaults."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 16
    stop_token_ids: list | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    detokenize: bool = True


class LLM:
    def __init__(self, model, *, skip_tokenizer_init=False, dtype="auto", seed=None, gpu_memory_utilization=0.9,
                 max_model_len=None, max_num_seqs=256, logprobs_mode="raw_logprobs", generation_config="auto"):
        assert skip_tokenizer_init and generation_config == "vllm" and logprobs_mode == "processed_logprobs"
        assert 0 < gpu_memory_utilization < 0.5 and dtype in ("float32", "bfloat16")
        self.place, self.most, self.stale = model, max_model_len, False
        self.collective_rpc("reload_weights")
        self.stale = False
        print("words of a library")

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        assert method == "reload_weights"
        self.model, self.stale = AutoModelForCausalLM.from_pretrained(self.place).eval(), True

    def reset_prefix_cache(self):
        self.stale = False
        return True

    @torch.no_grad()
    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert not self.stale, "the prefix cache holds keys of other weights"
        return [self.one(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    def one(self, prompt, asked):
        assert asked.ignore_eos and not asked.detokenize and asked.logprobs == 0 and asked.top_p == 1
        assert len(prompt) + asked.max_tokens <= self.most
        ids, places = [], []
        generator = torch.Generator().manual_seed(asked.seed)
        while len(ids) < asked.max_tokens:
            logits = self.model(torch.tensor([prompt + ids])).logits[0, -1]
            scores = logits / asked.temperature
            scores[scores < scores.topk(asked.top_k or len(scores)).values[-1]] = -torch.inf
            scores = scores.log_softmax(-1)
            token = int(torch.multinomial(scores.exp(), 1, generator=generator))
            ids.append(token)
            places.append({token: SimpleNamespace(logprob=float(scores[token]))})
            if token in asked.stop_token_ids:
                break
        reason = "stop" if ids[-1] in asked.stop_token_ids else "length"
        output = SimpleNamespace(token_ids=tuple(ids), logprobs=places, finish_reason=reason, stop_reason=None)
        return SimpleNamespace(outputs=[output])
'''


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def engine(request, context, tmp_path, monkeypatch):
    """engine(**keys of the rollout, should_stop=): an engine that is closed at the end."""
    if request.param == "vllm":
        (tmp_path / "vllm.py").write_text(STAND_IN)
        monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def make(should_stop=lambda: False, **keys):
        rollout = replace(context.rollout, engine=request.param, **keys)
        made.append(make_engine(replace(context, rollout=rollout, should_stop=should_stop)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def own(context, **keys):
    return make_engine(replace(context, rollout=replace(context.rollout, **keys)))


@pytest.mark.slow
def test_greedy_completions_are_those_of_the_own_sampler_under_weights_that_move(engine, context):
    kernel, state = context.policy.attention_kernel, torch.get_rng_state()
    other, numbers = engine(top_k=1), range(len(PROMPTS))
    ends = set()
    for _ in range(3):
        expected = own(context, top_k=1).complete(PROMPTS, numbers)
        assert other.complete(PROMPTS, numbers) == expected
        ends |= {reply.end for reply in expected}
        with torch.no_grad():
            for parameter in context.policy.module.parameters():
                parameter.mul_(-0.9)
    assert ends > {None}, "some were cut, and some ended"
    assert ends - {None} <= STOPS
    assert context.policy.attention_kernel == kernel
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_sampled_completions_have_the_log_probs_and_the_distribution_of_the_own_sampler(engine, context):
    prompts = [PROMPTS[0]] * 200
    found = engine(temperature=0.7, max_new_tokens=3).complete(prompts, range(200))
    expected = own(context, temperature=0.7, max_new_tokens=3).complete(prompts, range(200))
    log_probs = {(*reply.ids, reply.end): reply.log_prob for reply in expected}
    same = [reply for reply in found if (*reply.ids, reply.end) in log_probs]
    assert len(same) > 20
    for reply in same:
        assert reply.log_prob == pytest.approx(log_probs[*reply.ids, reply.end], abs=1e-4)
    for reply in found:
        assert len(reply.log_probs) == len(reply.ids) + reply.stopped
        assert reply.stopped or len(reply.ids) == 3
    ours, theirs = (Counter((*reply.ids, reply.end)[0] for reply in some) for some in (expected, found))
    for token in ours | theirs:
        share = (ours[token] + theirs[token]) / 400
        assert abs(ours[token] - theirs[token]) / 200 < 4.5 * math.sqrt(2 * share * (1 - share) / 200)
    assert len(theirs) > 3


def test_a_stop_is_heeded_and_what_fails_is_told(engine, context, monkeypatch):
    stopped = engine(should_stop=lambda: True)
    with pytest.raises(Interrupted):
        stopped.complete(PROMPTS, range(4))
    if type(stopped).__name__ == "Vllm":
        other = engine(top_p=0.5)  # which the one that stands in does not know
    else:
        other = engine()
        monkeypatch.setattr(context.policy.base, "_get_logits_processor", None)
    with pytest.raises(UftError, match=r"rollout\.engine=own"):
        other.complete(PROMPTS, range(4))
    assert context.policy.attention_kernel == "packed_sdpa"


def test_vllm_is_refused_where_it_is_not_installed(monkeypatch):
    from uft.config.rules import rollouts

    assert "vllm" not in sys.modules
    settings = {
        "rollout": {**vars(Rollout(completions=8, engine="vllm")), "hint": {}},
        "objective": {"name": "grpo", "method": "policy_gradient"},
        "train": {"batch_size": 8, "steps": 5},
        "hardware": {"sharding": "none"},
        "data": {"exhaustion": "repeat"},
    }
    assert [key for key, *_ in rollouts(settings)] == ["rollout.engine"]
