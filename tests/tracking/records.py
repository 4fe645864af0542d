"""Reads a W&B run back from its local log: records of protobuf in LevelDB's log framing. And what tests log."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from uft.evaluation.evaluate import Sample
from uft.runs import Run

BLOCK = 32 * 1024
SAMPLES = [
    Sample("sums", "sums.jsonl:1", "3+4?", "7", "7", {"accuracy": 1.0}),
    Sample("style", "style.jsonl:2", "hello", "hi\nthere", None, {}),
]


def records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file, up to a torn tail."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if (left := BLOCK - position % BLOCK) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        body = data[position + 7 : position + 7 + length]
        position += 7 + length
        if len(body) < length:
            return
        parts = body if kind in (1, 2) else parts + body
        if kind in (1, 4):
            yield Record.FromString(parts)


def items(update: Any) -> dict[str, Any]:
    return {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in update}


def load(path: Path) -> dict[str, Any]:
    """Everything that a test asks about a segment: `path` is the file or the segment's folder."""
    if path.is_dir():
        (path,) = path.glob("*.wandb")
    found: dict[str, Any] = {
        "config": {},
        "summary": {},
        "history": [],
        "metrics": {},
        "exit": None,
        "preempting": False,
    }
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found |= {"id": run.run_id, "name": run.display_name, "project": run.project, "group": run.run_group}
            found |= {"job_type": run.job_type, "tags": list(run.tags), "entity": run.entity}
            found["config"] |= items(run.config.update)
        elif kind == "history":
            found["history"].append(items(record.history.item))
        elif kind == "summary":
            found["summary"] |= items(record.summary.update)
        elif kind == "metric":
            metric = record.metric
            found["metrics"][metric.name or metric.glob_name] = (metric.step_metric, metric.options.hidden)
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
        elif kind == "preempting":
            found["preempting"] = True
    return found


def segments(run: Run) -> list[Path]:
    return [run.path / name for name in run.info()["wandb"]["dirs"]]


def curve(history: list[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in history if name in row]
