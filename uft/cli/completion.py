"""Shell completion: Hydra's, made to know verbs.

The shell calls `uft -sc query=bash` with the line so far in COMP_LINE. Without a verb on it the verbs are offered;
with one, the verb is cut out and Hydra completes groups, options and keys. The scripts that `-sc install=bash` and
`install=fish` print are Hydra's own; zsh reads the one of bash.
"""

from __future__ import annotations

import glob
import io
import os
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from uft.cli import VERBS
from uft.cli.help import PAGES
from uft.data.readers import reader_of
from uft.errors import GOOD
from uft.runs import OUTPUTS, find_runs, find_sweeps

OF_RUNS = ("advise", "resume", "compare", "sync", "ls", "generate", "eval", "export", "chat")
"""Verbs whose words, or first word, name runs. Where no name fits, the shell offers its files."""
OUR_OPTIONS = ("--trace",)  # words that Hydra's parser does not know
OPTIONS = ("--help", "--multirun", "--cfg", "--info", "--config-dir", "--config-name", "--config-path", *OUR_OPTIONS)
HIDDEN = ("schema", "+schema", "~schema")


def complete(arguments: list[str]) -> int:
    """Answer `-sc query=SHELL`, or print the script for `-sc install=SHELL`."""
    if not any(word.startswith("query=") for word in arguments):
        return hydra_completion(arguments)
    line = os.environ.get("COMP_LINE", "")
    words = [*line.split(), *([""] if line.endswith(" ") else [])]  # the last one is to be completed
    if len(words) <= 2:
        print("\n".join(verb for verb in VERBS if verb.startswith(words[-1] if len(words) == 2 else "")))
        return GOOD
    program, verb, *rest = (word for word in words if word not in OUR_OPTIONS)
    if rest and rest[-1].startswith("-"):
        offered = OPTIONS if verb in PAGES else OPTIONS[:1]
        print("\n".join(option for option in offered if option.startswith(rest[-1])))
        return GOOD
    named = list[str]()  # none of Hydra's words
    if verb == "annotate":
        from uft.config.schema import COLUMNS

        named = list(COLUMNS)
    elif verb in OF_RUNS and (runs := find_runs(OUTPUTS)):
        named = [*sorted({run.name for run in runs} | {sweep.name for sweep in find_sweeps(OUTPUTS)}), "last"]
    if rest and (verb not in PAGES or len(rest) == 1 or (verb == "chat" and len(rest) == 2)):
        print("".join(f"{word}\n" for word in named if word.startswith(rest[-1])), end="")
    if verb not in PAGES:
        return GOOD
    while verb in ("generate", "eval", "annotate", "chat") and len(rest) > 1 and "=" not in rest[0]:
        rest = rest[1:]
    before = ""  # of several values those before the last one, as Hydra knows one alone
    if rest and (several := re.fullmatch(r"([\w./@]+=)([^\[{(]*,)(.*)", rest[-1])):
        rest[-1], before = several[1] + several[3], several[2]
    if rest and rest[-1].startswith("data="):
        places = map(Path, sorted(glob.glob(f"{glob.escape(rest[-1].removeprefix('data='))}*")))
        print("".join(f"data={before}{place}\n" for place in places if place.is_file() and reader_of(place)), end="")
    os.environ["COMP_LINE"] = " ".join([program, *rest])
    answer = io.StringIO()
    with redirect_stdout(answer), redirect_stderr(io.StringIO()):  # a line that cannot be read has no completions
        hydra_completion(arguments)
    found = [word for word in answer.getvalue().split() if not word.startswith(HIDDEN)]
    print("\n".join(word.replace("=", f"={before}", 1) for word in found))
    return GOOD


def hydra_completion(arguments: list[str]) -> int:
    """Let Hydra answer. It takes the program's name from argv."""
    from uft.cli.verbs import run_hydra, train_run
    from uft.config.files import register

    register()
    sys.argv = ["uft", *arguments]
    return run_hydra(train_run)
