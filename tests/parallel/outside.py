"""What processes of these tests see of the world outside."""

from __future__ import annotations

from pathlib import Path

from program import isolated


def environment(folder: Path) -> dict[str, str]:
    """Of every process: this installation of uft, one thread, no network, caches of the test's own."""
    own = {"TQDM_DISABLE": "1"}
    variables = isolated(folder, folder / "cache") | own
    return {name: value for name, value in variables.items() if not name.startswith("SLURM_")}
