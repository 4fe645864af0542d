"""Views: what an objective uses of a row.

Every objective sees the same rows in the same order; a view says which completions it takes, in which role, and with
which explicit reward. A view is a pure function of the row and of how often the row was visited before, and looks at no
text: rows whose completions have the same feedback look alike (`uft.data.many.alike`). It returns `None` when the
objective cannot use such a row at all (the run stops before step 0), and an empty tuple when the method by its own rule
takes nothing from this one (a bad completion under supervised fine-tuning).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from uft.data.rows import Row


class Role(IntEnum):
    """On which side of the loss a completion stands."""

    POSITIVE = 1
    NEGATIVE = 0


@dataclass(frozen=True, slots=True)
class Part:
    """One completion of a row, as an objective uses it."""

    completion: int  # index into row.completions
    role: Role = Role.POSITIVE
    target: float = math.nan  # explicit reward in [0, 1]; NaN: none


Parts = tuple[Part, ...]
View = Callable[[Row, int], Parts | None]  # (row, how often it was visited before) -> parts
