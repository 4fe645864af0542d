from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from uft.config.schema import Lora
from uft.data.batch import Batch
from uft.model import export as export_module
from uft.model.export import export
from uft.model.policy import Policy, add_lora
from uft.runs import read_json

Build = Callable[..., Any]
ALL = ["llama_tied", "mistral", "qwen2", "phi3", "gemma2", "gemma3", "cohere", "granite", "gpt2"]


def load(folder: Path) -> Policy:
    from transformers import AutoModelForCausalLM

    return Policy(AutoModelForCausalLM.from_pretrained(folder).eval())


def lora_policy(build: Build, name: str, model: Any = None) -> Policy:
    module = add_lora(model or build(name), Lora(rank=3, alpha=6), init_seed=0, float32=True)
    policy = Policy(module).eval()
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.normal_(std=0.1)
    return policy


@pytest.mark.parametrize("name", ALL)
def test_plain_transformers_gives_the_same_log_probs(
    build: Build, tokenizer: Any, batch: Batch, tmp_path: Path, name: str
):
    for policy in (Policy(build(name).eval()), lora_policy(build, name)):
        before = policy(batch).log_probs
        weights = {key: value.clone() for key, value in policy.module.state_dict().items()}
        loaded = load(export(policy, tokenizer, tmp_path / "model"))
        torch.testing.assert_close(loaded(batch).log_probs, before, atol=1e-5, rtol=0)
        assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}
        assert all(torch.equal(value, weights[key]) for key, value in policy.module.state_dict().items())
        assert type(loaded.module) is type(policy.base)


def test_tied_embeddings_stay_tied(build: Build, tokenizer: Any, tmp_path: Path):
    from safetensors import safe_open

    for name, policy in {"a": Policy(build("llama_tied")), "b": lora_policy(build, "llama_tied")}.items():
        loaded = load(export(policy, tokenizer, tmp_path / name)).base
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        with safe_open(tmp_path / name / "model.safetensors", framework="pt") as file:
            assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_the_adapter_lies_beside_the_merged_weights(build: Build, tokenizer: Any, batch: Batch, tmp_path: Path):
    from peft import PeftModel

    policy = lora_policy(build, "llama")
    folder = export(policy, tokenizer, tmp_path / "model")
    again = Policy(PeftModel.from_pretrained(build("llama"), str(folder / "adapter")).eval())
    torch.testing.assert_close(again(batch).log_probs, policy(batch).log_probs, atol=1e-6, rtol=0)


def test_an_adapter_over_bfloat16_weights_is_merged_without_rounding(
    build: Build, tokenizer: Any, batch: Batch, tmp_path: Path
):
    from transformers import AutoModelForCausalLM

    build("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    policy = lora_policy(build, "llama", base)
    loaded = load(export(policy, tokenizer, tmp_path / "model"))
    policy.module.float()
    torch.testing.assert_close(loaded(batch).log_probs, policy(batch).log_probs, atol=1e-5, rtol=0)


def test_precision_tokenizer_template_and_generation_settings_are_there(build: Build, tokenizer: Any, tmp_path: Path):
    from transformers import AutoTokenizer, GenerationConfig

    model = build("llama")
    model.generation_config.max_new_tokens = 17
    folder = export(Policy(model), tokenizer, tmp_path / "model", torch.bfloat16)
    again = AutoTokenizer.from_pretrained(folder)
    assert read_json(folder / "tokenizer_config.json")["model_input_names"] == ["input_ids", "attention_mask"]
    assert again("w5 w7").input_ids == tokenizer("w5 w7").input_ids
    assert again.chat_template == tokenizer.chat_template
    assert GenerationConfig.from_pretrained(folder).max_new_tokens == 17
    assert {p.dtype for p in load(folder).module.parameters()} == {torch.bfloat16}


def raise_interrupt(folder: Path) -> None:
    raise KeyboardInterrupt


def test_the_folder_is_the_old_one_until_the_new_one_is_whole(
    build: Build, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = export(Policy(build("llama")), tokenizer, tmp_path / "model")
    (folder / "of-the-old-one").write_text("")

    def fail(folder: Path) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "flush", fail)
        with pytest.raises(OSError, match="disk full"):
            export(Policy(build("llama")), tokenizer, folder)
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "for_older_readers", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            export(Policy(build("llama")), tokenizer, folder)
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder / "of-the-old-one").exists()
    load(folder)
    export(Policy(build("llama")), tokenizer, folder)
    assert not (folder / "of-the-old-one").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
