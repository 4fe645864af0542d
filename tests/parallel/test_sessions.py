"""Two processes are one run, each with the whole model or with half of it: the same losses, gradients, evaluations and
objective states to rounding; and a run goes on in another number of processes."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import CASES, write_files, write_untied
from outside import environment
from program import run

PROGRAM = Path(__file__).with_name("cases.py")
SHARDED = (
    "sft",
    "sft_one_row",
    "sft_packed",
    "sft_lora",
    "aot_unpaired",
    "dpo_lora",
    "dpo_untied",
    "uft",
    "ift",
    "dft",
    "kto",
    "irft_own",
)
EVERY = [*(("two", name) for name in CASES if name != "long"), *(("sharded", name) for name in SHARDED)]
EVERY = [*EVERY, ("offloaded", "sft")]
FAST = [("two", "sft_short_last"), ("sharded", "sft_lora")]
PAIRS = [pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow) for pair in EVERY]
CLOCKS = {"seconds", "rollout/seconds", "tokens_per_second", "mfu"}
EXACT = {"step", "rows", "tokens", "supervised_tokens", "epoch"}
Said = Callable[[str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sessions")
    write_files(folder)
    write_untied(folder)
    return folder


def one(folder: Path, *words: str) -> None:
    """Sessions on one process."""
    command = [sys.executable, str(PROGRAM), str(folder), *words]
    run(command, env=environment(folder), check=True, timeout=1800, capture_output=True)


@pytest.fixture(scope="module")
def said(folder: Path, two: Callable[..., None]) -> Said:
    """said("two", name): the metric lines of a case on two processes ("one": on one).

    One start of the program for all fast cases, another for the others: importing costs more than a case.
    """

    def read(way: str, name: str) -> list[dict[str, Any]]:
        file = folder / f"{way}-{name}.json"
        if not file.exists():
            pairs = [pair for pair in EVERY if (pair in FAST) == ((way, name) in FAST or way == "one")]
            two(folder, PROGRAM, str(folder), *(f"{way}:{name}" for way, name in pairs))
            names = dict.fromkeys(name for _, name in pairs if not (folder / f"one-{name}.json").exists())
            one(folder, *(f"one:{name}" for name in names))
        lines: list[dict[str, Any]] = json.loads(file.read_text())
        return lines

    return read


@pytest.mark.parametrize(("way", "name"), PAIRS)
def test_two_processes_say_what_one_says(said: Said, way: str, name: str) -> None:
    two, one = said(way, name), said("one", name)
    assert len(one) == len(two) >= 3
    for line, other in zip(one, two, strict=True):
        assert line.keys() == other.keys()
        ties = {"objective/accuracy"} if line["step"] == 1 else set()  # policy = reference: who is ahead is rounding
        for key in line.keys() - CLOCKS - ties:
            if key in EXACT:
                assert line[key] == other[key], (line["step"], key)
            else:
                assert other[key] == pytest.approx(line[key], rel=1e-5, abs=2e-5), (line["step"], key)


@pytest.mark.slow
def test_the_cases_are_what_they_are_called(said: Said) -> None:
    """A short last batch, a source that ends the run early, steps in which a process has no row."""
    names = ("sft_short_last", "sft_dry", "sft_one_row")
    rows = {name: [line["rows"] for line in said("two", name)] for name in names}
    assert rows["sft_short_last"][-1] % 7 != 0
    assert rows["sft_dry"][-1] < 18  # of 9 + 9 rows, in shares of 3 : 1
    assert rows["sft_one_row"][-1] == 3
    assert all(line["grad_norm"] > 0 for name in rows for line in said("one", name) if "loss" in line)


# --- sharded runs and their checkpoints


@pytest.fixture(scope="module")
def resumed(folder: Path, two: Callable[..., None]) -> Path:
    """Four steps on two processes with halves, four on one ("grown"); then four on one, and four on halves ("back")."""
    two(folder, PROGRAM, str(folder), "kept:long:grown:4")
    one(folder, "one:long:whole", "one:long:back:4", "one:long:grown")
    two(folder, PROGRAM, str(folder), "kept:long:back")
    return folder


def curve(run: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grown", "back"])
def test_halves_go_on_whole_and_whole_goes_on_in_halves(resumed: Path, name: str) -> None:
    ours, whole = curve(resumed / name), curve(resumed / "whole")
    assert len(ours) == len(whole) == 8
    for (loss, norm), (expected_loss, expected_norm) in zip(ours, whole, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4, abs=1e-4)
    found = sorted((resumed / name / "checkpoints").iterdir())
    assert [path.name for path in found] == ["step-000006", "step-000008"]


@pytest.mark.slow
def test_the_exported_model_is_the_whole_one(resumed: Path) -> None:
    from safetensors.torch import load_file
    from torch.testing import assert_close
    from transformers import AutoModelForCausalLM

    ours, info = AutoModelForCausalLM.from_pretrained(resumed / "back" / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(ours).__name__ == "LlamaForCausalLM"
    state = ours.state_dict()
    for name, tensor in load_file(resumed / "whole" / "model" / "model.safetensors").items():
        assert_close(state[name], tensor, rtol=1e-4, atol=1e-4)
    assert "FSDP" not in (resumed / "back" / "model" / "config.json").read_text()


@pytest.mark.slow
def test_shards_are_safetensors_and_hold_everything(resumed: Path) -> None:
    from uft.model import checkpoint

    step = resumed / "back" / "checkpoints" / "step-000008"
    assert [path.suffix for path in (step / "shards").iterdir()] == [".safetensors"] * 2
    assert not (resumed / "grown" / "checkpoints" / "step-000008" / "shards").exists()
    tensors, _ = checkpoint.load(step)
    assert {"model", "optimiser"} < {name.partition("/")[0] for name in tensors}
    assert {f"model/{name}" for name in checkpoint.load_weights(step)} == {n for n in tensors if n.startswith("model/")}
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())


@pytest.mark.slow
def test_each_holds_half(resumed: Path) -> None:
    """Of every weight and of its moments; and the first alone has ever read the model's files."""
    for rank in (0, 1):
        held = json.loads((resumed / f"held-{rank}.json").read_text())
        assert (held["files read"] > 0) == (rank == 0)
        assert held["weights"] * 2 == pytest.approx(held["of"], rel=0.05)
        assert held["moments"] * 2 == pytest.approx(2 * held["of"], rel=0.05)


def test_shards_of_an_earlier_format_are_refused_in_a_line(tmp_path: Path) -> None:
    """Their index is a pickle, which is not read."""
    from torch import ones

    from uft.errors import UftError
    from uft.model import checkpoint
    from uft.runs import create_run

    run = create_run(tmp_path / "run", "{}\n", [])
    hidden = checkpoint.begin(run, 3, {"meter/w": ones(1)}, {})
    (hidden / "shards").mkdir()
    (hidden / "shards" / ".metadata").write_bytes(pickle.dumps({}))
    with pytest.raises(UftError, match="finish the run with the version that began it"):
        checkpoint.load(checkpoint.publish(run, hidden))
