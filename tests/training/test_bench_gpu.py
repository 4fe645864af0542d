"""The script for the first minutes on a GPU, on what is here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_gpu.py"


@pytest.mark.slow
def test_every_section_has_figures(tmp_path: Path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--size", "toy", "--steps", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    sections = ("correctness", "steps", "memory", "head", "attention", "profile")
    assert [section for section in sections if "failed" in found[section]] == [], done.stderr
    right = found["correctness"]
    assert max(right["policy"], right["compiled"]) <= right["explained"]
    assert right["head"] < 0.1
    assert set(found["steps"]) == {"sft", "sft, not compiled", "dpo", "sft, LoRA"}
    for arm in found["steps"].values():
        assert min(arm.values()) > 0
        assert arm["mfu"] < 1.5
    assert all(line in done.stdout for line in ("\nsteps: training", "\nhead: TFLOP/s"))
