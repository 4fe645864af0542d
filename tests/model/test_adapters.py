"""Kinds of adapters, modules trained whole beside them, and quantised weights beneath."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from uft.config.schema import Lora, Model
from uft.data.batch import Batch
from uft.errors import UftError
from uft.model.export import export, merged_state
from uft.model.load import load_model
from uft.model.memory import shape_of
from uft.model.policy import Frozen, Policy, add_lora, blocks
from uft.model.precision import plain_state, quantise

Build = Callable[..., Any]
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rslora": ("llama", "none", {"rslora": True, "targets": ["q_proj", "down_proj"]}),
    "dora": ("qwen2", "none", {"dora": True}),
    "dora on 4 bits": ("qwen2", "nf4", {"dora": True}),
    "head saved": ("qwen2", "none", {"modules_to_save": ["lm_head"]}),
    "embeddings saved": ("qwen2", "none", {"modules_to_save": ["embed_tokens"], "rslora": True}),
    "both saved": ("llama", "nf4", {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
}
"""Model, quantisation and keys of the adapter. `qwen2` has biases, and its head is its embedding."""


def adapted(build: Build, name: str, quantize: str = "none", **kind: Any) -> Policy:
    base = build(name, hidden_size=64, intermediate_size=128)
    quantise(blocks(base), Model("m", "m", quantize=quantize))
    return Policy(add_lora(base, Lora(rank=4, alpha=6, **kind), init_seed=0, float32=True)).eval()


def moved(policy: Policy) -> Policy:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_starts_as_no_change_and_is_exported_as_it_is(
    build: Build, tokenizer: Any, batch: Batch, tmp_path: Path, kind: str
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    name, quantize, keys = KINDS[kind]
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    policy = adapted(build, name, quantize, **keys)
    assert policy.head is not None
    initial = Frozen(policy)(batch).log_probs
    torch.testing.assert_close(policy(batch).log_probs, initial, atol=1e-5, rtol=0)
    assert policy.check_head() < 1e-4
    ours = moved(policy)(batch).log_probs
    assert (ours - initial).abs().max() > 0.1
    assert torch.equal(Frozen(policy)(batch).log_probs, initial)
    folder = export(policy, tokenizer, tmp_path / "model")
    merged = Policy(AutoModelForCausalLM.from_pretrained(folder).eval())
    torch.testing.assert_close(merged(batch).log_probs, ours, atol=1e-4, rtol=0)
    base = build(name, hidden_size=64, intermediate_size=128)
    quantise(blocks(base), Model("m", "m", quantize=quantize))
    again = Policy(PeftModel.from_pretrained(base, str(folder / "adapter")).eval())
    torch.testing.assert_close(again(batch).log_probs, ours, atol=1e-5, rtol=0)


def test_what_is_added_to_a_weight(build: Build):
    """LoRA: s B A with s = alpha / r; rsLoRA: alpha / sqrt(r); DoRA: rows of W + s B A at the length m."""
    layer, rank, alpha = "model.layers.1.mlp.down_proj", 4, 6
    for kind in ({}, {"rslora": True}, {"dora": True}):
        policy = moved(adapted(build, "llama", **kind))
        state = policy.base.state_dict()
        a, b = (state[f"{layer}.lora_{side}.default.weight"].double() for side in "AB")
        scale = alpha / (math.sqrt(rank) if kind.get("rslora") else rank)
        expected = state[f"{layer}.base_layer.weight"].double() + scale * b @ a
        if kind.get("dora"):
            length = state[f"{layer}.lora_magnitude_vector.default.weight"].double()
            expected *= (length / expected.square().sum(1).sqrt())[:, None]
        found = merged_state(policy.base, torch.float64, state)[f"{layer}.weight"]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_quantised_model_is_its_dequantised_copy(build: Build, batch: Batch):
    """Log-probs, gradients of the adapter, and its bytes: half a byte a weight of linear layers, and their scales."""
    pytest.importorskip("bitsandbytes")
    narrow, plain = adapted(build, "llama", "nf4"), adapted(build, "llama")
    values = plain_state(narrow.base)
    assert values.keys() == plain.base.state_dict().keys()
    before = {name: tensor.clone() for name, tensor in plain.base.state_dict().items()}
    plain.base.load_state_dict(values)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, values[name])}
    inside = {f"{n}.weight" for n, m in plain.base.named_modules() if type(m) is nn.Linear and "base_layer" in n}
    assert changed == inside
    for policy in (narrow, plain):
        moved(policy)(batch).log_probs.sum().backward()
    torch.testing.assert_close(narrow(batch).log_probs, plain(batch).log_probs, atol=1e-5, rtol=0)
    for name, parameter in narrow.trainable().items():
        torch.testing.assert_close(parameter.grad, plain.trainable()[name].grad, atol=1e-4, rtol=1e-4)
    assert narrow.size == plain.size
    weights = sum(
        m.weight.numel() for m in plain.base.modules() if type(m) is nn.Linear and m is not plain.base.lm_head
    )
    adapter = sum(p.numel() for n, m in plain.base.named_modules() if "lora_" in n for p in m.parameters(recurse=False))
    saved = shape_of(plain).weight_bytes - shape_of(narrow).weight_bytes
    assert saved == pytest.approx((4 - 0.516) * (weights - adapter), rel=1e-3)
    assert any("nf4" in line for line in narrow.describe())


def test_an_absent_module_to_save_is_named(build: Build):
    with pytest.raises(UftError, match=r"did you mean  lm_head \?"):
        adapted(build, "llama", modules_to_save=["lm_haed"])


def test_bitsandbytes_is_asked_for_where_it_is_missing(build: Build, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UftError, match=r"uft-lm\[bitsandbytes\]"):
        adapted(build, "llama", "nf4")


def test_what_is_trained_beside_an_adapter_is_float32_over_bfloat16(build: Build, tmp_path: Path):
    build("llama").save_pretrained(tmp_path)
    lora = Lora(rank=2, dora=True, modules_to_save=["lm_head"])
    model = Model(name="m", path=str(tmp_path), dtype="bfloat16", adapter="lora", lora=lora)
    policy = Policy(load_model(model, torch.device("cpu"), 0), "bfloat16")
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    assert {p.dtype for p in policy.module.parameters() if not p.requires_grad} == {torch.bfloat16}
