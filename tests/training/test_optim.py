"""Optimisers and schedules: shapes, what decays, and going on from saved moments."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from uft.config.schema import Optim
from uft.model import checkpoint
from uft.runs import create_run
from uft.training.step import OPTIMISERS, SCHEDULES, learning_rate, make_optimiser, warmup_steps
from uft.training.trainer import add_prefix, strip_prefix

MOMENTS = {
    "adamw": {"betas": [0.8, 0.95], "weight_decay": 0.1},
    "rmsprop": {"momentum": 0.9, "alpha": 0.9, "weight_decay": 0.1},
    "sgd": {"momentum": 0.9, "weight_decay": 0.1},
    "sgd-plain": {},
    "adamw8bit": {"betas": [0.8, 0.95], "weight_decay": 0.1},
    "adafactor": {"weight_decay": 0.1},
    "muon": {"betas": [0.8, 0.95], "momentum": 0.9, "weight_decay": 0.1},
}


def optim(name: str = "adamw", **keys: object) -> Optim:
    return Optim(**{"name": name, "lr": 0.01, **keys})


def rates(steps: int, **keys: object) -> list[float]:
    return [learning_rate(step, steps, optim(**keys)) for step in range(steps)]


# --- schedules


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule(schedule):
    """Warm-up rises in equal steps to the peak, none of them 0; `lr_scale` multiplies all of it."""
    curve = rates(20, schedule=schedule, warmup=4)
    assert curve[:5] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    assert max(curve) <= 0.01
    assert all(later <= earlier for earlier, later in pairwise(curve[4:]))
    for warmup in (0, 0.1, 0.5, 3, 7):
        assert all(rate > 0 for rate in rates(20, schedule=schedule, warmup=warmup))
    assert rates(20, schedule=schedule, warmup=4, lr_scale=1.0) == curve
    assert rates(20, schedule=schedule, warmup=4, lr_scale=0.25) == pytest.approx([rate / 4 for rate in curve])


def test_shapes_after_the_warmup():
    assert rates(8, schedule="constant", warmup=0) == [0.01] * 8
    assert rates(4, schedule="linear", warmup=0) == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert rates(4, schedule="cosine", warmup=0) == pytest.approx([0.01, 0.0085355, 0.005, 0.0014645], abs=1e-7)
    wsd = [0.01, 0.01, 0.01, 0.01, 0.0042265, 0.0018350]  # 1 - sqrt(1/3), 1 - sqrt(2/3)
    assert rates(6, schedule="wsd", warmup=0, decay=0.5) == pytest.approx(wsd, abs=1e-7)
    assert rates(3, warmup=6) == pytest.approx([0.01 / 6, 0.02 / 6, 0.03 / 6]), "the run ends before the peak"
    assert rates(5, lr=0.0, warmup=2) == [0.0] * 5


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"), [(0.1, 800, 80), (0.1, 4, 0), (0, 9, 0), (1, 9, 1), (5, 3, 5)]
)
def test_warmup_is_a_share_below_one_and_a_count_from_one_on(warmup, steps, expected):
    assert warmup_steps(warmup, steps) == expected


# --- optimisers


class Small(nn.Module):
    """A matrix, a bias, a gain that gets no gradient at all."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)  # the least that has moments in 8 bits
        self.gain = nn.Parameter(torch.ones(64))
        self.idle = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) * self.gain).square().sum()


def small() -> dict[str, nn.Parameter]:
    torch.manual_seed(3)
    return dict(Small().named_parameters())


def advance(parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, steps: range) -> None:
    module = Small()
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, parameter)
    for step in steps:
        optimiser.zero_grad(set_to_none=True)
        module(torch.randn(5, 64, generator=torch.Generator().manual_seed(step))).backward()
        optimiser.step()


@pytest.fixture(autouse=True)
def _bitsandbytes(request):
    if "adamw8bit" in request.node.name:
        pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("name", OPTIMISERS)
def test_only_matrices_decay(name):
    parameters = small()
    optimiser = make_optimiser(parameters, optim(name, weight_decay=0.5, lr=0.1))
    before = {key: p.detach().clone() for key, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    moved = {key for key, p in parameters.items() if not torch.equal(p, before[key])}
    assert moved == {"linear.weight", "idle"}
    assert parameters["idle"].detach().abs().max() < 1


def test_a_model_without_matrices_or_without_vectors_has_one_group():
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    assert len(make_optimiser({"m": matrix}, optim()).param_groups) == 1
    assert len(make_optimiser({"v": vector}, optim()).param_groups) == 1


@pytest.mark.parametrize("case", MOMENTS)
def test_saved_and_loaded_equals_never_stopped(case, tmp_path):
    cfg = optim(case.partition("-")[0], **MOMENTS[case])
    straight = small()
    optimiser = make_optimiser(straight, cfg)
    advance(straight, optimiser, range(3))
    run = create_run(tmp_path / "run", "{}\n", [])
    tensors = {
        **add_prefix("model", straight),
        **add_prefix("optimiser", checkpoint.optimiser_tensors(optimiser, straight)),
    }
    found, _ = checkpoint.load(checkpoint.publish(run, checkpoint.begin(run, 3, tensors, {})))
    advance(straight, optimiser, range(3, 6))

    resumed = small()
    again = make_optimiser(resumed, cfg)
    with torch.no_grad():
        for name, tensor in strip_prefix("model", found).items():
            resumed[name].copy_(tensor)
    checkpoint.load_optimiser(again, resumed, strip_prefix("optimiser", found))
    advance(resumed, again, range(3, 6))
    for name, parameter in straight.items():
        assert torch.equal(parameter, resumed[name]), name
    for parameter, twin in zip(straight.values(), resumed.values(), strict=True):
        assert optimiser.state[parameter].keys() >= again.state[twin].keys()
        for key, value in again.state[twin].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(optimiser.state[parameter][key])), key


def test_muon_updates_the_hidden_matrices_and_adamw_all_else():
    """Muon's update: its momentum with all singular values near 1, times 0.2 sqrt(rows) (2502.16982, eq. 4)."""
    mixed, plain = small(), small()
    advance(mixed, make_optimiser(mixed, optim("muon", momentum=0.0), hidden={"linear.weight"}), range(1))
    advance(plain, make_optimiser(plain, optim("adamw", fused=False)), range(1))
    moved = (small()["linear.weight"] - mixed["linear.weight"]).detach() / (0.01 * 0.2 * 8)
    values = torch.linalg.svdvals(moved)
    assert values[:5].tolist() == pytest.approx([1] * 5, abs=0.4), "five rows make five directions"
    assert all(torch.equal(mixed[name], plain[name]) for name in mixed if name != "linear.weight")
    assert len(make_optimiser(small(), optim("muon"), hidden=set()).param_groups) == 2, "AdamW alone"


def test_moments_of_adamw8bit_are_nearly_those_in_32():
    narrow, plain = small(), small()
    advance(narrow, make_optimiser(narrow, optim("adamw8bit")), range(20))
    advance(plain, make_optimiser(plain, optim("adamw")), range(20))
    start = small()["linear.weight"]
    moved, expected = (one["linear.weight"] - start for one in (narrow, plain))
    assert 0 < (moved - expected).norm() < 0.1 * expected.norm()


def test_the_rate_of_b_over_that_of_a():
    """LoRA+: under plain SGD an update is the rate times the gradient."""
    parameters = {f"q.lora_{side}.default.weight": nn.Parameter(torch.zeros(2, 2)) for side in "AB"}
    optimiser = make_optimiser(parameters, optim("sgd"), lr_ratio=16.0)
    assert sorted(group["lr_ratio"] for group in optimiser.param_groups) == [1.0, 16.0]
    for group in optimiser.param_groups:
        group["lr"] = 0.01 * group["lr_ratio"]
        group["params"][0].grad = torch.ones(2, 2)
    optimiser.step()
    a, b = parameters.values()
    torch.testing.assert_close(b.detach(), 16 * a.detach())
    assert a[0, 0].item() == pytest.approx(-0.01)


# --- one kernel


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_fused_update_is_the_plain_one_and_goes_on_from_its_moments(name, tmp_path):
    gradients = [torch.randn(7, 5, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    start = torch.randn(7, 5, generator=torch.Generator().manual_seed(9))

    def begun(fused: bool) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        weight = nn.Parameter(start.clone())
        return weight, make_optimiser({"w": weight}, optim(name, fused=fused, **MOMENTS[name]))

    def steps(weight: nn.Parameter, optimiser: torch.optim.Optimizer, taken: list[torch.Tensor]) -> None:
        for gradient in taken:
            weight.grad = gradient.clone()
            optimiser.step()

    (plain, slow), (fused, fast) = begun(False), begun(True)
    assert fast.param_groups[0]["fused"] is True
    steps(plain, slow, gradients)
    steps(fused, fast, gradients[:2])
    other, resumed = begun(True)
    with torch.no_grad():
        other.copy_(fused)
    checkpoint.load_optimiser(resumed, {"w": other}, checkpoint.optimiser_tensors(fast, {"w": fused}))
    steps(fused, fast, gradients[2:])
    steps(other, resumed, gradients[2:])
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    assert torch.equal(other, fused)
