from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from uft.config.schema import Config, Lora, Optim
from uft.model.memory import Shape, estimate, peak_memory, shape_of
from uft.model.policy import Policy, add_lora

SHAPE = Shape(
    weight_bytes=400,
    trained_bytes=400,
    trained=100,
    layers=2,
    hidden=8,
    intermediate=16,
    vocabulary=64,
    activation_bytes=4,
)


def parts(shape: Shape = SHAPE, optimiser="adamw", momentum=0.0, tokens=10, **changes: Any) -> dict[str, int]:
    return estimate(Config(optim=Optim(name=optimiser, momentum=momentum)), shape, tokens, **changes)


def test_another_model_compared_with_is_counted_by_its_own_weights():
    larger = replace(SHAPE, weight_bytes=7000)
    assert parts(reference_mode="copy")["reference"] == 400
    assert parts(reference_mode="copy", other=larger)["reference"] == 7000
    assert parts(reference_mode="cached", other=larger)["reference"] == 0


def test_exact_parts():
    found = parts()
    assert found["weights"] + found["gradients"] + found["optimiser"] == 16 * 100
    kept = {("adamw", 0.0): 2, ("rmsprop", 0.0): 1, ("rmsprop", 0.9): 2, ("sgd", 0.0): 0, ("sgd", 0.9): 1}
    for (optimiser, momentum), numbers in kept.items():
        assert parts(optimiser=optimiser, momentum=momentum)["optimiser"] == 4 * 100 * numbers
    shape = replace(SHAPE, hidden_trained=60, factors=30)
    bytes_kept = {"muon": 4 * 60 + 8 * 40, "adafactor": 4 * 30, "adamw8bit": 2 * 100 + 3}
    for optimiser, size in bytes_kept.items():
        assert parts(shape, optimiser=optimiser)["optimiser"] == size
    modes = ("copy", "cached", "adapter_off", None)
    assert [parts(reference_mode=mode)["reference"] for mode in modes] == [400, 0, 0, 0]


def test_activations_grow_with_tokens_and_shrink_with_recomputing_and_the_head_is_bounded_by_its_chunk():
    assert parts(tokens=20)["activations"] == 2 * parts()["activations"]
    none, some, every = (parts(replace(SHAPE, layers=8, recomputed=blocks))["activations"] for blocks in (0, 4, 8))
    assert every < some < none
    assert parts(replace(SHAPE, offloaded=True))["activations"] == parts(replace(SHAPE, layers=1))["activations"]
    assert parts(replace(SHAPE, vocabulary=50_000), tokens=10**6)["head"] <= 2 * 4 * 2**24


def test_the_numbers_of_a_model(build: Callable[..., Any]):
    model = build("llama_tied")
    count = sum(p.numel() for p in model.parameters())
    shape = shape_of(Policy(model))
    assert (shape.weight_bytes, shape.trained, shape.layers, shape.hidden) == (4 * count, count, 2, 16)
    assert (shape.intermediate, shape.vocabulary, shape.recomputed) == (24, 61, 0)
    lora = shape_of(Policy(add_lora(build("llama"), Lora(rank=2), 0, float32=True), "bfloat16"))
    assert lora.trained_bytes == 4 * lora.trained < lora.weight_bytes
    assert lora.activation_bytes == 2
    assert lora.hidden_trained == lora.trained
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert shape.hidden_trained == count - vectors - 61 * 16
    assert shape.factors == vectors + sum(sum(p.shape) for p in model.parameters() if p.ndim == 2)
    assert shape_of(Policy(build("gpt2"))).intermediate == 64


def test_peak_memory_counts_this_process():
    assert 50 * 2**20 < peak_memory(torch.device("cpu")) < 2**40


FAULTS = """
import resource
from uft.model.memory import keep_freed_memory
import torch
def faults():
    torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = faults()
assert keep_freed_memory()
print(faults() < given_back / 10)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")
def test_kept_memory_is_not_asked_of_the_kernel_again():
    done = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True)
    assert done.stdout == "True\n"
