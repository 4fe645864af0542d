"""Two policies small enough to differentiate exactly; what tests share is in toys.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for toys.py
from toys import Toy


@pytest.fixture
def policy():
    return Toy.random(0)


@pytest.fixture
def reference():
    return Toy.random(1)
