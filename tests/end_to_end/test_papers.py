"""The recipes of papers: two steps of every row of their tables, as typed, where a tiny model and rows in the layout of
the hub's lie in folders that are named as the hub's are."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from uft.config.messages import conf_dir

Uft = Callable[..., Any]
TABLES = sorted(path.stem for path in (conf_dir() / "sweep").glob("paper_*.yaml"))
ARMS = {
    sweep: yaml.safe_load((conf_dir() / "sweep" / f"{sweep}.yaml").read_text())["hydra"]["sweeper"]["arms"]
    for sweep in TABLES
}
RECIPES = [
    *(f"sweep={sweep} arm={arm}" for sweep, arms in ARMS.items() for arm in arms),
    *("experiment=paper_irft", "experiment=paper_spin"),
    "experiment=paper_uft_rl data.sources.countdown.path=countdown.jsonl",
]
MORE = {  # of recipes that sample
    **{
        name: ["generate.max_new_tokens=150", "generate.seeds=[0,1,2,3]"]
        for name in ("paper_dft", "paper_spin", "paper_irft")
    },
    "paper_uft_rl": ["rollout.prompts=4", "rollout.max_new_tokens=12"],
}
SMALL = ["train.steps=2", "train.batch_size=4", "train.max_length=240", "eval=none", "tracking=none", "hardware=cpu"]


def said(n: int, text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Name fruit {n}."}, {"role": "assistant", "content": text}]


def graded(n: int) -> dict[str, Any]:
    grades = {"helpfulness": 4 - n % 4, "correctness": n % 5, "coherence": 3, "complexity": 1, "verbosity": 2}
    return {"prompt": f"Name fruit {n // 2}.", "response": f"A fig, {n}.", **grades}


def pair(n: int) -> dict[str, Any]:
    sides = {"chosen": said(n, "Plums."), "rejected": said(n, "No.")}
    scores = {"score_chosen": 8.0, "score_rejected": 3.0}
    return {"prompt": f"Name fruit {n}.", "prompt_id": f"p{n}", **sides, "messages": sides["chosen"], **scores}


LAYOUTS: dict[str, tuple[dict[str, int], Callable[[int], dict[str, Any]]]] = {
    "HuggingFaceH4/ultrachat_200k": (
        {"train_sft": 40, "test_sft": 4},
        lambda n: {"prompt": f"Name fruit {n}.", "prompt_id": f"u{n}", "messages": said(n, "Pear.")},
    ),
    "nvidia/HelpSteer2": ({"train": 16, "validation": 4}, graded),
    "HuggingFaceH4/ultrafeedback_binarized": ({"train_prefs": 12, "test_prefs": 4}, pair),
    "AI-MO/NuminaMath-CoT": (
        {"train": 12, "test": 4},
        lambda n: {
            "source": "aops",
            "problem": f"{n} + 1?",
            "solution": f"$\\boxed{{{n + 1}}}$",
            "messages": said(n, "2"),
        },
    ),
}  # hub id -> rows of each split, and a row as the hub has it
MODELS = (
    *("mistralai/Mistral-7B-v0.1", "HuggingFaceH4/mistral-7b-sft-beta", "alignment-handbook/zephyr-7b-sft-full"),
    *("Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.1-8B"),
    "HuggingFaceH4/zephyr-7b-beta",
)
COUNTDOWN = [
    {
        "prompt": f"Reach {n + 3} with 3 and {n}.",
        "completion": f"3 + {n}\n= {n + 3}",
        "numbers": [3, n],
        "target": n + 3,
    }
    for n in range(1, 9)
]


@pytest.fixture
def hub(tmp_path: Path, tiny_model: Path) -> Path:
    """A folder where the hub's names are found."""
    from datasets import Dataset, DatasetDict

    for name, (splits, row) in LAYOUTS.items():
        rows = {split: Dataset.from_list([row(n) for n in range(count)]) for split, count in splits.items()}
        DatasetDict(rows).save_to_disk(tmp_path / name)
    for name in MODELS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.symlink(tiny_model, tmp_path / name)
    (tmp_path / "countdown.jsonl").write_text("".join(json.dumps(row) + "\n" for row in COUNTDOWN))
    return tmp_path


@pytest.mark.parametrize(
    "recipe", [pytest.param(recipe, marks=pytest.mark.slow if n % 16 else ()) for n, recipe in enumerate(RECIPES)]
)
def test_a_row_of_a_table_trains(uft: Uft, hub: Path, recipe: str) -> None:
    words = shlex.split(recipe)
    uft("train", *words, *SMALL, *MORE.get(words[0].partition("=")[2], ()), cwd=hub)
    outermost = min(hub.glob("outputs/**/result.json"), key=lambda path: len(path.parts))  # stages have theirs below
    result = json.loads(outermost.read_text())
    assert result["status"] == "finished"
    assert result["steps"] >= 2
