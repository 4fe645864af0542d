"""The verbs over a configuration: train, check, data, generate, annotate, config. Each has a help page and a job."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uft.cli.app import FLAGS, Page, run_app, task
from uft.config.compose import Examined, changed
from uft.config.frozen import annotated, free
from uft.config.messages import written
from uft.config.schema import COLUMNS
from uft.config.stages import made, rows_of, without_stages
from uft.errors import GOOD, Problem, UftError
from uft.launch.launcher import changed_keys, is_sweep_job, launch_job, launch_train, typed_overrides
from uft.runs import Run, open_run

FILES = {"path", "eval_path", "template"}  # keys of the data that may name files
COMPARE: list[Run] = []
"""The run that `uft config --diff` compares with. Hydra's task function takes a configuration and nothing else."""


@task
def train_job(examined: Examined, words: Sequence[str]) -> int:
    return launch_train(examined.settings, typed_overrides(words), quiet=is_sweep_job(words))


@task
def check_job(examined: Examined, words: Sequence[str]) -> int:
    return launch_job("check", examined.settings)


@task
def data_job(examined: Examined, words: Sequence[str]) -> int:
    return launch_job("data", examined.settings)


@task
def generate_job(examined: Examined, words: Sequence[str]) -> int:
    return launch_job("generate", examined.settings)


@task
def annotate_job(examined: Examined, words: Sequence[str]) -> int:
    if examined.settings["annotate"]["column"] is None:
        raise UftError(Problem("uft annotate", "needs a column", "command line", (f"columns: {', '.join(COLUMNS)}",)))
    return launch_job("annotate", examined.settings)


@task
def config_job(examined: Examined, words: Sequence[str]) -> int:
    if not COMPARE:
        print(annotated(examined.settings, examined.origins, examined.references))
        return GOOD
    changes = changed_keys(COMPARE[0], examined.settings)
    width = max((len(key) for key, _, _ in changes), default=0)
    for key, old, new in changes:
        note = "   (may change within a run)" if free(key) else ""
        print(f"{key:<{width}}  {written(old)} -> {written(new)}{note}")
    if not changes:
        print(f"the same as {COMPARE[0].path}")
    return GOOD


PAGES = {
    "train": Page(
        verb="train",
        keys=(
            *("seed", "train.steps", "train.batch_size", "train.max_length", "train.eval_every"),
            *("optim.lr", "model.path", "model.adapter", "data.ratio", "data.too_long", "tracking.mode"),
            *("run.name", "run.dir", "sweep.name"),
        ),
        examples={
            "uft train objective=ift data=mix": "the embedded model on the embedded mixture",
            "uft train -m objective=sft,ift,uft seed=1,2,3": "nine runs, one after the other",
            "uft train sweep=beta_ratio": "a sweep written in conf/sweep",
            "uft train experiment=sft_then_dpo": "a run of two stages",
            "uft train data=files +data.sources.mine.path=rows.jsonl model.path=org/name": "your rows, your model",
            "uft train debug=fast": "two steps: does it run at all",
        },
        notes=("-m trains a run for every combination of comma-separated values; run it again to complete it",),
    ),
    "check": Page(
        verb="check",
        keys=("train.batch_size", "train.micro_batch_tokens", "train.max_length", "data.too_long", "data.template"),
        examples={
            "uft check model=smollm2_135m data=mix": "will it fit, are the masks right",
            "uft check data=files +data.sources.mine.path=rows.jsonl": "are these rows usable",
        },
    ),
    "data": Page(
        verb="data",
        keys=("data.ratio", "data.exhaustion", "data.template", "data.too_long", "data.bad_rows", "train.max_length"),
        examples={
            "uft data data=mix": "the mixture table, lengths, rows with the trained tokens coloured",
            "uft data data=mix data.ratio=0.25": "what a ratio does to it",
            "uft data data=files +data.sources.mine.path=rows.jsonl": "how your rows are understood",
        },
    ),
    "generate": Page(
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
    ),
    "annotate": Page(
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
    ),
    "config": Page(
        verb="config",
        keys=("seed", "train.steps", "optim.lr", "data.ratio"),
        examples={
            "uft config objective=dpo data.ratio=0.5": "every value, and where it is from",
            "uft config --diff outputs/DATE/RUN": "what a run has that this request has not",
            "uft train objective=dpo --cfg job": "the plain configuration, as Hydra prints it",
        },
        usage="uft config [--diff RUN] [options] [key=value ...]",
    ),
}


def train(arguments: list[str]) -> int:
    return run_app(PAGES["train"], train_job, arguments)


def check(arguments: list[str]) -> int:
    return run_app(PAGES["check"], check_job, arguments)


def data(arguments: list[str]) -> int:
    return run_app(PAGES["data"], data_job, arguments)


def config(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--diff")
    ours, rest = parser.parse_known_args(arguments)
    COMPARE[:] = [open_run(ours.diff)] if ours.diff else []
    return run_app(PAGES["config"], config_job, rest)


def annotate(arguments: list[str]) -> int:
    """The column, if there is one, is the first word; to Hydra it is one of our keys."""
    named = first_word(arguments)
    return run_app(
        PAGES["annotate"], annotate_job, [f"annotate.column={named}", *arguments[1:]] if named else arguments
    )


def generate(arguments: list[str]) -> int:
    """Completions of any model, or of the run whose folder is the first word: with its model and configuration."""
    named = first_word(arguments)
    if named is None:
        return run_app(PAGES["generate"], generate_job, arguments)
    run = open_run(named)
    if not run.model_dir.is_dir():
        finished = run.status == "finished"
        advice = "it was trained with train.save_model=false" if finished else f"finish it:  uft resume {run.path}"
        raise UftError(Problem(str(run.path), "has no model/ in it", advice=(advice,)))
    return launch_job("generate", changed(with_model(run), arguments[1:]))


def first_word(arguments: list[str]) -> str | None:
    """The first argument where it is neither an option nor an override."""
    first = arguments[0] if arguments else "-"
    return None if "=" in first or first.startswith(("-", "~")) or set(FLAGS) & set(arguments) else first


def with_model(run: Run) -> dict[str, Any]:
    """The run's configuration, its trained model in the place of the one it began with, its files found from here."""
    settings: dict[str, Any] = without_stages(run.config())
    started = Path(str(run.info().get("cwd", ".")))
    for node in (settings["data"], *settings["data"]["sources"].values()):
        node |= {key: found_from(started, node[key]) for key in FILES & node.keys()}
    for name, source in settings["data"]["sources"].items():
        source["path"] = str(rows_of(run.path, source["path"], name)) if made(source["path"]) else source["path"]
    settings["model"] |= {"path": str(run.model_dir.resolve()), "revision": None, "adapter": "none"}
    settings["generate"]["out"] = settings["generate"]["out"] or str(Path(run.path, "generated.jsonl"))
    return settings


def found_from(started: Path, path: str | None) -> str | None:
    """A file or folder as it was named in `started`; anything else (a hub id, builtin:NAME, auto) stays as it is."""
    named = path not in (None, "auto", "plain")  # template names, even where a file is called so
    return str(started / path) if path and named and os.path.exists(started / path) else path
