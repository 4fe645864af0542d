"""Architectures whose norms and recurrences are computed in float32 whatever the weights are.

A model of these that is loaded in float64 is no float64 computation: on random weights it is as far from one as the
model in float32 (Qwen3.5: 6e-5 nats under IFT's mixed inputs; Gemma 4: 3e-5 a sequence). So our log-probs are held
against a computation that is float64 throughout: they are no farther from it than those of transformers.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from uft.data.batch import sequence_batch
from uft.model.policy import Policy
from uft.objectives.base import ForwardRequest

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


class Float64(TorchFunctionMode):
    """Whatever asks for float32 gets float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def make(name):
    if name == "qwen3_5":
        from transformers import Qwen3_5TextConfig as Config

        own = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        own |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    else:
        from transformers import Gemma4TextConfig as Config

        own = {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8, "global_head_dim": 16}
        own |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 0}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Config(**SMALL, **own), dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def log_probs(model, ids, guess=None):
    """(T - 1,) by transformers; with a `guess`, on embeddings of which a fifth is the guess's."""
    embed = model.get_input_embeddings()
    inputs = {"input_ids": ids[None]}
    if guess is not None:
        mixed = 0.8 * embed(ids[1:]) + 0.2 * embed(guess)
        inputs = {"inputs_embeds": torch.cat([embed(ids[:1]), mixed])[None]}
    logits = model(**inputs).logits[0, :-1]
    return torch.log_softmax(logits.double(), -1).gather(1, ids[1:, None])[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mix"), [("qwen3_5", 0.0), ("qwen3_5", 0.2), ("gemma4", 0.0)])
@torch.no_grad()
def test_log_probs_are_as_near_to_float64_as_those_of_transformers(name, mix):
    model, random = make(name), torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 61, (length,), generator=random) for length in (11, 24, 38, 17)]
    policy, whole = Policy(model, "float32").eval(), copy.deepcopy(model).double()
    batch = sequence_batch([(row.numpy(), np.arange(len(row)) > 0) for row in rows], 0)
    plain = policy(batch, ForwardRequest(argmax=True))
    request = ForwardRequest(replace=plain.argmax, mix=mix) if mix else ForwardRequest()
    lengths = batch.lengths.tolist()
    ours, guesses = policy(batch, request).log_probs.split(lengths), plain.argmax.split(lengths)
    errors = []
    for row, found, guess in zip(rows, ours, guesses, strict=True):
        guess = guess if mix else None
        with Float64():
            truth = log_probs(whole, row, guess)
        far = [float((values.double() - truth).abs().max()) for values in (found, log_probs(model, row, guess))]
        errors.append(far)
    ours, theirs = (max(column) for column in zip(*errors, strict=True))
    assert ours <= 2 * theirs + 1e-5, (ours, theirs)
    assert 1e-7 < theirs < 5e-4, "in float32"
