"""Means between two metric lines, and their half-filled sums in a checkpoint."""

from __future__ import annotations

import torch

from uft.objectives.base import Term
from uft.training.trainer import Meter

CPU = torch.device("cpu")


def term(total: float, count: float) -> Term:
    return Term(torch.tensor(total), torch.tensor(count))


def test_a_mean_is_over_the_steps_that_had_units() -> None:
    meter = Meter()
    for total, count in ((6.0, 1), (8.0, 4), (0.0, 0)):
        meter.add_loss({"nll": term(total, count)})
    assert meter.means() == {"nll": 4.0}


def test_reading_starts_anew() -> None:
    meter = Meter()
    meter.add("loss", 3.0)
    meter.means()
    meter.add("loss", 5.0)
    assert meter.means() == {"loss": 5.0}
    assert meter.means() == {}


def test_what_was_never_counted_is_left_out() -> None:
    meter = Meter()
    meter.add_loss({"pair": term(0.0, 0), "nll": term(1.0, 2)})
    assert meter.means() == {"nll": 0.5}


def test_many_small_numbers_keep_their_digits() -> None:
    meter = Meter()
    for _ in range(100_000):
        meter.add("loss", torch.tensor(0.1))
    assert abs(meter.means()["loss"] - float(torch.tensor(0.1))) < 1e-12


def test_nothing_of_the_graph_is_kept() -> None:
    meter = Meter()
    meter.add("loss", torch.ones((), requires_grad=True) * 2)
    assert not meter.totals["loss"].requires_grad


def test_a_half_filled_meter_goes_on_after_a_checkpoint_in_the_same_order() -> None:
    straight = Meter()
    losses = [{"uft": term(0.1, 3), "a/b": term(0.7, 1), "accuracy": term(1.0, 2)}, {"uft": term(0.3, 1)}]
    straight.add("loss", 0.1)
    straight.add_loss(losses[0])
    state = straight.state_dict()
    resumed = Meter()
    resumed.load_state_dict(dict(sorted(state.items())), CPU)  # a file keeps an order of its own
    for meter in (straight, resumed):
        meter.add("loss", 0.2)
        meter.add_loss({**losses[0], **losses[1]})
    assert list(straight.means().items()) == list(resumed.means().items())
