"""The first minutes on a GPU: is everything right there, how fast is it, and where does the time go?

    python scripts/bench_gpu.py --out gpu.json             about ten minutes on one GPU
    python scripts/bench_gpu.py --size toy --steps 1       the same on any machine, for a look at what it measures

Correctness comes first: log-probs, the output head and attention in the device's precision against float32. Then steps
of training (tokens per second, MFU, peak memory), memory by the tokens of a pass beside its plan, products of the head,
attention, and a profile. What fails is told in its place, and the rest goes on. Prints a table; `--out` writes JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from bench.ours import words
from bench.setting import KINDS, SIZES, Place, furnish

from uft.config.compose import compose
from uft.config.frozen import frozen, to_config
from uft.data.batch import Span
from uft.model.attention import attend_spans
from uft.model.head import Head, Transform, widens
from uft.model.layout import compile_blocks
from uft.model.memory import Utilisation, peak_memory, peak_rate
from uft.runs import create_run
from uft.training.liveness import Stop
from uft.training.setup import Prepared, Work, choose_device, prepare
from uft.training.trainer import available_devices

DEVICE = torch.device(available_devices()[0])
ON_GPU = DEVICE.type == "cuda"
DTYPE = "bfloat16" if ON_GPU else "float32"
ARMS = {  # name: (objective, what is typed besides)
    "sft": ("sft", ()),
    "sft, not compiled": ("sft", ("model.compile=false",)),
    "dpo": ("dpo", ()),
    "sft, LoRA": ("sft", ("model.adapter=lora", "model.gradient_checkpointing=true")),
}
Figures = dict[str, Any]


class Bench:
    """Places with a model and rows, and preparations of trainers on them."""

    def __init__(self, folder: Path, size: str, steps: int) -> None:
        self.folder, self.steps, self.made = folder, steps, 0
        self.places: dict[str, Place] = {}
        for kind in dict.fromkeys(KINDS[objective] for objective, _ in ARMS.values()):
            (folder / kind).mkdir()
            self.places[kind] = furnish(folder / kind, size, kind, 1 + steps)

    def prepared(self, objective: str, *typed_besides: str, dtype: str = DTYPE) -> Prepared:
        """A trainer as `uft train` would have it."""
        self.made += 1
        own = self.folder / f"run-{self.made}"
        own.mkdir()
        typed_words = words(objective, self.places[KINDS[objective]], own, torch.get_num_threads(), dtype)
        keys = {word.partition("=")[0] for word in typed_besides}
        given = [word for word in typed_words if word != "hardware=cpu" and word.partition("=")[0] not in keys]
        text = frozen(compose([*given, *typed_besides]))
        config = to_config(yaml.safe_load(text))
        return prepare(create_run(own / "run", text, []), Work(config, choose_device(config.hardware), Stop()))


def synchronise() -> None:
    if ON_GPU:
        torch.cuda.synchronize(DEVICE)


def seconds_of(work: Callable[[], Any], least: float = 0.2) -> float:
    """Seconds of one call, after one that warms up."""
    work()
    synchronise()
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < least:
        work()
        synchronise()
        calls += 1
    return (time.perf_counter() - started) / calls


def forget() -> None:
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(DEVICE)


# --- what is looked at


def correctness(bench: Bench) -> Figures:
    """Largest differences, each beside what rounding explains: of a policy's log-probs as it trains from float32, and
    of a head's log-probs and weight gradient from those of the same numbers in float32."""
    exact, narrow = (bench.prepared("sft", "model.compile=false", dtype=dtype) for dtype in ("float32", DTYPE))
    policies = [one.trainer.policy.eval() for one in (exact, narrow)]
    batch = policies[0].trial_batch(policies[0].layout)
    with torch.no_grad():
        expected, found = (policy(batch).log_probs for policy in policies)
        narrow.trainer.policy.train()
        if ON_GPU:  # elsewhere nobody compiles unasked
            compile_blocks(narrow.trainer.policy, asked=False)
    compiled = policies[1](batch).log_probs.detach()
    figures = {
        "policy": float((found - expected).abs().max()),
        "compiled": float((compiled - expected).abs().max()),
        "explained": policies[1].tolerance(expected),
        "notes": policies[1].notes,
        "products in float32": widens(DEVICE),
    }
    torch.manual_seed(0)
    hidden, targets = torch.randn(96, 64, device=DEVICE), torch.randint(0, 500, (96,), device=DEVICE)
    sides = []
    for dtype in (torch.float32, torch.bfloat16 if ON_GPU else torch.float32):
        torch.manual_seed(1)
        head = Head(torch.nn.Linear(64, 500, bias=False, device=DEVICE), Transform(), dtype)
        log_probs = head(hidden, targets)[0]
        log_probs.sum().backward()
        sides.append((log_probs.detach(), head.projection.weight.grad))
    (expected, weight), (found, other) = sides
    assert weight is not None
    assert other is not None
    figures["head"] = float((found - expected).abs().max())
    figures["head, gradient"] = float((other - weight).norm() / weight.norm())
    return figures


def steps(bench: Bench) -> Figures:
    """Every arm: seconds until the first step is over, then tokens per second, MFU and gigabytes at the peak."""
    figures: Figures = {}
    for name, (objective, besides) in ARMS.items():
        forget()
        started = time.perf_counter()
        trainer = bench.prepared(objective, *besides).trainer
        marks: list[tuple[float, int, int]] = []

        class Marks:
            def __call__(self, trainer: Any, step: Any, marks: list[tuple[float, int, int]] = marks) -> None:
                synchronise()
                marks.append((time.perf_counter(), step.tokens, step.supervised_tokens))

        trainer.hooks = [Marks()]
        trainer.fit()
        seconds, measured = marks[-1][0] - marks[0][0], marks[1:]
        tokens, supervised = sum(mark[1] for mark in measured), sum(mark[2] for mark in measured)
        figures[name] = {
            "first step": marks[0][0] - started,
            "tokens/s": tokens / seconds,
            "mfu": Utilisation.of(trainer.policy, 1)(tokens, supervised, seconds),
            "peak GB": peak_memory(DEVICE) / 1e9,
        }
    return figures


def memory(bench: Bench) -> Figures:
    """Gigabytes at the peak of a step by the tokens of a pass, and as planned."""
    figures: Figures = {}
    for tokens in (1024, 4096, 16384) if ON_GPU else (256, 512):
        forget()
        prepared = bench.prepared("sft", f"train.micro_batch_tokens={tokens}", "model.compile=false")
        trainer = prepared.trainer
        trainer.update(
            trainer.collator(trainer.sampler.examples_of(trainer.sampler.preview(trainer.config.train.batch_size)))
        )
        synchronise()
        planned = sum(prepared.planned(tokens).values())
        figures[f"{tokens:,} tokens"] = {"peak GB": peak_memory(DEVICE) / 1e9, "planned GB": planned / 1e9}
    return figures


def head(bench: Bench) -> Figures:
    """TFLOP/s of the visit of a chunk (three products of rows x hidden x vocabulary), by its rows."""
    hidden_size, vocabulary = (2048, 128_256) if ON_GPU else (64, 2048)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    module = Head(torch.nn.Linear(hidden_size, vocabulary, bias=False, device=DEVICE), Transform(), dtype)
    figures: Figures = {"rows of a chunk here": module.rows}
    for rows in (256, 1024, 2048, 4096) if ON_GPU else (64, 128):
        states = torch.randn(rows, hidden_size, device=DEVICE, requires_grad=True)
        targets = torch.randint(0, vocabulary, (rows,), device=DEVICE)

        def visit(states: Any = states, targets: Any = targets, rows: int = rows) -> None:
            module.chunked_backward(
                states, targets, [slice(0, rows)], lambda part, log_probs, argmax: log_probs * 0 - 1
            )

        if rows <= 2 * module.rows:
            figures[f"{rows:,} rows"] = 6 * rows * hidden_size * vocabulary / seconds_of(visit) / 1e12
    return figures


def attention(bench: Bench) -> Figures:
    """TFLOP/s of causal attention, forward and backward, of 8,192 tokens in rows of a length: half of the square."""
    heads, keys, width, total = (32, 8, 64, 8192) if ON_GPU else (2, 1, 32, 512)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    figures: Figures = {}
    for length in (256, 1024, 8192) if ON_GPU else (64, 512):
        spans = tuple(Span(length, number, 0) for number in range(total // length))
        sizes = (heads, keys, keys)
        qkv = [torch.randn(1, n, total, width, device=DEVICE, dtype=dtype, requires_grad=True) for n in sizes]

        def both(spans: Any = spans, qkv: Any = qkv) -> None:
            attend_spans(qkv[0], qkv[1], qkv[2], spans).sum().backward()

        work = 12 * heads * width * total * length / 2  # two products forward, four backward and one made again
        figures[f"rows of {length:,}"] = work / seconds_of(both) / 1e12
    return figures


def profile(bench: Bench) -> Figures:
    """Milliseconds of the longest operations in one step of SFT, after one that warms up."""
    trainer = bench.prepared("sft").trainer
    batches = trainer.collator(trainer.sampler.examples_of(trainer.sampler.preview(trainer.config.train.batch_size)))
    trainer.update(batches)
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * ON_GPU
    with torch.profiler.profile(activities=kinds) as found:
        trainer.update(batches)
        synchronise()
    name = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    longest = sorted(found.key_averages(), key=lambda event: -getattr(event, name))[:15]
    return {event.key[:60]: getattr(event, name) / 1e3 for event in longest}


SECTIONS: dict[str, tuple[Callable[[Bench], Figures], str]] = {
    "correctness": (correctness, "differences from float32"),
    "steps": (steps, "training"),
    "memory": (memory, "peak of a step by tokens of a pass"),
    "head": (head, "TFLOP/s"),
    "attention": (attention, "TFLOP/s"),
    "profile": (profile, "ms of a step"),
}


def table(name: str, figures: Mapping[str, Any]) -> None:
    print(f"\n{name}: {SECTIONS[name][1]}")
    for key, value in figures.items():
        values = value.items() if isinstance(value, Mapping) else [("", value)]
        shown = "  ".join(f"{k} {v:,.4g}".strip() if isinstance(v, float) else f"{k} {v}".strip() for k, v in values)
        print(f"  {key:<28} {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="1b", help="the model of steps, memory and profile")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of every arm")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--out", help="JSON file")
    options = parser.parse_args()
    name = torch.cuda.get_device_name(DEVICE) if ON_GPU else "CPU"
    rate = peak_rate(DEVICE, torch.bfloat16 if ON_GPU else torch.float32)
    found: Figures = {"device": name, "torch": torch.__version__, "peak TFLOP/s": rate / 1e12, "size": options.size}
    print(f"{name}, torch {torch.__version__}: {rate / 1e12:,.4g} TFLOP/s at best; model {options.size}", flush=True)
    with tempfile.TemporaryDirectory(prefix="uft-bench-") as folder:
        bench = Bench(Path(folder), options.size, options.steps)
        for section in options.only:
            forget()
            try:
                found[section] = SECTIONS[section][0](bench)
            except Exception as error:
                traceback.print_exc()
                found[section] = {"failed": f"{type(error).__name__}: {error}"}
            table(section, found[section])
            if options.out:
                Path(options.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
