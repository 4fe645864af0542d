"""Meter: what happened since the last metric line, summed on the device and brought to the host only when asked."""

from __future__ import annotations

import torch

from uft.objectives.base import Loss

Tensor = torch.Tensor


class Meter:
    """Means over steps. Its tensors are part of the checkpoint: a resumed curve repeats every digit."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        total, count = torch.as_tensor(total).detach().double(), torch.as_tensor(count).detach().double()
        # taken out and put in again: the order is that of the last step, so that a resumed meter has it too
        self.totals[name] = self.totals.pop(name) + total if name in self.totals else total
        self.counts[name] = self.counts.pop(name) + count if name in self.counts else count

    def add_loss(self, loss: Loss) -> None:
        """Each term's mean in this step; a step in which it has no units does not count for it."""
        for name, term in loss.items():
            self.add(name, term.total / term.count.clamp(min=1), term.count > 0)

    def means(self) -> dict[str, float]:
        """total / count of everything that was counted at all; then start anew."""
        totals = {name: float(total) for name, total in self.totals.items()}
        counts = {name: float(count) for name, count in self.counts.items()}
        self.totals, self.counts = {}, {}
        return {name: total / counts[name] for name, total in totals.items() if counts[name] > 0}

    def copy(self) -> Meter:
        """As it is now: what it holds is replaced, never changed."""
        copied = Meter()
        copied.totals, copied.counts = dict(self.totals), dict(self.counts)
        return copied

    def state_dict(self) -> dict[str, Tensor]:
        totals = {f"totals/{name}": total.cpu() for name, total in self.totals.items()}
        return totals | {f"counts/{name}": count.cpu() for name, count in self.counts.items()}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device) -> None:
        for key, value in state.items():
            part, _, name = key.partition("/")
            getattr(self, part)[name] = value.to(device)
