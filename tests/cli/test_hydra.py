"""Hydra stays whole underneath: its options, overrides and search path."""

import pickle
import re
import shlex

import pytest
import yaml

from uft.cli import main
from uft.errors import Problem, UftError
from uft.launch.launcher import JobFailed
from uft.runs import find_runs


def test_cfg_job_prints_and_does_nothing(worker, capsys):
    assert main(["train", "objective=dpo", "objective.beta=0.3", "--cfg", "job"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["objective"]["beta"] == 0.3
    assert printed["optim"]["lr"] == "${model.lr}"
    assert main(["train", "--cfg", "job", "--resolve", "--package", "optim"]) == 0
    assert "lr: 0.001" in capsys.readouterr().out
    assert list(worker.iterdir()) == []


@pytest.mark.slow
def test_info_and_hydras_help(program, tmp_path):
    (tmp_path / "conf-user").mkdir()
    asked = {"searchpath": "uft-user", "defaults": "objective/ift", "plugins": "UftSweeper"}
    for words, expected in (*((("--info", what), says) for what, says in asked.items()), (("--hydra-help",), "Hydra")):
        done = program("train", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["conf-user"]


def test_user_folders_and_a_primary_config_of_ones_own(worker, capsys):
    folder = worker / "conf-user"
    (folder / "optim").mkdir(parents=True)
    (folder / "optim" / "mine.yaml").write_text("# mine\nname: sgd\nlr: 0.125\n")
    (folder / "paper.yaml").write_text("# all of it\ndefaults:\n  - config\n  - _self_\nseed: 11\n")
    assert main(["train", "-cn", "paper", "optim=mine", "--cfg", "job"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["seed"], printed["optim"]["lr"]) == (11, 0.125)
    assert main(["config", "-cn", "paper", "optim=mine"]) == 0
    out = capsys.readouterr().out
    assert "# conf-user/paper.yaml:5" in out
    assert "# conf-user/optim/mine.yaml:3" in out


@pytest.mark.slow
def test_config_dir_adds_options(worker, capsys):
    (worker / "more" / "optim").mkdir(parents=True)
    (worker / "more" / "optim" / "mine.yaml").write_text("# my optimiser\nname: sgd\n")
    assert main(["train", "--config-dir", "more", "optim=mien"]) == 2
    assert "did you mean  optim=mine ?" in capsys.readouterr().err
    assert main(["train", "--config-dir", "more", "--help"]) == 0
    assert "my optimiser" in capsys.readouterr().out
    assert main(["train", "optim=mine", "--config-dir", "more", "train.stps=3"]) == 2
    (command,) = re.findall(r"See what would run:  uft (.*)", capsys.readouterr().err)
    assert main(shlex.split(command)) == 0, "the command that is advised finds the same files"
    assert "name: sgd" in capsys.readouterr().out


@pytest.mark.slow
def test_options_stand_anywhere(worker, capsys):
    assert main(["train", "objective=dpo", "--cfg", "job", "seed=7", "-p", "objective", "objective.beta=0.3"]) == 0
    assert "beta: 0.3\n" in capsys.readouterr().out
    assert main(["train", "objective=sft", "-m", "seed=1,2", "tracking=none", "sweep.name=s"]) == 0
    assert sorted(run.name for run in find_runs(worker / "outputs")) == ["sft-seed1", "sft-seed2"]


def test_failures_can_be_sent_between_processes():
    failure = pickle.loads(pickle.dumps(JobFailed(75, "stopped")))
    assert (failure.code, failure.message) == (75, "stopped")
    error = UftError(Problem("a", "b"), footer="f", code=2)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
