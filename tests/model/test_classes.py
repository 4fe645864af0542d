import subprocess
import sys

LOADS = """
import sys
import torch
from transformers import utils
from uft.config.schema import Model
from uft.model.load import load_policy

there = utils.is_scipy_available()
load_policy(Model(name="playground", path="builtin:playground"), torch.device("cpu"), 0)
print(there, "scipy" in sys.modules, utils.is_scipy_available())
"""


def test_a_model_is_loaded_without_scipy_which_stays_there_for_others():
    done = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "True"]
