"""The process that does the work of one request: `python -m uft.launch.worker RUN`, or `--job NAME SPEC`.

One process tree per run: W&B, CUDA contexts and a crash never leak from one run into the next.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from uft.environment import PeerLost, launched, note, note_code, rank
from uft.errors import FAILED, UftError, render, tell_redacted
from uft.launch.process import die_with_parent
from uft.runs import Run, keep_others_out, open_run

if TYPE_CHECKING:
    from uft.config.schema import Config


def train(folder: str) -> int:
    """Train the run in `folder` from where it stands."""
    from uft.training.liveness import listening

    run = open_run(folder)
    with listening() as stop, holding(run):  # before the slow imports: a signal that comes meanwhile is remembered
        with uncollected():
            from uft.config.load import load_config
            from uft.model.policy import auto_model
            from uft.training import session

            auto_model()
        config = load_config(run.config_file)
        return (session.train_stages if config.stages else session.train)(run, config, stop)


@contextmanager
def holding(run: Run) -> Iterator[None]:
    """The run is this process's, or that of all that were launched together."""
    if launched() == 1:
        with run.lock():
            yield
        return
    from uft.distributed import process_group

    with process_group() as group, ExitStack() as held:
        group.on_rank0(lambda: held.enter_context(run.lock()))
        yield


def carry_out(job: str, spec: str) -> int:
    """`check`, `data`, `generate` or `annotate`, of the configuration in `spec`."""
    with uncollected():
        from uft.config.load import load_config
        from uft.distributed import process_group
        from uft.training import jobs
        from uft.training.liveness import watching

    config = load_config(spec)
    work: dict[str, Callable[[Config], int]] = {
        "check": jobs.check,
        "data": jobs.data,
        "generate": jobs.generate,
        "annotate": jobs.annotate_job,
    }
    with process_group(), watching(config.hardware.watchdog, None, tell_hung):
        return (work | jobs.JOBS if config.stages else work)[job](config)


@contextmanager
def uncollected() -> Iterator[None]:
    """For imports: what they make stays, and looking for garbage among it would cost every start more than a second."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def tell_hung(why: str) -> None:
    """The last words of a job that hangs: there is no folder to leave them in."""
    note(why)
    if rank() == 0:
        print(f"uft: {why}\nRun the same command to continue.", file=sys.stderr, flush=True)


def quiet() -> None:
    """Libraries do not talk into the console; what a person should know, uft says."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("uft").setLevel(logging.WARNING)


def main(arguments: Sequence[str]) -> int:
    """Run one job; the exit code. A user's mistake is told without a traceback."""
    die_with_parent()
    sys.excepthook = tell_redacted
    keep_others_out()
    faulthandler.enable()  # a crash in a library says where it was
    quiet()
    code = requested(arguments)
    note_code(code)
    return code


def requested(arguments: Sequence[str]) -> int:
    try:
        return carry_out(*arguments[1:]) if arguments[0] == "--job" else train(arguments[0])
    except UftError as error:
        if os.environ.get("UFT_TRACE"):
            raise
        note(render(error))
        if rank() == 0:
            print(render(error), file=sys.stderr, end="")
        return error.code
    except (BrokenPipeError, PeerLost):  # whoever ended first says why
        return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
