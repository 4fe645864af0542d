"""Is a model trained by uft as good as one trained by TRL? Both on the playground's rows, and the same evaluation.

    python scripts/peer_quality.py                            SFT, DPO and KTO, seeds 1 to 5; ten minutes on two cores
    python scripts/peer_quality.py --objectives sft --seeds 1 2 3

The same rows, number of updates, batch, rate, schedule and optimiser; the order of the rows differs, so seeds are not
paired. What both trained is measured by `uft eval` on the held-out rows. TRL comes with  pip install -e '.[bench]'.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from uft.playground import world
from uft.report.verdict import difference_of

STEPS, BATCH = 165, 32
METRICS = (
    "eval/instruct/exact_match",
    "eval/pairs/exact_match",
    "eval/pairs/correct",
    "eval/instruct/nll",
    "eval/pairs/nll",
)
Record = dict[str, Any]


def message(role: str, text: str) -> list[Record]:
    return [{"role": role, "content": text}]


def demonstration(row: Record, reply: str = "response") -> Record:
    return {"prompt": message("user", row["prompt"]), "completion": message("assistant", row[reply])}


def pair(row: Record) -> Record:
    sides = {side: message("assistant", row[side]) for side in ("chosen", "rejected")}
    return {"prompt": message("user", row["prompt"]), **sides}


def labelled(row: Record) -> Record:
    return {**demonstration(row, "completion"), "label": row["label"]}


@dataclass(frozen=True)
class Method:
    rows: str  # of the playground
    lr: float
    words: tuple[str, ...]  # for uft
    trainer: str  # of TRL
    options: dict[str, Any]  # for TRL
    record: Callable[[Record], Record]


METHODS = {
    "sft": Method("instruct", 1e-3, (), "SFT", {}, demonstration),
    "dpo": Method("pairs", 1e-4, ("objective.beta=0.1",), "DPO", {"beta": 0.1}, pair),
    "kto": Method("binary", 3e-4, ("objective.beta=0.1",), "KTO", {"beta": 0.1}, labelled),
}


def by_trl(name: str, seed: int, folder: Path) -> Path:
    """The folder of a model that TRL trained."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    method, start = METHODS[name], world.model_dir()
    settings = getattr(trl, f"{method.trainer}Config")(
        output_dir=str(folder / "trl"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=method.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.1 * STEPS),
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        max_length=None,
        dataloader_drop_last=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **method.options,
    )
    trainer = getattr(trl, f"{method.trainer}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(start, dtype="float32"),
        args=settings,
        train_dataset=Dataset.from_list([method.record(row) for row in world.records(method.rows)]),
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    trainer.train()
    trainer.save_model(str(folder / "model"))
    AutoTokenizer.from_pretrained(start).save_pretrained(folder / "model")
    return folder / "model"


def by_uft(name: str, seed: int, folder: Path) -> Path:
    """The folder of a model that uft trained."""
    method = METHODS[name]
    words = [f"objective={name}", f"data={method.rows}", f"optim.lr={method.lr}", f"seed={seed}", *method.words]
    length = [
        f"train.steps={STEPS}",
        f"train.batch_size={BATCH}",
        "eval=none",
        "tracking=none",
        f"run.dir={folder / 'run'}",
    ]
    run(["train", *words, *length], folder)
    return folder / "run" / "model"


def run(words: list[str], folder: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "uft", *words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def figures(model: Path, folder: Path) -> dict[str, float]:
    """What `uft eval` says of a model."""
    words = ["data=mix", "eval.rows=200", "eval.generate_rows=200", f"eval.out={folder / 'figures.json'}"]
    run(["eval", str(model), *words], folder)
    read = json.loads((folder / "figures.json").read_text(encoding="utf-8"))["figures"]
    return {metric: read[metric]["value"] for metric in METRICS}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--objectives", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    asked = parser.parse_args()
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in asked.seeds:
        for name in asked.objectives:
            for side, train in (("trl", by_trl), ("uft", by_uft)):
                with tempfile.TemporaryDirectory(prefix="uft-quality-") as place:
                    print(f"{name} {side} seed {seed} ...", file=sys.stderr, flush=True)
                    found.setdefault((name, side), []).append(figures(train(name, seed, Path(place)), Path(place)))
    print("| objective | figure | TRL | uft | uft - TRL | seeds |", "|---" * 6 + "|", sep="\n")
    for name in asked.objectives:
        for metric in METRICS:
            sides: dict[str, dict[Hashable, float]] = {
                side: {(side, n): one[metric] for n, one in enumerate(found[name, side])} for side in ("trl", "uft")
            }
            both = difference_of(sides["uft"], sides["trl"])  # Welch: no seed of one is a seed of the other
            spread = "" if both.low is None else f" [{both.low:+.3f}, {both.high:+.3f}]"
            means = [f"{fmean(values.values()):.3f}" for values in sides.values()]
            print(f"| {name} | {metric} | {' | '.join(means)} | {both.difference:+.3f}{spread} | {both.n} |")


if __name__ == "__main__":
    main()
