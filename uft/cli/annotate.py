"""`uft annotate COLUMN`: the rows of a mixture with a number beside every completion, for objectives that read it."""

from __future__ import annotations

from omegaconf import DictConfig

from uft.cli.app import run_app, task
from uft.cli.help import FLAGS, Help
from uft.config.examine import Examined
from uft.config.schema import COLUMNS
from uft.errors import Problem, UftError
from uft.launch.launcher import launch_job

HELP = Help(
    verb="annotate",
    keys=(
        *("annotate.models", "annotate.out", "annotate.temperature", "annotate.batch_tokens"),
        *("data.too_long", "model.dtype", "hardware.device"),
    ),
    examples={
        "uft annotate baseline_logp data=instruct annotate.models=[builtin:playground]": "for objective=poft",
        "uft annotate baseline_logp data=mix annotate.models=[org/a,org/b]": "the mean over two models",
        "uft annotate soft_label data=scored annotate.temperature=0.2": "for objective=gdpo_soft",
    },
    usage=f"uft annotate {'|'.join(COLUMNS)} [options] [key=value ...]",
)


@task
def run(cfg: DictConfig, examined: Examined) -> int:
    if cfg.annotate.column is None:
        raise UftError(Problem("uft annotate", "needs a column", "command line", (f"columns: {', '.join(COLUMNS)}",)))
    return launch_job("annotate", cfg)


def main(arguments: list[str]) -> int:
    """The column, if there is one, is the first word; to Hydra it is one of our keys."""
    first = arguments[0] if arguments else "-"
    named = "=" not in first and not first.startswith(("-", "~")) and not set(FLAGS) & set(arguments)
    return run_app(HELP, run, [f"annotate.column={first}", *arguments[1:]] if named else arguments)
