"""Runs that must say the same on one process as on two: the whole trainer on small files, without the command line.

As a program, also under torch's launcher: `cases.py FOLDER WAY:NAME...` writes what each says to FOLDER/WAY-NAME.json.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

WORDS = ("one", "two", "three", "four", "Paris", "France", "the", "of", "is", "and", "not", "a", "city", "sea", "red")
KINDS = ("demonstrations", "pairs", "labels", "scores", "negatives")
LORA = ("model.adapter=lora", "model.lora.rank=4")
SHORT_LAST = ("train.epochs=1", "train.steps=null", "train.batch_size=7")
FEW = ("train.batch_size=1", "train.steps=3")
DRY = ("data.exhaustion=first", "data.sources.pairs.share=3", "data.sources.demonstrations.share=1", *SHORT_LAST)

CASES: dict[str, tuple[str, Sequence[str], Sequence[str]]] = {
    "sft": ("sft", ("demonstrations", "pairs"), ()),
    "sft_lora": ("sft", ("demonstrations",), LORA),
    "sft_short_last": ("sft", ("demonstrations", "labels"), SHORT_LAST),
    "sft_one_row": ("sft", ("demonstrations",), FEW),
    "sft_dry": ("sft", ("demonstrations", "pairs"), DRY),
    "sft_padded": ("sft", ("demonstrations",), ("train.packing=padded", "train.micro_batch_tokens=60")),
    "dpo": ("dpo", ("pairs", "negatives"), ()),
    "dpo_lora": ("dpo", ("pairs",), LORA),
    "dpo_cached": ("dpo", ("pairs",), ("reference.mode=cached",)),
    "uft": ("uft", KINDS, ()),
    "uft_lora": ("uft", KINDS, LORA),
    "ift": ("ift", KINDS, ("objective.lam_noise=0.3",)),
    "ift_lora": ("ift", KINDS, LORA),
    "dft": ("dft", ("demonstrations", "negatives"), ("train.epochs=3", "train.steps=null")),
    "dft_lora": ("dft", ("negatives",), LORA),
    "dft_one_example": ("dft", ("negatives",), ("data.sources.negatives.limit=4", "train.batch_size=5")),
    "kto": ("kto", ("labels", "scores"), ()),
    "per_kind": ("per_kind", KINDS, ()),
    "sft_packed": ("sft", KINDS[:2], ("train.packing=packed", "model.gradient_checkpointing=true")),
    "dpo_untied": ("dpo", ("pairs",), ("model=custom", "model.path=untied", "reference.mode=copy")),
}
"""Name -> (objective, sources, settings)."""

PIECES = ("hardware.sharding=full", "train.save_model=true")
WAYS = {"one": (), "two": (), "sharded": PIECES, "offloaded": (*PIECES, "hardware.offload=true")}
"""What is asked of the hardware besides."""

SHARDED = ("sft", "sft_one_row", "sft_packed", "sft_lora", "dpo_lora", "dpo_untied", "uft", "ift", "dft", "kto")
"""Cases that are tried with the model in pieces."""


def rows_of(kind: str, count: int = 11) -> Iterator[dict[str, Any]]:
    """Random rows of one kind, of very unequal lengths."""
    draw = random.Random(kind)

    def text(most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))

    for number in range(count):
        prompt, reply = f"{number} {text(8)}", text(25)
        yield from {
            "demonstrations": [{"prompt": prompt, "response": reply}],
            "pairs": [{"prompt": prompt, "chosen": reply, "rejected": text(12)}],
            "labels": [{"prompt": prompt, "completion": reply, "label": draw.random() < 0.5}],
            "scores": [{"prompt": prompt, "completion": text(12), "score": score} for score in (0.9, 0.3)],
            "negatives": [{"prompt": prompt, "response": reply, "negatives": [text(9) for _ in range(3)]}],
        }[kind]


def write_files(folder: Path) -> None:
    for kind in KINDS:
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind)))


def write_untied(folder: Path) -> None:
    """The playground's model with a head of its own, in FOLDER/untied."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import uft.playground

    source = Path(uft.playground.__file__).with_name("model")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, tie_word_embeddings=False))
    model.save_pretrained(folder / "untied")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "untied")


def overrides(objective: str, sources: Sequence[str], folder: Path, more: Sequence[str]) -> list[str]:
    return [
        f"objective={objective}",
        "data=files",
        *(f"+data.sources.{name}.path={folder / name}.jsonl" for name in sources),
        *(f"+data.sources.{name}.limit=null" for name in sources),
        *(f"+data.sources.{name}.share=null" for name in sources),
        "data.unusable=drop",
        "data.holdout=2",
        "optim.lr=0.001",
        "train.steps=4",
        "train.batch_size=6",
        "train.micro_batch_tokens=150",
        "train.log_every=1",
        "train.checkpoint_every=2",
        "train.save_model=false",
        "eval=default",
        "eval.max_new_tokens=6",
        "tracking=none",
        "hardware=cpu",
        *(f"model.path={folder / 'untied'}" if word == "model.path=untied" else word for word in more),
    ]


def say(name: str, folder: Path, where: str, more: Sequence[str] = ()) -> dict[str, Any]:
    """Train a case to its end in FOLDER/WHERE-NAME: its metric lines and its result."""
    from uft.config.compose import compose
    from uft.config.freeze import frozen
    from uft.config.load import load_config
    from uft.distributed import ranks
    from uft.runs import Run, create_run
    from uft.tracking.metrics import read_metrics
    from uft.training import session
    from uft.training.liveness import Stop

    objective, sources, settings = CASES[name]
    run = Run(folder / f"{where}-{name}")
    if not run.exists:
        text = frozen(compose([*overrides(objective, sources, folder, settings), *more]))
        ranks().on_rank0(lambda: create_run(run.path, text, []) and None)
    code = session.train(run, load_config(run.config_file), Stop())
    assert code == 0, run.result()
    return {"metrics": read_metrics(run), "result": run.result()} if ranks().is_rank0 else {}


def main(folder: Path, wanted: Sequence[str]) -> None:
    from uft.distributed import process_group

    torch.set_num_threads(1)
    with process_group() as group:
        for where, name in (word.split(":") for word in wanted):
            said = say(name, folder, where, WAYS[where])
            if group.is_rank0:
                (folder / f"{where}-{name}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
