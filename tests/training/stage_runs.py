"""Sessions of runs in this process: how tests start them, end them early and look at what they left."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dying import Death, lines

from uft.config.schema import Config
from uft.errors import GOOD
from uft.runs import Run, create_run
from uft.training import session
from uft.training.liveness import Stop

CLOCKS = (
    "seconds",
    "rollout/seconds",
    "tokens_per_second",
    "mfu",
    "wall_seconds",
    "making_seconds",
    "peak_memory_bytes",
)
SFT, DPO = 4, 5  # steps of the two stages
Nodes = Mapping[str, Any]


def sit(folder: Path, config: Config, stop: Stop | None = None) -> int:
    """A session of a run, with caches of the run's own; the exit code."""
    if not folder.exists():
        create_run(folder, "{}\n", [])
    cache, stages = f"{folder}-cache", copy.deepcopy(config.stages)
    for node in stages.values():
        if "data" in node["config"]:
            node["config"]["data"]["cache"] = cache
    own = replace(config, data=replace(config.data, cache=cache), stages=stages)
    return session.train(Run(folder), own, stop or Stop())


def survive(folder: Path, config: Config, death: Death, *deaths: int) -> Path:
    """Die at each of these moments in turn, then go on to the end; the folder."""
    if not folder.exists():
        create_run(folder, "{}\n", [])
    for moment in deaths:
        with death.after(moment):
            sit(folder, config)
    with death.after(None):
        assert sit(folder, config) == GOOD
    return folder


def written(folder: Path) -> dict[str, Any]:
    """Everything a finished run says but the time it took, names in the order in which they were written."""
    run = Run(folder)
    result = json.loads(json.dumps(run.result()), object_hook=lambda o: {k: v for k, v in o.items() if k not in CLOCKS})
    below = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    names = [str(path.relative_to(folder)) for path in below]
    curve = [[(k, v) for k, v in line.items() if k not in CLOCKS] for line in lines(run.metrics_file)]
    same = ("check.json", "model.safetensors", "tensors.safetensors", "samples.jsonl", "items.jsonl", "rows.jsonl")
    content = {str(p.relative_to(folder)): p.read_bytes() for p in below if p.name in same}
    data = [json.loads(path.read_text())["run_digest"] for path in sorted(folder.glob("stages/*/data.json"))]
    return {"curve": curve, "result": result, "files": names, "data": data, **content}
