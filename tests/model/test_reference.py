from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from uft.config.schema import Model, ReferenceModel
from uft.data.batch import Batch, sequence_batch
from uft.errors import UftError
from uft.model import reference as reference_module
from uft.model.layout import settle_layout
from uft.model.load import load_policy
from uft.model.policy import Policy
from uft.model.reference import Reference, choose_mode, make_reference

CPU = torch.device("cpu")


@dataclass
class Completion:
    ids: np.ndarray
    supervised: np.ndarray


@pytest.fixture
def completions(sequences: list[tuple[np.ndarray, np.ndarray]]) -> list[Completion]:
    return [Completion(*sequence) for sequence in sequences]


def settings(folder: Path, **changes: Any) -> Model:
    return Model(name="tiny", path=str(folder), **changes)


def trained(policy: Policy) -> Policy:
    """The policy after some training: away from where it started."""
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.05)
    return policy


def make(policy: Policy, model: Model, mode: str, cache: Path, tokenizer: Any, path: str | None = None) -> Reference:
    cfg = ReferenceModel(path=path, mode=mode)
    return make_reference(policy, model, cfg, device=CPU, tokenizer=tokenizer, visits_per_row=1.0, cache=cache)


def log_probs(reference: Reference, batch: Batch, completions: list[Completion]) -> torch.Tensor:
    if reference.column is not None:
        assert reference.column.fill(completions)
        values = torch.from_numpy(np.concatenate([reference.column(c) for c in completions]))
        batch = replace(batch, columns={"reference": values})
    return reference.forward(batch).log_probs


@pytest.mark.parametrize(
    ("adapter", "modes"), [("none", ["copy", "cached"]), ("lora", ["copy", "cached", "adapter_off"])]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_modes_are_the_initial_policy_even_when_it_has_been_trained(
    model_folder: Path,
    tokenizer: Any,
    tmp_path: Path,
    batch: Batch,
    completions: list[Completion],
    adapter: str,
    modes: list[str],
    dtype: str,
):
    model = settings(model_folder, adapter=adapter, dtype=dtype)
    policy = load_policy(model, CPU, 0)
    initial = policy(batch).log_probs.detach()
    trained(policy)
    assert not torch.allclose(policy(batch).log_probs, initial, atol=1e-3)
    for mode in modes:
        found = log_probs(make(policy, model, mode, tmp_path, tokenizer), batch, completions)
        assert not found.requires_grad
        tolerance = 1e-5 if dtype == "float32" else 1e-2 if mode == "cached" else 1e-5  # cached: other padding
        torch.testing.assert_close(found, initial, atol=tolerance, rtol=0)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_packed_they_are_it_too(
    model_folder: Path, tokenizer: Any, tmp_path: Path, sequences: Any, completions: list[Completion], adapter: str
):
    model = settings(model_folder, adapter=adapter)
    policy = load_policy(model, CPU, 0)
    initial = policy(sequence_batch(sequences, pad_id=0)).log_probs.detach()
    padded = make(policy, model, "cached", tmp_path, tokenizer)
    assert padded.column
    assert padded.column.fill(completions)
    settle_layout(policy, "packed", 30)
    batch = sequence_batch(sequences, 0, policy.layout)
    torch.testing.assert_close(policy(batch).log_probs.detach(), initial, atol=1e-5, rtol=0)
    trained(policy)
    for mode in ["copy", "cached", "adapter_off"][: 3 if adapter == "lora" else 2]:
        reference = make(policy, model, mode, tmp_path, tokenizer)
        torch.testing.assert_close(log_probs(reference, batch, completions), initial, atol=1e-5, rtol=0)
        if reference.column is not None:
            assert reference.column.store.folder != padded.column.store.folder


def test_another_model_can_be_the_reference(
    model_folder: Path, tokenizer: Any, build: Any, tmp_path: Path, batch: Batch, completions: list[Completion]
):
    other, path = build("gemma2"), str(tmp_path / "other")
    other.save_pretrained(path)
    model = settings(model_folder, adapter="lora")
    policy, expected = load_policy(model, CPU, 0), Policy(other)(batch).log_probs
    for mode in ("copy", "cached"):
        found = log_probs(make(policy, model, mode, tmp_path, tokenizer, path=path), batch, completions)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_reference_that_is_not_there_or_has_too_small_a_vocabulary_is_named_by_its_own_key(
    model_folder: Path, tokenizer: Any, build: Any, tmp_path: Path
):
    small, absent, model = str(tmp_path / "small"), str(tmp_path / "absent"), settings(model_folder)
    build("llama", vocab_size=40).save_pretrained(small)
    policy = load_policy(model, CPU, 0)
    with pytest.raises(UftError, match="reference\\.path"):
        make(policy, model, "copy", tmp_path, tokenizer, path=small)
    shapes = {"positions": {"max_position_embeddings": 8}, "distributions": {"vocab_size": 64}}
    for words, changes in shapes.items():
        build("llama", **changes).save_pretrained(tmp_path / words)
        asked = {"visits_per_row": 1.0, "cache": tmp_path, "longest_row": 9, "distributions": words == "distributions"}
        other = ReferenceModel(path=str(tmp_path / words), mode="copy")
        with pytest.raises(UftError, match=words):
            make_reference(policy, model, other, device=CPU, tokenizer=tokenizer, **asked)
    for mode in ("copy", "cached"):
        with pytest.raises(UftError) as raised:
            make(policy, model, mode, tmp_path, tokenizer, path=absent)
        assert raised.value.problems[0].what == f"reference.path={absent}"


def test_whole_distributions_are_compared_of_the_same_tokens_alone(
    model_folder: Path, tokenizer: Any, build: Any, tmp_path: Path
):
    """Not of a model whose tokenizer has two tokens in each other's place; one that comes without a tokenizer is taken
    at its size."""
    policy = load_policy(settings(model_folder), CPU, 0)
    asked = {"device": CPU, "tokenizer": tokenizer, "visits_per_row": 1.0, "cache": tmp_path, "key": "teacher.path"}

    def compare(folder: str, distributions: bool = True) -> str:
        other = ReferenceModel(path=str(tmp_path / folder))
        return make_reference(policy, settings(model_folder), other, distributions=distributions, **asked).mode

    for folder in ("bare", "swapped"):
        build("llama").save_pretrained(tmp_path / folder)
    assert compare("bare") == "copy"
    tokenizer.save_pretrained(tmp_path / "swapped")
    file = tmp_path / "swapped" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(content))
    assert compare("swapped", distributions=False) == "copy"
    with pytest.raises(UftError) as refused:
        compare("swapped")
    [problem] = refused.value.problems
    assert problem.what == f"teacher.path={tmp_path / 'swapped'}"
    assert "numbers 2 tokens otherwise" in problem.why


def test_the_cheapest_mode_is_chosen_with_a_reason():
    cases = {
        ("lora", None, 9.0): "adapter_off",
        ("lora", "other", 9.0): "cached",
        ("lora", "other", 1.0): "copy",
        ("none", None, 1.5): "copy",
        ("none", None, 1.6): "cached",
    }
    for (adapter, path, visits), mode in cases.items():
        found, why = choose_mode(Model(adapter=adapter), ReferenceModel(path=path), visits)
        assert found == mode
        assert why
    assert choose_mode(Model(adapter="lora"), ReferenceModel(mode="copy"), 9.0)[0] == "copy"
    for adapter, path in (("none", None), ("lora", "other")):
        with pytest.raises(UftError, match="adapter_off"):
            choose_mode(Model(adapter=adapter), ReferenceModel(path=path, mode="adapter_off"), 1.0)


def test_a_filled_cache_loads_no_model_and_serves_other_runs(
    model_folder: Path,
    tokenizer: Any,
    tmp_path: Path,
    batch: Batch,
    completions: list[Completion],
    monkeypatch: pytest.MonkeyPatch,
):
    model = settings(model_folder)
    policy = load_policy(model, CPU, 0)
    first = log_probs(make(policy, model, "cached", tmp_path, tokenizer), batch, completions)
    monkeypatch.setattr(reference_module, "load_base", lambda *a: pytest.fail("the model was loaded"))
    again = log_probs(make(trained(policy), model, "cached", tmp_path, tokenizer), batch, completions)
    assert torch.equal(first, again)


def test_other_weights_or_another_precision_have_a_cache_of_their_own(
    model_folder: Path, tokenizer: Any, build: Any, tmp_path: Path, completions: list[Completion]
):
    tokenizer.save_pretrained(tmp_path / "other")
    other = build("llama_tied")
    with torch.no_grad():
        other.model.norm.weight.add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    models = [settings(model_folder), settings(tmp_path / "other"), settings(model_folder, dtype="bfloat16")]
    for model in models:
        column = make(load_policy(model, CPU, 0), model, "cached", tmp_path, tokenizer).column
        assert len(column.missing(completions)) == 3
        column.fill(completions)
    assert len(list((tmp_path / "reference").iterdir())) == 3
