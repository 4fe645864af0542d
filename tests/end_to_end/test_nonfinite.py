"""Numbers that are not: the run ends as failed, names the rows, and leaves a state that is still good."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lifecycle import UNEVEN, checkpoints_of, result_of, rows_of

Uft = Callable[..., "subprocess.CompletedProcess[str]"]
POISON = "§"
"""One character of the byte-level vocabulary that no other row has."""


@pytest.fixture
def poisoned_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model, but the input embedding of the last byte of `POISON` is NaN."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    token = tokenizer(POISON, add_special_tokens=False)["input_ids"][-1]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    folder = tmp_path / "poisoned"
    shutil.copytree(tiny_model, folder)
    model.save_pretrained(folder)
    return folder


def finite(folder: Path, poisoned_rows: int) -> None:
    """Assert that a checkpoint loads and that no more embedding rows are NaN than in the model itself."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "tensors.safetensors")
    json.loads((folder / "state.json").read_text(encoding="utf-8"))
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            bad = (~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1) if tensor.ndim else ~torch.isfinite(tensor)
            assert int(bad.sum()) <= (poisoned_rows if name.endswith("embed_tokens.weight") else 0), name


@pytest.mark.slow  # in one process, for every kind of objective: tests/training/test_trainer.py
@pytest.mark.parametrize("objective", ["dft", "sft"])
def test_a_planted_nan_names_its_row(
    uft: Uft,
    request_of: Callable[..., list[str]],
    write: Callable[..., Path],
    poisoned_model: Path,
    tmp_path: Path,
    objective: str,
) -> None:
    rows = rows_of("pairs", 20)
    rows[13]["chosen"] += f" {POISON}"
    files = {"good": write(tmp_path / "good.jsonl", rows_of("demonstrations", 20))}
    files["mine"] = write(tmp_path / "mine.jsonl", rows)
    request = request_of(objective, files, *UNEVEN, "data.holdout=0", f"model.path={poisoned_model}", "seed=1")
    run = tmp_path / "run"
    failed = uft("train", *request, f"run.dir={run}", code=1)
    result = result_of(run)
    assert result["status"] == "failed"
    assert "rows: mine:13" in result["error"]
    assert "not finite" in result["error"]
    assert "rows: mine:13" in failed.stdout
    kept = re.search(r"the last good state is kept in (\S+)", result["error"])
    assert kept is not None
    step = int(kept[1].rpartition("step-")[2])
    assert step == result["steps"] == max(checkpoints_of(run)) > 0
    finite(Path(kept[1]), poisoned_rows=1)

    again = uft("resume", str(run), code=1)  # the same rows under the same weights: the same end, and no Traceback
    assert result_of(run)["error"] == result["error"]
    assert "Traceback" not in failed.stdout + failed.stderr + again.stdout + again.stderr


@pytest.mark.slow
def test_a_learning_rate_that_blows_up(
    uft: Uft, request_of: Callable[..., list[str]], write: Callable[..., Path], tmp_path: Path
) -> None:
    files: dict[str, Any] = {"mine": write(tmp_path / "mine.jsonl", rows_of("demonstrations", 20))}
    huge = ("optim=sgd", "optim.lr=1e38", "optim.warmup=0", "train.checkpoint_every=1", "train.max_grad_norm=0")
    run = tmp_path / "run"
    failed = uft("train", *request_of("sft", files, *UNEVEN, *huge, "eval=none"), f"run.dir={run}", code=1)
    result = result_of(run)
    assert result["status"] == "failed"
    assert "not finite" in result["error"]
    assert "lower optim.lr" in result["error"].lower()
    assert "Traceback" not in failed.stdout + failed.stderr
    for step in checkpoints_of(run):
        finite(run / "checkpoints" / f"step-{step:06d}", poisoned_rows=0)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines)
