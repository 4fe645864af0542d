"""Frozen Lake: the world by search and by value iteration, the nets against numpy, and the specification's figures.

No order of methods is expected anywhere.
"""

import csv
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch

from uft.cli import main
from uft.objectives import make
from uft.objectives.base import ForwardRequest, StepContext
from uft.playground.lake import ACTIONS, CELLS, MAPS, Lake, move
from uft.training.lake import ARMS, PAPER, Design, Measure, Nets, learn, losses, sampled, shown, study

LAKES = [Lake(text) for text in MAPS]


def test_a_map_has_two_routes_and_value_iteration_gives_the_distances_of_a_search():
    for lake in LAKES:
        assert len(lake.routes) == 2
        assert len(lake.routes[0]) < len(lake.routes[1])
        far, queue = {lake.gift: 0}, deque([lake.gift])
        while queue:  # breadth first from the gift: a cell is one further than the nearest that it leads to
            to = queue.popleft()
            for cell in sorted(lake.ice - far.keys()):
                if any(move(cell, action) == to for action in range(ACTIONS)):
                    far[cell] = far[to] + 1
                    queue.append(cell)
        assert {lake.gift: 0, **lake.distance} == far
        assert len(lake.routes[0]) == far[0]
        assert np.allclose(lake.optimal.sum(1), [float(cell in lake.distance) for cell in range(CELLS)])
        negatives = {kind: lake.negative(kind) for kind in ("route", "hole", "detour")}
        ends = {kind: move(lake.visited(actions)[-1], actions[-1]) for kind, actions in negatives.items()}
        assert ends["route"] == ends["detour"] == lake.gift
        assert ends["hole"] not in lake.ice | {lake.gift}
        assert len(negatives["detour"]) == len(lake.routes[0]) + 2


def loss_of(arm, nets, batch, **changes):
    objective = make({"name": arm, **ARMS[arm], **changes})
    return losses(objective, batch, nets, Nets.initial(2, 1), StepContext())


def test_the_gradient_of_sft_is_that_of_numpy_and_ift_without_its_two_ideas_is_sft():
    nets, lake = Nets.initial(2, 1), LAKES[0]
    batch = shown("sft", [lake, lake], "route")
    loss = loss_of("sft", nets, batch)
    gradient = torch.autograd.grad(loss, nets.weights)
    cells, actions = lake.visited(lake.routes[0]), lake.routes[0]
    total = 0.0
    for net in range(2):
        one, b, two, c = (weight[net].detach().numpy() for weight in nets.weights)
        hidden = np.tanh(one[cells] + b)
        odds = np.exp(hidden @ two + c)
        policy = odds / odds.sum(1, keepdims=True)
        total -= np.log(policy[range(len(actions)), actions]).mean()
        slope = (policy - np.eye(ACTIONS)[actions]) / len(actions)
        np.testing.assert_allclose(gradient[2][net], hidden.T @ slope, atol=1e-12)
        first = np.zeros_like(one)
        np.add.at(first, cells, slope @ two.T * (1 - hidden**2))
        np.testing.assert_allclose(gradient[0][net], first, atol=1e-12)
    assert float(loss.detach()) == pytest.approx(total)
    plain = torch.autograd.grad(loss_of("ift", nets, batch, lam=0.0, gamma=0.0), nets.weights)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(plain, gradient, strict=True))


def test_a_replaced_action_moves_the_next_input():
    """With the whole weight on the guess, the next input is the cell that the guessed action leads to."""
    nets, lake = Nets.initial(2, 1), LAKES[0]
    batch = shown("sft", [lake, lake], "route")
    down = torch.full_like(batch.target_ids, 1)
    found = nets(batch, ForwardRequest(replace=down, mix=1.0)).log_probs
    cells = [0, *(move(cell, 1) for cell in lake.visited(lake.routes[0])[:-1])]
    wanted = nets.policy()[0, cells].log()[range(len(cells)), lake.routes[0]]
    assert torch.allclose(found[: len(cells)], wanted)


def test_first_losses_are_those_of_a_policy_that_equals_its_reference():
    for arm, of_each in (("dpo", np.log(2)), ("uft", 0.25)):
        loss = loss_of(arm, Nets.initial(2, 1), shown(arm, LAKES[:2], "hole"))
        assert float(loss.detach()) == pytest.approx(2 * of_each)


def test_own_trajectories_are_walks_of_the_map_and_scored_by_their_end():
    rows = [lake for lake in LAKES for _ in range(4)]
    batch = sampled(Nets.initial(4, len(LAKES)), rows, torch.Generator().manual_seed(0))
    for number in range(len(batch.row)):
        own, lake = batch.sequence == number, rows[int(batch.row[number])]
        cells, actions = batch.input_ids[0][own].tolist(), batch.target_ids[own].tolist()
        assert cells == lake.visited(actions)
        assert set(cells) <= lake.ice
        end = move(cells[-1], actions[-1])
        assert bool(batch.target[number]) == (end == lake.gift)
        assert end not in lake.ice or len(actions) == 16
    assert 0 < float(batch.target.mean()) < 1


def test_nets_of_one_batch_do_not_touch_each_other():
    design = Design(arms="dpo", maps=2, seeds=3, stop=5)
    both = study(design)["dpo"]
    assert torch.allclose(study(replace(design, maps=1))["dpo"], both[:1], atol=1e-12)


def test_the_best_stop_is_no_worse_than_a_fixed_one(monkeypatch):
    monkeypatch.setattr("uft.training.lake.MARKS", (5, 10))
    best, fixed = Design(stop="best", maps=2, seeds=2), Design(stop=10, maps=2, seeds=2)
    means = [learn("sft", one, LAKES[:2], Measure.of(one, LAKES[:2])).mean(1) for one in (best, fixed)]
    assert (means[0] <= means[1]).all()


def test_the_figures_are_those_of_a_program_in_numpy():
    """The specification's program on the first map, a step into a hole, 25 updates."""
    for optimiser, wanted in (
        ("rmsprop", {"sft": 0.144912, "ift": 0.144623, "dpo": 0.146553, "orpo": 0.144946}),
        ("sgd", {"sft": 0.161005, "ift": 0.161089, "dpo": 0.173895, "orpo": 0.158929}),
    ):
        design = Design(arms=",".join(wanted), negative="hole", maps=1, stop=25, optimiser=optimiser)
        found = study(design)
        assert {arm: round(float(found[arm].mean()), 6) for arm in wanted} == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("negative", "wanted"),
    [
        ("route", {"untrained": 0.1711, "sft": 0.1732, "ift": 0.1745, "dpo": 0.2575, "orpo": 0.1840}),
        ("hole", {"untrained": 0.1711, "dpo": 0.2048, "orpo": 0.1744}),
        ("detour", {"untrained": 0.1711, "dpo": 0.2157, "orpo": 0.1772}),
    ],
)
def test_the_figures_of_200_updates_are_those_of_the_specification(negative, wanted):
    """Means over RMSprop and plain descent, eight maps and ten seeds."""
    arms = ",".join(list(wanted)[1:])
    found = [study(Design(arms=arms, negative=negative, optimiser=name)) for name in ("rmsprop", "sgd")]
    assert {arm: round(float(sum(one[arm].mean() for one in found)) / 2, 4) for arm in wanted} == wanted


def test_the_verb_prints_a_table_and_writes_a_file(tmp_path, capsys):
    file = tmp_path / "lake.csv"
    words = ["arms=sft,grpo", "stop=3", "maps=2", "seeds=2", "table=cell", "cells=both", f"csv={file}"]
    assert main(["lake", *words]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{arm}" in out for arm in ("untrained", "sft", "grpo"))
    assert PAPER in out
    rows = list(csv.DictReader(file.open()))
    assert len(rows) == 3 * 2 * 2
    assert {row["map"] for row in rows} == set(MAPS[:2])
    assert main(["lake", "negative=wall", "stp=3"]) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in ("'route', 'hole' or 'detour'", "did you mean  stop=3", "2 problems"))
