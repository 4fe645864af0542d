"""A tiny Llama, rows of every kind of feedback and unequal lengths, and a trainer made of them as `train` makes it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from uft.config.frozen import to_builtins, to_config
from uft.config.messages import conf_dir
from uft.config.schema import Config
from uft.config.stages import differing
from uft.errors import GOOD
from uft.runs import Run, create_run
from uft.training import exporting, making, session, setup, trainer
from uft.training.setup import Prepared, Work, prepare

sys.path.insert(0, str(Path(__file__).parent))  # for the helper modules beside this

from dying import UNEVEN, Death, StopAt
from small_rows import VOCABULARY, Rows, write_rows
from stage_runs import DPO, SFT, sit

LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = ("demonstration", "preference", "binary", "scored", "negatives")
USES = {
    "sft": KINDS,
    "ift": KINDS,
    "uft": KINDS,
    "una": ("preference", "binary", "scored"),
    "dft": ("demonstration", "preference", "negatives"),
    "dft2": ("demonstration", "preference", "negatives"),
    **dict.fromkeys(("dpo", "aot", "aot_unpaired"), ("preference", "scored", "negatives")),
    "kto": KINDS,
    "anchored_sft": ("demonstration", "binary", "scored"),
    "distill": ("demonstration", "preference", "binary"),
    "orpo": ("preference", "negatives"),
    "per_kind": KINDS,
}
"""The kinds each objective is trained on here."""


@pytest.fixture(autouse=True)
def no_collections(monkeypatch):
    """A process of hundreds of tests holds millions of objects: looking through them at every start costs more than the
    steps that are tested. `test_trainer.py` has the real thing."""
    for module in (trainer, session):
        monkeypatch.setattr(module, "gc", SimpleNamespace(collect=int, freeze=int, unfreeze=int))


@pytest.fixture(autouse=True)
def same_generator():
    """`prepare` seeds torch's generator; no test may depend on which one ran before it."""
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A random Llama with untied embeddings and a tokenizer of words w3 ... w60."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} </s> {% endfor %}"
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**LLAMA))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


def _rows_of(kind: str, count: int) -> list[dict[str, Any]]:
    rows = Rows(KINDS.index(kind))
    made = [getattr(rows, kind)() for _ in range(count)]
    if kind == "scored":  # two completions of every prompt, so that pairwise objectives find a best and a worst
        made += [{**row, "completion": rows.text(), "score": (row["score"] + 0.5) % 1} for row in made]
    return made


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """One JSONL file of 12 rows per kind."""
    folder = tmp_path_factory.mktemp("rows")
    return {kind: write_rows(folder / f"{kind}.jsonl", _rows_of(kind, 12)) for kind in KINDS}


@pytest.fixture(scope="session")
def configure(model_folder, files, tmp_path_factory):
    """configure("ift", "train.steps=3", sources={name: path}) -> a typed configuration without the command line."""
    cache = tmp_path_factory.mktemp("cache")

    @functools.cache
    def preset(name: str) -> dict[str, Any]:
        text = (conf_dir() / "objective" / f"{name}.yaml").read_text().replace("${rollout.max_new_tokens}", "5")
        content = yaml.safe_load(text)
        placed = (entry for entry in content.pop("defaults", ()) if isinstance(entry, dict))
        return content | {place.partition("@")[2]: preset(option) for e in placed for place, option in e.items()}

    def make(objective: str, *settings: str, sources: dict[str, Path] | None = None) -> Config:
        chosen = {kind: files[kind] for kind in USES[objective]} if sources is None else sources
        base = {
            "objective": preset(objective),
            "data": {
                "name": "kinds",
                "sources": {name: {"path": str(path)} for name, path in chosen.items()},
                "cache": str(cache),
            },
            "model": {"name": "tiny", "path": str(model_folder), "lr": 0.01},
            "train": {"steps": 4, "batch_size": 8, "check_model": False},
            "hardware": {"device": "cpu"},
            "tracking": {"mode": "disabled"},
        }
        merged = OmegaConf.merge(OmegaConf.create(base), OmegaConf.from_dotlist(list(settings)))
        return to_config(OmegaConf.to_container(merged))

    return make


@pytest.fixture
def build(configure, tmp_path):
    """build("ift", ...) -> Prepared in a fresh run folder; `run` for another one."""

    def make(objective: str, *settings: str, run: str = "run", **options: Any) -> Prepared:
        config = configure(objective, *settings, **options)
        folder = tmp_path / run
        made = Run(folder) if folder.exists() else create_run(folder, "{}\n", [])
        return prepare(made, Work(config))

    return make


@pytest.fixture(scope="session")
def chain(configure, files):
    """chain({"sft": ("sft", "demonstration", "train.steps=4"), ...}): a run of these stages.

    A stage is (objective, kind of its rows, settings); the objective of one that does not train is what it does.
    """

    def make(parts: Mapping[str, tuple[str, ...]], *settings: str, reference: str = "start") -> Config:
        whole = {}
        for name, (does, kind, *own) in parts.items():
            objective = "sft" if does in making.ROW_STAGES else does
            source = {kind: files[kind]} if kind in files else {"made": Path(kind)}
            whole[name] = configure(objective, *UNEVEN, "optim.lr=0.02", *settings, *own, sources=source)
        run = whole[[name for name, part in parts.items() if part[0] not in making.ROW_STAGES][-1]]
        top = to_builtins(asdict(run))
        nodes: dict[str, Any] = {}
        for name, (does, *_) in parts.items():
            what = {"do": does} if does in making.ROW_STAGES else {"do": "fit", "reference": reference}
            nodes[name] = {**what, "config": differing(to_builtins(asdict(whole[name])), top)}
        return replace(run, stages=nodes)

    return make


@pytest.fixture(scope="session")
def two(chain):
    """two(*settings): SFT, then DPO."""
    parts = {
        "sft": ("sft", "demonstration", f"train.steps={SFT}"),
        "dpo": ("dpo", "preference", f"train.steps={DPO}"),
    }
    return lambda *settings, **options: chain(parts, *settings, **options)


@pytest.fixture(scope="session")
def finished(two, tmp_path_factory):
    """The folder of a finished run of `two`, to be looked at alone, and how often it asked whether to stop."""
    folder, watch = tmp_path_factory.mktemp("finished") / "run", StopAt()
    assert sit(folder, two(), watch) == GOOD
    return folder, watch.looks


@pytest.fixture
def death(monkeypatch):
    return Death(monkeypatch, session, setup, exporting)
