"""The processes that a launcher starts.

    python -m uft.launch.worker RUN                    train the run in this folder
    python -m uft.launch.worker --job NAME SPEC        a job without a run folder (uft/training/jobs.py)
    python -m uft.launch.worker --elastic [OPTIONS OF torchrun] -m uft.launch.worker ...      the same on several ranks

One process tree per run: W&B, CUDA contexts and a crash never leak from one run into the next.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from uft.environment import FOLDER, PeerLost, keep_others_out, launched, note, note_code, noted_code, rank, reasons
from uft.errors import FAILED, GOOD, UftError, render, stop_code, tell_redacted
from uft.launch.process import PARENT, cause, die_with_parent, oom_kills
from uft.runs import Run, open_run, write_json
from uft.tracking.console import expect_durations, phase_status


def main(arguments: Sequence[str]) -> int:
    """Carry out one request; the exit code. A user's mistake is told without a traceback."""
    die_with_parent()
    if arguments[0] == "--elastic":
        return elastic_agent(arguments[1:])
    sys.excepthook = tell_redacted
    keep_others_out()
    faulthandler.enable()  # a crash in a library says where it was
    silence_libraries()
    try:
        with phase_status() if rank() == 0 else nullcontext():
            code = run_job(*arguments[1:]) if arguments[0] == "--job" else train(arguments[0])
    except UftError as error:
        if os.environ.get("UFT_TRACE"):
            raise
        note(render(error))
        if rank() == 0:
            print(render(error), file=sys.stderr, end="")
        code = error.code
    except (BrokenPipeError, PeerLost):  # the process that ended first tells why
        code = FAILED
    note_code(code)
    return code


def silence_libraries() -> None:
    """Before they are imported: libraries do not write to the console."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("uft").setLevel(logging.WARNING)


def preload() -> None:
    """Import what workers import, in a process that they will be forks of (:mod:`uft.launch.forkserver`).

    Not wandb: it makes temporary folders when it is imported, which the first fork that ends would remove for all.
    """
    silence_libraries()
    import pandas  # noqa: F401  # pyarrow looks for it with the first column
    import peft.utils.transformers_weight_conversion  # noqa: F401
    import pyarrow.compute  # noqa: F401
    import safetensors.numpy
    import safetensors.torch  # noqa: F401
    from transformers import conversion_mapping
    from transformers.models.llama import modeling_llama  # noqa: F401

    from uft.model.policy import auto_model
    from uft.training import jobs, session  # noqa: F401

    auto_model()
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns, once in a process


def train(folder: str) -> int:
    """Train the run in `folder` from where it stands."""
    from uft.training.liveness import listening

    run = open_run(folder)
    with listening() as stop, ExitStack() as held:  # before the slow imports: a signal that comes meanwhile is kept
        if launched() == 1:
            held.enter_context(run.lock())
        else:  # the run is locked by rank 0 for all
            from uft.distributed import process_group

            held.enter_context(process_group()).on_rank0(lambda: held.enter_context(run.lock()))
        with uncollected():
            from uft.config.frozen import load_config
            from uft.model.policy import auto_model
            from uft.training import session

            auto_model()
        config = load_config(run.config_file)
        expect_durations(f"train {config.model.path}")
        return session.train(run, config, stop)


def run_job(job: str, spec: str) -> int:
    """`check`, `data`, `generate` or `annotate`, of the configuration in the file `spec`."""
    with uncollected():
        from uft.config.frozen import load_config
        from uft.distributed import process_group
        from uft.training import jobs
        from uft.training.liveness import watching

    def tell_hung(why: str) -> None:
        note(why)
        if rank() == 0:
            print(f"uft: {why}\nRun the same command to continue.", file=sys.stderr, flush=True)

    config = load_config(spec)
    expect_durations(f"{job} {config.model.path}")
    with process_group(), watching(config.hardware.watchdog, None, tell_hung):
        return jobs.JOBS[job](config)


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection during imports, which make no garbage: it would cost every start more than a second."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def elastic_agent(arguments: Sequence[str]) -> int:
    """Start the ranks of a run by `torch.distributed.run` and watch them; the exit code of the request.

    The agent dies with its launcher and forwards signals. When one rank ends the others are ended, and the cause is
    printed. Nothing is restarted in place: a run is continued by `uft resume`, in fresh processes.
    """
    ranks = next(int(word.partition("=")[2]) for word in arguments if word.startswith("--nproc-per-node="))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    os.environ[PARENT] = str(os.getpid())
    os.environ["PYTHONSAFEPATH"] = "1"  # the ranks are started without -P
    os.environ["LOGLEVEL"] = "CRITICAL"  # of torch's launcher: the cause of a failure is printed below
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    killed_before = oom_kills()
    with tempfile.TemporaryDirectory(prefix="uft-ranks-") as folder:
        os.environ[FOLDER] = folder
        try:
            torchrun.run(torchrun.parse_args(list(arguments)))
            return GOOD
        except SignalException as error:
            code = noted_code(Path(folder))
            return stop_code(error.sigval) if code is None else code
        except ChildFailedError as error:
            failures = error.failures
        code, why = noted_code(Path(folder)), reasons(Path(folder))

    stop_signals = (signal.SIGTERM, signal.SIGINT)  # what ends a rank because another one failed: never the cause
    killed = {rank: f for rank, f in failures.items() if f.exitcode < 0 and -f.exitcode not in stop_signals}
    run, blamed = Run(Path(arguments[-1])), ""
    if killed:
        first = min(killed, key=lambda rank: killed[rank].timestamp)  # the others may have had to be killed after it
        number, oom = -killed[first].exitcode, oom_kills() - killed_before
        blamed = f"process {first} was killed by {signal.Signals(number).name}{cause(number, oom)}"
        print(f"uft: {blamed}; the others were ended", file=sys.stderr)
        code = FAILED
    elif why and 0 not in why:  # rank 0 tells its own reason itself
        first, text = next(iter(why.items()))
        blamed = f"process {first}: {text.rstrip()}"
        print(f"uft: {blamed}", file=sys.stderr)
    elif not why and code is None:
        ends = ", ".join(f"process {r} with exit code {f.exitcode}" for r, f in sorted(failures.items()))
        print(f"uft: the run ended before it began: {ends}", file=sys.stderr)
    if blamed and run.result().get("status") == "failed":  # rank 0 wrote it, and only knew that it was left alone
        write_json(run.path / "result.json", {**run.result(), "error": blamed})
    return FAILED if code is None else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
