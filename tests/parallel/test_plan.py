"""The plan of `uft check`: memory by the configuration alone, against what the largest step takes."""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import program
import pytest
from cases import WORDS
from outside import environment

from uft.config.schema import Config, Hardware
from uft.model.memory import Shape, estimate, step_flops

SHAPE = Shape(4000, 4000, 1000, 4, 8, 16, vocabulary=50, activation_bytes=4, shared_bytes=1600, block_bytes=600)
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


def parts(**hardware: Any) -> dict[str, int]:
    return estimate(Config(hardware=Hardware(**hardware)), SHAPE, tokens=10, reference_mode="copy")


def test_shares_of_a_model_in_pieces() -> None:
    one, whole, pieces = parts(), parts(processes=8), parts(processes=8, sharding="full")
    assert one == whole
    assert [pieces[name] for name in ("weights", "gradients", "reference", "optimiser")] == [500, 500, 500, 1000]
    assert pieces["gathered"] == 2 * (1600 + 2 * 600)
    assert pieces["activations"] == one["activations"]
    offloaded = parts(processes=8, sharding="full", offload=True)
    assert offloaded["weights"] == offloaded["optimiser"] == 0 < offloaded["gathered"]


def test_work_of_a_step() -> None:
    """600 weights in blocks and a head of 400: six operations a weight and token, the head on supervised tokens."""
    assert step_flops(SHAPE, tokens=10, supervised=5) == 6 * (600 * 10 + 400 * 5)
    assert step_flops(SHAPE, tokens=10, supervised=5, trained_share=0.0) == 4 * (600 * 10 + 400 * 5)
    assert step_flops(replace(SHAPE, weight_bytes=2000, shared_bytes=800, stored_bytes=2), 10, 0) == 6 * 600 * 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 27 million weights, large beside what Python and torch take, and rows that fill a micro-batch."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import uft.playground

    folder, source = tmp_path_factory.mktemp("plan"), Path(uft.playground.__file__).with_name("model")
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "max_position_embeddings": 2048}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    config = AutoConfig.from_pretrained(source, **shape, **heads, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "model")
    texts = [" ".join(random.Random(n).choices(WORDS, k=60)) for n in range(24)]
    rows = [{"prompt": text[: len(text) // 2], "response": text} for text in texts]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def amount(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)([kMG]?)B", text).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_is_what_the_step_takes(folder: Path, dtype: str) -> None:
    words = ("objective=sft", "data=files", f"+data.sources.rows.path={folder}/rows.jsonl", "data.holdout=0")
    size = ("model=custom", f"model.path={folder}/model", "train.batch_size=12", "train.micro_batch_tokens=4096")
    more = ("hardware=cpu", "train.max_length=2048", f"model.dtype={dtype}")
    command = [sys.executable, "-m", "uft", "check", *words, *size, *more]
    done = program.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    took, expected = re.search(r"model took (\S+) of it; planned for this step: (\S+)", done.stdout).groups()  # type: ignore[union-attr]
    assert amount(took) == pytest.approx(amount(expected), rel=0.15), done.stdout
    first, [later] = (re.findall(rf"{before} [^(]*\((weights[^)]*)\)", done.stdout) for before in ("plan:", " memory"))
    assert first == [" ".join(later.split())], "before the model is read, and after"
    assert ("copies in bfloat16" in later) == (dtype == "bfloat16")
