"""The folder a run leaves behind: plain transformers and PEFT load it elsewhere and find what the run logged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HELD_OUT = [
    {"prompt": "What is the capital of Spain?", "response": "Madrid, of course."},
    {"prompt": "3+4?", "response": "seven"},
    {"prompt": "Count down from three.", "response": "three two one"},
]
HELD_OUT_PAIRS = [
    {"prompt": "Greet him.", "chosen": "Good evening, sir.", "rejected": "what"},
    {"prompt": "And her?", "chosen": "Good evening!", "rejected": "I do not know her at all, who would that be?"},
]
LEARNING = ("train.steps=4", "optim.lr=3e-3", "train.batch_size=4", "eval=quick", "eval.samples=0")

PLAIN = """
import json, sys
from pathlib import Path
from oracle import nll, positives
from plain_model import Model, read
from transformers import AutoModelForCausalLM

folder, *models = map(Path, sys.argv[1:])
rows = [row for file in sorted(folder.glob("*.jsonl")) for row in read(file)]
found = []
for place in models:
    if (place / "adapter_config.json").is_file():
        from peft import PeftConfig, PeftModel
        base = PeftConfig.from_pretrained(place).base_model_name_or_path
        model = Model(Path(base))
        lm = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
        model.lm = PeftModel.from_pretrained(lm, place).double().eval()
    else:
        model = Model(place)
    found.append(nll(model, positives(rows)).item())
assert not any(name.split(".")[0] == "uft" for name in sys.modules)
print(json.dumps(found))
"""


@pytest.fixture
def plain_nll(environment: dict[str, str]) -> Callable[..., list[float]]:
    """plain_nll(rows, *folders of models or adapters): measured in a fresh process without uft."""

    def measure(*arguments: Path) -> list[float]:
        # of this test's folder alone: uft could not even be imported by accident
        env = environment | {"PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-c", PLAIN, *map(str, arguments)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return measure


@pytest.fixture
def held_out(tmp_path: Path, write: Callable[..., Path]) -> Path:
    folder = tmp_path / "held-out"
    write(folder / "demonstrations.jsonl", HELD_OUT)
    write(folder / "pairs.jsonl", HELD_OUT_PAIRS)
    return folder


@pytest.fixture
def asked(request_of, held_out: Path) -> Callable[..., list[str]]:
    """asked(objective, overrides): a short run that learns and measures itself on the held-out files."""
    names = ("demonstrations", "pairs")
    apart = [f"+data.sources.{name}.eval_path={held_out / f'{name}.jsonl'}" for name in names]
    return lambda objective, *more: request_of(objective, names, *apart, *LEARNING, *more)


def evaluations(lines: list[dict]) -> list[float]:
    return [line["eval/nll"] for line in lines if "eval/nll" in line]


def test_plain_transformers_reproduce_the_last_evaluation(
    uft, asked, held_out, plain_nll, metrics, make_model, tmp_path
):
    run, initial = tmp_path / "run", make_model(seed=2, tied=True)
    uft("train", *asked("ift", f"model.path={initial}", f"run.dir={run}"))
    before, last = evaluations(metrics(run))
    assert abs(last - before) > 0.01  # it did learn, so these are not the initial weights
    assert plain_nll(held_out, initial, run / "model") == pytest.approx([before, last], abs=1e-4)


@pytest.mark.slow
def test_an_adapter_is_merged_and_loads_with_peft(uft, asked, held_out, plain_nll, metrics, tmp_path):
    run = tmp_path / "run"
    lora = ("model.adapter=lora", "model.lora.rank=4", "model.lora.alpha=12", "optim.lr=0.05")
    uft("train", *asked("sft", *lora, f"run.dir={run}"))
    before, last = evaluations(metrics(run))
    assert abs(last - before) > 0.01
    assert plain_nll(held_out, run / "model", run / "model" / "adapter") == pytest.approx([last, last], abs=1e-4)


def test_an_exported_model_is_where_the_next_run_starts(here, asked, metrics):
    """Sequential training: the second run measures, before its first step, what the first measured at its end."""
    first = here(asked("sft"), name="first")
    second = here(asked("dpo", f"model.path={first / 'model'}", "data.unusable=drop"), name="second")
    assert evaluations(metrics(second))[0] == pytest.approx(evaluations(metrics(first))[-1], abs=1e-6)
