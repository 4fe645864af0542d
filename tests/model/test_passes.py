"""Weights that are cast once a step, and the precision that a device is good at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from uft.config.schema import Lora, Model
from uft.data.batch import Batch
from uft.model.policy import Policy, add_lora
from uft.model.precision import resolve_dtype, why_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "gpt2", "lora"])
def test_weights_cast_once_a_step_give_the_same_bits(build: Callable[..., Any], batch: Batch, name: str):
    """Over steps of two passes each, in weights and in what an evaluation between them says."""

    def train(once: bool) -> tuple[list[torch.Tensor], Policy]:
        module = add_lora(build("llama"), Lora(rank=2), 0, float32=True) if name == "lora" else build(name)
        policy = Policy(module, "bfloat16").train()
        if once:
            policy.cast_once()
        optimiser = torch.optim.AdamW(policy.trainable().values(), lr=0.01, fused=True)
        said = []
        for _ in range(3):
            for _ in range(2):
                policy(batch).log_probs.sum().backward()
            optimiser.step()
            policy.weights_changed()
            optimiser.zero_grad()
            with torch.no_grad():
                said.append(policy.eval()(batch).log_probs)
            policy.train()
        return [*said, *(p.detach() for p in policy.trainable().values())], policy

    plain, _ = train(once=False)
    cast, policy = train(once=True)
    assert all(torch.equal(one, other) for one, other in zip(cast, plain, strict=True))
    assert len(policy.narrow) == {"llama_tied": 15, "qwen2": 15, "gpt2": 1, "lora": 28}[name]
    assert not torch.equal(plain[0], plain[1])
    assert list(policy.base.state_dict()) == list(train(once=False)[1].base.state_dict())


def test_nothing_is_cast_in_float32(build: Callable[..., Any]):
    policy = Policy(build("llama"))
    policy.cast_once()
    assert policy.narrow == []


def test_auto_is_bfloat16_where_the_device_multiplies_it(monkeypatch: pytest.MonkeyPatch):
    large, auto = "org/model-1.7B", "auto"
    for flags, path, expected in (
        ({"avx512_bf16": True, "amx_bf16": False}, large, "bfloat16"),
        ({"amx_bf16": True}, large, "bfloat16"),
        ({"avx512_bf16": False, "avx2": True}, large, "float32"),
        ({"amx_bf16": True}, "org/model-5M", "float32"),
        ({"amx_bf16": True}, "builtin:playground", "float32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        model = Model(name="m", path=path, dtype=auto)
        assert resolve_dtype(model, CPU).dtype == expected
        told = why_precision(resolve_dtype(model, CPU), CPU)
        assert told.startswith(f"model.dtype=auto is {expected}: this cpu ")
        assert ("does not multiply" in told) != any(flags.get(name) for name in ("avx512_bf16", "amx_bf16"))
        for said in ("float32", "bfloat16"):
            assert resolve_dtype(replace(model, dtype=said), CPU).dtype == said
