"""Multirun: all jobs checked first, each in its own folder and worker, every failure told of."""

import yaml

from uft.cli import main
from uft.runs import find_runs

BASE = ("train", "-m", "tracking=none")


def sweep(*words):
    return main([*BASE, *words])


def runs(folder):
    return {run.name: run for run in find_runs(folder / "outputs")}


def test_each_job_has_its_folder(worker, capsys):
    assert sweep("objective=sft,ift", "seed=1,2", "train.log_every=7") == 0
    found = runs(worker)
    assert list(found) == ["ift-seed1", "ift-seed2", "sft-seed1", "sft-seed2"]
    (folder,) = {run.path.parent for run in found.values()}
    assert folder.name.startswith("objective-seed-")
    config = found["ift-seed2"].config()
    assert (config["objective"]["name"], config["seed"], config["sweep"]["name"]) == ("ift", 2, folder.name)
    overrides = yaml.safe_load((found["ift-seed2"].path / "overrides.yaml").read_text())
    assert set(overrides) == {"tracking=none", "objective=ift", "seed=2", "train.log_every=7"}
    assert "all 4 jobs are done" in capsys.readouterr().out
    assert [path.name for path in worker.iterdir()] == ["outputs"], "Hydra leaves no files"


def test_a_rerun_skips_what_is_finished_and_does_what_is_new(worker):
    assert sweep("seed=choice(1)", "sweep.name=A", "tracking.mode=disabled") == 0
    assert sweep("seed=1,2", "sweep.name=A", "tracking.mode=offline") == 0
    assert {name: (run.path / "sittings").read_text() for name, run in runs(worker).items()} == {
        "seed1": "ok\n",
        "seed2": "ok\n",
    }


def test_one_failure_does_not_stop_the_others_and_all_are_listed(worker, capfd):
    assert sweep("generate.system=fail,ok,die", "sweep.name=A") == 1
    err = capfd.readouterr().err
    assert "2 of 3 jobs failed" in err
    assert "ValueError: it broke" in err
    assert "outputs/" in err
    assert "exit code 1" in err
    assert {name: run.status for name, run in runs(worker).items()} == {
        "systemdie": "interrupted",
        "systemfail": "failed",
        "systemok": "finished",
    }


def test_all_jobs_are_checked_before_the_first_starts(worker, capsys):
    assert sweep("objective=sft,dpo", "objective.beta=0.1", "data.ratio=0.5,2", "+nope=1") == 2
    err = capsys.readouterr().err
    assert "uft: 3 problems in this request" in err
    assert "in 2 of 4 jobs, the first is  objective=sft data.ratio=0.5" in err
    assert "no such key in objective=sft" in err
    assert "data.ratio=2.0" in err
    assert "must be at most 1" in err
    assert "in 2 of 4 jobs, the first is  objective=sft data.ratio=2" in err
    assert "+nope=1" in err
    assert not (worker / "outputs").exists()


def test_a_typo_in_a_fixed_key_is_found_too(worker, capsys):
    assert sweep("objective=sft,ift", "train.stps=3") == 2
    assert "did you mean  train.steps ?" in capsys.readouterr().err


def test_bad_rows_of_any_job_stop_the_sweep(worker, capsys):
    (worker / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    words = ("data=files", "+data.sources.a.path=bad.jsonl,missing.jsonl", "data.holdout=0")
    assert sweep(*words) == 2
    err = capsys.readouterr().err
    assert "bad.jsonl:2" in err
    assert "missing.jsonl" in err
    assert not (worker / "outputs").exists()


def test_one_folder_for_several_jobs_is_refused(worker, capsys):
    assert sweep("seed=1,2", "run.dir=x") == 2
    assert "sweep.name=" in capsys.readouterr().err
    assert sweep("run.dir=x") == 0


def test_a_name_for_all_runs_stands_before_their_own(worker):
    assert sweep("seed=1,2", "run.name=mine") == 0
    assert list(runs(worker)) == ["mine-seed1", "mine-seed2"]


def test_axes_can_come_from_a_file(worker):
    folder = worker / "conf-user" / "experiment"
    folder.mkdir(parents=True)
    (folder / "betas.yaml").write_text(
        "# @package _global_\n# betas\ndefaults:\n  - override /objective: dpo\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      objective.beta: 0.1,0.2\n"
    )
    assert main(["train", "tracking=none", "experiment=betas"]) == 0
    assert list(runs(worker)) == ["beta0.1", "beta0.2"]


def test_hydras_own_sweeper_works_too(worker, capfd):
    assert sweep("hydra/sweeper=basic", "generate.system=ok,fail") == 1
    assert "exit code 1" in capfd.readouterr().err
    assert sorted(run.status for run in runs(worker).values()) == ["failed", "finished"]


def test_other_verbs_can_be_swept(worker, capfd):
    assert main(["check", "-m", "model.path=a,b"]) == 0
    assert [line for line in capfd.readouterr().out.splitlines() if line.startswith(("a ", "b "))] == [
        "a None",
        "b None",
    ]
    assert [path.name for path in worker.iterdir()] == []
