"""Frozen Lake, by which IFT's paper illustrates what objectives learn of a world (arXiv 2405.11870).

A 4 x 4 lake that is not slippery has exactly two simple routes to the gift. A net of one hidden layer learns from the
shorter one, or from the shorter against something worse; the distance from the optimal policy is measured at all cells.
Map, steps, seeds and numbers of the paper are unpublished, so what it leaves open is a setting here (`Design`), and no
order of methods is expected.

The net is a `Forward` like a language model: targets are actions, inputs are cells. So the objectives of the program
run on it as they are. They are sums over rows: the nets of all maps, seeds and rates are rows of one batch, and their
gradients do not touch each other.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from statistics import stdev
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass

from uft.data.batch import NOT_AN_INPUT, Batch
from uft.data.rows import Kind, Role
from uft.objectives import make
from uft.objectives.base import PLAIN, Forward, ForwardOutput, ForwardRequest, Objective, StepContext
from uft.playground.lake import ACTIONS, CELLS, MAPS, Lake, move

Tensor = torch.Tensor

MOVES = torch.tensor([[move(cell, action) for action in range(ACTIONS)] for cell in range(CELLS)])

UNITS = 32
ARMS: dict[str, dict[str, object]] = {
    "sft": {"method": "nll", "reduction": "sequence"},
    "ift": {"method": "ift", "lam": 0.2, "gamma": 0.95},
    "dpo": {"method": "pairwise", "beta": 0.1},
    "orpo": {"method": "contrastive", "score": "odds", "alpha": 1.0, "lam": 0.25},
    "uft": {"method": "uft", "beta": 0.1},  # the shorter route has reward 1, the other trajectory 0
    "grpo": {"method": "policy_gradient", "reduction": "sequence"},  # reward: the gift is reached
}
"""Settings of each arm. The paper has the first four; it leaves out reinforcement learning."""
GROUP, MAX_MOVES = 8, 16  # own trajectories of grpo: of each net in each update, and their longest
RATES, MARKS = (3e-4, 1e-3, 3e-3, 1e-2), (25, 50, 100, 200, 400, 800, 1600)

PAPER = (
    "The paper's order (DPO, IFT, ORPO, SFT, the best first) rests on a map, steps and seeds that are not published. "
    "It came out in 4 of 1728 designs of this kind: read nothing into one of them."
)


@dataclass
class Design:
    """What the paper leaves open."""

    arms: str = Field(",".join(ARMS), description="methods, separated by commas")
    negative: Literal["route", "hole", "detour"] = Field(
        "route", description="what is worse: the longer route, a step into a hole, a step aside and back"
    )
    table: Literal["action", "cell"] = Field("action", description="compared are actions, or the cells they lead to")
    cells: Literal["live", "route", "both"] = Field(
        "live", description="where: all cells with a way to the gift, the shorter route, both trajectories"
    )
    stop: Annotated[int, Field(ge=1)] | Literal["best"] = Field(
        200, description="updates; best: the best of 4 rates and 7 stops, by the measure itself"
    )
    optimiser: Literal["rmsprop", "sgd"] = Field("rmsprop", description="sgd: plain descent at ten times the rate")
    lr: float = Field(1e-3, gt=0, description="the rate, where stop is a number")
    maps: int = Field(len(MAPS), ge=1, le=len(MAPS), description="the first so many maps")
    seeds: int = Field(10, ge=2, description="initial nets, the same for all methods")
    csv: str | None = Field(None, description="a file for the distance of every method, map and seed")

    @field_validator("arms")
    @classmethod
    def known(cls, arms: str) -> str:
        if unknown := [arm for arm in arms.split(",") if arm not in ARMS]:
            raise ValueError(f"{', '.join(unknown)}: no such arm; arms: {', '.join(ARMS)}")
        return arms


# --- K nets, and what they learn from: a batch whose rows are the nets


@plain_dataclass(frozen=True)
class Nets:
    """One-hot cells, a hidden layer of tanh, actions; K of them."""

    weights: tuple[Tensor, ...]  # (K, CELLS, UNITS), (K, 1, UNITS), (K, UNITS, ACTIONS), (K, 1, ACTIONS) float64

    @classmethod
    def initial(cls, seeds: int, copies: int) -> Nets:
        """`copies` times the same nets, one per seed."""
        rng = np.random.Generator(np.random.Philox(1))
        shapes = ((CELLS, UNITS), CELLS), ((1, UNITS), CELLS), ((UNITS, ACTIONS), UNITS), ((1, ACTIONS), UNITS)
        drawn = (rng.uniform(-1, 1, (seeds, *shape)) / math.sqrt(fan) for shape, fan in shapes)
        return cls(tuple(torch.from_numpy(one).repeat(copies, 1, 1).requires_grad_() for one in drawn))

    def hidden(self, net: Tensor, cell: Tensor) -> Tensor:
        """(N, UNITS) before tanh, of cells (N,) in the nets (N,)."""
        return self.weights[0][net, cell] + self.weights[1][net, 0]

    def policy(self) -> Tensor:
        """(K, CELLS, ACTIONS) probabilities of the actions everywhere."""
        states, biases, actions, offsets = self.weights
        return torch.softmax(torch.tanh(states + biases) @ actions + offsets, -1)

    def __call__(self, batch: Batch, request: ForwardRequest = PLAIN) -> ForwardOutput:
        """Log-probs of the actions taken. A replaced action moves on: its cell is mixed into the next input."""
        cells, net = batch.input_ids[0], batch.row[batch.sequence]
        before = self.hidden(net, cells)
        if request.replace is not None and request.mix:
            inner = batch.place != NOT_AN_INPUT
            place, to = batch.place[inner], MOVES[cells[inner], request.replace[inner]]
            mixed = (1 - request.mix) * before[place] + request.mix * self.hidden(net[place], to)
            before = before.index_copy(0, place, mixed)
        logits = (torch.tanh(before).unsqueeze(1) @ self.weights[2][net] + self.weights[3][net]).squeeze(1)
        log_probs = torch.log_softmax(logits, -1)
        return ForwardOutput(log_probs.gather(1, batch.target_ids.unsqueeze(1)).squeeze(1), logits.argmax(-1))


def as_batch(cells: Tensor, actions: Tensor, lengths: Tensor, row: Tensor, role: Tensor, target: Tensor) -> Batch:
    """S trajectories as a packed batch: cells and actions (S, T), of which the first `lengths` (S,) count."""
    kept = torch.arange(cells.shape[1]) < lengths.unsqueeze(1)
    sequence, offset = kept.nonzero().unbind(1)
    at, rows = torch.arange(len(sequence)), int(row.max()) + 1
    last = offset + 1 == lengths[sequence]
    kind = Kind.ROLLOUT if (role == Role.OWN).any() else Kind.PREFERENCE
    pairs = (role == Role.NEGATIVE).nonzero().squeeze(1)  # each behind its positive
    return Batch(
        input_ids=cells[kept].unsqueeze(0),
        attention_mask=torch.ones(1, len(at), dtype=torch.int64),
        position_ids=offset.unsqueeze(0),
        target_ids=actions[kept],
        predictor=at,
        place=torch.where(last, NOT_AN_INPUT, at + 1),
        offset=offset,
        sequence=sequence,
        row=row,
        role=role,
        target=target,
        good=(role == Role.POSITIVE) | (target >= 0.5),
        pairs=torch.stack([pairs - 1, pairs], 1),
        example=torch.arange(rows),
        kind=torch.full((rows,), list(Kind).index(kind)),
        columns={},
    )


def shown(arm: str, lakes: Sequence[Lake], negative: str) -> Batch:
    """What every net of an arm learns from: the shorter route of its map, and the worse trajectory if it takes one."""
    roles = [Role.POSITIVE, Role.NEGATIVE] if arm not in ("sft", "ift") else [Role.POSITIVE]
    parts = [
        (lake, lake.routes[0] if role is Role.POSITIVE else lake.negative(negative), row, role)
        for row, lake in enumerate(lakes)
        for role in roles
    ]
    longest = max(len(actions) for _, actions, _, _ in parts)

    def padded(values: list[int]) -> list[int]:
        return values + [0] * (longest - len(values))

    return as_batch(
        torch.tensor([padded(lake.visited(actions)) for lake, actions, _, _ in parts]),
        torch.tensor([padded(actions) for _, actions, _, _ in parts]),
        torch.tensor([len(actions) for _, actions, _, _ in parts]),
        torch.tensor([row for _, _, row, _ in parts]),
        torch.tensor([int(role) for _, _, _, role in parts]),
        torch.tensor([float(role is Role.POSITIVE) if arm == "uft" else math.nan for _, _, _, role in parts]),
    )


def sampled(nets: Nets, lakes: Sequence[Lake], generator: torch.Generator) -> Batch:
    """GROUP trajectories of every net's own, until the gift, a hole or MAX_MOVES steps; reward 1 for the gift."""
    policy, net = nets.policy().detach(), torch.arange(len(lakes)).repeat_interleave(GROUP)
    gifts = torch.tensor([lake.gift for lake in lakes])[net]
    ice = torch.zeros(len(lakes), CELLS, dtype=torch.bool)
    for row, lake in enumerate(lakes):
        ice[row, list(lake.ice)] = True
    cell, going = torch.zeros_like(net), torch.ones_like(net, dtype=torch.bool)
    lengths, steps = torch.zeros_like(net), []
    for _ in range(MAX_MOVES):
        action = torch.multinomial(policy[net, cell], 1, generator=generator).squeeze(1)
        steps.append((cell, action))
        lengths = lengths + going
        cell = torch.where(going, MOVES[cell, action], cell)
        going = going & ice[net, cell]
        if not going.any():
            break
    cells, actions = (torch.stack(values, 1) for values in zip(*steps, strict=True))
    return as_batch(cells, actions, lengths, net, torch.full_like(net, Role.OWN), (cell == gifts).float())


# --- the study


def losses(objective: Objective, batch: Batch, nets: Forward, reference: Forward, context: StepContext) -> Tensor:
    """() the sum over the nets of each one's own loss: every net has as many units of a term as any other."""
    loss, rows = objective(batch, nets, reference, context), batch.example.numel()
    return torch.stack([rows * t.weight * t.total / t.count for t in loss.values() if t.weight]).sum()


@plain_dataclass(frozen=True)
class Measure:
    """Mean squared difference from the optimal policy at the design's cells."""

    target: Tensor  # (maps, 1, CELLS, X)
    where: Tensor  # (maps, CELLS) float64: 1 / number of cells, or 0
    table: str

    @classmethod
    def of(cls, design: Design, lakes: Sequence[Lake]) -> Measure:
        where = torch.zeros(len(lakes), CELLS, dtype=torch.float64)
        for row, lake in enumerate(lakes):
            route, other = lake.visited(lake.routes[0]), lake.visited(lake.negative(design.negative))
            cells = {"live": lake.distance, "route": route, "both": {*route, *other} & lake.ice}[design.cells]
            where[row, list(cells)] = 1 / len(cells)
        target = torch.from_numpy(np.stack([lake.optimal for lake in lakes])).unsqueeze(1)
        return cls(as_table(target, design.table), where, design.table)

    def __call__(self, nets: Nets, seeds: int) -> Tensor:
        """(rates, maps, seeds) distances."""
        policy = as_table(nets.policy().detach(), self.table)
        gap = policy.view(-1, len(self.where), seeds, *policy.shape[1:]) - self.target
        return (gap.square().mean(-1) * self.where.unsqueeze(1)).sum(-1)


def as_table(policy: Tensor, table: str) -> Tensor:
    """(.., CELLS, ACTIONS) as it is, or as probabilities of the cells that they lead to, (.., CELLS, CELLS)."""
    if table == "action":
        return policy
    to = torch.nn.functional.one_hot(MOVES, CELLS).to(policy.dtype)
    return torch.einsum("...sa,sat->...st", policy, to)


def learn(arm: str, design: Design, lakes: Sequence[Lake], measure: Measure) -> Tensor:
    """(maps, seeds) distances of an arm where the design stops."""
    best = design.stop == "best"
    rates, marks = (RATES, MARKS) if best else ((design.lr,), (int(design.stop),))
    rows = [lake for _ in rates for lake in lakes for _ in range(design.seeds)]
    nets = Nets.initial(design.seeds, len(rates) * len(lakes))
    reference = Nets(tuple(weight.detach().clone() for weight in nets.weights))
    squares = [torch.zeros_like(weight) for weight in nets.weights]
    rate = torch.tensor(rates, dtype=torch.float64).repeat_interleave(len(rows) // len(rates)).view(-1, 1, 1)
    objective, generator = make({"name": arm, **ARMS[arm]}), torch.Generator().manual_seed(0)
    batch, measured = shown(arm, rows, design.negative), list[Tensor]()
    for step in range(marks[-1]):
        batch = sampled(nets, rows, generator) if objective.needs.rollouts else batch
        loss = losses(objective, batch, nets, reference, StepContext(step, marks[-1]))
        gradients = torch.autograd.grad(loss, nets.weights)
        with torch.no_grad():
            for weight, gradient, square in zip(nets.weights, gradients, squares, strict=True):
                if design.optimiser == "sgd":
                    weight -= 10 * rate * gradient
                else:  # torch's RMSprop (alpha 0.99, eps 1e-8), every net at its own rate
                    square.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
                    weight -= rate * gradient / (square.sqrt() + 1e-8)
        if step + 1 in marks:
            measured.append(measure(nets, design.seeds))
    distances = torch.cat(measured)  # (stops and rates, maps, seeds)
    chosen = distances.mean(-1).argmin(0)
    return distances[chosen, torch.arange(len(lakes))]


def study(design: Design) -> dict[str, Tensor]:
    """(maps, seeds) float64 distance from the optimal policy by arm, that of the untrained nets first."""
    lakes = [Lake(text) for text in MAPS[: design.maps]]
    measure = Measure.of(design, lakes)
    untrained = measure(Nets.initial(design.seeds, len(lakes)), design.seeds)[0]
    return {"untrained": untrained} | {arm: learn(arm, design, lakes, measure) for arm in design.arms.split(",")}


def report(design: Design, found: dict[str, Tensor]) -> str:
    """A line for every arm, with what the figures are of."""
    settings = "  ".join(f"{key}={value}" for key, value in asdict(design).items() if key not in ("csv", "arms"))
    lines = [settings, "", f"{'':<10}  distance  sd over seeds  nearest  nearer than untrained"]
    means = {arm: values.mean(1) for arm, values in found.items()}
    trained_ones = torch.stack([mean for arm, mean in means.items() if arm != "untrained"])
    for arm, values in found.items():
        own = f"{arm:<10}  {values.mean():8.4f}  {stdev(values.mean(0).tolist()):13.4f}"
        nearest, nearer = means[arm] <= trained_ones.min(0).values, means[arm] < means["untrained"]
        maps = f"  {int(nearest.sum()):>4}/{design.maps}  {int(nearer.sum()):>19}/{design.maps}"
        lines.append(own if arm == "untrained" else own + maps)
    return "\n".join([*lines, "", PAPER])


def write_csv(file: Path, found: dict[str, Tensor]) -> None:
    """A line for every arm, map and seed."""
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(("arm", "map", "seed", "distance"))
        for arm, values in found.items():
            for text, of_map in zip(MAPS, values.tolist(), strict=False):
                writer.writerows((arm, text, seed, distance) for seed, distance in enumerate(of_map))
