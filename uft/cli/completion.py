"""Shell completion: Hydra's, made to know verbs.

The shell calls `uft -sc query=bash` with the line so far in COMP_LINE. Without a verb on it the verbs are offered;
with one, the verb is cut out and Hydra completes groups, options and keys. The scripts that `-sc install=bash` and
`install=fish` print are Hydra's own; zsh reads the one of bash.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout

from uft.cli import VERBS
from uft.errors import GOOD

HYDRA_VERBS = ("train", "check", "data", "generate", "annotate", "config")
FIRST_WORDS = ("generate", "annotate")
"""Verbs whose first word is none of Hydra's, a run folder or a column."""
OUR_OPTIONS = ("--trace",)  # words that Hydra's parser does not know
HIDDEN = ("schema", "+schema", "~schema")


def complete(arguments: list[str]) -> int:
    """Answer `-sc query=SHELL`, or print the script for `-sc install=SHELL`."""
    if not any(word.startswith("query=") for word in arguments):
        return hydra_completion(arguments, "uft")
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
        start = words[1] if len(words) == 2 else ""
        print("\n".join(verb for verb in VERBS if verb.startswith(start)))
        return GOOD
    if words[1] not in HYDRA_VERBS:
        return GOOD  # folders and files: the shell's own completion
    rest = [word for word in words[2:] if word not in OUR_OPTIONS]
    if words[1] in FIRST_WORDS and rest and "=" not in rest[0]:
        if len(rest) == 1 and not line.endswith(" "):
            offer(words[1], rest[0])
        else:
            rest = rest[1:]
    elif words[1] in FIRST_WORDS and not rest:
        offer(words[1], "")
    os.environ["COMP_LINE"] = " ".join([words[0], *rest]) + (" " if line.endswith(" ") else "")
    answer = io.StringIO()
    with redirect_stdout(answer), redirect_stderr(io.StringIO()):  # a line that cannot be read has no completions
        hydra_completion(arguments, "uft")
    print("\n".join(word for word in answer.getvalue().splitlines() if not word.startswith(HIDDEN)))
    return GOOD


def offer(verb: str, start: str) -> None:
    from uft.config.schema import COLUMNS

    options = COLUMNS if verb == "annotate" else ()
    print("".join(f"{word}\n" for word in options if word.startswith(start)), end="")


def hydra_completion(arguments: list[str], program: str) -> int:
    """Let Hydra answer. It takes the program's name from argv."""
    import hydra

    from uft.cli.verbs import train_job
    from uft.config.files import VERSION_BASE, register
    from uft.config.messages import conf_dir

    register()
    sys.argv = [program, *arguments]
    try:
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base=VERSION_BASE)(train_job)()
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else GOOD
    return GOOD
