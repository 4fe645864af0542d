"""What processes of these tests see of the world outside."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(folder: Path) -> dict[str, str]:
    """Of every process: this installation of uft, one thread, no network, caches of the test's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "UFT_", "SLURM_"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    own = {"UFT_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    return kept | own | {"PYTHONPATH": path, "HOME": str(folder), "TQDM_DISABLE": "1"}
