"""`uft generate [RUN]`: completions for the prompts of a mixture, from a run's model or from any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from uft.cli.app import run_app, task
from uft.cli.help import FLAGS, Help
from uft.config.change import changed
from uft.config.examine import Examined
from uft.errors import Problem, UftError
from uft.launch.launcher import launch_job
from uft.runs import Run, open_run

OUT = "generated.jsonl"
FILES = {"path", "eval_path", "template"}  # keys of the data that may name files
HELP = Help(
    verb="generate",
    keys=(
        *("generate.out", "generate.seeds", "generate.temperature", "generate.top_k", "generate.top_p"),
        *("generate.max_new_tokens", "generate.limit", "generate.system"),
    ),
    examples={
        "uft generate data=mix": "what the base model answers to the training prompts",
        "uft generate outputs/DATE/RUN": "what a trained run answers",
        "uft generate generate.seeds=[0,1,2,3] generate.out=negatives.jsonl": "negatives for objective=dft",
    },
    usage="uft generate [RUN] [options] [key=value ...]",
    notes=("with RUN: the configuration of that run, and its model",),
)


@task
def run(cfg: DictConfig, examined: Examined) -> int:
    return launch_job("generate", cfg)


def main(arguments: list[str]) -> int:
    first = arguments[0] if arguments else "-"
    if "=" in first or first.startswith(("-", "~")) or set(FLAGS) & set(arguments):
        return run_app(HELP, run, arguments)
    return from_run(open_run(first), arguments[1:])


def from_run(run: Run, overrides: list[str]) -> int:
    """Generate with the model that a run arrived at."""
    if not run.model_dir.is_dir():
        finished = run.status == "finished"
        advice = "it was trained with train.save_model=false" if finished else f"finish it:  uft resume {run.path}"
        raise UftError(Problem(str(run.path), "has no model/ in it", advice=(advice,)))
    return launch_job("generate", changed(with_model(run), overrides))


def with_model(run: Run) -> dict[str, Any]:
    """The run's configuration, its trained model in the place of the one it began with, its files found from here."""
    settings: dict[str, Any] = {key: value for key, value in run.config().items() if key != "stages"}
    started = Path(run.info().get("cwd", "."))
    for node in (settings["data"], *settings["data"]["sources"].values()):
        node |= {key: found_from(started, node[key]) for key in FILES & node.keys()}
    settings["model"] |= {"path": str(run.model_dir.resolve()), "revision": None, "adapter": "none"}
    settings["generate"]["out"] = settings["generate"]["out"] or str(Path(run.path, OUT))
    return settings


def found_from(started: Path, path: str | None) -> str | None:
    """A file or folder as it was named in `started`; anything else (a hub id, builtin:NAME, auto) stays as it is."""
    named = path not in (None, "auto", "plain")  # template names, even where a file is called so
    return str(started / path) if path and named and (started / path).exists() else path
