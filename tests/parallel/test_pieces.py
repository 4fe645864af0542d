"""A model in pieces: what it leaves, that it goes on in another number of them, and that nobody holds all of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import program
import pytest
import torch
from cases import write_files
from outside import environment

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("pieces.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, two: Callable[..., None]) -> Path:
    """What two processes with halves of a model, and then others, left."""
    folder = tmp_path_factory.mktemp("pieces")
    write_files(folder)
    two(folder, PROGRAM, str(folder))
    for name in ("whole", "continued"):
        command = [sys.executable, str(PROGRAM), str(folder), name]
        program.run(command, env=environment(folder), check=True, timeout=900, capture_output=True)
    two(folder, PROGRAM, str(folder), "back")
    return folder


def curve(run: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.mark.parametrize("name", ["continued", "back"])
def test_halves_go_on_whole_and_whole_goes_on_in_halves(folder: Path, name: str) -> None:
    """Four steps on two processes with halves, four on one; then four on one, and four on halves."""
    ours, whole = curve(folder / name), curve(folder / "whole")
    assert len(ours) == len(whole) == 8
    for (loss, norm), (expected_loss, expected_norm) in zip(ours, whole, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4, abs=1e-4)


def test_the_exported_model_is_the_whole_one(folder: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    ours, info = AutoModelForCausalLM.from_pretrained(folder / "back" / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(ours).__name__ == "LlamaForCausalLM"
    whole = load_file(folder / "whole" / "model" / "model.safetensors")
    state = ours.state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-4)
    assert "FSDP" not in (folder / "back" / "model" / "config.json").read_text()


def test_checkpoints_are_whole_or_not_there(folder: Path) -> None:
    for run in ("continued", "back"):
        found = sorted((folder / run / "checkpoints").iterdir())
        assert [path.name for path in found] == ["step-000006", "step-000008"]
    assert (folder / "back" / "checkpoints" / "step-000008" / "shards" / ".metadata").is_file()
    assert not (folder / "continued" / "checkpoints" / "step-000008" / "shards").exists()


def test_an_index_with_something_else_in_it_is_refused(folder: Path, tmp_path: Path) -> None:
    import pickle
    import shutil

    from uft.errors import UftError
    from uft.training import checkpoint

    step = folder / "back" / "checkpoints" / "step-000008"
    assert all(tensor.isfinite().all() for tensor in checkpoint.read_sharded(step, {}).values())
    shutil.copytree(step, tmp_path / "step")

    class Hostile:
        def __reduce__(self):
            return exec, ("open('owned', 'w')",)

    (tmp_path / "step" / "shards" / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UftError, match="exec"):
        checkpoint.read_sharded(tmp_path / "step", {})


def test_each_holds_half(folder: Path) -> None:
    """Of every weight and of its moments; and the first alone has ever read the model's files."""
    for rank in (0, 1):
        held = json.loads((folder / f"held-{rank}.json").read_text())
        assert (held["files read"] > 0) == (rank == 0)
        assert held["weights"] * 2 == pytest.approx(held["of"], rel=0.05)
        assert held["moments"] * 2 == pytest.approx(2 * held["of"], rel=0.05)
