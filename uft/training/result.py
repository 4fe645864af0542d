"""What a sitting leaves: `result.json`, the last card, and what one would type next."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from uft.config.schema import Config
from uft.errors import FAILED, UftError
from uft.model.memory import peak_memory
from uft.parallel.environment import note
from uft.parallel.ranks import ranks
from uft.runs import Run, shown, write_json
from uft.tracking.cards import Ending
from uft.training.trainer import Progress

GIGABYTE = 1e9


def leave_result(run: Run, result: Mapping[str, Any], code: int, say: Callable[[str], None]) -> int:
    """Write `result.json`; the exit code. Where there is no room, the run counts as interrupted and can be resumed."""
    try:
        write_json(run.path / "result.json", result)
    except UftError as error:
        say(str(error))
        return FAILED
    return code


def last_words(
    run: Run, record: Callable[[str], Mapping[str, Any]], say: Callable[[str], None]
) -> Callable[[str], None]:
    """What a run that hangs does before it is ended: its result is what is on disk. `record`: of why it failed."""

    def speak(why: str) -> None:
        note(why)
        if ranks().first:
            leave_result(run, record(why), FAILED, say)
            say(f"{why}\nContinue it:  uft resume {shown(run.path)}")

    return speak


def result_record(
    progress: Progress, config: Config, device: torch.device, wall_seconds: float, lines: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """What `result.json` says besides how it ended: counters, final and best metrics."""
    best_step, best_value = progress.best_step, progress.best_value
    return {
        "steps": progress.step,
        "rows": progress.rows,
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised_tokens,
        "seconds": progress.seconds,
        "wall_seconds": wall_seconds,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else None,
        "peak_memory_bytes": peak_memory(device),
        "final": final_metrics(lines),
        "best": {config.eval.best: best_value} if best_value is not None else {},
        "best_step": best_step,
        "best_checkpoint": f"checkpoints/step-{best_step:06d}" if best_step is not None else None,
    }


def ending(result: Mapping[str, Any], total_steps: int, commands: Sequence[str]) -> Ending:
    """The last card."""
    return Ending(
        status=result["status"],
        steps=result["steps"],
        total_steps=total_steps,
        seconds=result["seconds"],
        tokens=result["tokens"],
        final=result["final"],
        best=result["best"],
        best_step=result["best_step"],
        best_checkpoint=result["best_checkpoint"],
        peak_memory_gb=result["peak_memory_bytes"] / GIGABYTE,
        error=result["error"],
        commands=commands,
    )


def final_metrics(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The last training loss and likelihood, and the last battery, as they were written: an earlier sitting counts."""
    found: dict[str, float] = {}
    for line in lines:
        battery = {name: value for name, value in line.items() if name.startswith("eval/")}
        kept = {name: value for name, value in found.items() if not (battery and name.startswith("eval/"))}
        found = {**kept, **{name: line[name] for name in ("loss", "nll") if name in line}, **battery}
    return found


OWN = ("objective", "experiment", "run.", "++run.", "++sweep.")
"""What was typed for this run alone: its objective (an experiment sets one too) and its folder."""


def next_commands(run: Run, config: Config, status: str) -> list[str]:
    """What one would type next."""
    if status != "finished":
        return [f"uft resume {shown(run.path)}"]
    other = "sft" if config.objective["name"] != "sft" else "ift"
    kept = [word for word in run.overrides() if not word.startswith(OWN)]
    again = shlex.join(["uft", "train", f"objective={other}", *kept])
    return [
        f"{again}      the same rows under another objective",
        f"uft generate {shown(run.path)}      what it answers now",
    ]


def next_commands_of_stages(run: Run, status: str) -> list[str]:
    """Likewise after a run of stages."""
    if status != "finished":
        return [f"uft resume {shown(run.path)}"]
    return [f"uft generate {shown(run.path)}      what it answers now"]
