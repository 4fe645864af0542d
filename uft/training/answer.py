"""Answer: a yes or no that a device works out, to be asked for without waiting for what it does afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Answer:
    """`value`: () bool on a device. On a GPU its copy to the host is under way from the start; who asks for it later
    waits for that copy, not for the work that was queued behind it."""

    value: Tensor
    copied: Tensor = field(init=False)
    arrived: torch.cuda.Event | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        copied, arrived = self.value, None
        if self.value.is_cuda:
            copied = torch.empty_like(self.value, device="cpu", pin_memory=True)
            copied.copy_(self.value, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        object.__setattr__(self, "copied", copied)
        object.__setattr__(self, "arrived", arrived)

    def __bool__(self) -> bool:
        if self.arrived is not None:
            self.arrived.synchronize()
        return bool(self.copied)


YES = Answer(torch.ones((), dtype=torch.bool))
