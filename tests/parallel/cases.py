"""Sessions of small runs, on one process or under torch's launcher: the whole trainer, without the command line.

`cases.py FOLDER WAY:CASE[:RUN[:STEPS]]...` begins or goes on with FOLDER/RUN (WAY-CASE unless named), until it is
asked to stop after so many steps. Each leaves WAY-CASE.json, its metric lines, and sharded ones that are asked to stop
`held-RANK.json`, what every rank held of the model.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

WORDS = ("horse", "moon", "fox", "lamp", "leaf", "bear", "fish", "rain", "the", "duck", "is", "star", "hat", "owl")
KINDS = ("demonstrations", "pairs", "labels", "scores", "negatives")
LORA = ("model.adapter=lora", "model.lora.rank=4")
SHORT_LAST = ("train.epochs=1", "train.steps=null", "train.batch_size=7")
FEW = ("train.batch_size=1", "train.steps=3")
DRY = ("data.exhaustion=first", "data.sources.pairs.share=3", "data.sources.demonstrations.share=1", *SHORT_LAST)

OWN = ("rollout.completions=2", "rollout.max_new_tokens=6", "rollout.prompts=12")

CASES: dict[str, tuple[str, Sequence[str], Sequence[str]]] = {
    "sft": ("sft", ("demonstrations", "pairs"), ()),
    "sft_lora": ("sft", ("demonstrations",), LORA),
    "sft_short_last": ("sft", ("demonstrations", "labels"), SHORT_LAST),
    "sft_one_row": ("sft", ("demonstrations",), FEW),
    "sft_dry": ("sft", ("demonstrations", "pairs"), DRY),
    "sft_padded": ("sft", ("demonstrations",), ("train.packing=padded", "train.micro_batch_tokens=60")),
    "dpo": ("dpo", ("pairs", "negatives"), ()),
    "aot_unpaired": ("aot_unpaired", ("pairs",), ("train.micro_batch_tokens=60",)),
    "dpo_lora": ("dpo", ("pairs",), LORA),
    "dpo_cached": ("dpo", ("pairs",), ("reference.mode=cached",)),
    "uft": ("uft", KINDS, ()),
    "uft_lora": ("uft", KINDS, LORA),
    "ift": ("ift", KINDS, ("objective.lam_noise=0.3",)),
    "ift_lora": ("ift", KINDS, LORA),
    "dft": ("dft", ("demonstrations", "negatives"), ("train.epochs=3", "train.steps=null")),
    "dft_lora": ("dft", ("negatives",), LORA),
    "dft_one_example": ("dft", ("negatives",), ("data.sources.negatives.limit=4", "train.batch_size=5")),
    "irft_own": (
        "irft",
        ("demonstrations",),
        OWN,
    ),
    "kto": ("kto", ("labels", "scores"), ()),
    "per_kind": ("per_kind", KINDS, ()),
    "sft_packed": ("sft", KINDS[:2], ("train.packing=packed", "model.gradient_checkpointing=true")),
    "dpo_untied": ("dpo", ("pairs",), ("model=custom", "model.path=untied", "reference.mode=copy")),
    "long": ("dpo", ("pairs",), ("train.steps=8", "train.save_model=true", "eval=none")),
}
"""Name -> (objective, sources, settings)."""

FULL = ("hardware.sharding=full", "train.save_model=true")
WAYS = {
    "one": (),
    "two": (),
    "sharded": FULL,
    "kept": (*FULL, "hardware.reshard=false"),
    "offloaded": (*FULL, "hardware.offload=true"),
}
"""What is asked of the hardware besides."""


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


def session_of(folder: Path, way: str, case: str, name: str, until: int | None) -> None:
    """Begin or go on with a run, as `way` has it; leave what it said."""
    from uft.config.compose import compose
    from uft.config.frozen import frozen, load_config
    from uft.distributed import ranks
    from uft.runs import Run, create_run, write_atomically
    from uft.training import session
    from uft.training.liveness import Stop
    from uft.training.session import Recorder

    objective, sources, settings = CASES[case]
    run, stop, after = Run(folder / name), Stop(), Recorder.write_line
    text = frozen(compose([*overrides(objective, sources, folder, settings), *WAYS[way]]))
    begin = (
        (lambda: write_atomically(run.config_file, text)) if run.exists else (lambda: create_run(run.path, text, []))
    )
    ranks().barrier()
    ranks().on_rank0(lambda: begin() and None)

    def watched(self: Recorder, trainer: Any) -> None:
        after(self, trainer)
        if trainer.progress.step == until:
            stop.signal = 15
            if ranks().sharded:
                tell(folder, trainer)

    Recorder.write_line = watched  # type: ignore[method-assign]
    try:
        code = session.train(run, load_config(run.config_file), stop)
    finally:
        Recorder.write_line = after  # type: ignore[method-assign]
    assert code == (0 if until is None else 75), run.result()
    if ranks().is_rank0:
        lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
        (folder / f"{way}-{case}.json").write_text(json.dumps(lines))


READS: list[str] = []  # of the model's files, by this process


def tell(folder: Path, trainer: Any) -> None:
    """What this rank holds of the model."""
    from uft.distributed import ranks

    moments = [s[key] for s in trainer.optimiser.state.values() for key in ("exp_avg", "exp_avg_sq")]
    held = {
        "files read": len(READS),
        "weights": sum(p.to_local().numel() for p in trainer.parameters.values()),
        "moments": sum(m.to_local().numel() for m in moments),
        "of": sum(p.numel() for p in trainer.parameters.values()),
    }
    (folder / f"held-{ranks().rank}.json").write_text(json.dumps(held))


def main(folder: Path, wanted: Sequence[str]) -> None:
    from uft.distributed import process_group
    from uft.model import load

    read = load.load_base

    def counted(*arguments: Any, **settings: Any) -> Any:
        READS.append("")
        return read(*arguments, **settings)

    load.load_base = counted
    torch.set_num_threads(1)
    with process_group():
        for way, case, *rest in (word.split(":") for word in wanted):
            READS.clear()
            name = rest[0] if rest else f"{way}-{case}"
            session_of(folder, way, case, name, int(rest[1]) if rest[1:] else None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
