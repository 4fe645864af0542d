"""The program of test_pieces.py: runs that are begun in pieces and go on whole, and the other way round."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from cases import overrides

HALVES = ("hardware.sharding=full", "hardware.reshard=false")
MORE = ("train.steps=8", "train.save_model=true", "model.lora.rank=4", "eval=none")


def sit(folder: Path, name: str, *more: str, until: int | None = None) -> None:
    """A sitting of a run; with `until`, somebody asks it to stop after that many steps."""
    from uft.config.compose import compose
    from uft.config.freeze import frozen
    from uft.config.load import load_config
    from uft.distributed import ranks
    from uft.runs import Run, create_run, write_atomically
    from uft.training import session
    from uft.training.liveness import Stop
    from uft.training.session import MetricsHook

    run, stop = Run(folder / name), Stop()
    text = frozen(compose([*overrides("dpo", ("pairs",), folder, MORE), *more]))
    if run.exists:
        ranks().barrier()
        ranks().on_rank0(lambda: write_atomically(run.config_file, text))
    else:
        ranks().barrier()
        ranks().on_rank0(lambda: create_run(run.path, text, []) and None)
    config, after = load_config(run.config_file), MetricsHook.after_step

    def watched(self, trainer, step) -> None:
        after(self, trainer, step)
        if trainer.progress.step == until:
            stop.signal = 15
            tell(folder, trainer)

    MetricsHook.after_step = watched
    try:
        session.train(run, config, stop)
    finally:
        MetricsHook.after_step = after


READ: list[Path] = []


def counting(read):
    """Every time the model's files are read is noted."""

    def counted(*arguments, **settings):
        READ.append(Path())
        return read(*arguments, **settings)

    return counted


def tell(folder: Path, trainer) -> None:
    """What this process holds of the model."""
    from uft.distributed import ranks

    if not ranks().sharded:
        return
    moments = [s[key] for s in trainer.optimiser.state.values() for key in ("exp_avg", "exp_avg_sq")]
    held = {
        "files read": len(READ),
        "weights": sum(p.to_local().numel() for p in trainer.parameters.values()),
        "moments": sum(m.to_local().numel() for m in moments),
        "of": sum(p.numel() for p in trainer.parameters.values()),
    }
    (folder / f"held-{ranks().rank}.json").write_text(json.dumps(held))


def main(folder: Path, name: str = "") -> None:
    from uft.distributed import process_group
    from uft.model import load

    load.load_base = counting(load.load_base)
    torch.set_num_threads(1)
    with process_group():
        if not name:
            sit(folder, "continued", *HALVES, until=4)
        elif name == "whole":
            sit(folder, "whole")
            sit(folder, "back", until=4)
        elif name == "continued":
            sit(folder, "continued")
        else:
            sit(folder, "back", *HALVES)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
