"""Tiny random models of many architectures, and a folder that looks like any model on disk."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SMALL),
    "llama_tied": ("LlamaConfig", SMALL | {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", SMALL | {"sliding_window": 4}),
    "qwen2": ("Qwen2Config", SMALL | {"tie_word_embeddings": True}),
    "phi3": ("Phi3Config", SMALL),
    "gemma2": ("Gemma2Config", SMALL | {"head_dim": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", SMALL | {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "cohere": ("CohereConfig", SMALL | {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", SMALL | {"logits_scaling": 3.0}),
    "gpt2": ("GPT2Config", GPT2 | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}


def _build(name: str, **changes: Any) -> Any:
    import transformers

    config_class, settings = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(**{**settings, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)  # far from uniform, so that a wrong head shows
    return model


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """build("gemma2", **changes of the configuration) -> a random model."""
    return _build


def _visible(spans: tuple[Any, ...]) -> torch.Tensor:
    """(T, T) bool: who attends to whom."""
    starts = [0, *accumulate(span.length for span in spans)]
    mask = torch.zeros(starts[-1], starts[-1], dtype=torch.bool)
    for span, start in zip(spans, starts, strict=False):
        for at in range(start, start + span.length):
            mask[at, start : at + 1] = True
            mask[at, starts[span.prompt] : starts[span.prompt] + span.prefix] = True
    return mask


@pytest.fixture(scope="session")
def visible() -> Callable[..., torch.Tensor]:
    """visible(spans) -> (T, T) bool: who attends to whom."""
    return _visible


@pytest.fixture(scope="session")
def sequences() -> list[tuple[np.ndarray, np.ndarray]]:
    """Three sequences of different lengths with 2, 5 and 4 supervised tokens; one has a gap (two turns)."""
    generator = np.random.default_rng(3)
    masks = ([0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1])
    return [(generator.integers(3, VOCABULARY, len(m)).astype(np.int32), np.array(m, dtype=bool)) for m in masks]


@pytest.fixture(scope="session")
def batch(sequences: list[tuple[np.ndarray, np.ndarray]]) -> Any:
    from uft.data.batch import sequence_batch

    return sequence_batch(sequences, pad_id=0)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Words w0, w1, ... with a chat template, without a pad token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = "{% for m in messages %}{{ m.content }} </s>{% endfor %}"
    return made


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A Llama with its tokenizer on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    _build("llama_tied").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
