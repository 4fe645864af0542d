"""uft on the rows: its own configuration, preparation and loop, as `uft train` has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from bench.figures import Figures, Stopwatch
from bench.setting import Place
from bench.theirs import LEARNING_RATE


def _head_in_two_stages() -> None:
    from uft.training import step

    step.visit = lambda *_: iter(())  # type: ignore[assignment]


def _every_prompt_anew() -> None:
    from uft.data.packing import Layout
    from uft.model import packed

    packed.LAYOUT = Layout.PACKED


WAYS: dict[str, tuple[str, ...] | Callable[[], None]] = {
    "uft": (),
    "uft-compiled": ("model.compile=true",),
}
"""How uft is measured: what is typed besides."""

LADDER: dict[str, tuple[str, ...] | Callable[[], None]] = {
    "uft-padded": ("train.packing=padded",),
    "uft-every-prompt": _every_prompt_anew,
    "uft-head-in-two-stages": _head_in_two_stages,
    "uft-one-micro-batch": ("train.micro_batch_tokens=1000000",),
    "uft-reference-copy": ("reference.mode=copy",),
}
"""The same with a lever off; by hand where nobody would want a key for it."""


def words(objective: str, place: Place, own: Path, threads: int) -> list[str]:
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
        f"optim.lr={LEARNING_RATE}",
        "optim.schedule=constant",
        "optim.warmup=0",
        f"train.steps={len(place.tokens)}",
        f"train.batch_size={place.rows}",
        "train.micro_batch_tokens=2048",
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
    from uft.config.freeze import frozen
    from uft.config.load import typed
    from uft.runs import create_run
    from uft.training.prepare import choose_device, prepare
    from uft.training.signals import Stop

    off = {**WAYS, **LADDER}[way]
    typed_words = words(objective, place, own, threads) + ([] if callable(off) else list(off))
    if callable(off):
        off()
    text = frozen(compose(typed_words))
    run = create_run(own / "run", text, typed_words)
    config = typed(yaml.safe_load(text))
    trainer = prepare(run, config, choose_device(config.hardware), Stop()).trainer
    stopwatch, losses, tokens = Stopwatch(), [], []

    class Marks:
        def after_step(self, trainer: Any, step: Any) -> None:
            losses.append(step.loss)
            tokens.append(step.tokens)
            stopwatch.mark()

    trainer.hooks = [Marks()]
    trainer.fit()
    assert tokens == place.tokens, "uft counts other tokens than there are"
    return stopwatch.figures([float(loss) for loss in losses], tokens, warm_up)
