"""`uft data`: the mixture as it will be drawn."""

from __future__ import annotations

from omegaconf import DictConfig

from uft.cli.app import run_app, task
from uft.cli.help import Help
from uft.config.examine import Examined
from uft.launch.launcher import launch_job

HELP = Help(
    verb="data",
    keys=("data.ratio", "data.exhaustion", "data.template", "data.too_long", "data.bad_rows", "train.max_length"),
    examples={
        "uft data data=mix": "the mixture table, lengths, rows with the trained tokens coloured",
        "uft data data=mix data.ratio=0.25": "what a ratio does to it",
        "uft data data=files +data.sources.mine.path=rows.jsonl": "how your rows are understood",
    },
)


@task
def run(cfg: DictConfig, examined: Examined) -> int:
    return launch_job("data", cfg)


def main(arguments: list[str]) -> int:
    return run_app(HELP, run, arguments)
