"""A W&B agent that runs `uft train` as docs/wandb_sweep.yaml says, against a stand-in for the server."""

from __future__ import annotations

import itertools
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from standin import KEY, PROJECT, Standin

from uft.cli import main
from uft.config.compose import examine
from uft.config.files import Request
from uft.runs import find_runs

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docs" / "wandb_sweep.yaml"
VALUES = {"objective.beta": 0.123, "data.ratio": 0.5}
SHIM = """#!{python}
import sys
from uft.launch import process
process.COMMAND = (sys.executable, {worker!r})
from uft.cli import main
sys.exit(main(sys.argv[1:]))
"""


class SweepServer(Standin):
    """Has one sweep, and asks the agent for one run of it."""

    def __init__(self) -> None:
        super().__init__()
        args = {key: {"value": value} for key, value in VALUES.items()}
        self.commands = iter([{"type": "run", "program": "uft", "run_id": "given", "args": args}])

    def sweep(self, v: dict) -> dict:
        found = {"id": "sweep-id", "name": "swp", "config": FILE.read_text(), "state": "RUNNING", "method": "bayes"}
        empty = ("bestLoss", "controller", "scheduler", "description", "displayName", "createdAt", "heartbeatAt")
        found |= dict.fromkeys(empty) | {"updatedAt": None, "earlyStopJobRunning": False}
        return {"project": {**PROJECT, "sweep": {**found, "runs": {"edges": []}, "runCount": 0}}}

    on_Sweep = on_SweepWithRuns = on_GetSweeps = on_SweepState = sweep

    def on_CreateAgent(self, v: dict) -> dict:
        return {"createAgent": {"agent": {"id": "agent"}}}

    def on_Heartbeat(self, v: dict) -> dict:
        commands = list(itertools.islice(self.commands, 1))
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}


@pytest.fixture
def sweep_server(monkeypatch):
    server = SweepServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield server
    server.close()


def test_every_parameter_is_a_key_and_every_value_fits(tmp_path):
    sweep = yaml.safe_load(FILE.read_text())
    words = [word for word in sweep["command"][3:] if not word.startswith("${")]
    for key, space in sweep["parameters"].items():
        for value in space.get("values", [space.get("min"), space.get("max")]):
            assert examine(Request((*words, f"{key}={value}"))).problems == []


@pytest.mark.slow
def test_an_agent_runs_what_the_file_says(sweep_server, tmp_path, monkeypatch):
    shim = tmp_path / "bin" / "uft"
    shim.parent.mkdir()
    shim.write_text(SHIM.format(python=sys.executable, worker=str(ROOT / "tests" / "launch" / "fake_worker.py")))
    shim.chmod(shim.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(shim.parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "wandb", "agent", "--count", "1", "tester/uft/swp"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    runs = find_runs(tmp_path / "outputs")
    assert len(runs) == 1, done.stdout + done.stderr
    config = runs[0].config()
    assert (config["objective"]["name"], config["objective"]["beta"]) == ("uft", 0.123)
    assert config["data"]["ratio"] == 0.5
    agent = json.loads((runs[0].path / "wandb.json").read_text())
    assert agent["WANDB_SWEEP_ID"] == "swp"
    assert agent["WANDB_RUN_ID"] == "given"
    assert (agent["WANDB_ENTITY"], agent["WANDB_PROJECT"]) == ("tester", "uft")


def test_several_runs_for_one_of_an_agents_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SWEEP_ID", "swp")
    assert main(["train", "-m", "seed=1,2"]) == 2
    assert "a W&B agent asks for one run at a time" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
