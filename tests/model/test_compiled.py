"""Compiled blocks say what plain ones say, and where they cannot be, the request says so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from uft.data.batch import Layout, TokenSequence, sequence_batch
from uft.errors import UftError
from uft.model.layout import compile_blocks, compiles, settle_layout
from uft.model.policy import Policy, blocks
from uft.objectives.base import ForwardRequest


def packing(model: Any) -> Policy:
    policy = Policy(model)
    settle_layout(policy, "packed", 30)
    return policy.train()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout.PADDED, Layout.SHARED])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_compiled_is_eager_in_value_and_gradient(
    build: Callable[..., Any], sequences: list[TokenSequence], name: str, layout: Layout
) -> None:
    model = build(name)
    eager, compiled = packing(copy.deepcopy(model)), packing(model)
    compile_blocks(compiled)
    assert f"{len(blocks(compiled.base))} blocks compiled" in compiled.notes
    for taken in (sequences, sequences[:2], sequences[1:]):  # other shapes without another compilation
        batch = sequence_batch(taken, 0, layout)
        found = []
        for policy in (eager, compiled):
            policy.module.zero_grad()
            mixed = ForwardRequest(replace=batch.target_ids.flip(0), mix=0.3, embed_grad=False)
            log_probs = [policy(batch).log_probs, policy(batch, mixed).log_probs]
            torch.stack(log_probs).sum().backward()
            gradients = {n: p.grad.clone() for n, p in policy.trainable().items() if p.grad is not None}
            found.append((torch.stack(log_probs).detach(), gradients))
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-4)
        for parameter, gradient in found[0][1].items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(found[1][1][parameter], gradient, rtol=1e-4, atol=1e-4 * scale)


def test_passes_without_gradients_are_not_compiled(
    build: Callable[..., Any], batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []

    def pretended(forward: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(torch.is_grad_enabled())
            return forward(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", pretended)
    policy = Policy(build("llama"))
    compile_blocks(policy)
    calls.clear()
    with torch.no_grad():
        policy(batch)
    assert calls == []
    policy(batch)
    assert calls == [True] * len(blocks(policy.base))


def failing(forward: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no C++ compiler is found")

    return call


def wrong(forward: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: forward(*args, **kwargs) * 1.01


def test_what_cannot_be_compiled_stops_the_request(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for pretended, why in ((failing, "no C.. compiler is found"), (wrong, "differ by")):
        monkeypatch.setattr(torch, "compile", pretended)
        with pytest.raises(UftError, match=why) as error:
            compile_blocks(Policy(build("llama")))
        assert error.value.problems[0].what == "model.compile=true"


def test_what_nobody_asked_for_is_left_out_with_a_note(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU compiles by default, a CPU when it is told to."""
    on, off = torch.device("cuda"), torch.device("cpu")
    assert [compiles(wanted, device) for wanted in (None, True, False) for device in (on, off)] == [
        *(True, False, True, True, False, False)
    ]
    monkeypatch.setattr(torch, "compile", failing)
    policy = packing(build("llama"))
    before = policy(policy.trial_batch(policy.layout)).log_probs
    compile_blocks(policy, asked=False)
    assert any("not compiled: this model cannot be compiled here" in note for note in policy.notes)
    assert torch.equal(policy(policy.trial_batch(policy.layout)).log_probs, before)
    assert not policy.compiled


def test_saved_weights_keep_their_names(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    policy = Policy(build("llama"))
    names = list(policy.trainable())
    compile_blocks(policy)
    assert list(policy.trainable()) == names
    policy.module.save_pretrained(tmp_path)
    assert type(policy.base).from_pretrained(tmp_path).state_dict().keys() == policy.module.state_dict().keys()
