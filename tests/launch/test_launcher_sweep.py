"""Multirun: all jobs checked first, each in its own folder and worker, every failure told of."""

import shlex

import yaml

from uft.cli import main
from uft.config.files import Request, make_loader
from uft.launch.names import sweep_name
from uft.launch.sweep import expand
from uft.launch.sweep_jobs import unique_names
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
    out = capsys.readouterr().out
    assert "all 4 jobs are done" in out
    assert "4 of 4 done: ift-seed2 finished at step 2" in out
    assert "worker train" not in out, "a job talks into its console.log"
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
    assert "killed by SIGKILL" in err
    assert "uft resume outputs/" in err
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


def test_jobs_with_other_settings_in_the_same_folder_are_refused_before_any_starts(worker, capsys):
    assert sweep("seed=choice(1)", "sweep.name=A", "train.log_every=3") == 0
    capsys.readouterr()
    assert sweep("seed=1,2", "sweep.name=A", "optim.lr=0.5") == 2
    err = capsys.readouterr().err
    assert "optim.lr" in err
    assert "0.001 -> 0.5" in err
    assert "1 of 2 jobs, the first is seed1" in err
    assert list(runs(worker)) == ["seed1"]


def test_what_a_worker_refuses_is_told_at_the_end(worker, capfd):
    assert sweep("generate.system=refuse,ok", "sweep.name=A") == 1
    out, err = capfd.readouterr()
    assert "1 of 2 jobs failed" in err
    assert "no rows that this objective can use" in err
    assert "did you mean  data=mix ?" in err
    assert list(runs(worker)) == ["systemok"]
    assert "0 of 2 done: systemrefuse failed" in out


def test_keys_of_some_objectives_come_with_the_commands_that_sweep_them(worker, capsys):
    words = ("objective=sft,dpo,ift,uft", "objective.beta=0.1,0.2", "objective.gamma=0.9", "generate.system=ok")
    assert sweep(*words) == 2
    err = capsys.readouterr().err
    commands = [shlex.split(line) for line in err.splitlines() if line.startswith("  uft train")]
    assert [command[3:6] for command in commands] == [
        ["tracking=none", "objective=sft", "generate.system=ok"],
        ["tracking=none", "objective=dpo,uft", "objective.beta=0.1,0.2"],
        ["tracking=none", "objective=ift", "objective.gamma=0.9"],
    ]
    assert {command[-1] for command in commands} == {"sweep.name=objective-beta"}
    assert main(commands[2][1:]) == 0
    assert [run.path.parent.name for run in runs(worker).values()] == ["objective-beta"]
    assert list(runs(worker)) == ["ift"]


def test_a_key_that_no_objective_has_is_a_typo_alone(worker, capsys):
    assert sweep("objective=sft,ift", "objective.bta=0.1,0.2") == 2
    assert "Sweep them apart" not in capsys.readouterr().err


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


def test_a_shipped_sweep_its_name_and_values_of_ones_own(worker, capsys):
    """The group `sweep` and the key `sweep.name` are two things; what is typed replaces an axis of the file."""
    words = ("train", "tracking=none", "sweep=beta_ratio", "objective=dpo", "data.unusable=drop")
    assert main([*words, "sweep.name=mine", "objective.beta=0.1,0.2", "data.ratio=0.5"]) == 0
    assert list(runs(worker)) == ["dpo-beta0.1-ratio0.5", "dpo-beta0.2-ratio0.5"]
    config = runs(worker)["dpo-beta0.2-ratio0.5"].config()
    assert (config["objective"]["beta"], config["sweep"]) == (0.2, {"name": "mine"})
    capsys.readouterr()
    assert main([*words, "objective.beta=0.1,0.2", "train.stps=3"]) == 2
    err = capsys.readouterr().err
    assert "uft: 1 problem" in err
    assert "did you mean  train.steps ?" in err


def test_a_key_of_a_file_that_is_typed_too_is_one_axis():
    """So the sweep keeps its name, and its jobs theirs, when a grid of a file is extended on the command line."""
    loader = make_loader(Request())
    file = ["objective.beta=0.1,0.2", "data.ratio=0.25,0.5", "sweep=beta_ratio"]
    jobs, axes = expand([*file, "objective.beta=0.3"], loader)
    assert axes == {"objective.beta": ["0.3"], "data.ratio": ["0.25", "0.5"]}
    assert jobs == [["objective.beta=0.3", f"data.ratio={ratio}", "sweep=beta_ratio"] for ratio in ("0.25", "0.5")]
    wider, _ = expand([*file, "objective.beta=0.3,0.4"], loader)
    assert unique_names(wider, list(axes), None)[:2] == unique_names(jobs, list(axes), None)
    name = sweep_name(list(axes), ["sweep=beta_ratio"])
    assert name.startswith("beta_ratio-")
    assert name == sweep_name(list(axes)[::-1], ["sweep=beta_ratio", "tracking=none", "sweep.name=x"])


def test_a_folder_of_hydras_own_key(worker):
    assert sweep("seed=1,2", "hydra.sweep.dir=here/it/is") == 0
    assert sorted(path.name for path in (worker / "here/it/is").iterdir()) == ["seed1", "seed2", "sweep.json"]


def test_hydras_own_sweeper_works_too(worker, capfd):
    assert sweep("hydra/sweeper=basic", "generate.system=ok,fail") == 1
    assert "exit code 1" in capfd.readouterr().err
    assert sorted(run.status for run in runs(worker).values()) == ["failed", "finished"]


def test_config_lists_the_jobs_and_shows_the_first(worker, capsys):
    assert main(["config", "sweep=beta_ratio", "objective.beta=0.1,0.2"]) == 0
    out = capsys.readouterr().out
    assert "# 6 jobs; below is the first one's configuration" in out
    assert "#   objective.beta=0.2 data.ratio=0.75" in out
    assert yaml.safe_load(out)["objective"]["beta"] == 0.1
    assert list(worker.iterdir()) == []


def test_other_verbs_can_be_swept(worker, capfd):
    assert main(["check", "-m", "model.path=a,b"]) == 0
    assert [line for line in capfd.readouterr().out.splitlines() if line.startswith(("a ", "b "))] == [
        "a None",
        "b None",
    ]
    assert [path.name for path in worker.iterdir()] == []
