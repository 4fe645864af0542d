"""Five real steps equal a training loop of a dozen lines of torch, loss by loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import torch
from plain_model import Model, read

LR = 1e-3
STEPS = 5
LEARNING = (f"optim.lr={LR}", "optim.schedule=constant", "optim.warmup=0", f"train.steps={STEPS}")
IN_PIECES = "train.micro_batch_tokens=150"


def by_hand(model: Model, loss: Callable[[], torch.Tensor], max_grad_norm: float = 1.0) -> dict[int, float]:
    """Losses by step."""
    optimiser = torch.optim.AdamW(model.lm.parameters(), lr=LR, weight_decay=0.0)
    losses = {}
    for step in range(1, STEPS + 1):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.lm.parameters(), max_grad_norm)
        optimiser.step()
        losses[step] = value.item()
    return losses


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_five_steps(objective, here, request_of, rows, curve, tiny_model):
    run = here(request_of(objective, ["pairs"], *LEARNING, IN_PIECES))
    pairs, model, frozen = read(rows("pairs")), Model(tiny_model), Model(tiny_model)
    losses = {
        "sft": lambda: oracle.sft(model, pairs).objective,
        "dpo": lambda: oracle.dpo(model, pairs, frozen).objective,
    }
    expected = by_hand(model, losses[objective])
    logged = {step: line["loss"] for step, line in curve(run).items()}
    assert logged == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert logged[STEPS] < logged[1]


def test_a_schedule_with_warm_up_and_another_optimiser(here, request_of, rows, curve, tiny_model):
    """RMSprop under linear decay: lr / 2, lr, then down to 0 over the three steps that are left."""
    more = ("optim=rmsprop", "optim.schedule=linear", "optim.warmup=2", "train.max_grad_norm=0")
    run: Path = here(request_of("sft", ["demonstrations"], *LEARNING, *more))
    seen, model = read(rows("demonstrations")), Model(tiny_model)
    optimiser = torch.optim.RMSprop(model.lm.parameters(), alpha=0.99, eps=1e-8)
    for step, rate in enumerate((LR / 2, LR, LR, LR * 2 / 3, LR / 3), 1):
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        loss = oracle.sft(model, seen).objective
        loss.backward()
        optimiser.step()
        line = curve(run)[step]
        assert (line["loss"], line["lr"]) == (pytest.approx(loss.item(), rel=1e-5), pytest.approx(rate))
