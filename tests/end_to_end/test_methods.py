"""What is new in KTO, a mixture of objectives and a divergence over the vocabulary, as a person types it.

Each run ends, dies again after half of its steps (what came later is taken away), and resumes to the same bits.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from lifecycle import LORA, checkpoints_of, result_of, rows_of, same

Uft = Callable[..., "subprocess.CompletedProcess[str]"]
CASES = {
    "kto": ("demonstrations", "pairs", "labels", "scores"),
    "per_kind": ("demonstrations", "pairs", "labels", "scores", "negatives"),
    "anchored_sft": ("demonstrations", "labels"),
    "distill": ("demonstrations", "labels"),
}
CHANGES = {
    "kto": ("objective.undesirable_weight=1.2",),
    "per_kind": ("objective@objective.preference=simpo", "objective.preference.beta=3", "+objective.weights.binary=2"),
    "anchored_sft": ("objective.alpha=0.1", *LORA),
    "distill": ("objective.beta=0.9", *LORA),
}
SHORT = (
    "train.steps=6",
    "train.batch_size=6",
    "train.micro_batch_tokens=300",
    "train.log_every=1",
    "train.checkpoint_every=3",
    "eval.max_new_tokens=4",
    "optim.lr=0.01",
)


def died_in_between(run: Path, place: Path) -> Path:
    """A copy of a finished run as it was after the checkpoint of its third step."""
    shutil.copytree(run, place)
    shutil.rmtree(place / "checkpoints" / "step-000006")
    shutil.rmtree(place / "model")
    (place / "result.json").unlink()
    assert checkpoints_of(place) == [3]
    return place


@pytest.mark.slow
@pytest.mark.parametrize("objective", CASES)
def test_it_runs_and_resumes_to_the_same_bits(
    uft: Uft,
    request_of: Callable[..., list[str]],
    tmp_path: Path,
    write: Callable[..., Path],
    other_model: Path,
    objective: str,
) -> None:
    files = {kind: write(tmp_path / "rows" / f"{kind}.jsonl", rows_of(kind)) for kind in CASES[objective]}
    whole = tmp_path / "whole"
    taught = (f"teacher.path={other_model}",) if objective == "distill" else ()
    done = uft("train", *request_of(objective, files, *CHANGES[objective], *taught, *SHORT), f"run.dir={whole}")
    assert objective in done.stdout
    assert result_of(whole)["status"] == "finished"
    curve = [json.loads(line) for line in (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shown = {name for line in curve for name in line}
    wanted = {
        "kto": {"objective/kto", "objective/reference_point"},
        "per_kind": {"objective/preference.pair", "objective/binary.kto", "objective/negatives.log_u"},
        "anchored_sft": {"objective/kl", "objective/sft"},
        "distill": {"objective/distill", "nll"},
    }
    assert shown >= wanted[objective], sorted(shown)
    again = died_in_between(whole, tmp_path / "died")
    uft("resume", str(again))
    same(again, whole)
