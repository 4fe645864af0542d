"""`uft check`: everything before step 0, and one worst-case step. Trains nothing, writes nothing."""

from __future__ import annotations

from omegaconf import DictConfig

from uft.cli.app import run_app, task
from uft.cli.help import Help
from uft.config.examine import Examined
from uft.launch.launcher import launch_job

HELP = Help(
    verb="check",
    keys=("train.batch_size", "train.micro_batch_tokens", "train.max_length", "data.too_long", "data.template"),
    examples={
        "uft check model=smollm2_135m data=mix": "will it fit, are the masks right",
        "uft check data=files +data.sources.mine.path=rows.jsonl": "are these rows usable",
    },
)


@task
def run(cfg: DictConfig, examined: Examined) -> int:
    return launch_job("check", cfg)


def main(arguments: list[str]) -> int:
    return run_app(HELP, run, arguments)
