"""Hydra stays whole underneath: its options, overrides and search path."""

import pytest
import yaml

from uft.cli import main


def test_cfg_job_prints_and_does_nothing(worker, capsys):
    assert main(["train", "objective=dpo", "objective.beta=0.3", "--cfg", "job"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["objective"]["beta"] == 0.3
    assert printed["optim"]["lr"] == "${model.lr}"
    assert main(["train", "--cfg", "job", "--resolve", "--package", "optim"]) == 0
    assert "lr: 0.001" in capsys.readouterr().out
    assert list(worker.iterdir()) == []


@pytest.mark.parametrize("what", ["searchpath", "defaults", "plugins"])
def test_info(program, tmp_path, what):
    (tmp_path / "conf-user").mkdir()
    done = program("train", "--info", what, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = {"searchpath": "uft-user", "defaults": "objective/ift", "plugins": "UftSweeper"}[what]
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


def test_config_dir_adds_options(worker, capsys):
    (worker / "more" / "optim").mkdir(parents=True)
    (worker / "more" / "optim" / "mine.yaml").write_text("# my optimiser\nname: sgd\n")
    assert main(["config", "--config-dir", "more", "optim=mine"]) == 0
    assert "name: sgd" in capsys.readouterr().out
    assert main(["train", "--config-dir", "more", "optim=mien"]) == 2
    assert "did you mean  optim=mine ?" in capsys.readouterr().err
    assert main(["train", "--config-dir", "more", "--help"]) == 0
    assert "my optimiser" in capsys.readouterr().out
    assert main(["train", "--config-dir", "nowhere"]) == 2


def test_hydra_help(program, tmp_path):
    done = program("train", "--hydra-help", cwd=tmp_path)
    assert done.returncode == 0
    assert "Hydra" in done.stdout


def test_job_functions_can_be_sent_to_other_processes():
    import pickle

    from uft.cli import verbs

    for verb in verbs.PAGES:
        job = getattr(verbs, f"{verb}_job")
        assert pickle.loads(pickle.dumps(job)) is job


def test_failures_can_be_sent_between_processes():
    import pickle

    from uft.errors import Problem, UftError
    from uft.launch.launcher import JobFailed

    failure = pickle.loads(pickle.dumps(JobFailed(75, "stopped")))
    assert (failure.code, failure.message) == (75, "stopped")
    error = UftError(Problem("a", "b"), footer="f", code=2)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
