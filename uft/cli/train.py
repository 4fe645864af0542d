"""`uft train`: compose, check and train one run, or with -m a run for every combination."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from uft.cli.app import run_app, task
from uft.cli.help import Help
from uft.config.examine import Examined
from uft.launch.launcher import launch_train
from uft.launch.sweep import is_sweep_job, typed_overrides

HELP = Help(
    verb="train",
    keys=(
        *("seed", "train.steps", "train.batch_size", "train.max_length", "train.eval_every"),
        *("optim.lr", "model.path", "model.adapter", "data.ratio", "data.too_long", "tracking.mode"),
        *("run.name", "run.dir", "sweep.name"),
    ),
    examples={
        "uft train objective=ift data=mix": "the embedded model on the embedded mixture",
        "uft train -m objective=sft,ift,uft seed=1,2,3": "nine runs, one after the other",
        "uft train sweep=beta_ratio": "a sweep that somebody has written down",
        "uft train experiment=sft_then_dpo": "a run of two stages",
        "uft train data=files +data.sources.mine.path=rows.jsonl model.path=org/name": "your rows, your model",
        "uft train debug=fast": "two steps: does it run at all",
    },
    notes=("-m trains a run for every combination of comma-separated values; run it again to complete it",),
)


@task
def run(cfg: DictConfig, examined: Examined) -> int:
    words = list(HydraConfig.get().overrides.task)
    return launch_train(cfg, typed_overrides(words), quiet=is_sweep_job(words))


def main(arguments: list[str]) -> int:
    return run_app(HELP, run, arguments)
