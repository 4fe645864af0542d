"""The whole program in processes of its own, on small models and files of every kind made here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for every_kind.py, plain_model.py and oracle.py
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))  # for evidence.py

from every_kind import ROWS

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = ["The capital of France is Paris.", "system user assistant", "one two three 0123456789 plus minus?!"] * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


# --- files


def count_rows(file: Path) -> int:
    """Rows that uft makes of a JSONL file: scored completions of one prompt are one row."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    scored = {json.dumps(record["prompt"]) for record in records if "score" in record}
    return len(scored) + sum("score" not in record for record in records)


@pytest.fixture(scope="session")
def write() -> Callable[[Path, Sequence[Mapping[str, Any]]], Path]:
    """write(path, rows): a JSONL file."""

    def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory, write: Callable[..., Path]) -> Callable[[str], Path]:
    """rows("pairs"): a JSONL file of that name in ROWS."""
    folder = tmp_path_factory.mktemp("rows")
    files = {name: write(folder / f"{name}.jsonl", content) for name, content in ROWS.items()}
    return files.__getitem__


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_model(seed=0, tied=False): a folder with a random two-layer Llama and a byte-level tokenizer with ChatML.

    Its weights are large enough that no prediction is near uniform and that wrong arithmetic shows.
    """
    folder = tmp_path_factory.mktemp("models")

    def make(seed: int = 0, tied: bool = False) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        place = folder / f"llama-{seed}{'-tied' if tied else ''}"
        if place.is_dir():
            return place
        tokenizer = _tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(std=0.2)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        return place

    return make


@pytest.fixture(scope="session")
def tiny_model(make_model: Callable[..., Path]) -> Path:
    return make_model(seed=0)


@pytest.fixture(scope="session")
def other_model(make_model: Callable[..., Path]) -> Path:
    """Of the same shape and tokenizer as `tiny_model`, with other weights: a reference that differs."""
    return make_model(seed=1)


@pytest.fixture
def request_of(tiny_model: Path, rows: Callable[[str], Path]) -> Callable[..., list[str]]:
    """request_of("sft", ["pairs"], "train.steps=3"): the overrides of a small quiet run on these files.

    One step on a batch of all rows, every step logged, no learning and no evaluation, unless overridden. `sources`:
    names in ROWS, or a dict from name to JSONL file.
    """

    def make(objective: str, sources: Sequence[str] | Mapping[str, Path], *more: str) -> list[str]:
        files = sources if isinstance(sources, Mapping) else {name: rows(name) for name in sources}
        return [
            f"objective={objective}",
            "data=files",
            "data.holdout=0",
            *(f"+data.sources.{name}.path={path}" for name, path in files.items()),
            "model=custom",
            f"model.path={tiny_model}",
            "optim.lr=0",
            "train.steps=1",
            f"train.batch_size={sum(map(count_rows, files.values()))}",
            "train.log_every=1",
            "eval=none",
            "tracking=none",
            "hardware=cpu",
            *more,
        ]

    return make


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """here(overrides): the worker's own run of them within this process, which is spared seconds of imports."""
    monkeypatch.setenv("UFT_CACHE", str(tmp_path / "cache"))

    def run(overrides: list[str], name: str = "run") -> Path:
        from uft.config.compose import compose
        from uft.config.frozen import frozen
        from uft.launch.worker import train
        from uft.runs import create_run

        run = create_run(tmp_path / name, frozen(compose(overrides)), overrides)
        assert train(str(run.path)) == 0
        return run.path

    return run


# --- what a run left


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """metrics(run): the lines of metrics.jsonl."""

    def read(run: Path) -> list[dict[str, Any]]:
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    return read


@pytest.fixture(scope="session")
def curve(metrics: Callable[[Path], list[dict[str, Any]]]) -> Callable[[Path], dict[int, dict[str, Any]]]:
    """curve(run): training metrics by step."""
    return lambda run: {line["step"]: line for line in metrics(run) if "loss" in line}


@pytest.fixture(scope="session")
def result() -> Callable[[Path], dict[str, Any]]:
    """result(run): result.json."""
    return lambda run: json.loads((run / "result.json").read_text(encoding="utf-8"))
