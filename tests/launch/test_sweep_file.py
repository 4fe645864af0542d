"""What a sweep was asked for is written down, and grows."""

import json
import sys
from pathlib import Path

import pytest

from uft.launch.sweep_file import continuing, record
from uft.launch.sweep_jobs import Job
from uft.runs import create_run, find_sweeps, planned, waiting


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """ask(words, axes, *names): as if `uft train WORDS` had planned these jobs; what the file says then."""
    monkeypatch.chdir(tmp_path)

    def ask(words, axes, *names):
        monkeypatch.setattr(sys, "argv", ["uft train", *words.split()])
        record(Path("S"), [Job((f"name={name}",), Path("S") / name) for name in names], axes)
        return json.loads(Path("S/sweep.json").read_text())

    return ask


def test_commands_axes_and_jobs(ask, tmp_path):
    found = ask("-m seed=1,2 sweep.name=S", {"seed": ["1", "2"]}, "seed1", "seed2")
    assert (found["format"], found["name"], found["axes"]) == (1, "S", {"seed": ["1", "2"]})
    (command,) = found["commands"]
    assert (command["words"], command["cwd"]) == (["-m", "seed=1,2", "sweep.name=S"], str(tmp_path))
    assert [job["name"] for job in found["jobs"]] == ["seed1", "seed2"]
    assert found["jobs"][0]["overrides"] == ["name=seed1"]


def test_a_sweep_grows_and_forgets_nothing(ask):
    first = ask("-m seed=1,2", {"seed": ["1", "2"]}, "seed1", "seed2")
    ask("-m seed=2,3", {"seed": ["2", "3"]}, "seed2", "seed3")
    ask("-m lr=1", {"lr": ["1"]}, "lr1")
    found = ask("-m seed=1,2", {"seed": ["1", "2"]}, "seed1", "seed2")
    assert found["axes"] == {"seed": ["1", "2", "3"], "lr": ["1"]}
    assert [job["name"] for job in found["jobs"]] == ["seed1", "seed2", "seed3", "lr1"]
    assert found["jobs"][0] == first["jobs"][0]
    assert [command["words"][1] for command in found["commands"]] == ["seed=2,3", "lr=1", "seed=1,2"]
    assert found["made"] == first["made"]


def test_what_resume_does_is_no_new_request(ask, tmp_path):
    ask("-m seed=1,2", {"seed": ["1"]}, "seed1")
    with continuing(Path("S")) as commands:
        assert commands == [(["-m", "seed=1,2"], tmp_path)]
        found = ask("-m seed=1,2 tracking.mode=offline hydra.sweep.dir=S", {"seed": ["1"]}, "seed1")
    assert len(found["commands"]) == 1
    assert len(ask("-m seed=3", {"seed": ["3"]}, "seed3")["commands"]) == 2


def test_jobs_that_have_not_started_are_known(ask, tmp_path):
    ask("-m seed=1,2", {"seed": ["1", "2"]}, "seed1", "seed2")
    create_run(tmp_path / "S" / "seed1", "{}\n", [])
    assert find_sweeps(tmp_path) == [tmp_path / "S"]
    assert [run.name for run in planned(tmp_path / "S")] == ["seed1", "seed2"]
    assert [run.path for run in waiting(tmp_path)] == [tmp_path / "S" / "seed2"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"jobs": 3}', '{"jobs": [{}]}'])
def test_a_damaged_file_plans_nothing(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    assert waiting(tmp_path) == []
