"""uft on the rows: its own configuration, preparation and loop, as `uft train` has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from bench.figures import Figures, Stopwatch
from bench.setting import Place
from bench.theirs import LEARNING_RATE


def _head_in_two_stages(trainer: Any) -> None:
    from uft.training import step

    step.chunked_backward = lambda *_: []


def _logits_of_every_position(trainer: Any) -> None:
    trainer.policy.head = None


def _every_prompt_anew(trainer: Any) -> None:
    from uft.data.batch import Layout

    trainer.policy.layout = Layout.PACKED


def _gradients_by_autograd(trainer: Any) -> None:
    from uft.model import head

    head.own_gradient = lambda weight: None
    head.keeps_its_own = lambda weight: False


Off = tuple[str, ...] | Callable[[Any], None]

WAYS: dict[str, Off] = {
    "uft": (),
    "uft-compiled": ("model.compile=true",),
    "uft-bf16": (),
}
"""How uft is measured: what is typed besides."""

LADDER: dict[str, Off] = {
    "packing off": ("train.packing=padded",),
    "shared prompts off": _every_prompt_anew,
    "selected positions off": _logits_of_every_position,
    "one visit off": _head_in_two_stages,
    "in place off": _gradients_by_autograd,
    "micro-batches off": ("train.micro_batch_tokens=1000000",),
    "cached reference off": ("reference.mode=copy",),
    "fused update off": ("optim.fused=false",),
    "kept memory on": ("hardware.keep_memory=true",),
    "thread on": ("train.prefetch=true",),
}
"""The same with one lever the other way round; by hand where nobody would want a key for it."""


def words(objective: str, place: Place, own: Path, threads: int, dtype: str = "float32") -> list[str]:
    """What one would type."""
    return [
        f"objective={objective}",
        "data=files",
        f"+data.sources.rows.path={place.file}",
        "data.holdout=0",
        f"data.cache={own / 'cache'}",
        "model=custom",
        "model.name=random",
        f"model.path={place.model}",
        f"model.dtype={dtype}",
        f"optim.lr={LEARNING_RATE}",
        "optim.schedule=constant",
        "optim.warmup=0",
        f"train.steps={len(place.tokens)}",
        f"train.batch_size={place.rows}",
        "train.max_length=2048",
        "reference.mode=cached" if objective in ("dpo", "uft", "una", "dft") else "reference.mode=auto",
        "hardware=cpu",
        f"hardware.threads={threads}",
        "eval=none",
        "tracking=none",
    ]


def measure(objective: str, way: str, place: Place, own: Path, warm_up: int, threads: int) -> Figures:
    """Train through all rows of `place`; `own` is a folder for the run and its caches."""
    from uft.config.compose import compose
    from uft.config.frozen import frozen, to_config
    from uft.runs import create_run
    from uft.training.liveness import Stop
    from uft.training.setup import Work, choose_device, prepare

    off = {**WAYS, **LADDER}[way]
    dtype = "bfloat16" if way == "uft-bf16" else "float32"
    typed_words = words(objective, place, own, threads, dtype) + ([] if callable(off) else list(off))
    text = frozen(compose(typed_words))
    run = create_run(own / "run", text, typed_words)
    config = to_config(yaml.safe_load(text))
    trainer = prepare(run, Work(config, choose_device(config.hardware), Stop())).trainer
    if callable(off):
        off(trainer)
    stopwatch, losses, tokens = Stopwatch(), [], []

    class Marks:
        def __call__(self, trainer: Any, step: Any) -> None:
            losses.append(step.loss)
            tokens.append(step.tokens)
            stopwatch.mark()

    trainer.hooks = [Marks()]
    trainer.fit()
    assert tokens == place.tokens, "uft counts other tokens than there are"
    return stopwatch.figures([float(loss) for loss in losses], tokens, warm_up)
