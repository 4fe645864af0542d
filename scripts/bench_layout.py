"""What padding, packing and shared prompts cost: seconds and memory of whole optimiser steps of SFT and DPO.

    python scripts/bench_layout.py                  both losses, about ten minutes on two cores
    python scripts/bench_layout.py --rounds 1 --steps 1 --losses dpo

A random Llama of 30 million parameters with a vocabulary of 49,152 in float32, rows of skewed lengths like chat, DPO's
with long prompts. Every figure is of a process of its own, since a process never gives its peak memory back; processes
take turns, so that a busy machine is busy for all of them. CPU seconds are the steadier figure.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

VOCABULARY = 49_152
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
LAYOUTS = ("padded", "packed", "shared")
ROWS = {"sft": 8, "dpo": 4}
"""Rows of a step."""
# median and spread (of the logarithm) of prompts and completions, in tokens
LENGTHS = {"sft": ((90, 0.9), (120, 0.9)), "dpo": ((320, 0.5), (70, 0.7))}
LONGEST = 1024


@dataclass(frozen=True)
class Figures:
    """Of one process; per step."""

    cpu: float  # seconds, all threads together
    wall: float
    peak_mb: float
    losses: list[float]
    tokens: int


def main() -> None:
    options = _options()
    if options.one:
        print(json.dumps(asdict(one(options.losses[0], options.layouts[0], options.steps, options.budget))))
        return
    arms = [(loss, layout) for loss in options.losses for layout in options.layouts]
    found: dict[tuple[str, str], list[Figures]] = {arm: [] for arm in arms}
    for _ in range(options.rounds):
        for arm in arms:
            found[arm].append(in_a_process(*arm, options))
    for line in table(found):
        print(line)
    if options.out:
        content = [{"loss": a[0], "layout": a[1], "runs": [asdict(f) for f in runs]} for a, runs in found.items()]
        Path(options.out).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--losses", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--rounds", type=int, default=3, help="processes per arm")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a process, after one that warms up")
    parser.add_argument("--budget", type=int, default=2048, help="train.micro_batch_tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="JSON file for the figures")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_a_process(loss: str, layout: str, options: argparse.Namespace) -> Figures:
    command = [sys.executable, __file__, "--one", "--losses", loss, "--layouts", layout]
    command += ["--steps", str(options.steps), "--budget", str(options.budget)]
    import os

    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


def table(found: dict[tuple[str, str], list[Figures]]) -> Iterator[str]:
    """A line per arm: medians, and how many times less than padded."""
    yield f"{'loss':5} {'layout':8} {'CPU s/step':>10} {'wall s':>7} {'peak MB':>8} {'tokens/CPU s':>13} {'x':>5}"
    for (loss, layout), runs in found.items():
        cpu, wall, peak = (statistics.median(getattr(r, name) for r in runs) for name in ("cpu", "wall", "peak_mb"))
        base = found.get((loss, "padded"))
        gain = statistics.median(r.cpu for r in base) / cpu if base else float("nan")
        speed = runs[0].tokens / cpu
        yield f"{loss:5} {layout:8} {cpu:10.2f} {wall:7.2f} {peak:8.0f} {speed:13.0f} {gain:5.2f}"
        expected = (base or runs)[0].losses
        apart = max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(runs[0].losses, expected, strict=True))
        if apart > 1e-4:
            yield f"      losses differ from padded by {apart:.1e}"


def one(loss: str, layout: str, steps: int, budget: int) -> Figures:
    """Measure in this process."""
    import torch

    from uft.data.packing import Layout
    from uft.model.packed import settle_layout
    from uft.objectives.base import Clock
    from uft.training.step import optimiser_step

    policy, reference, objective, items = setting(loss, steps + 1)
    if layout != "padded":
        settle_layout(policy, "packed", LONGEST)
        settle_layout(reference, "packed", LONGEST)
    optimiser = torch.optim.AdamW(policy.trainable().values(), lr=1e-4)
    losses, tokens, cpu, wall = [], 0, 0.0, 0.0
    for number, taken in enumerate(items):
        started = time.process_time(), time.perf_counter()
        done = optimiser_step(
            taken,
            objective,
            policy,
            _frozen(reference),
            optimiser,
            policy.trainable(),
            Clock(step=number),
            lr=1e-4,
            micro_batch_tokens=budget,
            max_grad_norm=1.0,
            pad_id=0,
            device=policy.device,
            layout=Layout(layout),
        )
        losses.append(float(done.loss))
        if number:
            cpu += time.process_time() - started[0]
            wall += time.perf_counter() - started[1]
            tokens += done.tokens
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Figures(cpu / steps, wall / steps, peak, losses, tokens // steps)


def _frozen(reference: Any) -> Any:
    from uft.model.reference import Frozen

    return Frozen(reference)


def setting(loss: str, steps: int) -> tuple[Any, Any, Any, list[list[Any]]]:
    """(policy, reference, objective, the items of every step)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from uft.model.forward import Policy
    from uft.objectives import make

    def model() -> Policy:
        torch.manual_seed(0)
        return Policy(LlamaForCausalLM(LlamaConfig(**LLAMA)))

    file = Path(__file__).parents[1] / "conf" / "objective" / f"{loss}.yaml"
    content = {k: v for k, v in yaml.safe_load(file.read_text(encoding="utf-8")).items() if k != "defaults"}
    random = np.random.default_rng(0)
    items = [[item(loss, random, step * ROWS[loss] + n) for n in range(ROWS[loss])] for step in range(steps)]
    return model(), model(), make(content), items


def item(loss: str, random: np.random.Generator, number: int) -> Any:
    """A demonstration, or a pair under one prompt."""
    from uft.data.batches import Item
    from uft.data.rows import Completion, Message, Row
    from uft.data.templates import Encoded
    from uft.data.views import Part, Role

    def tokens(median: float, spread: float, most: int) -> np.ndarray:
        length = int(np.clip(median * np.exp(spread * random.standard_normal()), 4, most))
        return random.integers(0, VOCABULARY, length).astype(np.int32)

    prompts, completions = LENGTHS[loss]
    prompt = tokens(*prompts, LONGEST // 2)

    def encoded() -> Encoded:
        ids = np.concatenate([prompt, tokens(*completions, LONGEST // 2)])
        return Encoded(ids, np.arange(len(ids)) >= len(prompt), len(prompt))

    turn = (Message("assistant", "x"),)
    feedback: list[dict[str, Any]] = [{}] if loss == "sft" else [{"preferred": True}, {"preferred": False}]
    row = Row("random", number, (Message("user", "x"),), tuple(Completion(turn, **f) for f in feedback))
    parts = (Part(0), Part(1, Role.NEGATIVE))[: len(feedback)]
    return Item(number, row, parts, tuple(encoded() for _ in parts))


if __name__ == "__main__":
    main()
