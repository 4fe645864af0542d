"""The objectives' schema without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from uft.config.parameters import parameters
from uft.config.schema import fields_of

ROOT = Path(__file__).resolve().parents[2]

SCHEMA = """
import sys
from uft.config.compose import compose
cfg = compose(["objective=dpo", "objective.beta=0.3"])
assert cfg["objective"]["beta"] == 0.3
heavy = [name for name in ("torch", "transformers", "datasets", "wandb") if name in sys.modules]
assert not heavy, heavy
left = [name for name in sys.modules if name.startswith("uft.objectives")]
assert not left, left
"""

AFTERWARDS = """
import torch
from uft.objectives import OBJECTIVES, make
from uft.objectives import ift
assert isinstance(ift.torch, type(torch)) and ift.torch is torch and ift.Tensor is torch.Tensor
assert make({"method": "ift", "lam": 0.5}).lam == 0.5
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_composition_needs_no_torch_and_the_real_modules_come_afterwards():
    run(SCHEMA + AFTERWARDS)


@pytest.mark.slow
def test_an_objective_that_needs_torch_as_it_is_imported_still_has_a_schema():
    run(
        "import sys\n"
        "import uft.environment as lazy\n"
        "lazy.TORCH = ('torch',)  # torch.nn.functional is now missing beside the stand-in\n" + SCHEMA.split("heavy")[0]
    )


def test_hyper_parameters_are_the_public_ones():
    assert "state" not in fields_of(parameters()["ift"])
    assert fields_of(parameters()["ift"])["lam"].default == 0.2
