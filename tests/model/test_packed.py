"""Which layout a model gets, and that a model which lets packed rows see each other does not get the packed one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from uft.config.schema import Lora
from uft.data.batch import Layout, Span
from uft.errors import UftError
from uft.model import attention, layout
from uft.model import policy as policy_module
from uft.model.layout import follow_layout, settle_layout
from uft.model.policy import Policy, add_lora

Build = Callable[..., Any]


def settled(model: Any, packing: str = "packed", longest: int = 30, dtype: str = "float32") -> Policy:
    policy = Policy(model, dtype)
    settle_layout(policy, packing, longest)
    return policy


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "phi3", "gemma3", "cohere", "granite", "gpt2"])
def test_these_models_read_packs(build: Build, name: str):
    policy = settled(build(name))
    assert policy.layout is Layout.SHARED
    assert policy.attention == "sdpa"
    assert "rows packed" in policy.describe()[-1]


def test_also_under_an_adapter_and_in_half_precision(build: Build):
    for dtype in ("float32", "bfloat16"):
        for model in (build("llama"), add_lora(build("llama"), Lora(rank=2), 0, float32=True)):
            training = model.training
            assert settled(model, dtype=dtype).layout is Layout.SHARED
            assert model.training == training


REFUSED = {
    "window": ("mistral", {"sliding_window": 29}, "window of 29 tokens is shorter than the longest row of 30"),
    "eager": ("llama", {"attn_implementation": "eager"}, "attention eager"),
    "sparse": ("llama", {"index_topk": 8}, "window of 8 tokens is shorter than the longest row of 30"),
    "both ways": ("llama", {"is_causal": False}, "not causal"),
}


@pytest.mark.parametrize(("name", "changes", "why"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_said_and_padded_or_refused_where_it_was_asked_for(
    build: Build, monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, Any], why: str
):
    monkeypatch.setattr(layout, "SMALL_MODEL", 0)
    model = build(name, **changes)
    before = model.config._attn_implementation
    policy = settled(model, "auto")
    assert policy.layout is Layout.PADDED
    assert policy.notes == [note for note in policy.notes if why in note and note.startswith("rows padded: ")]
    assert len(policy.notes) == 1
    assert model.config._attn_implementation == before
    with pytest.raises(UftError, match=why):
        settled(model)


def test_a_window_as_long_as_the_longest_row_is_none(build: Build):
    assert settled(build("mistral", sliding_window=30)).layout is Layout.SHARED
    assert settled(build("qwen2", sliding_window=4, use_sliding_window=False)).layout is Layout.SHARED


def test_small_models_are_padded_on_a_cpu_unless_told_otherwise(build: Build, monkeypatch: pytest.MonkeyPatch):
    policy = settled(build("llama"), "auto")
    assert policy.layout is Layout.PADDED
    assert "so small a model" in policy.notes[0]
    monkeypatch.setattr(layout, "SMALL_MODEL", 100)
    assert settled(build("llama"), "auto").layout is Layout.SHARED


def blind(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    """All of the pack as one sequence: what a model does that ignores the segments."""
    return (Span(sum(span.length for span in spans), 0, 0),)


def off_by_one(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    """A prompt without its last token."""
    return tuple(Span(s.length, s.prompt, max(0, s.prefix - 1)) for s in spans)


@pytest.mark.parametrize("wrong", [blind, off_by_one])
def test_a_kernel_that_shows_a_row_other_tokens_is_found_out_and_taken_back(
    build: Build, batch: Any, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any]
):
    loop = attention.loop
    monkeypatch.setattr(attention, "loop", lambda q, k, v, spans, *rest: loop(q, k, v, wrong(spans), *rest))
    monkeypatch.setattr(layout, "SMALL_MODEL", 0)
    policy = settled(build("llama"), "auto")
    assert policy.layout is Layout.PADDED
    assert "differ from padded ones" in policy.notes[0]
    assert policy.base.config._attn_implementation == "sdpa"


def test_a_row_that_moves_others_is_found_out(build: Build, monkeypatch: pytest.MonkeyPatch):
    """Also where the packed log-probs are close to the padded ones."""
    policy = Policy(build("llama"))
    normal = policy.body.norm.forward  # type: ignore[union-attr,operator]

    def leaking(states: torch.Tensor) -> torch.Tensor:
        return normal(states + 0.01 * states.mean(1, keepdim=True) if states.shape[0] == 1 else states)

    monkeypatch.setattr(policy.body.norm, "forward", leaking)
    monkeypatch.setitem(policy_module.HEAD_TOLERANCE, "float32", 1.0)
    monkeypatch.setattr(layout, "LEAK", 1e-5)
    with pytest.raises(UftError, match="a row in a pack moves others"):
        settle_layout(policy, "packed", 30)


def test_scores_that_are_capped_are_no_kernels_business(build: Build, monkeypatch: pytest.MonkeyPatch):
    attend = attention.attend_spans
    monkeypatch.setattr(attention, "attend_spans", lambda *given, **more: attend(*given, **more, softcap=2.0))
    with pytest.raises(UftError, match="scores are capped"):
        settled(build("llama"))


def test_a_model_that_fails_on_a_pack_is_padded(build: Build, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layout, "SMALL_MODEL", 0)
    policy = Policy(build("llama"))
    forward = policy.body.layers[0].forward  # type: ignore[index,union-attr]

    def strict(states: Any, attention_mask: Any = None, position_embeddings: Any = None, **rest: Any) -> Any:
        assert "segments" not in rest, "no such keyword"
        return forward(states, attention_mask=attention_mask, position_embeddings=position_embeddings, **rest)

    monkeypatch.setattr(policy.body.layers[0], "forward", strict)  # type: ignore[index]
    settle_layout(policy, "auto", 30)
    assert policy.layout is Layout.PADDED
    assert "AssertionError: no such keyword" in policy.notes[0]


def test_a_reference_follows_or_says_which_key_helps(build: Build):
    policy, reference = settled(build("llama")), Policy(build("llama"))
    follow_layout(reference, policy, 30)
    assert reference.layout is Layout.SHARED
    other = Policy(build("mistral"))
    with pytest.raises(UftError, match=r"train.packing=padded") as raised:
        follow_layout(other, policy, 30)
    assert raised.value.problems[0].what == "reference.path"
    follow_layout(other, settled(build("llama"), "padded"), 30)
    assert other.layout is Layout.PADDED


def test_what_is_saved_does_not_tell(build: Build, tmp_path: Path):
    texts = []
    for packing in ("padded", "packed"):
        settled(build("llama"), packing).base.save_pretrained(tmp_path / packing)
        texts.append(json.loads((tmp_path / packing / "config.json").read_text()))
    assert texts[0] == texts[1]
