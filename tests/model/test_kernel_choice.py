"""Which kernel a device, a precision, heads and dropout get; flex only where it says what it should."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from uft.model import attention
from uft.model.attention import KERNELS, choose_kernel, flex_works, installed, loop

CPU = torch.device("cpu")
HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
TURING, AMPERE = (7, 5), (8, 0)
PACKAGE, VARLEN, TRITON = "flash_attn", "torch.nn.attention.varlen", "triton"
ALL = {PACKAGE, VARLEN, TRITON}
TORCH = {VARLEN, TRITON}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "a CPU": ("loop", {"device": "cpu"}),
    "an Apple": ("loop", {"device": "mps"}),
    "the package": ("flash_attn", {}),
    "the package has dropout": ("flash_attn", {"dropout": 0.1}),
    "the package pads heads": ("flash_attn", {"width": 100}),
    "torch": ("varlen", {"there": TORCH}),
    "torch in float16": ("varlen", {"there": TORCH, "dtype": HALF}),
    "torch has no dropout, nor has flex": ("loop", {"there": TORCH, "dropout": 0.1}),
    "torch does not pad heads": ("flex", {"there": TORCH, "width": 100}),
    "heads of 256": ("flash_attn", {"width": 256}),
    "wider ones": ("flex", {"width": 264}),
    "values of another width": ("flex", {"width": 192, "value_width": 128}),
    "float32": ("flex", {"dtype": SINGLE}),
    "float32 with dropout": ("loop", {"dtype": SINGLE, "dropout": 0.1}),
    "float32 under autocast": ("flash_attn", {"dtype": SINGLE, "autocast": BRAIN}),
    "float64": ("loop", {"dtype": DOUBLE}),
    "float64 under autocast": ("loop", {"dtype": DOUBLE, "autocast": BRAIN}),
    "before Ampere": ("flex", {"capability": TURING, "dtype": HALF}),
    "before Ampere in float32": ("flex", {"capability": TURING, "dtype": SINGLE}),
    "before Ampere there is no bfloat16": ("loop", {"capability": TURING}),
    "before Volta": ("loop", {"capability": (6, 1), "dtype": SINGLE}),
    "neither varlen": ("flex", {"there": {TRITON}}),
    "nothing": ("loop", {"there": set()}),
    "narrow heads": ("loop", {"dtype": SINGLE, "width": 8}),
    "narrow values": ("loop", {"dtype": SINGLE, "value_width": 8}),
    "one token": ("loop", {"dtype": SINGLE, "tokens": 1}),
    "flex fails on trial": ("loop", {"dtype": SINGLE, "works": False}),
}


@pytest.mark.parametrize(("expected", "case"), CASES.values(), ids=CASES)
def test_the_kernel_is_what_device_precision_and_heads_allow(
    monkeypatch: pytest.MonkeyPatch, expected: str, case: dict[str, Any]
):
    case = {"device": "cuda", "capability": AMPERE, "dtype": BRAIN, "dropout": 0.0, "there": ALL, "works": True} | case
    width, tokens = case.get("width", 64), case.get("tokens", 20)
    tried = []

    def works(*asked: Any) -> bool:
        tried.append(asked)
        return case["works"]

    def tensor(heads: int, width: int) -> Any:
        return SimpleNamespace(
            device=torch.device(case["device"]), dtype=case["dtype"], shape=(1, heads, tokens, width)
        )

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case["capability"])
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: "autocast" in case)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: case["autocast"])
    monkeypatch.setattr(attention, "installed", lambda module: module in case["there"])
    monkeypatch.setattr(attention, "flex_works", works)
    value_width = case.get("value_width", width)
    found = choose_kernel(tensor(4, width), tensor(2, width), tensor(2, value_width), case["dropout"], 0.3)
    assert found == expected
    assert found in KERNELS
    if found == "flex":
        assert tried == [(torch.device("cuda"), case["dtype"], (4, 2), (width, value_width), 0.3)]


def test_what_is_installed():
    assert installed("torch.nn.attention.flex_attention")
    assert not installed("no_such_package")


# --- the trial


@pytest.fixture
def _forgotten() -> Iterator[None]:
    flex_works.cache_clear()
    yield
    flex_works.cache_clear()


def small(*given: Any) -> torch.Tensor:
    return loop(*given) * 0.9


def blind(query: torch.Tensor, key: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Right values, and no gradient through the keys."""
    return loop(query, key.detach() + 0 * key, *rest)


def nothing(*given: Any) -> torch.Tensor:
    return loop(*given) * float("nan")


def broken(*given: Any) -> torch.Tensor:
    raise RuntimeError("no compiler\nand a long story")


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN])
def test_a_kernel_that_says_the_same_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dtype: torch.dtype
):
    monkeypatch.setattr(attention, "flex", loop)
    assert flex_works(CPU, dtype, (4, 2), (16, 32), None)
    assert not caplog.records


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (small, "it is off by"),
        (blind, "it is off by"),
        (nothing, "it is off by"),
        (broken, "RuntimeError: no compiler"),
    ],
)
def test_one_that_is_wrong_or_fails_does_not_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrong: Any, why: str
):
    monkeypatch.setattr(attention, "flex", wrong)
    with caplog.at_level(logging.WARNING):
        assert not flex_works(CPU, SINGLE, (4, 2), (16, 16), 0.3)
        assert not flex_works(CPU, SINGLE, (4, 2), (16, 16), 0.3)
    assert len(caplog.records) == 1
    assert why in caplog.text
    assert "long story" not in caplog.text
