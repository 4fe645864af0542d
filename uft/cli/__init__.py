"""The command line: `uft VERB [options] [key=value ...]`.

A shim over `sys.argv`: it finds the verb and hands the rest to it. Overrides, -m, --cfg, --info, --config-dir and
completion of most verbs are Hydra's own (:mod:`uft.cli.verbs`). Nothing heavy is imported here: `uft --help` answers at
once.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from uft.environment import keep_others_out
from uft.errors import (
    BAD_REQUEST,
    CLOSED_PIPE,
    FAILED,
    GOOD,
    INTERRUPTED,
    UftError,
    redact,
    tell,
    tell_redacted,
    tracing,
)

VERBS = {
    "train": "compose, check and train one run; -m trains a run for every combination",
    "check": "everything before step 0, and one worst-case step; trains nothing",
    "data": "the mixture as it will be drawn, lengths, and rows with the trained tokens coloured",
    "generate": "answers of a run or a model to your questions; completions of training prompts for dft",
    "chat": "a conversation with a run or a model, or with two side by side",
    "eval": "the evaluation of a run or any model, on held-out rows, rows of yours or benchmark tasks",
    "annotate": "a number beside every completion: baselines for poft, soft labels from scores",
    "select": "which rows to keep: at random, by score, by what a model would learn from them",
    "export": "the weights of a run or a checkpoint for other programs: a Hugging Face folder, GGUF, Ollama",
    "resume": "continue a run or a sweep that was stopped",
    "compare": "runs side by side: a table, one page, and whether a difference is more than seed noise",
    "advise": "what finished runs suggest to try next, or that they do not say (experimental)",
    "lake": "objectives in a toy world, the Frozen Lake of IFT's paper: how far from the optimal policy each ends",
    "sync": "upload what W&B lacks of runs that were offline or cut off, and say what arrived",
    "ls": "runs and sweeps here: state, steps, headline metrics",
    "config": "the composed config and where each value came from; --diff RUN",
    "docs": "the pages of the documentation, or one of them: uft docs start",
    "doctor": "versions, devices, disk, W&B and hub; no secrets",
}
STARTING = ("train", "check", "data", "generate", "chat", "eval", "annotate", "select", "export", "resume")
ANSWERED_AT_ONCE = frozenset(("--help", "-h", "--cfg", "-c", "--info", "-i", "--hydra-help"))
MODULES = {
    **dict.fromkeys(("export", "resume", "compare", "sync", "ls"), "uft.cli.manage"),
    **dict.fromkeys(("docs", "doctor", "advise", "lake"), "uft.cli.tools"),
}
"""Verb -> the module whose function of that name takes its arguments to the exit code; the others: uft.cli.verbs, and
its `run_verb` where that has no such function."""

USAGE = """\
uft: unified fine-tuning of language models, any objective on the same rows

usage: uft VERB [options] [key=value ...]

{verbs}

Start with
  uft train objective=ift data=mix      train the embedded model on the embedded mixture, in about a minute
  uft train --help                      what there is to choose from
  uft ls                                what has been trained here
  uft docs start                        your data, your model, ten minutes
"""


WIDEST, NARROWEST = 120, 30  # of help, and of a text beside its key
ROW = re.compile(r"( +\S.*?  +)(\S.*)")
"""A key or a command, and what it is, two blanks or more between them."""


def folded(text: str) -> str:
    """Help without a line that is wider than the terminal: paragraphs are filled anew, a text stays beside its key, or
    below it where there is no room."""
    room = min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)
    paragraphs = list[str]()
    before = ""
    for line in text.split("\n"):
        prose = bool(line.strip()) and not ROW.match(line) and not ROW.match(before)
        if prose and len(before) >= 80 and line[:2].isspace() == before[:2].isspace():  # a line of a paragraph
            paragraphs[-1] += f" {line.strip()}"
        else:
            paragraphs.append(line)
        before = line
    lines = list[str]()
    for line in paragraphs:
        row, margin = ROW.match(line), line[: len(line) - len(line.lstrip())]
        if len(line) <= room:
            lines.append(line)
        elif row and len(row[1]) <= room - NARROWEST:
            lines += filled(row[2], row[1], " " * len(row[1]), room)
        elif row:
            lines += [row[1].rstrip(), *filled(row[2], f"{margin}    ", f"{margin}    ", room)]
        else:
            lines += filled(line.strip(), margin, margin, room)
    return "\n".join(lines)


def filled(text: str, first: str, others: str, room: int) -> list[str]:
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, room, initial_indent=first, subsequent_indent=others, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; the exit code (0 good, 1 a run failed, 2 bad request, 75 stopped, 130 interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.excepthook = tell_redacted
    keep_others_out()
    if "--trace" in arguments or os.environ.get("HYDRA_FULL_ERROR") == "1":
        arguments = [word for word in arguments if word != "--trace"]
        os.environ["UFT_TRACE"] = "1"  # workers look at it too
    try:
        code = dispatch(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `uft train --help | head`: the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except UftError as error:
        if tracing():
            raise
        return tell(error)
    except Exception as error:
        if tracing():
            raise
        message = redact(f"uft: {type(error).__name__}: {error}")
        print(f"{message}\nThis is a fault in uft. --trace shows where.", file=sys.stderr)
        return FAILED


def dispatch(arguments: list[str]) -> int:
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help", "help"):
        verbs = "\n".join(f"  {verb:<10}{does}" for verb, does in VERBS.items())
        print(folded(USAGE.format(verbs=verbs)))
    elif first in ("-V", "--version", "version"):
        from uft import __version__

        print(f"uft {__version__}")
    elif first in ("-sc", "--shell-completion"):
        return int(import_module("uft.cli.completion").complete(arguments))
    elif first in VERBS:
        if first in STARTING and sys.stdout.isatty() and not ANSWERED_AT_ONCE.intersection(arguments):
            print(f"uft {first}: starting", flush=True)  # imports take seconds on a busy machine
        module = import_module(MODULES.get(first, "uft.cli.verbs"))
        if work := getattr(module, first, None):
            return int(work(arguments[1:]))
        return int(module.run_verb(first, arguments[1:]))  # the job of that name
    else:
        from difflib import get_close_matches

        near = get_close_matches(first, VERBS, 1)
        hint = f"did you mean  uft {near[0]} ?" if near else f"verbs: {', '.join(VERBS)}"
        hint = f"settings come after a verb:  uft train {first}" if "=" in first else hint
        print(f"uft: no verb {first!r}\n\n  {hint}\n\nSee all of them:  uft --help", file=sys.stderr)
        return BAD_REQUEST
    return GOOD
