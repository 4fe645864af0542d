"""`uft config`: the composed configuration and where each value came from; `--diff RUN` against a frozen one."""

from __future__ import annotations

import argparse

from omegaconf import DictConfig

from uft.cli.app import run_app, task
from uft.cli.help import Help
from uft.config.examine import Examined
from uft.config.freeze import free, plain
from uft.config.show import annotated
from uft.config.suggest import written
from uft.errors import GOOD
from uft.runs import Run, open_run

HELP = Help(
    verb="config",
    keys=("seed", "train.steps", "optim.lr", "data.ratio"),
    examples={
        "uft config objective=dpo data.ratio=0.5": "every value, and where it is from",
        "uft config --diff outputs/DATE/RUN": "what a run has that this request has not",
        "uft train objective=dpo --cfg job": "the plain configuration, as Hydra prints it",
    },
    usage="uft config [--diff RUN] [options] [key=value ...]",
)

COMPARE: list[Run] = []
"""The run to compare with. Hydra's task function takes a configuration and nothing else."""


@task
def run(cfg: DictConfig, examined: Examined) -> int:
    print("\n".join(compared(COMPARE[0], cfg)) if COMPARE else annotated(cfg, examined.origins))
    return GOOD


def compared(other: Run, cfg: DictConfig) -> list[str]:
    """A line per key that differs: the run's value -> the one of this request."""
    from uft.launch.launcher import changed_keys

    changes = changed_keys(other, plain(cfg))
    width = max((len(key) for key, _, _ in changes), default=0)
    lines = [
        f"{key:<{width}}  {written(old)} -> {written(new)}{'   (may change within a run)' if free(key) else ''}"
        for key, old, new in changes
    ]
    return lines or [f"the same as {other.path}"]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--diff")
    ours, rest = parser.parse_known_args(arguments)
    COMPARE[:] = [open_run(ours.diff)] if ours.diff else []
    return run_app(HELP, run, rest)
