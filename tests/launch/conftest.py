"""What tests of the launcher share with those of tracking."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tracking"))  # for standin.py
