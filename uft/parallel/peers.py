"""What the processes of a run hear of each other past everything that may hang: that they live, and that they end.

Through connections of their own to the store where torch's launcher lets processes meet.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from uft.parallel.environment import launched, rank

if TYPE_CHECKING:
    from torch.distributed import TCPStore

SIGNS, ENDING = "uft/signs-of-life", "uft/ending"


class Peers:
    """The other processes, if there are any. One that waits for another lives as long as that one does."""

    def __init__(self) -> None:
        self.mine = 0  # signs of life of this process
        self.heard = 0  # of all together, a tick or two ago

    def talk(self, over: threading.Event, tick: float) -> None:
        """Tell of one's own signs and hear of all, every `tick` seconds until it is over or nobody answers.

        In a thread of its own, for it may wait for an answer that never comes.
        """
        with suppress(RuntimeError):  # of torch: whoever keeps the store has ended
            store, told = _store(), 0
            while not over.wait(tick):
                now = self.mine
                self.heard = store.add(SIGNS, now - told)
                told = now

    def end_together(self) -> None:
        """Wait until all processes have come here. The first one goes first, lest it hear of another's end."""
        if launched() == 1:
            return
        with suppress(RuntimeError):
            store = _store()
            store.add(ENDING, 1)
            while store.add(ENDING, 0) < launched():
                time.sleep(0.1)
        if rank():
            time.sleep(1)


def _store() -> TCPStore:
    from torch.distributed import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
