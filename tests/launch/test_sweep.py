"""Multirun: all jobs checked first, each in its own folder and worker, every failure told, and the sweep can go on."""

import json
import shlex
import sys
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from omegaconf import OmegaConf

from uft.cli import main
from uft.config.compose import Examined, examine
from uft.config.files import Request, make_loader
from uft.errors import UftError
from uft.launch.launcher import row_problems
from uft.launch.sweep import Job, Sweep, examine_jobs, expand, job_names, record_sweep, resuming, sweep_dir, sweep_name
from uft.runs import create_run, find_runs, find_sweeps, planned, waiting, write_json

NOW = datetime(2026, 11, 21, 9, 8, 7)


def sweep(*words):
    return main(["train", "-m", "tracking=none", *words])


def runs(folder):
    return {run.name: run for run in find_runs(folder / "outputs")}


@pytest.mark.slow
def test_each_job_has_its_folder(worker, capsys):
    assert sweep("objective=sft,ift", "seed=choice(2)", "train.log_every=7") == 0
    found = runs(worker)
    assert list(found) == ["ift-seed2", "sft-seed2"]
    (folder,) = {run.path.parent for run in found.values()}
    assert folder.name.startswith("objective-seed-")
    config = found["ift-seed2"].config()
    assert (config["objective"]["name"], config["seed"], config["sweep"]["name"]) == ("ift", 2, folder.name)
    assert found["ift-seed2"].info()["sweep"] == folder.name
    assert set(found["ift-seed2"].overrides()) == {"tracking=none", "objective=ift", "seed=2", "train.log_every=7"}
    out = capsys.readouterr().out
    assert "all 2 jobs are done" in out
    assert "2 of 2 done: ift-seed2 finished at step 2" in out
    assert "worker train" not in out, "a job talks into its console.log"
    assert [path.name for path in worker.iterdir()] == ["outputs"], "Hydra leaves no files"


def test_a_rerun_skips_what_is_finished_does_what_is_new_and_refuses_other_settings(worker, capsys):
    assert sweep("seed=choice(1)", "sweep.name=A", "tracking.mode=disabled") == 0
    capsys.readouterr()
    assert sweep("seed=1,2", "sweep.name=A", "optim.lr=0.5") == 2
    err = capsys.readouterr().err
    assert all(part in err for part in ("optim.lr", "0.001 -> 0.5", "1 of 2 jobs, the first is seed1"))
    assert list(runs(worker)) == ["seed1"]
    assert sweep("seed=1,2", "sweep.name=A", "tracking.mode=offline") == 0
    sittings = {name: (run.path / "sittings").read_text() for name, run in runs(worker).items()}
    assert sittings == {"seed1": "ok\n", "seed2": "ok\n"}


@pytest.mark.slow
def test_failures_and_refusals_of_workers_do_not_stop_the_others_and_all_are_listed(worker, capfd):
    assert sweep("generate.system=fail,ok,die,refuse", "sweep.name=A") == 1
    out, err = capfd.readouterr()
    for said in (
        "3 of 4 jobs failed",
        "ValueError: it broke",
        "killed by SIGKILL",
        "no rows that this objective can use",
        "did you mean  data=mix ?",
        "uft resume outputs/",
    ):
        assert said in err
    assert "1 of 4 done: systemrefuse failed" in out
    found = {name: run.status for name, run in runs(worker).items()}
    assert found == {"systemdie": "interrupted", "systemfail": "failed", "systemok": "finished"}


class UncompletedJobError(RuntimeError):
    """What submitit raises where a job was killed."""


@pytest.mark.parametrize("error", [UncompletedJobError("Job 7 (slurm) has no output\nmore"), BrokenProcessPool("gone")])
def test_a_job_that_the_launcher_lost_is_told_and_the_others_count(tmp_path, error):
    def launch(jobs, initial_job_idx):
        write_json(create_run(tmp_path / "one", "{}\n", []).path / "result.json", {"status": "finished"})
        raise error

    jobs = [Job((f"seed={name}",), tmp_path / name) for name in ("one", "two")]
    sweep = Sweep(OmegaConf.create({}), (), {}, SimpleNamespace(launch=launch))
    assert sweep.launch(jobs) == []
    assert {job.folder.name: (failure.code, failure.message) for job, failure in sweep.failed.items()} == {
        "two": (1, f"the launcher lost a job: {' '.join(str(error).split())}")
    }


@pytest.mark.slow
def test_the_reason_of_a_failed_job_stands_wherever_jobs_are_listed(worker, capsys):
    """Not the line that only counts its problems: in the table, the report, `uft ls` and `uft compare`."""
    assert sweep("generate.system=ok,late_refusal", "sweep.name=A") == 1
    out, err = capsys.readouterr()
    assert "1 of 2 done: systemlate_refusal failed at step 2, data.x  no rows left" in out
    assert "systemlate_refusal  failed        2            data.x  no rows left" in out
    assert "  systemlate_refusal\n      data.x  no rows left\n" in err
    (folder,) = worker.glob("outputs/*/A")
    for verb in ("ls", "compare"):
        assert main([verb, str(folder)]) == 0
        out = capsys.readouterr().out
        assert "data.x  no rows left" in out
        assert "problems in this request" not in out


def test_all_jobs_are_checked_before_the_first_starts(worker, capsys):
    """Their settings and their rows, with every problem told once, and nothing is left in the folder."""
    assert sweep("objective=sft,dpo", "objective.beta=0.1", "data.ratio=0.5,2", "train.stps=1", "run.dir=x") == 2
    err = capsys.readouterr().err
    for said in (
        "uft: 4 problems in this request",
        "in 2 of 4 jobs, the first is  objective=sft data.ratio=0.5",
        "no such key in objective=sft",
        "data.ratio=2.0",
        "must be at most 1",
        "in 2 of 4 jobs, the first is  objective=sft data.ratio=2",
        "did you mean  train.steps ?",
        "one folder for 4 jobs",
    ):
        assert said in err
    assert list(worker.iterdir()) == []
    (worker / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    assert sweep("data=files", "+data.sources.a.path=bad.jsonl,missing.jsonl", "data.holdout=0") == 2
    err = capsys.readouterr().err
    for said in ("uft: 2 problems", "bad.jsonl:2", "missing.jsonl", "data.bad_rows=drop"):
        assert said in err
    assert not (worker / "outputs").exists()


@pytest.mark.slow
def test_keys_of_some_objectives_come_with_the_commands_that_sweep_them(worker):
    words = ("objective=sft,dpo,ift,uft", "objective.beta=0.1,0.2", "objective.gamma=0.9", "generate.system=ok")
    _, footer = examine_jobs(Request(words), make_loader(Request()))
    commands = [shlex.split(line) for line in footer.splitlines() if line.startswith("  uft train")]
    assert [command[3:6] for command in commands] == [
        ["objective=sft", "generate.system=ok", "sweep.name=objective-beta"],
        ["objective=dpo,uft", "objective.beta=0.1,0.2", "generate.system=ok"],
        ["objective=ift", "objective.gamma=0.9", "generate.system=ok"],
    ]
    assert {command[-1] for command in commands} == {"sweep.name=objective-beta"}
    assert main([*commands[2][1:], "tracking=none"]) == 0
    assert [run.path.parent.name for run in runs(worker).values()] == ["objective-beta"]
    assert list(runs(worker)) == ["ift"]
    _, footer = examine_jobs(Request(("objective=sft,ift", "objective.bta=0.1")), make_loader(Request()))
    assert "Sweep them apart" not in footer, "a key that no objective has is a typo"


def test_an_interval_is_for_a_search(worker, capsys):
    assert sweep("optim.lr=interval(0,1)") == 2
    assert "hydra/sweeper=uft_optuna" in capsys.readouterr().err


def test_values_that_are_none_or_twice_there_are_no_axis(worker, capsys):
    for words, why in (("seed=range(0)", "names no value"), ("seed=1,1", "names a value twice")):
        assert sweep(words) == 2
        assert f"{words}  {why}" in capsys.readouterr().err


def test_the_rows_of_a_mixture_are_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = []
    monkeypatch.setattr("uft.data.sources.load_sources", lambda data: read.append(data.sources["a"].path) or [])
    jobs = [
        Examined(
            {"seed": seed, "data": {"name": "d", "ratio": ratio, "sources": {"a": {"path": path, "share": share}}}}
        )
        for path, ratio, share, seed in product(("x.jsonl", "y.jsonl"), (None, 0.5), (None, 2.0), (1, 2))
    ]
    row_problems(jobs, refused=False)
    row_problems(jobs[:1], refused=False)
    assert read == ["x.jsonl", "y.jsonl"]


def test_the_configuration_of_a_sweep_is_shown_without_its_rows(capsys):
    words = ["-m", "objective=ift", "data=missing.jsonl", "seed=1,2"]
    assert main(["config", *words]) == 0
    assert "2 jobs" in capsys.readouterr().out
    assert main(["train", *words]) == 2


@pytest.mark.slow
def test_hydras_own_folder_and_a_name_for_all_runs_stands_before_their_own(worker):
    assert sweep("seed=1,2", "hydra.sweep.dir=here/it/is", "run.name=mine") == 0
    assert sorted(path.name for path in (worker / "here/it/is").iterdir()) == ["mine-seed1", "mine-seed2", "sweep.json"]


@pytest.mark.slow
def test_a_shipped_sweep_its_name_and_values_of_ones_own(worker, capsys):
    """The group `sweep` and the key `sweep.name` are two things; what is typed replaces an axis of the file."""
    words = ("train", "tracking=none", "sweep=beta_ratio", "objective=dpo", "data.unusable=drop")
    assert main([*words, "sweep.name=mine", "objective.beta=0.2", "data.ratio=0.5"]) == 0
    assert list(runs(worker)) == ["dpo-beta0.2-ratio0.5"]
    config = runs(worker)["dpo-beta0.2-ratio0.5"].config()
    assert (config["objective"]["beta"], config["sweep"]) == (0.2, {"name": "mine"})
    assert main([*words, "objective.beta=0.1", "data.ratio=0.5", "train.stps=3"]) == 2
    err = capsys.readouterr().err
    assert "uft: 1 problem" in err
    assert "did you mean  train.steps ?" in err


@pytest.mark.slow
def test_hydras_own_sweeper_works_too(worker, capfd):
    assert sweep("hydra/sweeper=basic", "generate.system=ok,fail") == 1
    assert "exit code 1" in capfd.readouterr().err
    assert sorted(run.status for run in runs(worker).values()) == ["failed", "finished"]


@pytest.mark.slow
def test_other_verbs_can_be_swept_by_a_file_too(worker, capfd):
    """`config` lists the jobs and shows the first."""
    folder = worker / "conf-user" / "experiment"
    folder.mkdir(parents=True)
    (folder / "betas.yaml").write_text(
        "# @package _global_\n# betas\ndefaults:\n  - override /objective: dpo\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      objective.beta: 0.3,0.2\n"
    )
    assert main(["config", "experiment=betas", "data.ratio=0.75,1"]) == 0
    out = capfd.readouterr().out
    assert "# 4 jobs; below is the first one's configuration" in out
    assert "#   objective.beta=0.2 data.ratio=0.75" in out
    assert yaml.safe_load(out)["objective"]["beta"] == 0.3
    assert main(["check", "-m", "model.path=a,b"]) == 0
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith(("a ", "b "))]
    assert said == ["a None", "b None"]
    assert list(worker.iterdir()) == [worker / "conf-user"]


# --- names


def test_a_key_of_a_file_that_is_typed_too_is_one_axis():
    """So the sweep keeps its name, and its jobs theirs, when a grid of a file is extended on the command line."""
    loader = make_loader(Request())
    file = ["objective.beta=0.1,0.2", "data.ratio=0.25,0.5", "sweep=beta_ratio"]
    jobs, axes = expand([*file, "objective.beta=0.3"], loader)
    assert axes == {"objective.beta": ["0.3"], "data.ratio": ["0.25", "0.5"]}
    assert jobs == [["objective.beta=0.3", f"data.ratio={ratio}", "sweep=beta_ratio"] for ratio in ("0.25", "0.5")]
    wider, _ = expand([*file, "objective.beta=0.3,0.4"], loader)
    assert job_names(wider, list(axes))[:2] == job_names(jobs, list(axes)) == ["beta0.3-ratio0.25", "beta0.3-ratio0.5"]
    name = sweep_name(list(axes), ["sweep=beta_ratio"])
    assert name.startswith("beta_ratio-")
    assert name == sweep_name(list(axes)[::-1], ["sweep=beta_ratio", "tracking=none", "sweep.name=x"])


def test_an_arm_is_a_row_of_settings_which_typed_keys_replace():
    loader, arms = make_loader(Request()), {"a": "objective=sft optim.lr=0.1", "b": "objective=dpo data=pairs"}
    jobs, axes = expand(["seed=1,2", "sweep=playground"], loader, arms)
    assert axes == {"arm": ["a", "b"], "seed": ["1", "2"]}
    assert jobs[0] == ["objective=sft", "optim.lr=0.1", "arm=a", "seed=1", "sweep=playground"]
    assert jobs[3] == ["objective=dpo", "data=pairs", "arm=b", "seed=2", "sweep=playground"]
    assert job_names(jobs, list(axes)) == ["a-seed1", "a-seed2", "b-seed1", "b-seed2"]
    assert expand(["arm=a", "optim.lr=3,4"], loader, arms) == (
        [["objective=sft", f"optim.lr={rate}", "arm=a"] for rate in (3, 4)],
        {"arm": ["a"], "optim.lr": ["3", "4"]},
    )
    for words, table, why in ((["arm=a,c"], arms, "no such arm"), (["arm=a"], {}, "no table of arms")):
        with pytest.raises(UftError, match=why):
            expand(words, loader, table)
    assert "no sweep is chosen" in examine(Request(("arm=a",))).problems[0].why


@pytest.mark.slow
def test_a_sweep_of_arms_can_be_begun_with_one_and_completed(worker, capsys):
    (worker / "conf-user" / "sweep").mkdir(parents=True)
    (worker / "conf-user" / "sweep" / "mine.yaml").write_text(
        "# @package _global_\n"
        "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2'}, arms: {a: objective=sft, b: optim.lr=0.1}}}\n"
    )
    for more in (["arm=b"], []):
        assert main(["train", "tracking=none", "sweep=mine", *more]) == 0
    (folder,) = (worker / "outputs").glob("*/*")
    assert sorted(run.name for run in find_runs(folder)) == ["a-seed1", "a-seed2", "b-seed1", "b-seed2"]
    assert runs(worker)["b-seed1"].config()["optim"]["lr"] == 0.1
    capsys.readouterr()
    assert main(["config", "sweep=mine", "arm=c"]) == 2
    assert "arms: a, b" in capsys.readouterr().err


def test_names_of_jobs_are_folders_unique_and_of_the_axes_that_vary():
    axes = ["objective", "objective.beta", "data.ratio", "seed"]
    job = ["model=playground", "objective=ift", "objective.beta=0.1", "data.ratio=0.5", "seed=1", "train.steps=3"]
    assert job_names([job], axes) == ["ift-beta0.1-ratio0.5-seed1"]
    assert job_names([job], axes, "mine") == ["mine-ift-beta0.1-ratio0.5-seed1"]
    assert job_names([["+objective.beta=0.1"]], ["+objective.beta"]) == ["beta0.1"]
    assert job_names([["seed=1"]], []) == ["run"]
    # two parts of a key where one is ambiguous
    axes = ["optim.lr", "model.lr", "data.ratio"]
    assert job_names([["optim.lr=1", "model.lr=2", "data.ratio=3"]], axes) == ["optim.lr1-model.lr2-ratio3"]
    (name,) = job_names([["optim.betas=[0.9,0.95]", "model.path=a/b=c"]], ["optim.betas", "model.path"])
    assert not set(name) & set("=,[]/ "), "nothing that Hydra or a shell would trip over"
    assert name.startswith("betas0.9-0.95-")
    assert job_names([["model.path=///"]], ["model.path"])[0].startswith("pathnone-")
    assert len(set(job_names([["model.path=a/b"], ["model.path=a-b"]], ["model.path"]))) == 2
    same = job_names([["data.x=1", "seed=1"], ["data.x=1", "seed=2"]], ["data.x"])
    assert len(set(same)) == 2
    assert same[0].startswith("x1-")
    axes = [f"data.sources.s{n}.share" for n in range(40)]
    jobs = [[f"{axis}=0.25" for axis in axes], [f"{axis}=0.25" for axis in axes[:-1]] + [f"{axes[-1]}=0.5"]]
    one, two = job_names(jobs, axes)
    assert len(one) < 140
    assert one != two


def test_sweep_name_depends_on_what_is_fixed_and_matters():
    name = sweep_name(["objective.beta", "seed"], ["data=mix"])
    assert name.startswith("beta-seed-")
    assert name == sweep_name(["objective.beta", "seed"], ["data=mix", "tracking.mode=offline", "train.log_every=5"])
    assert name != sweep_name(["objective.beta", "seed"], ["data=pairs"])


def test_a_sweep_of_an_earlier_day_is_completed_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sweep_dir("A", NOW) == Path("outputs/2026-11-21/A")
    Path("outputs/2026-11-19/A").mkdir(parents=True)
    assert sweep_dir("A", NOW) == Path("outputs/2026-11-19/A")


# --- sweep.json


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """ask(words, axes, *names): as if `uft train WORDS` had planned these jobs; what the file says then."""
    monkeypatch.chdir(tmp_path)

    def ask(words, axes, *names):
        monkeypatch.setattr(sys, "argv", ["uft train", *words.split()])
        record_sweep(Path("S"), [Job((f"name={name}",), Path("S") / name) for name in names], axes)
        return json.loads(Path("S/sweep.json").read_text())

    return ask


def test_a_sweep_grows_and_forgets_nothing(ask, tmp_path):
    first = ask("-m seed=1,2", {"seed": ["1", "2"]}, "seed1", "seed2")
    assert list(first) == ["format", "name", "made", "changed", "commands", "axes", "jobs"]
    assert (first["format"], first["name"]) == (1, "S")
    (command,) = first["commands"]
    assert (command["words"], command["cwd"]) == (["-m", "seed=1,2"], str(tmp_path))
    assert first["jobs"][0]["overrides"] == ["name=seed1"]
    ask("-m seed=2,3", {"seed": ["2", "3"]}, "seed2", "seed3")
    ask("-m lr=1", {"lr": ["1"]}, "lr1")
    found = ask("-m seed=1,2", {"seed": ["1", "2"]}, "seed1", "seed2")
    assert found["axes"] == {"seed": ["1", "2", "3"], "lr": ["1"]}
    assert [job["name"] for job in found["jobs"]] == ["seed1", "seed2", "seed3", "lr1"]
    assert found["jobs"][0] == first["jobs"][0]
    assert [command["words"][1] for command in found["commands"]] == ["seed=2,3", "lr=1", "seed=1,2"]
    assert found["made"] == first["made"]
    with resuming(Path("S")) as commands:  # gives them again, and asks for nothing new
        assert [words for words, _ in commands] == [["-m", "seed=2,3"], ["-m", "lr=1"], ["-m", "seed=1,2"]]
        assert {cwd for _, cwd in commands} == {tmp_path}
        again = ask("-m lr=1 tracking.mode=offline hydra.sweep.dir=S", {"lr": ["1"]}, "lr1")
    assert again["commands"] == found["commands"]
    assert len(ask("-m seed=3", {"seed": ["3"]}, "seed3")["commands"]) == 4


def test_jobs_that_have_not_started_are_known(ask, tmp_path):
    ask("-m seed=1,2", {"seed": ["1", "2"]}, "seed1", "seed2")
    create_run(tmp_path / "S" / "seed1", "{}\n", [])
    assert find_sweeps(tmp_path) == [tmp_path / "S"]
    assert [run.name for run in planned(tmp_path / "S")] == ["seed1", "seed2"]
    assert [run.path for run in waiting(tmp_path)] == [tmp_path / "S" / "seed2"]
    for text in ("", "{", "[]", '{"jobs": 3}', '{"jobs": [{}]}'):
        (tmp_path / "S" / "sweep.json").write_text(text)
        assert waiting(tmp_path) == [], "a damaged file plans nothing"
