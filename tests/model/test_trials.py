"""Trials of a model before the first step: what would falsify every number is refused, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from uft.config.schema import Lora, Model
from uft.data.batch import Batch, Layout, sequence_batch
from uft.errors import UftError
from uft.model.layout import settle_layout
from uft.model.load import load_policy
from uft.model.policy import Policy, add_lora
from uft.objectives.base import ForwardRequest

Build = Callable[..., Any]
SMALL = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
ENCODER = SMALL | {"max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def made(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def plain_log_probs(model: Any, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
    return logits.flatten(0, 1)[batch.predictor].gather(1, batch.target_ids[:, None]).squeeze(1)


def test_models_that_see_what_follows_are_refused(build: Build, tmp_path: Path):
    models = {
        "BERT": made("Bert", **ENCODER),
        "RoBERTa": made("Roberta", **ENCODER, pad_token_id=1),
        "a Llama of both ways": build("llama", is_causal=False),
        "Gemma of both ways": build("gemma3", use_bidirectional_attention=True),
    }
    for name, model in models.items():
        for dtype in ("float32", "bfloat16"):
            with pytest.raises(UftError, match="a later token changes") as raised:
                Policy(model, dtype).check_rows(f"model.path={name}")
        assert raised.value.problems[0].what == f"model.path={name}"
    models["BERT"].save_pretrained(tmp_path)
    with pytest.raises(UftError, match="a later token changes"):
        load_policy(Model(path=str(tmp_path)), torch.device("cpu"), 0)


def test_models_that_look_at_other_rows_are_refused(build: Build, monkeypatch: pytest.MonkeyPatch):
    Policy(build("llama"), "bfloat16").check_rows("model.path=x")
    policy = Policy(build("llama"))
    policy.check_rows("model.path=x")
    normal = policy.body.norm.forward  # type: ignore[union-attr,operator]
    monkeypatch.setattr(policy.body.norm, "forward", lambda states: normal(states + 0.1 * states.mean(0, keepdim=True)))
    with pytest.raises(UftError, match="when other rows are in its batch"):
        policy.check_rows("model.path=x")


@pytest.mark.parametrize("name", ["Roberta", "Electra", "RemBert", "Moshi", "Mamba", "Rwkv"])
def test_unusual_positions_heads_and_states_are_those_of_plain_transformers(name: str, batch: Batch):
    """RoBERTa begins behind the padding token, Electra and RemBERT have more than a matrix as their head, Moshi reads a
    token that it never predicts, states have no positions."""
    settings = {"Mamba": SMALL | {"state_size": 4}, "Rwkv": SMALL, "Moshi": SMALL | {"num_key_value_heads": 1}}
    model = made(name, **settings.get(name, ENCODER | {"is_decoder": True}), pad_token_id=1)
    policy = Policy(model)
    policy.check_head()
    policy.check_rows("model.path=x")
    expected = plain_log_probs(model, batch)
    torch.testing.assert_close(policy(batch).log_probs, expected, atol=1e-5, rtol=1e-5)
    assert policy.first_position == (2 if name == "Roberta" else 0)
    assert name != "Roberta" or policy.positions == 62


def test_packed_positions_begin_there_too(batch: Batch, sequences: Any):
    policy = Policy(made("Roberta", **ENCODER, is_decoder=True, pad_token_id=1))
    policy.check_head()
    policy.check_rows("model.path=x")
    padded = policy(batch).log_probs
    settle_layout(policy, "packed", 9)
    packed = policy(sequence_batch(sequences, 0, Layout.SHARED)).log_probs
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)


def test_rotary_embeddings_that_depend_on_the_longest_row_are_refused_beyond_it():
    """Phi-3, 3.5 and 4: below their original length all rows have the same embeddings."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [4.0] * 4, "short_factor": [1.0] * 4}
    settings = SMALL | {"max_position_embeddings": 256, "pad_token_id": 0}
    model = made("Phi3", **settings, rope_parameters=rope, original_max_position_embeddings=64)
    for packing in ("padded", "packed"):
        settle_layout(Policy(model), packing, 64)
        with pytest.raises(UftError, match="a row of 65 tokens changes the log-probs") as raised:
            settle_layout(Policy(model), packing, 65)
        assert "leave longer rows out:  train.max_length=64 data.too_long=drop" in raised.value.problems[0].advice
    settle_layout(Policy(made("Llama", **settings)), "padded", 200)
    settle_layout(Policy(made("GPT2", **GPT2)), "padded", 200)  # beyond its positions: no row is that long


def test_embeddings_that_a_model_looks_its_tokens_up_by_cannot_be_mixed(batch: Batch):
    """Gemma 4 finds the token of every embedding, and fails on one that is none's."""
    per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": SMALL["vocab_size"]}
    heads = {"head_dim": 8, "global_head_dim": 8, "num_key_value_heads": 2, "num_global_key_value_heads": 2}
    config = transformers.Gemma4TextConfig(**SMALL | per_layer | heads | {"pad_token_id": 0})
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(config).eval())
    assert policy(batch).log_probs.isfinite().all()
    policy.check_rows("model.path=x")
    with pytest.raises(UftError, match="takes no embeddings in place of tokens"):
        policy(batch, ForwardRequest(replace=batch.target_ids, mix=0.5))


def test_experts_that_are_one_weight_get_their_rank_and_scale(recwarn: pytest.WarningsRecorder):
    """Two matrices of an expert in one weight: twice the rank, the same scale."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1}
    adapted = add_lora(made("Mixtral", **SMALL | experts), Lora(rank=2, alpha=8.0, targets=["all-linear"]), 0, True)
    layers = [m for m in adapted.modules() if isinstance(getattr(m, "scaling", None), dict)]
    assert {m.parameter_name: m.r["default"] for m in layers if hasattr(m, "parameter_name")} == {
        "weight": 2,
        "down_proj": 2,
        "gate_up_proj": 4,
    }
    assert {m.scaling["default"] for m in layers} == {4.0}
    assert not [str(one.message) for one in recwarn if "pattern" in str(one.message)]


def test_a_model_that_fails_on_its_first_rows_is_one_line(build: Build, model_folder: Path, monkeypatch: Any):
    def fail(*_: Any, **__: Any) -> None:
        raise IndexError("no such thing\nin line two")

    monkeypatch.setattr(transformers.LlamaModel, "forward", fail)
    with pytest.raises(UftError, match=r"IndexError: no such thing\)") as raised:
        load_policy(Model(path=str(model_folder)), torch.device("cpu"), 0)
    assert raised.value.problems[0].what == f"model.path={model_folder}"


def test_tokens_that_every_layer_looks_up_cannot_be_mixed(build: Build, batch: Batch, monkeypatch: pytest.MonkeyPatch):
    """Gemma 3n and 4 add embeddings of their own in every layer, which embeddings in place of tokens do not bring."""
    policy = Policy(build("llama"))
    forward = policy.body.forward

    def looking(input_ids: Any = None, **rest: Any) -> Any:
        out = forward(input_ids=input_ids, **rest)
        return out if input_ids is None else (out[0] + 0.1 * policy.embeddings(input_ids),)

    monkeypatch.setattr(policy.body, "forward", looking)
    policy.takes_positions = True
    policy.check_rows("model.path=x")
    assert policy(batch).log_probs.isfinite().all()
    for request in (ForwardRequest(embed_grad=False), ForwardRequest(replace=batch.target_ids, mix=0.5)):
        with pytest.raises(UftError, match="takes no embeddings in place of tokens"):
            policy(batch, request)


def test_scaled_positions_count_as_scaled(build: Build):
    linear, yarn = ({"rope_type": kind, "rope_theta": 1e4, "factor": 4.0} for kind in ("linear", "yarn"))
    deepseek = yarn | {"original_max_position_embeddings": 16}
    found = [Policy(build("llama", rope_parameters=rope)).positions for rope in (linear, yarn, deepseek)]
    assert found == [256, 256, 64]
    assert Policy(build("llama")).positions == 64
    assert Policy(build("gpt2")).positions == 64


def test_experts_say_that_their_balance_is_not_trained(build: Build):
    small = SMALL | {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 1}
    assert any("load-balancing" in line for line in Policy(made("Mixtral", **small)).describe())
    assert not any("load-balancing" in line for line in Policy(build("llama")).describe())
