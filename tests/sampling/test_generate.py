from __future__ import annotations

import math
from itertools import count

import pytest
import torch
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MambaConfig, OpenAIGPTConfig, Phi3Config, RwkvConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from uft.model.policy import Policy
from uft.sampling.generate import Interrupted, Sampling, choose, complete, filtered, uniforms

VOCABULARY, PAD, END = 29, 0, 1
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.6,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, sliding_window=6),
}
PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13, 14], [3, 4], [20, 21, 22, 23, 24], [6, 6, 6]]
GREEDY = Sampling(max_new_tokens=12)
WARM = Sampling(temperature=0.9, top_k=12, top_p=0.95, max_new_tokens=12)


def model(name="llama", seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def run(module, prompts=PROMPTS, sampling=WARM, *, stop=(END,), batch_size=8, seed=3, dtype="float32", **options):
    settings = {"seed": seed, "stop_ids": stop, "pad_id": PAD, "batch_size": batch_size, **options}
    return complete(Policy(module, dtype), prompts, sampling, **settings)


def ids(found):
    return [reply.ids for reply in found]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_what_transformers_generates(name):
    module = model(name)
    for prompt, reply in zip(PROMPTS, run(module, sampling=GREEDY, batch_size=3), strict=True):
        own = module.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=END, pad_token_id=PAD
        )[0, len(prompt) :].tolist()
        assert reply.ids == (own[: own.index(END)] if END in own else own)
        assert reply.stopped == (END in own)


def test_rows_whose_embeddings_depend_on_the_longest_are_answered_alone():
    """Phi 3: beyond its original length, each token as by one forward pass over the row that ends with it."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [4.0] * 4, "short_factor": [1.0] * 4}
    torch.manual_seed(0)
    config = Phi3Config(**SMALL, rope_parameters=rope, original_max_position_embeddings=16, pad_token_id=PAD)
    module = AutoModelForCausalLM.from_config(config).eval()
    for prompt, reply in zip(PROMPTS, run(module, sampling=GREEDY, stop=()), strict=True):
        line = list(prompt)
        for token in reply.ids:
            assert int(module(torch.tensor([[*line, token]]), use_cache=False).logits[0, -2].argmax()) == token
            line.append(token)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_batch_does_not_change_a_completion(name):
    module = model(name)
    first, *others = (ids(run(module, batch_size=batch_size)) for batch_size in (4, 1, 2, 5))
    assert others == [first, first, first]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_that_several_completions_have_is_read_once_and_changes_none(name):
    module, prompts = model(name), [prompt for prompt in PROMPTS for _ in range(3)]
    read = []
    module.register_forward_pre_hook(
        lambda m, args, options: read.append(options["input_ids"].shape[0]), with_kwargs=True
    )
    policy = Policy(module)
    policy.caches = True
    settings = {"seed": 3, "stop_ids": (END,), "pad_id": PAD}
    together = complete(policy, prompts, WARM, batch_size=15, **settings)
    assert read[:2] == [len(PROMPTS), len(prompts)]
    assert ids(together) == ids(complete(policy, prompts, WARM, batch_size=1, **settings))


def test_a_completion_depends_on_its_own_number_only():
    module = model()
    everything = ids(run(module, numbers=[10, 11, 12, 13, 14]))
    assert ids(run(module, [PROMPTS[3]], numbers=[13])) == [everything[3]]
    assert ids(run(module, [PROMPTS[3]], numbers=[12])) != [everything[3]]
    assert ids(run(module, [PROMPTS[3]], numbers=[13], seed=4)) != [everything[3]]
    one, other = run(module, [[5, 6], [5, 6]])
    assert one.ids != other.ids
    assert run(module, []) == []


def test_rows_stop_at_their_own_stop_token_and_leave_the_batch():
    module = model()
    free = ids(run(module, stop=()))
    assert all(len(reply) == 12 for reply in free)
    stops = {free[1][4], free[3][2]}
    seen: list[int] = []
    forward = module.forward

    def counting(*args, **options):
        seen.append(options["input_ids"].shape[0])
        return forward(*args, **options)

    module.forward = counting
    for reply, whole in zip(run(module, stop=stops), free, strict=True):
        cut = next((i for i, token in enumerate(whole) if token in stops), None)
        assert reply.ids == whole[:cut]
        assert reply.stopped == (cut is not None)
    assert seen[-1] < len(PROMPTS)


def test_log_probs_are_those_of_the_distribution_drawn_from():
    module = model()
    for sampling in (Sampling(temperature=1.0, max_new_tokens=12), WARM):
        for prompt, reply in zip(PROMPTS, run(module, sampling=sampling, batch_size=2), strict=True):
            said = [*reply.ids, *([END] if reply.stopped else [])]
            logits = module(torch.tensor([prompt + said])).logits[0].detach()[len(prompt) - 1 : -1]
            warped = filtered(logits, sampling).log_softmax(-1)
            expected = float(warped.gather(1, torch.tensor(said)[:, None]).sum())
            assert reply.log_prob == pytest.approx(expected, abs=1e-4)


def test_models_whose_cache_or_padding_is_not_right_read_everything_anew():
    """RWKV's state knows no padding, GPT-1 has no cache, Mamba has one of its own: answered as one by one."""
    small = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    configs = {
        "cache": LlamaConfig(**SMALL),
        "rwkv": RwkvConfig(**small, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
        "mamba": MambaConfig(**small, hidden_size=32, num_hidden_layers=2, state_size=4),
        "gpt1": OpenAIGPTConfig(**small, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        policy = Policy(AutoModelForCausalLM.from_config(config).eval())
        settings = {"seed": 3, "stop_ids": (), "pad_id": PAD}
        together = complete(policy, PROMPTS, WARM, batch_size=8, **settings)
        assert policy.caches == (name == "cache"), name
        policy.caches = False
        alone = complete(policy, PROMPTS, WARM, batch_size=1, **settings)
        assert ids(together) == ids(alone), name


@pytest.mark.parametrize("sampling", [Sampling(0.7, 5), Sampling(1.3, 0, 0.8), Sampling(0.5, 9, 0.6), Sampling(1.0)])
def test_filters_equal_those_of_transformers(sampling):
    logits = 3 * torch.randn(50, VOCABULARY, generator=torch.Generator().manual_seed(1))
    logits[:, 3] = logits[:, 4]  # a tie
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    assert torch.equal(filtered(logits, sampling), warpers(None, logits))


def test_tokens_are_drawn_with_their_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    sampling = Sampling(temperature=0.8, top_k=4)
    size = 40_000
    grid = (torch.arange(size, dtype=torch.float64) + 0.5) / size  # every quantile once: no chance in this test
    tokens, log_probs = choose(logits.expand(size, -1), sampling, grid)
    drawn = tokens.bincount(minlength=5) / size
    expected = (logits[0] / 0.8).masked_fill(torch.tensor([False, False, False, True, False]), -math.inf).softmax(-1)
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(log_probs, expected[tokens].log())
    assert not choose(logits, GREEDY, grid[:1])[1].any()


def test_the_edges_of_the_distribution_are_tokens_that_may_be_drawn():
    logits = torch.tensor([[-1.0, 3.0, 2.0, 2.5, -2.0]])
    for draw in (0.0, 1 - 2**-53):
        token, _ = choose(logits, Sampling(1.0, top_k=3), torch.tensor([draw], dtype=torch.float64))
        assert int(token) in (1, 2, 3)


def test_draws_are_uniform_and_their_own():
    draws = uniforms(0, 0, 10_000)
    assert abs(draws.mean() - 0.5) < 0.02
    assert 0 <= draws.min() < draws.max() < 1
    assert (uniforms(0, 0, 5) == draws[:5]).all()
    assert (uniforms(0, 1, 5) != draws[:5]).all()
    assert (uniforms(1, 0, 5) != draws[:5]).all()


def test_the_model_and_the_generators_are_left_as_they_were():
    before = torch.get_rng_state()
    for training in (True, False):
        module = model().train(training)
        torch.set_rng_state(before)
        run(module)
        assert module.training is training
        assert torch.equal(torch.get_rng_state(), before)
        assert all(parameter.grad is None for parameter in module.parameters())


def test_a_request_to_stop_is_heard_at_every_token():
    module = model().train()
    for asked in (0, 1, 5):
        polls = count()
        with pytest.raises(Interrupted):
            run(module, stop=(), should_stop=lambda polls=polls, asked=asked: next(polls) >= asked)
        assert next(polls) == asked + 1
        assert module.training


def test_positions_of_the_model_are_never_exceeded():
    module = model("gpt2")
    long, full = [5] * 60, [5] * 64
    found = run(module, [long, full, [5]], stop=())
    assert [len(reply.ids) for reply in found] == [4, 0, 12]


def test_adapters_and_bfloat16():
    from peft import LoraConfig, get_peft_model

    plain = ids(run(model(), sampling=GREEDY))
    adapted = get_peft_model(model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5))
    adapted.train()
    assert ids(run(adapted, sampling=GREEDY)) == plain  # a fresh adapter adds nothing, and dropout is off
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    assert ids(run(adapted, sampling=GREEDY)) != plain
    with adapted.disable_adapter():
        assert ids(run(adapted, sampling=GREEDY)) == plain
    half = run(model(), sampling=GREEDY, dtype="bfloat16")
    assert len(half) == len(PROMPTS)
    assert half[0].ids[:1] == plain[0][:1]
