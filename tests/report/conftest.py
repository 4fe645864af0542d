"""Synthetic runs, and the stand-in for the W&B server that tests/tracking has."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tracking")]  # synthetic.py, chromium.py; standin.py

from chromium import browser, mixed, page  # noqa: E402, F401
